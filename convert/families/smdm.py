# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
SMDM: bare safetensors files in lit-gpt's format. The embedding has one more row than the head, for [MASK]; queries,
keys and values are interleaved head by head; cosines and sines are rounded to bfloat16.
"""

import re

import torch

from ..family import Family, Recipe, copy, per_layer
from ..source import Source

LAYER = "transformer.h.{i}."
# Sizes in millions of parameters by the number of heads, which neither a config nor tensors tell
_SIZES = {
    4: [6],
    6: [19],
    8: [34, 75],
    9: [48],
    10: [66, 85, 472, 551, 629],
    11: [571, 666, 761],
    12: [113, 142, 170, 717, 831, 944],
    14: [180, 206, 231, 1028, 1233],
    16: [268, 302, 336, 1476, 1678],
    17: [2121],
}
HEADS = {size: heads for heads, sizes in _SIZES.items() for size in sizes}


def _num_heads(source: Source) -> int:
    if source.weights.name.startswith("ar-"):
        raise ValueError(f"{source.weights.name} is one of SMDM's autoregressive models, not a diffusion model.")
    if source.config.get("n_head"):
        return source.config["n_head"]
    size = re.search(r"-(\d+)M-", source.weights.name)
    if size is None or int(size[1]) not in HEADS:
        raise ValueError(
            f"{source.weights.name} does not name a known size (such as mdm-170M-...); put a config.json with "
            "`n_head` and `block_size` beside it."
        )
    return HEADS[int(size[1])]


class SMDM(Family):
    name = "smdm"
    models = "SMDM (bare safetensors, 6M to 2121M)"

    def matches(self, source):
        return "transformer.h.0.attn.attn.weight" in source and "transformer.wte.weight" in source

    def config(self, source):
        num_heads, first = _num_heads(source), LAYER.format(i=0)
        rows, hidden_size = source.matrix(f"{first}attn.attn.weight")
        head_dim = hidden_size // num_heads
        return {
            "vocab_size": source.matrix("transformer.wte.weight")[0],
            "hidden_size": hidden_size,
            "intermediate_size": source.matrix(f"{first}mlp.swiglu.w1.weight")[0],
            "num_hidden_layers": source.num_layers(f"{LAYER}norm_1.weight", source.config.get("n_layer")),
            "num_attention_heads": num_heads,
            "num_key_value_heads": (rows // head_dim - num_heads) // 2,
            "head_dim": head_dim,
            "max_position_embeddings": source.config.get("block_size", 2048),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "rope_precision": "bfloat16",
            "rms_norm_eps": source.config.get("norm_eps", 1e-5),
            "tie_word_embeddings": False,
            "mask_token_id": source.matrix("lm_head.weight")[0],
        }

    def recipes(self, source, config):
        groups, head_dim = config["num_key_value_heads"], config["head_dim"]
        queries = config["num_attention_heads"] // groups

        def part(name: str, start: int, stop: int) -> Recipe:
            """The fused weight's rows are (queries, key, value) for each key/value head."""

            def compute(tensor: torch.Tensor) -> torch.Tensor:
                by_head = tensor.reshape(groups, queries + 2, head_dim, -1)
                return by_head[:, start:stop].reshape(groups * (stop - start) * head_dim, -1)

            return Recipe((f"{LAYER}attn.attn.weight",), f"{name} of every head", compute)

        layer: dict[str, str | Recipe] = {
            "input_layernorm.weight": f"{LAYER}norm_1.weight",
            "self_attn.q_proj.weight": part("q", 0, queries),
            "self_attn.k_proj.weight": part("k", queries, queries + 1),
            "self_attn.v_proj.weight": part("v", queries + 1, queries + 2),
            "self_attn.o_proj.weight": f"{LAYER}attn.proj.weight",
            "post_attention_layernorm.weight": f"{LAYER}norm_2.weight",
            "mlp.gate_proj.weight": f"{LAYER}mlp.swiglu.w1.weight",
            "mlp.up_proj.weight": f"{LAYER}mlp.swiglu.w2.weight",
            "mlp.down_proj.weight": f"{LAYER}mlp.swiglu.w3.weight",
        }
        return {
            "model.embed_tokens.weight": copy("transformer.wte.weight"),
            **per_layer(config["num_hidden_layers"], layer),
            "model.norm.weight": copy("transformer.ln_f.weight"),
            # [MASK] never gets a probability, so its row of the head may hold anything.
            "lm_head.weight": Recipe(
                ("lm_head.weight",),
                "add a row of zeros for [MASK]",
                lambda tensor: torch.cat((tensor, tensor.new_zeros(1, tensor.shape[1]))),
            ),
        }


FAMILIES = [SMDM()]
