# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""DiffuLLaMA: stock Llama 2 files, run without the causal mask; the state of position i - 1 predicts token i."""

from ..llama_format import LlamaFormat


class DiffuLLaMA(LlamaFormat):
    name = "diffullama"
    models = "DiffuLLaMA 7B (on request: nothing in its files tells it from the causal Llama)"
    reference = "Llama"
    shift_logits = True
    stored = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}

    def generation(self, source):
        return {"unmasking": "ancestral"}


FAMILIES = [DiffuLLaMA()]
