# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The objective by enumeration of every mask, and the small models that allow it."""

import itertools
import math

import torch
from tiny import tiny_model

SMALL = {"vocab_size": 6, "mask_token_id": 5, "pad_token_id": 0, "hidden_size": 16, "intermediate_size": 24}
SMALL_MASK = SMALL["mask_token_id"]


def small_model(**overrides):
    """A model of four words, pad and [MASK]."""
    return tiny_model(**SMALL | overrides)


def clean_ids(batch_size: int, length: int, seed: int = 0) -> torch.LongTensor:
    return torch.randint(1, 5, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def mask_losses(model, row, num_loops: int = 2, members=None) -> dict[tuple[int, ...], torch.Tensor]:
    """-log p of the masked tokens for every non-empty mask of `members`, by default of all tokens."""
    row = torch.as_tensor(row)
    members = range(len(row)) if members is None else members
    subsets = [subset for count in range(1, len(members) + 1) for subset in itertools.combinations(members, count)]
    noised = row.repeat(len(subsets), 1)
    for i, subset in enumerate(subsets):
        noised[i, list(subset)] = model.config.mask_token_id
    logits = model(noised, num_loops=num_loops).logits.double()
    logits[..., model.config.mask_token_id] = -math.inf
    log_probs = logits.log_softmax(-1)
    return {subset: -log_probs[i, list(subset), row[list(subset)]] for i, subset in enumerate(subsets)}


def exact_nelbo(model, row, num_loops: int = 2, maskable=None, counts=None) -> float:
    """
    Nats of a row: block by block, every number of masked tokens k weighs alike, within it every mask, and a mask's sum
    weighs L/k. `counts` are the k that occur, by default 1 to L.
    """
    row = torch.as_tensor(row)
    maskable = range(len(row)) if maskable is None else maskable
    size = model.config.attention_block_size or len(row)
    total = 0.0
    for start in range(0, len(row), size):
        members = [position for position in maskable if start <= position < start + size]
        allowed = range(1, len(members) + 1) if counts is None else counts
        seen = row.clone()
        seen[start + size :] = 1  # what comes after a block must not matter: make sure that it would show
        for subset, loss in mask_losses(model, seen, num_loops, members).items() if members else ():
            if len(subset) in allowed:
                share = math.comb(len(members), len(subset)) * len(allowed)
                total += loss.mean().item() * len(members) / share
    return total
