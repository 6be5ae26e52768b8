# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Randomness that depends on names alone, so that it survives a resume."""

import hashlib

import torch


def seeded_generator(*parts: int | str) -> torch.Generator:
    """
    A CPU generator that depends on `parts` alone, e.g. `(seed, "noise", index)`. Training draws all its noise from
    such generators, never from torch's global one, so that a resumed run repeats an uninterrupted one.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
