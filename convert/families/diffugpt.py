# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""DiffuGPT: GPT-2 under other names, without the causal mask; the state of position i - 1 predicts token i."""

from typing import Any

from ..family import Family, Recipe, copy, per_layer, rows, transposed
from ..source import Source


def gpt2_config(source: Source, body: str, embedding: str) -> dict[str, Any]:
    """Arguments of a `LoopMDMConfig` for GPT-2's layers, whose names start with `body`."""
    settings = source.config
    vocab_size, hidden_size = source.shape(embedding)
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        if settings.get(name):
            raise ValueError(f"GPT-2's `{name}` is on, which is not supported.")
    if settings.get("scale_attn_weights") is False:
        raise ValueError("GPT-2's `scale_attn_weights` is off, which is not supported.")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": source.shape(f"{body}h.0.mlp.c_fc.weight")[1],
        "num_hidden_layers": source.num_layers(f"{body}h.{{i}}.ln_1.weight", settings.get("n_layer")),
        "num_attention_heads": source.setting("n_head"),
        "hidden_act": settings.get("activation_function", "gelu_new"),
        "use_gated_mlp": False,
        "position_embedding_type": "learned",
        "max_position_embeddings": source.shape(f"{body}wpe.weight")[0],
        "norm_type": "layernorm",
        "rms_norm_eps": settings.get("layer_norm_epsilon", 1e-5),
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "shift_logits": True,
    }


def gpt2_recipes(config: dict[str, Any], body: str, embedding: str) -> dict[str, Recipe]:
    """GPT-2's projections are stored as (in, out), queries, keys and values side by side."""
    size = config["hidden_size"]
    layer = {}
    for target, name in (("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2")):
        layer |= {f"{target}.{kind}": f"{body}h.{{i}}.{name}.{kind}" for kind in ("weight", "bias")}
    for part, start in (("q", 0), ("k", size), ("v", 2 * size)):
        fused = f"{body}h.{{i}}.attn.c_attn"
        layer[f"self_attn.{part}_proj.weight"] = transposed(f"{fused}.weight", start, start + size)
        layer[f"self_attn.{part}_proj.bias"] = rows(f"{fused}.bias", start, start + size)
    for target, name in (
        ("self_attn.o_proj", "attn.c_proj"),
        ("mlp.up_proj", "mlp.c_fc"),
        ("mlp.down_proj", "mlp.c_proj"),
    ):
        layer[f"{target}.weight"] = transposed(f"{body}h.{{i}}.{name}.weight")
        layer[f"{target}.bias"] = f"{body}h.{{i}}.{name}.bias"
    return {
        "model.embed_tokens.weight": copy(embedding),
        "model.embed_positions.weight": copy(f"{body}wpe.weight"),
        **per_layer(config["num_hidden_layers"], {f"model.layers.{{i}}.{name}": to for name, to in layer.items()}),
        "model.norm.weight": copy(f"{body}ln_f.weight"),
        "model.norm.bias": copy(f"{body}ln_f.bias"),
    }


BODY, EMBEDDING = "denoise_model.", "embed_tokens.weight"
# What transformers' GPT-2 calls the two parts
_NAMES = {EMBEDDING: "transformer.wte.weight"}

FAMILY = Family(
    name="diffugpt",
    models="DiffuGPT (S, M)",
    matches=lambda source: f"{BODY}h.0.attn.c_attn.weight" in source and EMBEDDING in source,
    config=lambda source: gpt2_config(source, BODY, EMBEDDING),
    recipes=lambda source, config: gpt2_recipes(config, BODY, EMBEDDING),
    ignored=(r"denoise_model\.h\.\d+\.attn\.(masked_)?bias",),
    generation=lambda source: {"unmasking": "ancestral"},
    reference="GPT2",
    reference_names=lambda name: _NAMES.get(name, name.replace(BODY, "transformer.")),
)
