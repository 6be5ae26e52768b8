# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The tensor names and config.json keys of Llama, Qwen2 and Qwen3 in transformers, which most families share. The names
are the model's own, so every recipe is a copy; what the config cannot be trusted with is read off the tensors.
"""

import re
from typing import Any

from .family import Recipe, copy
from .source import Source

LAYERS = "model.layers.{i}.input_layernorm.weight"
MODULES = [
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    "input_layernorm",
    "post_attention_layernorm",
]
# Caches that some versions of transformers saved.
IGNORED = (r".*rotary_emb\.inv_freq",)


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5's `rope_parameters`, from either spelling (transformers 4: `rope_theta`, `rope_scaling`)."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("`rope_parameters` differ between layers, which is not supported.")
    rope["rope_type"] = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    if "mrope_section" in rope or rope["rope_type"] == "mrope":
        raise ValueError("Multimodal rotary positions (mrope) are not supported.")
    rope.setdefault("rope_theta", float(config.get("rope_theta") or 10000.0))
    return rope


def is_tied(source: Source) -> bool:
    """Whether the head shares the embedding's weight. A head that is stored all the same must then equal it."""
    stored = "lm_head.weight" in source
    return bool(source.config.get("tie_word_embeddings", not stored))


def config(source: Source) -> dict[str, Any]:
    """Arguments of a `LoopMDMConfig` for a checkpoint in this format."""
    settings = source.config
    if settings.get("use_sliding_window"):
        raise ValueError("`use_sliding_window` is on; attention within a window is not supported.")
    vocab_size, hidden_size = source.shape("model.embed_tokens.weight")
    num_heads = source.setting("num_attention_heads")
    head_dim, rest = divmod(source.shape("model.layers.0.self_attn.q_proj.weight")[0], num_heads)
    if rest:
        raise ValueError(f"The query projection has no multiple of `num_attention_heads` ({num_heads}) rows.")
    is_layer_norm = "model.norm.bias" in source
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": source.shape("model.layers.0.mlp.up_proj.weight")[0],
        "num_hidden_layers": source.num_layers(LAYERS, settings.get("num_hidden_layers")),
        "num_attention_heads": num_heads,
        "num_key_value_heads": source.shape("model.layers.0.self_attn.k_proj.weight")[0] // head_dim,
        "head_dim": head_dim,
        "hidden_act": settings.get("hidden_act", "silu"),
        "max_position_embeddings": source.setting("max_position_embeddings"),
        "rope_parameters": rope_parameters(settings),
        "norm_type": "layernorm" if is_layer_norm else "rmsnorm",
        "rms_norm_eps": source.setting("layer_norm_eps" if is_layer_norm else "rms_norm_eps"),
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in source,
        "attention_output_bias": "model.layers.0.self_attn.o_proj.bias" in source,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in source,
        "use_qk_norm": "model.layers.0.self_attn.q_norm.weight" in source,
        "tie_word_embeddings": is_tied(source),
        "initializer_range": settings.get("initializer_range", 0.02),
    }


def recipes(source: Source, config: dict[str, Any]) -> dict[str, Recipe]:
    """A copy of every tensor with a name that the model knows. Missing ones are found out by the plan."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "model.norm.bias"]
    if not config["tie_word_embeddings"]:
        names += ["lm_head.weight", "lm_head.bias"]
    for index in range(config["num_hidden_layers"]):
        names += [f"model.layers.{index}.{module}.{kind}" for module in MODULES for kind in ("weight", "bias")]
    return {name: copy(name) for name in names if name in source}


def has_layers(source: Source) -> bool:
    """Whether the tensors have these names, and no others that would change what the layers compute."""
    known = re.compile(
        r"model\.(embed_tokens|norm|layers\.\d+\.("
        + "|".join(map(re.escape, MODULES))
        + r"))\.(weight|bias)|lm_head\.weight"
    )
    return LAYERS.format(i=0) in source and all(
        known.fullmatch(name) or any(re.fullmatch(pattern, name) for pattern in IGNORED) for name in source.tensors
    )
