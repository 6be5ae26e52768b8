# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""SDAR and TraDo: Qwen3's layers with block-causal attention."""

from ..llama_format import LlamaFormat


class SDAR(LlamaFormat):
    name = "sdar"
    models = "SDAR (1.7B to 8B), TraDo"
    architectures = ("SDARForCausalLM",)
    reference = "Qwen3"

    def config(self, source):
        return super().config(source) | {"attention_block_size": source.setting("block_size"), "mask_token_id": 151669}

    def generation(self, source):
        return {"unmasking": "confidence", "confidence_threshold": 0.9}


FAMILIES = [SDAR()]
