# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Dream: Qwen2's layers with attention over the whole sequence; the state of position i - 1 predicts token i."""

from ..llama_format import LlamaFormat

# Dream's names of the commit rules; its default, "origin", is for comparisons only and never recommended.
RULES = {"origin": "entropy", "maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


class Dream(LlamaFormat):
    name = "dream"
    models = "Dream v0 (Base, Instruct), Dream-Coder, DiffuCoder"
    architectures = ("DreamModel",)
    reference = "Qwen2"
    shift_logits = True

    def config(self, source):
        if "model.layers.0.self_attn.q_norm.weight" in source:
            raise ValueError(
                "This is a DreamReasoner (Qwen3 layers), which is not supported; Dream's layers are Qwen2's."
            )
        return super().config(source)

    def generation(self, source):
        return {"unmasking": RULES.get(source.generation_config.get("alg"), "entropy")}


FAMILIES = [Dream()]
