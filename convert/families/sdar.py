# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""SDAR and TraDo: Qwen3's layers with block-causal attention."""

from .. import llama_format
from ..family import Family
from ..source import Source


def _config(source: Source) -> dict:
    return {**llama_format.config(source), "attention_block_size": source.setting("block_size")}


FAMILY = Family(
    name="sdar",
    models="SDAR (1.7B to 8B), TraDo",
    matches=lambda source: "SDARForCausalLM" in source.architectures,
    config=_config,
    recipes=llama_format.recipes,
    ignored=llama_format.IGNORED,
    mask_token_id=lambda source: 151669,
    generation=lambda source: {"unmasking": "confidence", "confidence_threshold": 0.9},
    reference="Qwen3",
)
