# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The training pass of the library's model, computed in bfloat16 from compiled layers; see train.py."""

import torch
from torch.nn import functional

MASK = 1


def _norm(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    states = states.float()
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6) * weight


def layer(states, qkv, out, gate_up, down, norm1, norm2, norm_q, norm_k, heads: int):
    """One pre-norm layer. States are float32, products in the dtype of the matrices."""
    batch, length, width = states.shape
    dtype = qkv.dtype
    query, key, value = (
        functional.linear(_norm(states, norm1).to(dtype), qkv).view(batch, length, 3, heads, -1).unbind(2)
    )
    query, key = _norm(query, norm_q), _norm(key, norm_k)
    query = (query * query.shape[-1] ** -0.5).to(dtype).transpose(1, 2)
    key, value = key.to(dtype).transpose(1, 2), value.transpose(1, 2)
    attention = (query @ key.transpose(2, 3)).float().softmax(-1).to(dtype) @ value
    states = states + functional.linear(attention.transpose(1, 2).reshape(batch, length, width), out)
    gate, up = functional.linear(_norm(states, norm2).to(dtype), gate_up).chunk(2, -1)
    return states + functional.linear((functional.silu(gate.float()) * up.float()).to(dtype), down)


def read(states, norm, embeddings):
    """Logits; [PAD] is a digit like others, as in the library, and [MASK] none."""
    logits = _norm(states, norm) @ embeddings.t()
    return logits.index_fill(-1, torch.tensor([MASK]), float("-inf"))


def loss(states, norm, embeddings, targets, weights):
    logits = _norm(states, norm) @ embeddings.t()
    logits = torch.where(torch.arange(logits.shape[-1]) == MASK, -1e9, logits)
    chosen = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return -(chosen * weights).sum()


_layer = torch.compile(layer, dynamic=False)
_loss = torch.compile(loss, dynamic=False)


class Looped:
    """A [`LoopMDMForMaskedLM`] with learned positions, query/key norm and a gated MLP, from its own weights."""

    def __init__(self, model):
        self.model, self.head, self.config = model.model, model.lm_head, model.config

    def weights(self) -> list[tuple]:
        """Once for each pass: gradients go through it."""
        parts = []
        for block in self.model.layers:
            attention, mlp = block.self_attn, block.mlp
            parts.append(
                (
                    torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)).bfloat16(),
                    attention.o_proj.weight.bfloat16(),
                    torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).bfloat16(),
                    mlp.down_proj.weight.bfloat16(),
                    block.input_layernorm.weight,
                    block.post_attention_layernorm.weight,
                    attention.q_norm.weight,
                    attention.k_norm.weight,
                )
            )
        return parts

    def run(self, parts: list[tuple], states: torch.Tensor) -> torch.Tensor:
        for part in parts:
            states = _layer(states, *part, heads=self.config.num_attention_heads)
        return states

    def losses(self, inputs, targets, weights, loops: int, deep: bool):
        """The weighted loss after every loop, or the last, and the last one's confidence."""
        start, stop = self.config.loop_start, self.config.loop_end
        parts = self.weights()
        head, mid, tail = parts[:start], parts[start:stop], parts[stop:]
        norm, embeddings = self.model.norm.weight, self.head.weight
        embedded = self.model.embed_tokens(inputs) + self.model.embed_positions.weight
        states, found = self.run(head, embedded), []
        for loop in range(loops):
            states = self.run(mid, states)
            if deep or loop == loops - 1:
                final = self.run(tail, states)
                found.append(_loss(final, norm, embeddings, targets, weights))
        with torch.no_grad():
            confidence = read(final, norm, embeddings).softmax(-1).amax(-1)
        return found, confidence
