# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What training tests share: examples, batches, arguments and trainers on tiny models."""

from collections.abc import Iterable

import torch
from tiny import tiny_model
from transformers import TrainingArguments

from loopmdm.training import ExampleStream, LoopMDMTrainer, MaskedDiffusionCollator

MASK, PAD = 22, 0


def examples(count: int, length: int = 6, seed: int = 0) -> list[dict]:
    """Clean sequences of `tiny_config`'s vocabulary with their places in a run."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 22, (length,), generator=generator), "index": i} for i in range(count)]


def training_batch(length: int = 7, rows: int = 3) -> dict[str, torch.Tensor]:
    return MaskedDiffusionCollator(MASK, PAD, seed=1)(examples(rows, length))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def training_args(folder, **overrides) -> TrainingArguments:
    values = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 5,
    }
    return TrainingArguments(str(folder), **values | overrides)


def make_trainer(folder, model=None, rows: Iterable[dict] | None = None, args=None, trainer=LoopMDMTrainer, **kwargs):
    """A trainer of a tiny model on a stream of examples, and what else a test says."""
    args = training_args(folder, **(args or {}))
    count = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    defaults = {
        "train_dataset": ExampleStream(list(examples(16) if rows is None else rows), count, seed=0),
        "data_collator": MaskedDiffusionCollator(MASK, PAD),
    }
    model = tiny_model(max_train_loops=4) if model is None else model
    return trainer(model=model, args=args, **defaults | kwargs)
