# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Measuring models: likelihood at any number of loops, and how few loops are enough."""

from .likelihood import NelboEstimate, nelbo
from .loop_budget import LoopBudget, calibrate_loops

__all__ = ["LoopBudget", "NelboEstimate", "calibrate_loops", "nelbo"]
