# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""GPT-2's layers: learned positions, LayerNorm, a plain MLP, projections stored as (in, out)."""

from typing import Any

from .family import Family, Recipe, copy, per_layer, rows, transposed
from .source import Source


class GPT2Format(Family):
    """A family in this format."""

    ignored = (r".*\.attn\.(masked_)?bias",)  # the causal mask
    reference = "GPT2"

    def names(self, source: Source) -> tuple[str, str]:
        """The prefix of the names of layers and positions, and the name of the embedding."""
        raise NotImplementedError

    def config(self, source: Source) -> dict[str, Any]:
        settings, (body, embedding) = source.config, self.names(source)
        vocab_size, hidden_size = source.matrix(embedding)
        for name, supported in (
            ("scale_attn_by_inverse_layer_idx", False),
            ("reorder_and_upcast_attn", False),
            ("scale_attn_weights", True),
        ):
            if bool(settings.get(name, supported)) != supported:
                raise ValueError(f"GPT-2's `{name}` is {settings[name]}, which is not supported.")
        return {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": source.matrix(f"{body}h.0.mlp.c_fc.weight")[1],
            "num_hidden_layers": source.num_layers(f"{body}h.{{i}}.ln_1.weight", settings.get("n_layer")),
            "num_attention_heads": source.setting("n_head"),
            "hidden_act": settings.get("activation_function", "gelu_new"),
            "use_gated_mlp": False,
            "position_embedding_type": "learned",
            "max_position_embeddings": source.matrix(f"{body}wpe.weight")[0],
            "norm_type": "layernorm",
            "rms_norm_eps": settings.get("layer_norm_epsilon", 1e-5),
            "attention_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": "lm_head.weight" not in source
            or settings.get("tie_word_embeddings", True) is not False,
            "shift_logits": True,
        }

    def recipes(self, source: Source, config: dict[str, Any]) -> dict[str, Recipe]:
        size, (body, embedding) = config["hidden_size"], self.names(source)
        block = f"{body}h.{{i}}."
        layer: dict[str, str | Recipe] = {}
        for target, name in (("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2")):
            layer |= {f"{target}.{kind}": f"{block}{name}.{kind}" for kind in ("weight", "bias")}
        for target, name, columns in (
            ("self_attn.q_proj", "attn.c_attn", (0, size)),
            ("self_attn.k_proj", "attn.c_attn", (size, 2 * size)),
            ("self_attn.v_proj", "attn.c_attn", (2 * size, 3 * size)),
            ("self_attn.o_proj", "attn.c_proj", ()),
            ("mlp.up_proj", "mlp.c_fc", ()),
            ("mlp.down_proj", "mlp.c_proj", ()),
        ):
            bias = f"{block}{name}.bias"
            layer[f"{target}.weight"] = transposed(f"{block}{name}.weight", *columns)
            layer[f"{target}.bias"] = rows(bias, *columns) if columns else bias
        return {
            "model.embed_tokens.weight": copy(embedding),
            "model.embed_positions.weight": copy(f"{body}wpe.weight"),
            **per_layer(config["num_hidden_layers"], layer),
            "model.norm.weight": copy(f"{body}ln_f.weight"),
            "model.norm.bias": copy(f"{body}ln_f.bias"),
            **({} if config["tie_word_embeddings"] else {"lm_head.weight": copy("lm_head.weight")}),
        }

    def reference_name(self, name: str) -> str:
        return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
