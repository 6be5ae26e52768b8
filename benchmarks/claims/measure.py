# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What is measured of a trained arm, as plain numbers for JSON. Rows and masks depend on seeds alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tasks import Rows

from loopmdm import LoopMDMForMaskedLM
from loopmdm.evaluation import measure_dynamics, nelbo

BINS, BATCH = 10, 64
SHARES = (0.25, 0.5, 0.75, 1.0)  # of masked positions, for the dynamics


def read_out(
    model: LoopMDMForMaskedLM, input_ids: torch.Tensor, loops: Sequence[int]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """
    The states after each of `loops` from one pass of the most loops: the number of loops, the hidden states that the
    head reads, `(batch_size, length, hidden_size)`, and each row's relative change in that loop, `(batch_size,)`.
    """
    transformer = model.model
    before, context = transformer.prelude(input_ids)
    for loop, (states, _) in enumerate(transformer.iterate(before, context, max(loops)), start=1):
        if loop in loops:
            change = (states - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
            yield loop, model.align(transformer.readout(states, context)), change
        before = states


def likelihood(
    model: LoopMDMForMaskedLM,
    rows: Rows,
    loops: Sequence[int],
    samples: int = BINS,
    base: LoopMDMForMaskedLM | None = None,
) -> dict[str, Any]:
    """
    The NELBO in nats per maskable token by number of loops, with its standard error over rows (each with its masks),
    and its parts by the share k/L that is masked: the mean -log p of a masked token in each tenth of (0, 1]. With
    `base`, a model without loops, also the difference to it on the same rows and masks, and the error of that.
    """
    loops = sorted(loops)

    def estimate_of(model: LoopMDMForMaskedLM, loops: list[int]):
        sizes = {"num_samples": samples, "batch_size": BATCH, "seed": 0}
        return nelbo(model, rows.input_ids, maskable=rows.maskable, num_loops=loops, **sizes)

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
    model: LoopMDMForMaskedLM, rows: Rows, loops: Sequence[int], tolerances: Sequence[float]
) -> dict[str, Any]:
    """
    Everything filled in at once: share of rows solved by number of loops, and adaptive loops: for every tolerance the
    share solved, and the mean loops, when each row stops at the first loop that changes it less (as `loop_tolerance`
    does). `loops` must be 1, 2, ...
    """
    loops = sorted(loops)
    solved, changes = [], []
    for part in rows.split(BATCH):
        by_loop = list(read_out(model, part.prompts(), loops))
        right = [(model.logits(hidden).argmax(-1) == part.input_ids) | ~part.scored for _, hidden, _ in by_loop]
        solved.append(torch.stack([r.all(-1) for r in right]))
        changes.append(torch.stack([change for _, _, change in by_loop]))
    solved, changes = torch.cat(solved, 1), torch.cat(changes, 1)
    adaptive = []
    for tolerance in tolerances:
        settled = changes < tolerance
        settled[-1] = True
        stop = settled.int().argmax(0)  # the first loop that settles
        mean_loops, rate = (stop + 1).double().mean().item(), solved.gather(0, stop[None]).double().mean().item()
        adaptive.append({"tolerance": tolerance, "loops": mean_loops, "solved": rate})
    by_loops = {loop: solved[i].double().mean().item() for i, loop in enumerate(loops)}
    return {"solved": by_loops, "adaptive": adaptive}


@torch.no_grad()
def generations(
    model: LoopMDMForMaskedLM,
    rows: Rows,
    num_loops: int | list[int],
    max_denoising_steps: int,
    **rule,
) -> dict[str, Any]:
    """Share of rows that `generate` solves, and what it cost on average: passes, loops, FLOPs."""
    solved, passes, loops = 0, 0, 0
    for part in rows.split(BATCH):
        outputs = model.generate(
            part.prompts(),
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


def dynamics(model: LoopMDMForMaskedLM, rows: Rows, num_loops: int) -> dict[str, Any]:
    """
    Loop by loop, `(len(SHARES), num_loops)` each: attention in mid from masked to masked positions, beside what
    uniform attention would give (`(len(SHARES),)`), the relative change of the state, and the loss of the logit lens.
    """
    found = measure_dynamics(
        model, rows.input_ids, None, rows.maskable, num_loops, SHARES, masks_per_text=1, batch_size=32
    )
    return {
        "shares": list(SHARES),
        "masked_to_masked": found.attention_of_mid()[..., 0, 0].tolist(),
        "uniform": found.uniform_attention[:, 0, 0].tolist(),
        "change": found.change[..., 2].tolist(),
        "loss": found.loss.tolist(),
    }
