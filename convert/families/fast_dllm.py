# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Fast-dLLM v2: Qwen2.5's layers, block-causal attention, and the state of position i - 1 predicts token i."""

from ..llama_format import LlamaFormat


class FastDLLM(LlamaFormat):
    name = "fast-dllm-v2"
    models = "Fast-dLLM v2 (1.5B, 7B)"
    architectures = ("Fast_dLLM_QwenForCausalLM",)
    reference = "Qwen2"
    shift_logits = True

    def config(self, source):
        return super().config(source) | {"attention_block_size": source.setting("bd_size"), "mask_token_id": 151665}

    def generation(self, source):
        return {"unmasking": "confidence", "confidence_threshold": 0.9}


FAMILIES = [FastDLLM()]
