# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""iLLaDA: not LLaDA's format but Llama's, with LayerNorm where `layer_norm_eps` is set."""

from ..llama_format import LlamaFormat


class ILLaDA(LlamaFormat):
    name = "illada"
    models = "iLLaDA 8B"
    architectures = ("ILLaDAForCausalLM",)

    def config(self, source):
        return super().config(source) | {"mask_token_id": 5}  # neither its config nor its tokenizer names it

    def generation(self, source):
        return {"unmasking": "confidence"}


FAMILIES = [ILLaDA()]
