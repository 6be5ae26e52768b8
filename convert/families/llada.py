# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
LLaDA (dense), in all variants of its code that are exact: separate or fused projections, gated or plain MLP, RMSNorm
or LayerNorm, grouped keys and values, scaled embeddings and logits.
"""

from typing import Any

from ..family import Family, Recipe, constant, copy, per_layer, rows, scaled
from ..source import Source

ROOT = "model.transformer."
# LLaDA's LayerNorm has this epsilon whatever the config's `rms_norm_eps` says.
LAYER_NORM_EPS = 1e-5
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "relu": "relu", "swiglu": "silu"}


def _layer(source: Source) -> str:
    """The name of layer `{i}`. `block_group_size` numbers layers within groups."""
    return f"{ROOT}blocks.{{i}}."


def _ungroup(source: Source) -> Source:
    """Renames `block_groups.{g}.{j}` to `blocks.{i}`."""
    group_size = source.config.get("block_group_size") or 1
    prefix = f"{ROOT}block_groups."
    tensors = {}
    for name, tensor in source.tensors.items():
        if name.startswith(prefix):
            group, member, rest = name.removeprefix(prefix).split(".", 2)
            name = f"{ROOT}blocks.{int(group) * group_size + int(member)}.{rest}"
        tensors[name] = tensor
    source.tensors = tensors
    return source


def _is_sequential(source: Source) -> bool:
    return source.setting("block_type") == "sequential"


def _norm_is_rms(source: Source) -> bool:
    return source.setting("layer_norm_type") in ("rms", "gemma_rms")


def _config(source: Source) -> dict[str, Any]:
    settings = source.config
    block_type, activation = source.setting("block_type"), settings.get("activation_type", "silu")
    for name, allowed in (
        ("block_type", ("llama", "sequential")),
        ("layer_norm_type", ("default", "low_precision", "rms", "gemma_rms")),
        ("activation_type", tuple(ACTIVATIONS)),
    ):
        if settings.get(name, allowed[0]) not in allowed:
            raise ValueError(f"LLaDA's `{name}` is {settings[name]!r}; convertible are {', '.join(allowed)}.")
    for name, why in (
        ("attention_layer_norm", "a norm over all heads together, which no published model uses"),
        ("alibi", "attention biases by distance"),
    ):
        if settings.get(name):
            raise ValueError(f"LLaDA's `{name}` is on ({why}), which is not supported.")
    if not settings.get("rope", False):
        raise ValueError("LLaDA's `rope` is off; only rotary positions are supported.")
    if block_type == "llama" and activation == "swiglu":
        raise ValueError('LLaDA with `block_type` "llama" and `activation_type` "swiglu" cannot run anywhere.')

    vocab_size, hidden_size = source.shape(f"{ROOT}wte.weight")
    num_heads = source.setting("n_heads")
    head_dim = hidden_size // num_heads
    num_kv_heads = 1 if settings.get("multi_query_attention") else settings.get("n_kv_heads") or num_heads
    layer = _layer(source)
    first = layer.format(i=0)
    is_gated = block_type == "llama" or activation == "swiglu"
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": source.shape(f"{first}ff_out.weight")[1],
        "num_hidden_layers": source.num_layers(f"{layer}ff_out.weight"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": ACTIVATIONS[activation],
        "use_gated_mlp": is_gated,
        "max_position_embeddings": source.setting("max_sequence_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(settings.get("rope_theta", 10000.0))},
        "rope_full_precision": bool(settings.get("rope_full_precision", True)),
        "norm_type": "rmsnorm" if _norm_is_rms(source) else "layernorm",
        "rms_norm_eps": source.setting("rms_norm_eps") if _norm_is_rms(source) else LAYER_NORM_EPS,
        "attention_bias": any(f"{first}{name}.bias" in source for name in ("q_proj", "att_proj")),
        "attention_output_bias": f"{first}attn_out.bias" in source,
        "mlp_bias": f"{first}ff_out.bias" in source,
        "lm_head_bias": f"{ROOT}ff_out.bias" in source,
        "tie_word_embeddings": _is_tied(source),
        "initializer_range": settings.get("init_std", 0.02),
    }


def _is_tied(source: Source) -> bool:
    # Scaling one of the two breaks the tie.
    scales = source.config.get("input_emb_norm") or source.config.get("scale_logits")
    return bool(source.config.get("weight_tying")) and not scales


def _norm(source: Source, target: str, name: str) -> dict[str, Recipe]:
    """Weight, and for LayerNorm the bias, of a norm; either may be absent from the source."""
    weight, bias = f"{name}.weight", f"{name}.bias"
    if weight.format(i=0) not in source:  # without affine parameters
        raise ValueError(
            f"{source.name} has no tensor {weight.format(i=0)!r}; norms without weights are not supported."
        )
    recipes = {f"{target}.weight": copy(weight)}
    if source.config["layer_norm_type"] == "gemma_rms":
        recipes[f"{target}.weight"] = Recipe((weight,), "plus 1", lambda tensor: tensor.double() + 1)
    if not _norm_is_rms(source):
        has_bias = bias.format(i=0) in source
        recipes[f"{target}.bias"] = copy(bias) if has_bias else constant(0.0, like=weight)
    return recipes


def _recipes(source: Source, config: dict[str, Any]) -> dict[str, Recipe]:
    layer, hidden_size = _layer(source), config["hidden_size"]
    template = {
        **_norm(source, "model.layers.{i}.input_layernorm", f"{layer}attn_norm"),
        **_norm(source, "model.layers.{i}.post_attention_layernorm", f"{layer}ff_norm"),
    }
    query_size = config["num_attention_heads"] * config["head_dim"]
    key_value_size = config["num_key_value_heads"] * config["head_dim"]
    for kind in ("weight", "bias"):
        attention, mlp = f"model.layers.{{i}}.self_attn.{{}}_proj.{kind}", f"model.layers.{{i}}.mlp.{{}}_proj.{kind}"

        def put(target: str, part: str, recipe: str | Recipe, kind: str = kind) -> None:
            name = (recipe if isinstance(recipe, str) else recipe.sources[0]).format(i=0)
            if kind == "weight" or name in source:
                template[target.replace("{}", part)] = recipe

        if _is_sequential(source):
            fused, start = f"{layer}att_proj.{kind}", 0
            for part, size in (("q", query_size), ("k", key_value_size), ("v", key_value_size)):
                put(attention, part, rows(fused, start, start + size))
                start += size
        else:
            for part in "qkv":
                put(attention, part, f"{layer}{part}_proj.{kind}")
        put(attention, "o", f"{layer}attn_out.{kind}")
        if not _is_sequential(source):
            put(mlp, "gate", f"{layer}ff_proj.{kind}")
            put(mlp, "up", f"{layer}up_proj.{kind}")
        elif config["use_gated_mlp"]:
            # Fused; the second half is the activated one.
            size = config["intermediate_size"]
            put(mlp, "up", rows(f"{layer}ff_proj.{kind}", 0, size))
            put(mlp, "gate", rows(f"{layer}ff_proj.{kind}", size, 2 * size))
        else:
            put(mlp, "up", f"{layer}ff_proj.{kind}")
        put(mlp, "down", f"{layer}ff_out.{kind}")

    embedding = f"{ROOT}wte.weight"
    head = embedding if source.config.get("weight_tying") else f"{ROOT}ff_out.weight"
    scale = hidden_size**0.5
    recipes = {
        "model.embed_tokens.weight": scaled(embedding, scale)
        if source.config.get("input_emb_norm")
        else copy(embedding),
        **per_layer(config["num_hidden_layers"], template),
        **_norm(source, "model.norm", f"{ROOT}ln_f"),
    }
    if not config["tie_word_embeddings"]:
        scales_logits = source.config.get("scale_logits")
        recipes["lm_head.weight"] = scaled(head, 1 / scale) if scales_logits else copy(head)
        if config["lm_head_bias"]:
            bias = f"{ROOT}ff_out.bias"
            recipes["lm_head.bias"] = scaled(bias, 1 / scale) if scales_logits else copy(bias)
    return recipes


FAMILY = Family(
    name="llada",
    models="LLaDA 8B (Base, Instruct), LLaDA 1.5",
    matches=lambda source: "LLaDAModelLM" in source.architectures and f"{ROOT}wte.weight" in source,
    config=_config,
    recipes=_recipes,
    tied_names=(f"{ROOT}ff_out.weight",),
    mask_token_id=lambda source: 126336,
    generation=lambda source: {"unmasking": "confidence", "block_length": 32},
    prepare=_ungroup,
)
