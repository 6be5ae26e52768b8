# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""SDAR and TraDo: Qwen3's layers with block-causal attention."""

from ..llama_format import LlamaFormat

# The repository on the Hub with the code for checkpoints without code of their own
CODE = "JetLM/SDAR-1.7B-Chat--"


class SDAR(LlamaFormat):
    name = "sdar"
    models = "SDAR (1.7B to 8B), TraDo"
    architectures = ("SDARForCausalLM",)
    reference = "Qwen3"
    stored = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "auto_map": {
            "AutoConfig": f"{CODE}configuration_sdar.SDARConfig",
            "AutoModel": f"{CODE}modeling_sdar.SDARModel",
            "AutoModelForCausalLM": f"{CODE}modeling_sdar.SDARForCausalLM",
        },
        # Its configuration class needs these.
        "debug": False,
        "fuse_cross_entropy": False,
        "use_sliding_window": False,
    }

    def config(self, source):
        return super().config(source) | {"attention_block_size": source.setting("block_size"), "mask_token_id": 151669}

    def stored_config(self, config):
        return super().stored_config(config) | {"block_size": config.attention_block_size}

    def stored_properties(self, config):
        return super().stored_properties(config) | {"attention_block_size": config.attention_block_size or "blocks"}

    def generation(self, source):
        return {"unmasking": "confidence", "confidence_threshold": 0.9}


FAMILIES = [SDAR()]
