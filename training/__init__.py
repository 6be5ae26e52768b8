# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Training of masked diffusion models with loops: what to add to transformers' Trainer."""

from ..data import ExampleStream, StreamedExamples, encode_answer, pack_documents, read_documents, read_jsonl
from ..objective.seeds import seeded_generator
from .adapters import layers_of, lora_config
from .checkpoints import last_complete_checkpoint
from .collator import MaskedDiffusionCollator
from .loop_schedules import (
    LOOP_SCHEDULES,
    LoopSamplingCallback,
    LoopSchedule,
    draw_num_loops,
    make_loop_schedule,
    set_num_train_loops,
)
from .optimizer import MuonAdamW
from .trainer import LoopMDMTrainer, training_flops

__all__ = [
    "LOOP_SCHEDULES",
    "ExampleStream",
    "LoopMDMTrainer",
    "LoopSamplingCallback",
    "LoopSchedule",
    "MaskedDiffusionCollator",
    "MuonAdamW",
    "StreamedExamples",
    "draw_num_loops",
    "encode_answer",
    "last_complete_checkpoint",
    "layers_of",
    "lora_config",
    "make_loop_schedule",
    "pack_documents",
    "read_documents",
    "read_jsonl",
    "seeded_generator",
    "set_num_train_loops",
    "training_flops",
]
