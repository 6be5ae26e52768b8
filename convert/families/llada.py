# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
LLaDA (dense), in all variants of its code that convert exactly: separate or fused projections, gated or plain MLP,
RMSNorm or LayerNorm, grouped keys and values, scaled embeddings and logits.
"""

from ..family import Family, Recipe, copy, per_layer, rows, scaled, zeros
from ..source import Source

ROOT = "model.transformer."
LAYER = ROOT + "blocks.{i}."
# Names of the separate modules of a layer, and of those around the layers
MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    **{f"self_attn.{part}_proj": f"{part}_proj" for part in "qkv"},
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
AROUND = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}
# The repository on the Hub with the code for checkpoints without code of their own
CODE = "GSAI-ML/LLaDA-8B-Instruct--"
# The settings that can be converted; the first is the default
CHOICES = {
    "block_type": ("llama", "sequential"),
    "layer_norm_type": ("default", "low_precision", "rms", "gemma_rms"),
    "activation_type": ("silu", "gelu", "relu", "swiglu"),
}


def _is_rms(source: Source) -> bool:
    return source.setting("layer_norm_type") in ("rms", "gemma_rms")


def _norm(source: Source, target: str, name: str) -> dict[str, Recipe]:
    """The weight of a norm, and the bias of a LayerNorm, which may be missing in the source."""
    weight, bias = f"{name}.weight", f"{name}.bias"
    if weight.format(i=0) not in source:
        raise ValueError(f"{source.name} has no tensor {weight.format(i=0)!r}; norms need weights.")
    recipes = {f"{target}.weight": copy(weight)}
    if source.config["layer_norm_type"] == "gemma_rms":
        recipes[f"{target}.weight"] = Recipe((weight,), "plus 1", lambda tensor: tensor.double() + 1)
    if not _is_rms(source):
        recipes[f"{target}.bias"] = copy(bias) if bias.format(i=0) in source else zeros(like=weight)
    return recipes


class LLaDA(Family):
    name = "llada"
    models = "LLaDA 8B (Base, Instruct), LLaDA 1.5"
    architectures = ("LLaDAModelLM",)
    tied_names = (f"{ROOT}ff_out.weight",)
    stored = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "auto_map": {
            "AutoConfig": f"{CODE}configuration_llada.LLaDAConfig",
            "AutoModelForCausalLM": f"{CODE}modeling_llada.LLaDAModelLM",
            "AutoModel": f"{CODE}modeling_llada.LLaDAModelLM",
        },
        "block_type": "llama",
        "block_group_size": 1,
        "rope": True,
        "alibi": False,
        "use_cache": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "flash_attention": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
        "layer_norm_with_affine": True,
        "init_device": "meta",
        "init_fn": "mitchell",
        "multi_query_attention": None,
        "precision": "amp_bf16",
    }

    def matches(self, source):
        return super().matches(source) and f"{ROOT}wte.weight" in source

    def prepare(self, source):
        """Renames `block_groups.{g}.{j}`, the layers of a config with `block_group_size`, to `blocks.{i}`."""
        group_size = source.config.get("block_group_size") or 1
        prefix = f"{ROOT}block_groups."

        def rename(name: str) -> str:
            if not name.startswith(prefix):
                return name
            group, member, rest = name.removeprefix(prefix).split(".", 2)
            return f"{LAYER.format(i=int(group) * group_size + int(member))}{rest}"

        source.tensors = {rename(name): tensor for name, tensor in source.tensors.items()}
        return source

    def check(self, source: Source) -> None:
        """Raises a ValueError for variants that cannot be converted."""
        settings = source.config
        for name, allowed in CHOICES.items():
            if settings.get(name, allowed[0]) not in allowed:
                raise ValueError(f"LLaDA's `{name}` is {settings[name]!r}; it must be one of {', '.join(allowed)}.")
        for name, why in (
            ("attention_layer_norm", "a norm over all heads together, which no published model uses"),
            ("alibi", "attention biases by distance"),
        ):
            if settings.get(name):
                raise ValueError(f"LLaDA's `{name}` is on ({why}), which is not supported.")
        if not settings.get("rope", False):
            raise ValueError("LLaDA's `rope` is off; only rotary positions are supported.")
        if source.setting("block_type") == "llama" and settings.get("activation_type") == "swiglu":
            raise ValueError('LLaDA with `block_type` "llama" and `activation_type` "swiglu" cannot run anywhere.')

    def config(self, source):
        self.check(source)
        settings, first = source.config, LAYER.format(i=0)
        vocab_size, hidden_size = source.matrix(f"{ROOT}wte.weight")
        num_heads, activation = source.setting("n_heads"), settings.get("activation_type", "silu")
        # Scaling the embedding or the logits breaks the tie of the two weights.
        is_scaled = settings.get("input_emb_norm") or settings.get("scale_logits")
        return {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": source.matrix(f"{first}ff_out.weight")[1],
            "num_hidden_layers": source.num_layers(f"{LAYER}ff_out.weight", settings.get("n_layers")),
            "num_attention_heads": num_heads,
            "num_key_value_heads": (
                1 if settings.get("multi_query_attention") else settings.get("n_kv_heads") or num_heads
            ),
            "head_dim": hidden_size // num_heads,
            "hidden_act": "silu" if activation == "swiglu" else activation,
            "use_gated_mlp": settings["block_type"] == "llama" or activation == "swiglu",
            "max_position_embeddings": source.setting("max_sequence_length"),
            "rope_parameters": {"rope_type": "default", "rope_theta": float(settings.get("rope_theta", 10000.0))},
            "rope_precision": "float32" if settings.get("rope_full_precision", True) else "model",
            "norm_type": "rmsnorm" if _is_rms(source) else "layernorm",
            # LLaDA's LayerNorm ignores `rms_norm_eps`.
            "rms_norm_eps": source.setting("rms_norm_eps") if _is_rms(source) else 1e-5,
            "attention_bias": f"{first}q_proj.bias" in source or f"{first}att_proj.bias" in source,
            "attention_output_bias": f"{first}attn_out.bias" in source,
            "mlp_bias": f"{first}ff_out.bias" in source,
            "lm_head_bias": f"{ROOT}ff_out.bias" in source,
            "tie_word_embeddings": bool(settings.get("weight_tying")) and not is_scaled,
            "initializer_range": settings.get("init_std", 0.02),
            "mask_token_id": 126336,
        }

    def projections(self, config: dict, is_fused: bool) -> dict[str, tuple]:
        """For every projection of a layer, the source's name for it, and its rows if several are fused."""
        parts: dict[str, tuple] = {target: (name,) for target, name in MODULES.items() if target.endswith("_proj")}
        if not is_fused:
            return parts
        del parts["mlp.gate_proj"]
        keys = config["num_attention_heads"] * config["head_dim"]  # the first row of the keys
        size = config["num_key_value_heads"] * config["head_dim"]
        parts["self_attn.q_proj"] = ("att_proj", 0, keys)
        parts["self_attn.k_proj"] = ("att_proj", keys, keys + size)
        parts["self_attn.v_proj"] = ("att_proj", keys + size, keys + 2 * size)
        if not config["use_gated_mlp"]:
            return {**parts, "mlp.up_proj": ("ff_proj",)}
        middle = config["intermediate_size"]  # the activation applies to the second half
        return {**parts, "mlp.up_proj": ("ff_proj", 0, middle), "mlp.gate_proj": ("ff_proj", middle, 2 * middle)}

    def recipes(self, source, config):
        settings, scale = source.config, config["hidden_size"] ** 0.5
        layer: dict[str, Recipe] = {}
        for target in ("input_layernorm", "post_attention_layernorm"):
            layer |= _norm(source, target, f"{LAYER}{MODULES[target]}")
        for target, (name, *part) in self.projections(config, settings["block_type"] == "sequential").items():
            for kind in ("weight", "bias"):
                stored = f"{LAYER}{name}.{kind}"
                if kind == "weight" or stored.format(i=0) in source:
                    layer[f"{target}.{kind}"] = rows(stored, *part) if part else copy(stored)
        embedding, norm, head = (f"{ROOT}{name}" for name in AROUND.values())
        recipes = {
            "model.embed_tokens.weight": scaled(f"{embedding}.weight", scale if settings.get("input_emb_norm") else 1),
            **per_layer(config["num_hidden_layers"], layer),
            **_norm(source, "model.norm", norm),
        }
        logit_scale = 1 / scale if settings.get("scale_logits") else 1
        if not config["tie_word_embeddings"]:
            is_tied = settings.get("weight_tying")
            recipes["lm_head.weight"] = scaled(f"{embedding if is_tied else head}.weight", logit_scale)
        if config["lm_head_bias"]:
            recipes["lm_head.bias"] = scaled(f"{head}.bias", logit_scale)
        return recipes

    def stored_config(self, config):
        return {
            "vocab_size": config.vocab_size,
            "embedding_size": config.vocab_size,
            "d_model": config.hidden_size,
            "mlp_hidden_size": config.intermediate_size,
            "n_layers": config.num_hidden_layers,
            "n_heads": config.num_attention_heads,
            "n_kv_heads": config.num_key_value_heads,
            "activation_type": config.hidden_act,
            "max_sequence_length": config.max_position_embeddings,
            "rope_theta": config.rope_parameters["rope_theta"],
            "rope_full_precision": config.rope_precision == "float32",
            "layer_norm_type": "rms" if config.norm_type == "rmsnorm" else "default",
            "bias_for_layer_norm": config.norm_type == "layernorm",
            "rms_norm_eps": config.rms_norm_eps,
            "include_bias": config.mlp_bias,
            "include_qkv_bias": config.attention_bias,
            "weight_tying": config.tie_word_embeddings,
            "init_std": config.initializer_range,
        }

    def stored_properties(self, config):
        # One setting for all biases except those of queries, keys, values and norms; a tied head has none.
        has_bias = config.attention_output_bias or config.mlp_bias or config.lm_head_bias
        return {
            "position_embedding_type": "rope",
            "use_gated_mlp": True,
            "use_qk_norm": False,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "attention_bias": has_bias or config.attention_bias,
            "attention_output_bias": has_bias,
            "mlp_bias": has_bias,
            "lm_head_bias": has_bias and not config.tie_word_embeddings,
        }

    def stored_name(self, name):
        module, _, kind = name.rpartition(".")
        if module in AROUND:
            return f"{ROOT}{AROUND[module]}.{kind}"
        index, _, part = module.removeprefix("model.layers.").partition(".")
        return f"{LAYER.format(i=index)}{MODULES[part]}.{kind}"

    def generation(self, source):
        return {"unmasking": "confidence", "block_length": 32}


FAMILIES = [LLaDA()]
