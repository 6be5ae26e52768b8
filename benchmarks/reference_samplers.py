# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What generation.py compares with: the authors' code from folders, or a plain model and samplers of our own."""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from loopmdm import LoopMDMForMaskedLM

LLADA, FAST_DLLM = "LLaDA", "Fast-dLLM"
Samplers = dict[str, Callable[[], torch.Tensor]]


class PlainModel(nn.Module):
    """
    A transformer as others write it, over the weights of a LoopMDM and called like Fast-dLLM's: no position is left
    out anywhere, and with `num_loops` above 1 mid's layers simply stand in the list so many times.
    """

    def __init__(self, model: LoopMDMForMaskedLM, num_loops: int, max_length: int):
        super().__init__()
        config = self.config = model.config
        layers = list(model.model.layers)
        start, stop = config.loop_start, config.loop_end
        self.layers = nn.ModuleList(layers[:start] + layers[start:stop] * num_loops + layers[stop:])
        self.embedding, self.norm = model.model.embed_tokens.weight, model.model.norm.weight
        self.lm_head = model.lm_head.weight
        places = torch.arange(max_length, device=self.embedding.device)[None]
        self.cos, self.sin = (table[:, None] for table in model.model.rotary_emb(self.embedding[None, :1], places))

    def _norm(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dtype, states = states.dtype, states.float()
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return weight * states.to(dtype)

    @staticmethod
    def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = states.chunk(2, dim=-1)
        return (states * cos + torch.cat((-second, first), dim=-1) * sin).to(states.dtype)

    def forward(
        self,
        tokens: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        replace_position: int | None = None,
    ) -> CausalLMOutputWithPast:
        """
        Logits at all `tokens`, `(batch_size, length)`, and the keys and values of every layer. Given ones are those of
        the positions before, or, with `replace_position`, the place of the first token, those of all positions.
        """
        start = replace_position or (past_key_values[0][0].shape[2] if past_key_values else 0)
        stop = start + tokens.shape[1]
        cos, sin = self.cos[:, :, start:stop], self.sin[:, :, start:stop]
        states, present = functional.embedding(tokens, self.embedding), []
        shape = (*tokens.shape, -1, self.config.head_dim)
        for index, layer in enumerate(self.layers):
            attention, mlp = layer.self_attn, layer.mlp
            normed = self._norm(states, layer.input_layernorm.weight)
            query, key, value = (
                functional.linear(normed, projection.weight).view(shape).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query, key = self._rotate(query, cos, sin), self._rotate(key, cos, sin)
            if replace_position is not None:
                keys, values = past_key_values[index]
                keys[:, :, start:stop], values[:, :, start:stop] = key, value
                key, value = keys, values
            elif past_key_values is not None:
                key, value = (
                    torch.cat(pair, dim=2) for pair in zip(past_key_values[index], (key, value), strict=True)
                )
            present.append((key, value))
            attended = functional.scaled_dot_product_attention(query, key, value)
            attended = attended.transpose(1, 2).reshape(*tokens.shape, -1)
            states = states + functional.linear(attended, attention.o_proj.weight)
            normed = self._norm(states, layer.post_attention_layernorm.weight)
            gate = functional.silu(functional.linear(normed, mlp.gate_proj.weight))
            up = functional.linear(normed, mlp.up_proj.weight)
            states = states + functional.linear(gate * up, mlp.down_proj.weight)
        logits = functional.linear(self._norm(states, self.norm), self.lm_head)
        return CausalLMOutputWithPast(logits=logits, past_key_values=present)


def commit(
    logits: torch.Tensor, tokens: torch.Tensor, masked: torch.Tensor, counts: torch.Tensor, dtype: torch.dtype
) -> None:
    """Writes the `counts`, `(batch_size,)`, most probable predictions into the masked places of `tokens`."""
    predicted = logits.argmax(-1)
    probability = logits.to(dtype).softmax(-1).gather(-1, predicted[..., None]).squeeze(-1)
    confidence = torch.where(masked, probability, -torch.inf)
    for row in range(len(tokens)):
        chosen = confidence[row].topk(int(counts[row])).indices
        tokens[row, chosen] = predicted[row, chosen]


@torch.inference_mode()
def plain_generate(
    model: PlainModel, prompt: torch.Tensor, args: argparse.Namespace, cache: str | None, dtype: torch.dtype
) -> torch.Tensor:
    """LLaDA's sampler, and Fast-dLLM's two with `cache`; `dtype` is that of the softmax."""
    mask = model.config.mask_token_id
    tokens = torch.cat((prompt, prompt.new_full((len(prompt), args.new_tokens), mask)), dim=1)
    for start in range(prompt.shape[1], tokens.shape[1], args.block_length):
        stop = start + args.block_length
        left = (tokens[:, start:stop] == mask).sum(-1)
        share, remainder = left // args.steps, left % args.steps
        past = None
        for step in range(args.steps):
            # What the pass computes, and so what it returns logits of.
            first = 0 if past is None else start
            last = stop if past is not None and cache == "dual" else tokens.shape[1]
            output = model(tokens[:, first:last], past, start if past is not None and cache == "dual" else None)
            if cache == "prefix" and past is None:
                past = [(key[:, :, :start], value[:, :, :start]) for key, value in output.past_key_values]
            elif cache == "dual":
                past = output.past_key_values
            masked = tokens[:, first:last] == mask
            masked[:, stop - first :] = False
            commit(output.logits, tokens[:, first:last], masked, share + (step < remainder), dtype)
    return tokens


def reference_flops(model: LoopMDMForMaskedLM, args: argparse.Namespace, cache: str | None, loops: int) -> int:
    """FLOPs of one row: in every pass all layers and the head, at all positions that it computes."""
    length, total = args.prompt_length + args.new_tokens, 0
    for start in range(args.prompt_length, length, args.block_length):
        later = {None: length, "prefix": length - start, "dual": args.block_length}[cache]
        for width in [length, *[later] * (args.steps - 1)]:
            total += model.config.pass_flops(width, length, width, width, width * loops)
    return total


def load_file_as_module(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def authors_samplers(source: Path, prompt: torch.Tensor, args: argparse.Namespace) -> tuple[nn.Module, Samplers]:
    """Fast-dLLM's model with the weights of `source`, and the authors' samplers over it."""
    folder = args.fast_dllm / "llada"
    sys.path.insert(0, str(folder))  # its generate.py imports `model`
    llada = load_file_as_module(args.llada / "generate.py", "llada_generate")
    fast = load_file_as_module(folder / "generate.py", "fast_dllm_generate")
    from model.modeling_llada import LLaDAConfig, LLaDAModelLM

    config = LLaDAConfig.from_pretrained(source)
    config.use_cache = False  # transformers 5 does not set it
    with torch.device(args.device):
        model = LLaDAModelLM(config).to(getattr(torch, args.dtype))
    model.load_state_dict(load_file(source / "model.safetensors"))
    model.to(args.device).eval()
    settings = {
        "steps": args.steps * args.new_tokens // args.block_length,
        "gen_length": args.new_tokens,
        "block_length": args.block_length,
        "mask_id": config.mask_token_id,
    }
    return model, {
        LLADA: lambda: llada.generate(model, prompt, **settings),
        FAST_DLLM: lambda: fast.generate(model, prompt, **settings)[0],
        f"{FAST_DLLM} prefix": lambda: fast.generate_with_prefix_cache(model, prompt, **settings)[0],
        f"{FAST_DLLM} dual": lambda: fast.generate_with_dual_cache(model, prompt, **settings)[0],
    }


def own_samplers(
    model: LoopMDMForMaskedLM, prompt: torch.Tensor, args: argparse.Namespace
) -> tuple[nn.Module, Samplers]:
    """The same from this file. LLaDA's softmax is in the model's dtype, as since June 2025; Fast-dLLM's in float64."""
    plain = PlainModel(model, 1, args.prompt_length + args.new_tokens)
    double = torch.float64
    return plain, {
        LLADA: lambda: plain_generate(plain, prompt, args, None, getattr(torch, args.dtype)),
        FAST_DLLM: lambda: plain_generate(plain, prompt, args, None, double),
        f"{FAST_DLLM} prefix": lambda: plain_generate(plain, prompt, args, "prefix", double),
        f"{FAST_DLLM} dual": lambda: plain_generate(plain, prompt, args, "dual", double),
    }


def assert_positions_differ(reference: nn.Module, inputs: Any, output: Any) -> None:
    """A hook: equal logits at two places would make equal tokens say nothing."""
    first, last = output.logits[:, 0], output.logits[:, -1]
    if torch.equal(first, last):
        raise SystemExit("A reference has the same logits at its first and its last position: its tokens say nothing.")
