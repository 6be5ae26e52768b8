# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Measuring models: likelihood at any number of loops."""

from .likelihood import NelboEstimate, nelbo

__all__ = ["NelboEstimate", "nelbo"]
