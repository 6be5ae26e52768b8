# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The format of Llama, Qwen2 and Qwen3 in transformers, which most families share. A LoopMDM has the same tensor names,
so every recipe is a copy. Whatever the tensors tell is read from them, since the config is not always right.
"""

from typing import Any

from ..configuration_loopmdm import LoopMDMConfig
from .family import Family, Recipe, copy
from .source import Source

LAYER = "model.layers.{i}."
# The classes in transformers, and the properties of their layers that the config cannot change
CLASSES: dict[str, dict[str, Any]] = {
    "Llama": {"use_qk_norm": False},
    "Qwen2": {"use_qk_norm": False, "attention_bias": True, "attention_output_bias": False, "mlp_bias": False},
    "Qwen3": {"use_qk_norm": True, "mlp_bias": False},
}
MODULES = [
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    "input_layernorm",
    "post_attention_layernorm",
]


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` as in transformers 5, from there or from `rope_theta` and `rope_scaling` of transformers 4."""
    found = [_rope(config, config[name]) for name in ("rope_parameters", "rope_scaling") if config.get(name)]
    if found and found[0] != found[-1]:  # transformers 5 takes the second, without the other's `rope_theta`
        raise ValueError(
            f"`rope_parameters` ({found[0]}) and `rope_scaling` ({found[1]}) of the config differ; remove one of them."
        )
    return found[0] if found else _rope(config, {})


def _rope(config: dict[str, Any], given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"`rope_parameters` (`rope_scaling`) is {given!r}; it must be an object.")
    rope = dict(given)
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("`rope_parameters` differ between layers, which is not supported.")
    old_type = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or old_type or "default"
    if "mrope_section" in rope or rope["rope_type"] == "mrope":
        raise ValueError("Multimodal rotary positions (mrope) are not supported.")
    theta = config.get("rope_theta")
    rope.setdefault("rope_theta", 10000.0 if theta is None else float(theta))
    original = config.get("original_max_position_embeddings")
    if original is not None and rope["rope_type"] in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = original  # transformers prefers it to the entry's own
    return rope


class LlamaFormat(Family):
    """
    A family in this format.

    Attributes:
        shift_logits (`bool`): The state of position i - 1 predicts token i, as in models adapted from causal ones.
    """

    ignored = (r".*rotary_emb\.inv_freq",)  # caches that some versions of transformers saved
    shift_logits = False

    def config(self, source: Source) -> dict[str, Any]:
        settings, first = source.config, LAYER.format(i=0)
        for name in ("use_sliding_window", "use_mrope"):
            if settings.get(name):
                raise ValueError(f"`{name}` is on, which is not supported.")
        vocab_size, hidden_size = source.matrix("model.embed_tokens.weight")
        num_heads = source.setting("num_attention_heads")
        head_dim, rest = divmod(source.matrix(f"{first}self_attn.q_proj.weight")[0], num_heads)
        if rest:
            raise ValueError(f"The query projection's rows are not a multiple of `num_attention_heads` ({num_heads}).")
        is_layer_norm = "model.norm.bias" in source
        return {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": source.matrix(f"{first}mlp.up_proj.weight")[0],
            "num_hidden_layers": source.num_layers(
                f"{LAYER}input_layernorm.weight", settings.get("num_hidden_layers")
            ),
            "num_attention_heads": num_heads,
            "num_key_value_heads": source.matrix(f"{first}self_attn.k_proj.weight")[0] // head_dim,
            "head_dim": head_dim,
            "hidden_act": settings.get("hidden_act", "silu"),
            "max_position_embeddings": source.setting("max_position_embeddings"),
            "rope_parameters": rope_parameters(settings),
            "norm_type": "layernorm" if is_layer_norm else "rmsnorm",
            "rms_norm_eps": source.setting("layer_norm_eps" if is_layer_norm else "rms_norm_eps"),
            "attention_bias": f"{first}self_attn.q_proj.bias" in source,
            "attention_output_bias": f"{first}self_attn.o_proj.bias" in source,
            "mlp_bias": f"{first}mlp.up_proj.bias" in source,
            "use_qk_norm": f"{first}self_attn.q_norm.weight" in source,
            # If a tied head is stored nevertheless, the plan checks that it equals the embedding.
            "tie_word_embeddings": bool(settings.get("tie_word_embeddings", "lm_head.weight" not in source)),
            "initializer_range": settings.get("initializer_range", 0.02),
            "shift_logits": self.shift_logits,
        }

    def recipes(self, source: Source, config: dict[str, Any]) -> dict[str, Recipe]:
        """A copy of every tensor with a name of the model's. The plan detects missing ones."""
        modules = ["model.embed_tokens", "model.norm", *["lm_head"] * (not config["tie_word_embeddings"])]
        for index in range(config["num_hidden_layers"]):
            modules += [LAYER.format(i=index) + module for module in MODULES]
        names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
        return {name: copy(name) for name in names if name in source}

    def stored_config(self, config: LoopMDMConfig) -> dict[str, Any]:
        same = (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
            *("tie_word_embeddings", "initializer_range"),
        )
        settings = {name: getattr(config, name) for name in same}
        if self.reference != "Qwen2":
            settings["attention_bias"] = config.attention_bias
        if self.reference == "Llama":
            settings["mlp_bias"] = config.mlp_bias
        # transformers 4's spelling, which version 5 and other engines read too
        rope = dict(config.rope_parameters or {})
        settings["rope_theta"] = rope.pop("rope_theta", None)
        return {**settings, "rope_scaling": None if rope.get("rope_type") == "default" else rope}

    def stored_properties(self, config: LoopMDMConfig) -> dict[str, Any]:
        has_bias = config.attention_bias or config.attention_output_bias  # one setting for both
        return {
            "position_embedding_type": "rope",
            "norm_type": "rmsnorm",
            "use_gated_mlp": True,
            "attention_bias": has_bias,
            "attention_output_bias": has_bias,
            **CLASSES[self.reference or "Llama"],
        }
