# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""transformers' Trainer, with loops drawn for every step and counted in the FLOPs."""

from typing import Any

import torch
from transformers import Trainer

from .loop_sampling import LoopSamplingCallback


class LoopMDMTrainer(Trainer):
    """
    A `Trainer` that draws S ~ Uniform{1..config.max_train_loops} for every optimiser step and whose `total_flos` are
    the operations really done: those of the loops drawn, and of the head at masked positions only.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(LoopSamplingCallback(self.model.config.max_train_loops))

    def floating_point_ops(self, inputs: dict[str, torch.Tensor | Any]) -> int:
        batch_size, length = inputs["input_ids"].shape
        num_logits = int(inputs["loss_weights"].count_nonzero()) / batch_size if "loss_weights" in inputs else None
        return 3 * self.model.flops(batch_size, length, self.model.model.num_train_loops, num_logits)
