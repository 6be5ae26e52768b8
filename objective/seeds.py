# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Random generators that depend only on names, so that a resumed run draws the same."""

import hashlib

import torch


def seeded_generator(*parts: int | str) -> torch.Generator:
    """
    A CPU generator that depends only on `parts`, e.g. `(seed, "noise", index)`. All noise of training comes from such
    generators, never from torch's global one, so that a resumed run repeats an uninterrupted one.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
