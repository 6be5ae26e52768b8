# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Fast-dLLM v2: Qwen2.5's layers, block-causal attention, and the state of position i - 1 predicts token i."""

from .. import llama_format
from ..family import Family
from ..source import Source


def _config(source: Source) -> dict:
    return {
        **llama_format.config(source),
        "shift_logits": True,
        "attention_block_size": source.setting("bd_size"),
    }


FAMILY = Family(
    name="fast-dllm-v2",
    models="Fast-dLLM v2 (1.5B, 7B)",
    matches=lambda source: "Fast_dLLM_QwenForCausalLM" in source.architectures,
    config=_config,
    recipes=llama_format.recipes,
    ignored=llama_format.IGNORED,
    mask_token_id=lambda source: 151665,
    generation=lambda source: {"unmasking": "confidence", "confidence_threshold": 0.9},
    reference="Qwen2",
)
