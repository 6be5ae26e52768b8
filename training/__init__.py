# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Training of masked diffusion models with loops: what to add to transformers' Trainer."""

from .collator import MaskedDiffusionCollator
from .data import ExampleStream, seeded_generator
from .loop_sampling import LoopSamplingCallback, draw_num_loops
from .optimizer import MuonAdamW
from .trainer import LoopMDMTrainer

__all__ = [
    "ExampleStream",
    "LoopMDMTrainer",
    "LoopSamplingCallback",
    "MaskedDiffusionCollator",
    "MuonAdamW",
    "draw_num_loops",
    "seeded_generator",
]
