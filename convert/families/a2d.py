# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A2D (dLLM): Llama, Qwen2 and Qwen3 with the causal mask removed; everything else is as in transformers."""

from ..llama_format import LlamaFormat


class A2D(LlamaFormat):
    def __init__(self, reference: str):
        self.name = f"a2d-{reference.lower()}"
        self.models = f"A2D {reference}: dllm-hub's diffusion models"
        self.architectures = (f"A2D{reference}LMHeadModel",)
        self.reference = reference
        self.stored = {"architectures": [*self.architectures], "model_type": self.name}

    def generation(self, source):
        return {"unmasking": "confidence"}


FAMILIES = [A2D("Llama"), A2D("Qwen2"), A2D("Qwen3")]
