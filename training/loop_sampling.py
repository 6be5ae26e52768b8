# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The number of loops of every training step."""

import torch
from torch import nn
from transformers import TrainerCallback

from .data import seeded_generator


def draw_num_loops(max_loops: int, seed: int, step: int) -> int:
    """S ~ Uniform{1..max_loops} for optimiser step `step`: the same on every rank and after a resume."""
    if max_loops < 1:
        raise ValueError(f"`max_loops` is {max_loops}; it must be at least 1.")
    return int(torch.randint(1, max_loops + 1, (), generator=seeded_generator(seed, "loops", step)))


def set_num_train_loops(model: nn.Module, num_loops: int | None) -> None:
    """
    Sets the loops of `model`'s training passes that name none; None: `config.num_loops`. Works through the wrappers
    of PEFT, DDP, FSDP and `torch.compile`.
    """
    looped = [module for module in model.modules() if hasattr(module, "num_train_loops")]
    if not looped:
        raise ValueError(f"{type(model).__name__} holds no LoopMDMModel, so it has no loops to set.")
    for module in looped:
        module.num_train_loops = num_loops


class LoopSamplingCallback(TrainerCallback):
    """
    Lets a plain transformers `Trainer` train with S ~ Uniform{1..max_loops}, drawn once for each optimiser step.

    Args:
        max_loops (`int`): S_max, e.g. `model.config.max_train_loops`.
    """

    def __init__(self, max_loops: int):
        self.max_loops = max_loops

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        set_num_train_loops(model, draw_num_loops(self.max_loops, args.seed, state.global_step))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        set_num_train_loops(model, None)
