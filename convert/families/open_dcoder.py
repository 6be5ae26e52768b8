# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Open-dCoder: stock Qwen2 files, run without the causal mask; the state of position i - 1 predicts token i."""

from .. import llama_format
from ..family import Family

FAMILY = Family(
    name="open-dcoder",
    models="Open-dCoder 0.5B (on request: nothing in its files tells it from the causal Qwen2)",
    matches=lambda source: False,
    config=lambda source: {**llama_format.config(source), "shift_logits": True},
    recipes=llama_format.recipes,
    ignored=llama_format.IGNORED,
    reference="Qwen2",
)
