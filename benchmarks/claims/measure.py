# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What is measured of a trained arm, as plain numbers for JSON. Rows and masks depend on seeds alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tasks import Rows

from loopmdm import LoopMDMForMaskedLM
from loopmdm.evaluation import measure_dynamics, nelbo

BINS = 10


def read_out(
    model: LoopMDMForMaskedLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, loops: Sequence[int]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """
    The states after each of `loops` from one pass of the most loops: the number of loops, the hidden states that the
    head reads, `(batch_size, length, hidden_size)`, and each row's relative change in that loop, `(batch_size,)`.
    """
    transformer = model.model
    before, context = transformer.prelude(input_ids, attention_mask)
    real = 1.0 if attention_mask is None else attention_mask[..., None]
    for loop, (states, _) in enumerate(transformer.iterate(before, context, max(loops)), start=1):
        if loop in loops:
            change = ((states - before) * real).flatten(1).norm(dim=1) / (before * real).flatten(1).norm(dim=1)
            yield loop, model.align(transformer.readout(states, context), attention_mask), change
        before = states


def likelihood(
    model: LoopMDMForMaskedLM,
    rows: Rows,
    loops: Sequence[int],
    samples: int = BINS,
    seed: int = 0,
    batch: int = 64,
    base: LoopMDMForMaskedLM | None = None,
) -> dict[str, Any]:
    """
    The NELBO in nats per maskable token by number of loops, with its standard error over rows (each with its masks),
    and its parts by the share k/L that is masked: the mean -log p of a masked token in each tenth of (0, 1]. With
    `base`, a model without loops, also the difference to it on the same rows and masks, and the error of that.
    """
    loops = sorted(loops)

    def estimate_of(model: LoopMDMForMaskedLM, loops: list[int]):
        return nelbo(
            model,
            rows.input_ids,
            rows.attention_mask,
            rows.maskable,
            None,
            loops,
            samples,
            batch_size=batch,
            seed=seed,
        )

    def error_of(nats: torch.Tensor) -> torch.Tensor:
        """Standard errors of nats per token, `(len(nats),)`, over rows."""
        residuals = nats - nats.sum(-1, keepdim=True) / counts.sum() * counts
        return residuals.std(-1) * len(rows) ** 0.5 / counts.sum()

    estimate = estimate_of(model, loops)
    means, counts = estimate.per_token()[0], estimate.num_tokens.double()
    columns = {"nelbo": means, "error": error_of(estimate.nats), "by_share": estimate.by_timestep(BINS)[0]}
    if base is not None:
        differences = estimate.nats - estimate_of(base, [1]).nats
        columns["to_base"] = differences.sum(-1) / counts.sum()
        columns["to_base_error"] = error_of(differences)
    return {loop: {name: values[i].tolist() for name, values in columns.items()} for i, loop in enumerate(loops)}


@torch.no_grad()
def one_step(
    model: LoopMDMForMaskedLM, rows: Rows, loops: Sequence[int], tolerances: Sequence[float] = (), batch: int = 64
) -> dict[str, Any]:
    """
    Everything filled in at once: share of rows solved by number of loops, and adaptive loops: for every tolerance the
    share solved, and the mean loops, when each row stops at the first loop that changes it less (as `loop_tolerance`
    does). `loops` must be 1, 2, ... for tolerances.
    """
    loops = sorted(loops)
    solved, changes = [], []
    for part in rows.split(batch):
        by_loop = list(read_out(model, part.prompts(), part.attention_mask, loops))
        right = [(model.logits(hidden).argmax(-1) == part.input_ids) | ~part.scored for _, hidden, _ in by_loop]
        solved.append(torch.stack([r.all(-1) for r in right]))
        changes.append(torch.stack([change for _, _, change in by_loop]))
    solved, changes = torch.cat(solved, 1), torch.cat(changes, 1)
    result = {
        "solved": {loop: solved[i].double().mean().item() for i, loop in enumerate(loops)},
    }
    if tolerances:
        result["adaptive"] = []
        for tolerance in tolerances:
            settled = changes < tolerance
            settled[-1] = True
            stop = settled.int().argmax(0)  # the first loop that settles
            result["adaptive"].append(
                {
                    "tolerance": tolerance,
                    "loops": (stop + 1).double().mean().item(),
                    "solved": solved.gather(0, stop[None]).double().mean().item(),
                }
            )
    return result


@torch.no_grad()
def generations(
    model: LoopMDMForMaskedLM,
    rows: Rows,
    num_loops: int | list[int],
    max_denoising_steps: int,
    batch: int = 64,
    **rule,
) -> dict[str, Any]:
    """Share of rows that `generate` solves, and what it cost on average: passes, loops, FLOPs."""
    solved, passes, loops = 0, 0, 0
    for part in rows.split(batch):
        outputs = model.generate(
            part.prompts(),
            attention_mask=part.attention_mask,
            max_new_tokens=0,
            num_loops=num_loops,
            max_denoising_steps=max_denoising_steps,
            return_dict_in_generate=True,
            **rule,
        )
        solved += int(((outputs.sequences == part.input_ids) | ~part.scored).all(-1).sum())
        passes += int(outputs.forward_passes.sum())
        loops += int(outputs.loops.sum())
    length = rows.input_ids.shape[1]
    plain = model.flops(1, length, 1)
    mid = model.flops(1, length, 2) - plain
    return {
        "num_loops": num_loops,
        "max_denoising_steps": max_denoising_steps,
        **rule,
        "solved": solved / len(rows),
        "forward_passes": passes / len(rows),
        "loops": loops / len(rows),
        "flops": (passes * plain + (loops - passes) * mid) / len(rows),
    }


def dynamics(
    model: LoopMDMForMaskedLM, rows: Rows, num_loops: int, shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
) -> dict[str, Any]:
    """
    Loop by loop, `(len(shares), num_loops)` each: attention in mid from masked to masked positions, beside what
    uniform attention would give (`(len(shares),)`), the relative change of the state, and the loss of the logit lens.
    """
    found = measure_dynamics(
        model, rows.input_ids, rows.attention_mask, rows.maskable, num_loops, shares, masks_per_text=1, batch_size=32
    )
    mass = found.attention_of_mid()
    return {
        "shares": list(shares),
        "masked_to_masked": mass[..., 0, 0].tolist(),
        "uniform": found.uniform_attention[:, 0, 0].tolist(),
        "change": found.change[..., 2].tolist(),
        "loss": found.loss.tolist(),
    }
