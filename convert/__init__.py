# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Non-looped checkpoints of masked diffusion language models, turned into looped initialisations."""

from .engine import convert_checkpoint
from .families import FAMILIES, choose_family
from .family import Family, Recipe
from .loop_window import calibrate, default_window
from .merge import merge_adapter
from .plan import Plan, plan_conversion
from .source import Source, open_source
from .unroll import export_checkpoint, formats

__all__ = [
    "FAMILIES",
    "Family",
    "Plan",
    "Recipe",
    "Source",
    "calibrate",
    "choose_family",
    "convert_checkpoint",
    "default_window",
    "export_checkpoint",
    "formats",
    "merge_adapter",
    "open_source",
    "plan_conversion",
]
