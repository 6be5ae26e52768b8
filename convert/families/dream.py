# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Dream: Qwen2's layers with attention over the whole sequence; the state of position i - 1 predicts token i."""

from ..llama_format import LlamaFormat

# Dream's names of the commit rules. Its default, "origin", is only for comparisons, and never recommended.
RULES = {"origin": "entropy", "maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}

# The repository on the Hub with the code for checkpoints without code of their own
CODE = "Dream-org/Dream-v0-Instruct-7B--"


class Dream(LlamaFormat):
    name = "dream"
    models = "Dream v0 (Base, Instruct), Dream-Coder, DiffuCoder"
    architectures = ("DreamModel",)
    reference = "Qwen2"
    shift_logits = True
    stored = {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "auto_map": {
            "AutoConfig": f"{CODE}configuration_dream.DreamConfig",
            "AutoModel": f"{CODE}modeling_dream.DreamModel",
        },
        "use_sliding_window": False,
    }

    def config(self, source):
        if "model.layers.0.self_attn.q_norm.weight" in source:
            raise ValueError("This is a DreamReasoner (Qwen3 layers), which is not supported; Dream has Qwen2's.")
        return super().config(source)

    def stored_properties(self, config):
        return super().stored_properties(config) | {"head_dim": config.hidden_size // config.num_attention_heads}

    def generation(self, source):
        return {"unmasking": RULES.get(source.generation_config.get("alg"), "entropy")}


FAMILIES = [Dream()]
