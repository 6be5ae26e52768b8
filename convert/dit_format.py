# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The diffusion transformer of MDLM and its relatives (UDLM, BD3LM, RADD). Its norms and residual branches may be
modulated by an embedding of the noise level sigma (adaLN). At a constant sigma the modulation is constant, and folds
exactly into the norms and the projections that write to the residual stream.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from .family import Family, Recipe, copy, per_layer, rows, zeros
from .source import Source

# The chunks of a block's modulation, in order. The output layer has only the first two.
SHIFT, SCALE, GATE, MLP_SHIFT, MLP_SCALE, MLP_GATE = range(6)


class DiTFormat(Family):
    """
    A family in this format.

    Attributes:
        root (`str`): The prefix of all tensor names.
    """

    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    root = "backbone."
    takes_sigma: bool = True

    def is_modulated(self, source: Source) -> bool:
        return f"{self.root}blocks.0.adaLN_modulation.weight" in source

    def settings(self, source: Source) -> dict[str, Any]:
        """What tensors do not tell: `n_heads`, `length`, `time_conditioning` and, if known, `n_blocks`."""
        return {
            "n_heads": source.setting("n_heads"),
            "length": source.setting("model_length"),
            "time_conditioning": source.setting("time_conditioning"),
            "n_blocks": source.config.get("n_blocks"),
        }

    def config(self, source: Source) -> dict[str, Any]:
        settings, block = self.settings(source), f"{self.root}blocks.{{i}}."
        if settings["time_conditioning"] and source.sigma is None:
            raise ValueError(
                f"{source.name} is conditioned on the noise level (`time_conditioning`), and a LoopMDM is not. Give "
                "--sigma (`sigma=`) to convert what it computes at that one level."
            )
        if not settings["time_conditioning"] and source.sigma is not None:
            raise ValueError(f"`sigma` is {source.sigma}, but {source.name} is not conditioned on it; leave it out.")
        vocab_size, hidden_size = source.matrix(f"{self.root}vocab_embed.embedding")
        return {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": source.matrix(f"{block}mlp.0.weight".format(i=0))[0],
            "num_hidden_layers": source.num_layers(f"{block}attn_qkv.weight", settings.get("n_blocks")),
            "num_attention_heads": settings["n_heads"],
            "hidden_act": "gelu_pytorch_tanh",
            "use_gated_mlp": False,
            "max_position_embeddings": settings["length"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "norm_type": "layernorm",
            "rms_norm_eps": 1e-5,
            "mlp_bias": True,
            "lm_head_bias": True,
            "tie_word_embeddings": False,
            "mask_token_id": vocab_size - 1,
        }

    def generation(self, source: Source) -> dict[str, Any]:
        return {"unmasking": "ancestral"}

    def recipes(self, source: Source, config: dict[str, Any]) -> dict[str, Recipe]:
        """Copies and splits. A modulation is folded in, at `source.sigma` or 0."""
        size, modulated = config["hidden_size"], self.is_modulated(source)
        block, last = f"{self.root}blocks.{{i}}.", f"{self.root}output_layer."

        def norm(target: str, prefix: str, name: str, scale: int, shift: int) -> dict[str, Recipe]:
            weight, bias = f"{prefix}{name}.weight", f"{prefix}{name}.bias"
            if modulated:
                made = (
                    self._fold(source, weight, prefix, scale, lambda weight, scale: weight * (1 + scale)),
                    self._fold(source, weight, prefix, shift, lambda weight, shift: shift),
                )
            else:
                made = copy(weight), copy(bias) if bias.format(i=0) in source else zeros(weight)
            return {f"{target}.weight": made[0], f"{target}.bias": made[1]}

        def gated(name: str, gate: int) -> Recipe:
            if not modulated:
                return copy(f"{block}{name}")
            return self._fold(source, f"{block}{name}", block, gate, _scale_rows)

        layer: dict[str, str | Recipe] = {
            **norm("input_layernorm", block, "norm1", SCALE, SHIFT),
            "self_attn.q_proj.weight": rows(f"{block}attn_qkv.weight", 0, size),
            "self_attn.k_proj.weight": rows(f"{block}attn_qkv.weight", size, 2 * size),
            "self_attn.v_proj.weight": rows(f"{block}attn_qkv.weight", 2 * size, 3 * size),
            "self_attn.o_proj.weight": gated("attn_out.weight", GATE),
            **norm("post_attention_layernorm", block, "norm2", MLP_SCALE, MLP_SHIFT),
            "mlp.up_proj.weight": f"{block}mlp.0.weight",
            "mlp.up_proj.bias": f"{block}mlp.0.bias",
            "mlp.down_proj.weight": gated("mlp.2.weight", MLP_GATE),
            "mlp.down_proj.bias": gated("mlp.2.bias", MLP_GATE),
        }
        return {
            "model.embed_tokens.weight": copy(f"{self.root}vocab_embed.embedding"),
            **per_layer(config["num_hidden_layers"], layer),
            **norm("model.norm", last, "norm_final", SCALE, SHIFT),
            "lm_head.weight": copy(f"{last}linear.weight"),
            "lm_head.bias": copy(f"{last}linear.bias"),
        }

    def _fold(self, source: Source, name: str, prefix: str, chunk: int, apply: Callable) -> Recipe:
        """`apply(tensor, modulation)` of the tensor `name` and one chunk of the modulation, in float64."""
        sigma, num_chunks = source.sigma or 0.0, 6 if "{i}" in prefix else 2
        names = [f"{prefix}adaLN_modulation.{kind}" for kind in ("weight", "bias")]
        names += [f"{self.root}sigma_map.mlp.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")]

        def compute(tensor, weight, bias, *sigma_map):
            conditioning = _conditioning(sigma, *(part.double() for part in sigma_map))
            modulation = weight.double() @ conditioning + bias.double()
            return apply(tensor.double(), modulation.chunk(num_chunks)[chunk])

        return Recipe((name, *names), f"fold adaLN at sigma {sigma:g}", compute)


def _scale_rows(tensor: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return tensor * (gate if tensor.ndim == 1 else gate[:, None])


def _conditioning(sigma: float, weight_0, bias_0, weight_2, bias_2) -> torch.Tensor:
    """The input of the modulation's linear layer, `(cond_dim,)`: sinusoids of sigma, a two-layer MLP, and a SiLU."""
    half = weight_0.shape[1] // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=weight_0.device).double() / half)
    features = torch.cat((torch.cos(sigma * frequencies), torch.sin(sigma * frequencies)))
    silu = torch.nn.functional.silu
    return silu(weight_2 @ silu(weight_0 @ features + bias_0) + bias_2)
