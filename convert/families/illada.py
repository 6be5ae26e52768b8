# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""iLLaDA: not LLaDA's format but Llama's, with LayerNorm where `layer_norm_eps` is set."""

from .. import llama_format
from ..family import Family

FAMILY = Family(
    name="illada",
    models="iLLaDA 8B",
    matches=lambda source: "ILLaDAForCausalLM" in source.architectures,
    config=llama_format.config,
    recipes=llama_format.recipes,
    ignored=llama_format.IGNORED,
    mask_token_id=lambda source: 5,  # in neither its config nor its tokenizer's settings
    generation=lambda source: {"unmasking": "confidence"},
    reference=None,
)
