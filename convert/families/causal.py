# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Causal language models to be adapted to diffusion by training, on request. Their layers are converted exactly, but
attention is over the whole sequence, so nothing useful comes out before training. The state of position i - 1 still
predicts token i, as these models have learnt.
"""

from ..gpt2_format import GPT2Format
from ..llama_format import LlamaFormat


class CausalLlama(LlamaFormat):
    shift_logits = True
    from_causal = True

    def __init__(self, reference: str):
        self.name = f"causal-{reference.lower()}"
        self.models = f"{reference} (with --from-causal)"
        self.architectures = (f"{reference}ForCausalLM",)
        self.reference = reference


class CausalGPT2(GPT2Format):
    name = "causal-gpt2"
    models = "GPT-2 (with --from-causal)"
    architectures = ("GPT2LMHeadModel",)
    from_causal = True

    def matches(self, source):
        # DiffuGPT keeps GPT-2's config.json, but not its tensor names.
        return super().matches(source) and self.names(source)[1] in source

    def names(self, source):
        # Published checkpoints were saved from the model without its head.
        body = "" if "wte.weight" in source else "transformer."
        return body, f"{body}wte.weight"


FAMILIES = [CausalLlama("Llama"), CausalLlama("Qwen2"), CausalLlama("Qwen3"), CausalGPT2()]
