# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What is measured of a trained arm, as plain numbers for JSON. Rows and masks depend on seeds alone."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tasks import MASK, Rows

from loopmdm import LoopMDMForMaskedLM
from loopmdm.randomness import seeded_generator

BINS = 10


def read_out(
    model: LoopMDMForMaskedLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, loops: Sequence[int]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """
    The states after each of `loops` from one pass of the most loops: the number of loops, the hidden states that the
    head reads, `(batch_size, length, hidden_size)`, and each row's relative change in that loop, `(batch_size,)`.
    """
    transformer = model.model
    state, context = transformer.prelude(input_ids, attention_mask)
    real = 1.0 if attention_mask is None else attention_mask[..., None]
    for loop in range(1, max(loops) + 1):
        before, state = state, transformer.loop(state, context)
        if loop in loops:
            change = ((state - before) * real).flatten(1).norm(dim=1) / (before * real).flatten(1).norm(dim=1)
            yield loop, model.align(transformer.readout(state, context), attention_mask), change


def logits_of(model: LoopMDMForMaskedLM, hidden_states: torch.Tensor) -> torch.Tensor:
    logits = model.lm_head(hidden_states).float()
    logits[..., MASK] = -torch.inf
    return logits


@torch.no_grad()
def likelihood(
    model: LoopMDMForMaskedLM, rows: Rows, loops: Sequence[int], samples: int = BINS, seed: int = 0, batch: int = 64
) -> dict[str, Any]:
    """
    The NELBO in nats per maskable token by number of loops, with its standard error over rows (each with its masks),
    and its parts by the share k/L that is masked: the mean -log p of a masked token in each tenth of (0, 1]. The mean
    of the tenths is the NELBO, as k is uniform.
    """
    loops = sorted(loops)
    counts = rows.maskable.sum(-1)
    nats = torch.zeros(len(loops), len(rows), samples, dtype=torch.float64)
    shares = torch.empty(len(rows), samples)
    masks = torch.zeros(samples, *rows.input_ids.shape, dtype=torch.bool)
    for row in range(len(rows)):
        generator = seeded_generator(seed, "claims", row)
        positions = rows.maskable[row].nonzero().squeeze(-1)
        for sample in range(samples):  # one in each stratum of the share
            share = (sample + torch.rand((), generator=generator).item()) / samples
            number = min(int(share * len(positions)), len(positions) - 1) + 1
            masks[sample, row, positions[torch.randperm(len(positions), generator=generator)[:number]]] = True
            shares[row, sample] = share
    for sample in range(samples):
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            masked = masks[sample, start : start + batch]
            targets, where = part.input_ids[masked], masked.nonzero()[:, 0]
            inputs = part.input_ids.masked_fill(masked, MASK)
            for i, (_, hidden, _) in enumerate(read_out(model, inputs, part.attention_mask, loops)):
                losses = torch.nn.functional.cross_entropy(logits_of(model, hidden[masked]), targets, reduction="none")
                sums = torch.zeros(len(part), dtype=torch.float64).index_add_(0, where, losses.double())
                nats[i, start : start + batch, sample] = sums / masked.sum(-1)
    bins = (shares * BINS).long().clamp(max=BINS - 1)
    result = {}
    for i, loop in enumerate(loops):
        per_row = nats[i].mean(-1) * counts  # NELBO of the row
        mean = (per_row.sum() / counts.sum()).item()
        error = (per_row - mean * counts).std() * len(rows) ** 0.5 / counts.sum()
        by_share = [nats[i][bins == b].mean().item() if (bins == b).any() else None for b in range(BINS)]
        result[loop] = {"nelbo": mean, "error": error.item(), "by_share": by_share}
    return result


@torch.no_grad()
def one_step(
    model: LoopMDMForMaskedLM, rows: Rows, loops: Sequence[int], tolerances: Sequence[float] = (), batch: int = 64
) -> dict[str, Any]:
    """
    Everything filled in at once: share of rows solved by number of loops, the mean relative change of the state in
    each loop, and adaptive loops: for every tolerance the share solved, and the mean loops, when each row stops at the
    first loop that changes it less (as `loop_tolerance` does). `loops` must be 1, 2, ... for tolerances.
    """
    loops = sorted(loops)
    solved, changes = [], []
    for part in rows.split(batch):
        by_loop = list(read_out(model, part.prompts(), part.attention_mask, loops))
        right = [(logits_of(model, hidden).argmax(-1) == part.input_ids) | ~part.scored for _, hidden, _ in by_loop]
        solved.append(torch.stack([r.all(-1) for r in right]))
        changes.append(torch.stack([change for _, _, change in by_loop]))
    solved, changes = torch.cat(solved, 1), torch.cat(changes, 1)
    result = {
        "solved": {loop: solved[i].double().mean().item() for i, loop in enumerate(loops)},
        "solved_at_any": solved.any(0).double().mean().item(),
        "change": {loop: changes[i].mean().item() for i, loop in enumerate(loops)},
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
    """Share of rows that `generate` solves, and what it cost on average: passes, loops, FLOPs; wall time in all."""
    solved, passes, loops, seconds = 0, 0, 0, time.perf_counter()
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
        "seconds": time.perf_counter() - seconds,
    }


@torch.no_grad()
def attention(
    model: LoopMDMForMaskedLM, rows: Rows, num_loops: int, shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
) -> list[dict[str, Any]]:
    """
    Attention from masked to masked positions, by layer as executed (head, mid once for each loop, tail): the mean over
    heads and masked positions of the mass that goes to masked positions, beside the share of positions that are
    masked, which uniform attention would give.
    """
    implementation, config = model.config._attn_implementation, model.config
    model.set_attn_implementation("eager")
    results = []
    for share in shares:
        masked = torch.zeros_like(rows.maskable)
        for row in range(len(rows)):
            positions = rows.maskable[row].nonzero().squeeze(-1)
            order = torch.randperm(len(positions), generator=seeded_generator("claims attention", row))
            masked[row, positions[order[: max(1, round(share * len(positions)))]]] = True
        inputs = rows.input_ids.masked_fill(masked, MASK)
        outputs = model(
            inputs, attention_mask=rows.attention_mask, num_loops=num_loops, output_attentions=True, logits_to_keep=1
        )
        real = torch.ones_like(inputs) if rows.attention_mask is None else rows.attention_mask
        mass = []
        for weights in outputs.attentions:  # (batch_size, heads, query, key)
            to_masked = (weights.float() * masked[:, None, None]).sum(-1).mean(1)
            mass.append(to_masked[masked].mean().item())
        start, width = config.loop_start, config.loop_end - config.loop_start
        end = start + width * num_loops
        results.append(
            {
                "share": share,
                "positions_masked": (masked.sum(-1) / real.sum(-1)).mean().item(),
                "head": mass[:start],
                "mid": [mass[i : i + width] for i in range(start, end, width)],
                "tail": mass[end:],
            }
        )
    model.set_attn_implementation(implementation)
    return results
