# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Stock Llama, Qwen2 and Qwen3 files whose config turns the causal mask off (`is_causal`), as transformers 5 does."""

from ..llama_format import LlamaFormat


class Bidirectional(LlamaFormat):
    def __init__(self, reference: str):
        self.name = f"{reference.lower()}-bidirectional"
        self.models = f"{reference} without the causal mask (`is_causal` false in config.json)"
        self.architectures = (f"{reference}ForCausalLM",)
        self.reference = reference
        self.stored = {"architectures": [*self.architectures], "model_type": reference.lower(), "is_causal": False}

    def matches(self, source):
        return super().matches(source) and source.config.get("is_causal") is False


FAMILIES = [Bidirectional("Llama"), Bidirectional("Qwen2"), Bidirectional("Qwen3")]
