# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The diffusion transformer of MDLM and its relatives (UDLM, BD3LM, RADD). Its norms and residual branches may be
modulated by an embedding of the noise level sigma (adaLN). Where sigma is constant, so is the modulation, and it
folds exactly into the norms and into the projections that write to the residual stream.
"""

import math
from typing import Any

import torch

from .family import Recipe, constant, copy, per_layer, rows
from .source import Source

LAYER_NORM_EPS = 1e-5
IGNORED = (r".*rotary_emb\.inv_freq",)
# Chunks of a block's modulation, in this order; the last layer's has the first two.
SHIFT, SCALE, GATE, MLP_SHIFT, MLP_SCALE, MLP_GATE = range(6)


def is_modulated(source: Source, root: str) -> bool:
    return f"{root}blocks.0.adaLN_modulation.weight" in source


def check_conditioning(source: Source, time_conditioning: bool) -> None:
    """Raises a ValueError unless the source computes the same at every noise level, or one level was chosen."""
    if time_conditioning and source.sigma is None:
        raise ValueError(
            f"{source.name} is conditioned on the noise level (`time_conditioning`), and a LoopMDM is not. Give "
            "--sigma (`sigma=`) to convert what it computes at that one level."
        )
    if not time_conditioning and source.sigma is not None:
        raise ValueError(f"`sigma` is {source.sigma}, but {source.name} is not conditioned on it; leave it out.")


def config(source: Source, root: str, num_heads: int, max_length: int, num_layers: int | None) -> dict[str, Any]:
    """Arguments of a `LoopMDMConfig`. Tensor names start with `root`; the config speaks of `num_layers`."""
    vocab_size, hidden_size = source.shape(f"{root}vocab_embed.embedding")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": source.shape(f"{root}blocks.0.mlp.0.weight")[0],
        "num_hidden_layers": source.num_layers(f"{root}blocks.{{i}}.attn_qkv.weight", num_layers),
        "num_attention_heads": num_heads,
        "hidden_act": "gelu_pytorch_tanh",
        "use_gated_mlp": False,
        "max_position_embeddings": max_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "norm_type": "layernorm",
        "rms_norm_eps": LAYER_NORM_EPS,
        "mlp_bias": True,
        "lm_head_bias": True,
        "tie_word_embeddings": False,
    }


def recipes(source: Source, config: dict[str, Any], root: str) -> dict[str, Recipe]:
    """Copies and splits; with modulation also folds, at `source.sigma` or 0."""
    size = config["hidden_size"]
    block, last = f"{root}blocks.{{i}}.", f"{root}output_layer."
    qkv = f"{block}attn_qkv.weight"

    def norm(name: str, prefix: str, scale: int, shift: int, chunks: int) -> dict[str, Recipe]:
        weight, bias = f"{prefix}{name}.weight", f"{prefix}{name}.bias"
        if is_modulated(source, root):
            return {
                "weight": _modulate(
                    source, root, weight, prefix, scale, chunks, lambda norm, scale: norm * (1 + scale)
                ),
                "bias": _modulate(source, root, weight, prefix, shift, chunks, lambda norm, shift: shift),
            }
        return {"weight": copy(weight), "bias": copy(bias) if bias.format(i=0) in source else constant(0.0, weight)}

    def gated(name: str, gate: int) -> Recipe:
        if not is_modulated(source, root):
            return copy(f"{block}{name}")
        return _modulate(source, root, f"{block}{name}", block, gate, 6, _scale_rows)

    layer = {
        **_under("input_layernorm", norm("norm1", block, SCALE, SHIFT, 6)),
        "self_attn.q_proj.weight": rows(qkv, 0, size),
        "self_attn.k_proj.weight": rows(qkv, size, 2 * size),
        "self_attn.v_proj.weight": rows(qkv, 2 * size, 3 * size),
        "self_attn.o_proj.weight": gated("attn_out.weight", GATE),
        **_under("post_attention_layernorm", norm("norm2", block, MLP_SCALE, MLP_SHIFT, 6)),
        "mlp.up_proj.weight": f"{block}mlp.0.weight",
        "mlp.up_proj.bias": f"{block}mlp.0.bias",
        "mlp.down_proj.weight": gated("mlp.2.weight", MLP_GATE),
        "mlp.down_proj.bias": gated("mlp.2.bias", MLP_GATE),
    }
    return {
        "model.embed_tokens.weight": copy(f"{root}vocab_embed.embedding"),
        **per_layer(config["num_hidden_layers"], _under("model.layers.{i}", layer)),
        **_under("model.norm", norm("norm_final", last, SCALE, SHIFT, 2)),
        "lm_head.weight": copy(f"{last}linear.weight"),
        "lm_head.bias": copy(f"{last}linear.bias"),
    }


def _scale_rows(tensor: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return tensor * (gate if tensor.ndim == 1 else gate[:, None])


def last_token(root: str):
    """The mask token of these families: the last row of the embedding."""
    return lambda source: source.shape(f"{root}vocab_embed.embedding")[0] - 1


def _under(prefix: str, recipes: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": recipe for name, recipe in recipes.items()}


def _modulate(source: Source, root: str, name: str, prefix: str, chunk: int, chunks: int, apply) -> Recipe:
    """`apply(tensor, modulation)` on the tensor `name` and one chunk of the modulation, in float64."""
    sigma = source.sigma or 0.0
    adaln = f"{prefix}adaLN_modulation"
    sigma_map = [f"{root}sigma_map.mlp.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")]

    def compute(tensor, weight, bias, *sigma_map):
        conditioning = _conditioning(sigma, *(part.double() for part in sigma_map))
        modulation = weight.double() @ conditioning + bias.double()
        return apply(tensor.double(), modulation.chunk(chunks)[chunk])

    return Recipe((name, f"{adaln}.weight", f"{adaln}.bias", *sigma_map), f"fold adaLN at sigma {sigma:g}", compute)


def _conditioning(sigma: float, weight_0, bias_0, weight_2, bias_2) -> torch.Tensor:
    """
    What the modulation is a linear function of, `(cond_dim,)`: sinusoids of sigma, a two-layer MLP, one more SiLU.
    """
    half = weight_0.shape[1] // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=weight_0.device).double() / half)
    features = torch.cat((torch.cos(sigma * frequencies), torch.sin(sigma * frequencies)))
    silu = torch.nn.functional.silu
    return silu(weight_2 @ silu(weight_0 @ features + bias_0) + bias_2)
