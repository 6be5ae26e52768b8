# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The masked diffusion objective: masks, their weights, and the bound on the likelihood that they estimate."""

from .log_probs import nelbo_log_probs, trace_log_probs
from .masking import CleanRows, Mask, block_ids, clean_rows, draw_mask, draw_share, split_blocks
from .nelbo import NelboEstimate, check_settings, evaluating, find_model, input_device, nelbo
from .seeds import seeded_generator

__all__ = [
    "CleanRows",
    "Mask",
    "NelboEstimate",
    "block_ids",
    "check_settings",
    "clean_rows",
    "draw_mask",
    "draw_share",
    "evaluating",
    "find_model",
    "input_device",
    "nelbo",
    "nelbo_log_probs",
    "seeded_generator",
    "split_blocks",
    "trace_log_probs",
]
