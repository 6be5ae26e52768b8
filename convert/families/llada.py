# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
LLaDA (dense), in all variants of its code that are exact: separate or fused projections, gated or plain MLP, RMSNorm
or LayerNorm, grouped keys and values, scaled embeddings and logits.
"""

from typing import Any

from ..family import Family, Recipe, constant, copy, per_layer, rows, scaled
from ..source import Source

ROOT = "model.transformer."
LAYER = ROOT + "blocks.{i}."
# LLaDA's LayerNorm has this epsilon whatever the config's `rms_norm_eps` says.
LAYER_NORM_EPS = 1e-5
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "relu": "relu", "swiglu": "silu"}


def _ungroup(source: Source) -> Source:
    """Renames `block_groups.{g}.{j}`, the layers of a config with `block_group_size`, to `blocks.{i}`."""
    group_size = source.config.get("block_group_size") or 1
    prefix = f"{ROOT}block_groups."

    def rename(name: str) -> str:
        if not name.startswith(prefix):
            return name
        group, member, rest = name.removeprefix(prefix).split(".", 2)
        return f"{ROOT}blocks.{int(group) * group_size + int(member)}.{rest}"

    source.tensors = {rename(name): tensor for name, tensor in source.tensors.items()}
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
    first = LAYER.format(i=0)
    is_gated = block_type == "llama" or activation == "swiglu"
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": source.shape(f"{first}ff_out.weight")[1],
        "num_hidden_layers": source.num_layers(f"{LAYER}ff_out.weight", settings.get("n_layers")),
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


def _linears(source: Source, config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, int] | None]]:
    """For every projection of a layer: the source's, and which of its rows where several are fused."""
    query_size = config["num_attention_heads"] * config["head_dim"]
    key_value_size = config["num_key_value_heads"] * config["head_dim"]
    mlp_size = config["intermediate_size"]
    common = {"self_attn.o_proj": ("attn_out", None), "mlp.down_proj": ("ff_out", None)}
    if not _is_sequential(source):
        separate = {f"self_attn.{part}_proj": (f"{part}_proj", None) for part in "qkv"}
        return {**separate, "mlp.gate_proj": ("ff_proj", None), "mlp.up_proj": ("up_proj", None), **common}
    ends = (query_size, query_size + key_value_size, query_size + 2 * key_value_size)
    fused = {
        "self_attn.q_proj": ("att_proj", (0, ends[0])),
        "self_attn.k_proj": ("att_proj", (ends[0], ends[1])),
        "self_attn.v_proj": ("att_proj", (ends[1], ends[2])),
    }
    if not config["use_gated_mlp"]:
        return {**fused, "mlp.up_proj": ("ff_proj", None), **common}
    # The second half is the activated one.
    halves = {
        "mlp.up_proj": ("ff_proj", (0, mlp_size)),
        "mlp.gate_proj": ("ff_proj", (mlp_size, 2 * mlp_size)),
    }
    return {**fused, **halves, **common}


def _recipes(source: Source, config: dict[str, Any]) -> dict[str, Recipe]:
    hidden_size = config["hidden_size"]
    template = {
        **_norm(source, "model.layers.{i}.input_layernorm", f"{LAYER}attn_norm"),
        **_norm(source, "model.layers.{i}.post_attention_layernorm", f"{LAYER}ff_norm"),
    }
    for target, (name, part) in _linears(source, config).items():
        for kind in ("weight", "bias"):
            stored = f"{LAYER}{name}.{kind}"
            if kind == "weight" or stored.format(i=0) in source:
                recipe = copy(stored) if part is None else rows(stored, *part)
                template[f"model.layers.{{i}}.{target}.{kind}"] = recipe

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
