# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""References for the tests of the model: transformers' own Llama, Qwen and GPT-2, unrolled and made bidirectional, and
mid run on every position at every loop, whatever has stopped."""

import copy
from collections.abc import Callable
from itertools import groupby, pairwise

import torch
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM

from loopmdm import LoopMDMForMaskedLM


def groups(mask: torch.Tensor, documents: torch.Tensor | None = None) -> list[list[list[int]]]:
    """Of every row the columns of its real tokens, document by document."""
    rows = []
    for row, real in enumerate(mask):
        columns = range(len(real))
        ids = [0] * len(columns) if documents is None else documents[row].tolist()
        parts = [[c for c in part if real[c]] for _, part in groupby(columns, ids.__getitem__)]
        rows.append([part for part in parts if part])
    return rows


def as_gpt2(ours: LoopMDMForMaskedLM) -> dict[str, torch.Tensor]:
    """The weights of a model with learned positions under GPT-2's names."""
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.embed_positions": "transformer.wpe",
        "model.norm": "transformer.ln_f",
        "model.layers": "transformer.h",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "up_proj": "c_fc",
        "down_proj": "c_proj",
    }
    weights = {}
    for name, tensor in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = tensor.t() if ".h." in name else tensor
    for name in [name for name in weights if "q_proj" in name]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("self_attn.q_proj", "attn.c_attn")] = torch.cat(parts, -1)
    return weights


def transformers_model(ours: LoopMDMForMaskedLM, num_loops: int) -> PreTrainedModel:
    """
    A model of transformers with the same weights, whose list of layers holds those of mid `num_loops` times. Layers
    are shared, so that gradients of all loops add up.
    """
    config = ours.config
    if config.position_embedding_type == "learned":
        cls = GPT2LMHeadModel
    elif config.use_qk_norm:
        cls = Qwen3ForCausalLM
    else:
        only_qkv = config.attention_bias and not config.attention_output_bias
        cls = Qwen2ForCausalLM if only_qkv else LlamaForCausalLM
    fields = cls.config_class.__dataclass_fields__.keys() & type(config).__annotations__
    shared = {name: copy.deepcopy(getattr(config, name)) for name in fields}
    if cls is GPT2LMHeadModel:
        shared |= {
            "n_embd": config.hidden_size,
            "n_layer": config.num_hidden_layers,
            "n_head": config.num_attention_heads,
            "n_positions": config.max_position_embeddings,
            "n_inner": config.intermediate_size,
            "activation_function": config.hidden_act,
            "layer_norm_epsilon": config.rms_norm_eps,
        }
    theirs = cls(cls.config_class(**shared)).eval().to(ours.dtype)
    theirs.load_state_dict(as_gpt2(ours) if cls is GPT2LMHeadModel else ours.state_dict())
    if ours.dtype == torch.float64:
        # Their norms round to float32; torch's own does not.
        for name, module in list(theirs.named_modules()):
            if hasattr(module, "variance_epsilon"):
                norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
                norm.weight = module.weight
                theirs.set_submodule(name, norm)
    inner, where = theirs.base_model, "h" if cls is GPT2LMHeadModel else "layers"
    layers = list(getattr(inner, where))
    mid = layers[config.loop_start : config.loop_end]
    unrolled = layers[: config.loop_start] + mid * num_loops + layers[config.loop_end :]
    setattr(inner, where, nn.ModuleList(unrolled))
    theirs.config.num_hidden_layers = len(unrolled)
    theirs.config.layer_types = ["full_attention"] * len(unrolled)
    if config.loop_update == "damped":
        begun = []
        mid[0].register_forward_pre_hook(lambda _, args: begun.append(args[0]))
        mid[-1].register_forward_hook(lambda _, args, new: begun[-1] + (new - begun[-1]) / num_loops)
    return theirs


def transformers_logits(
    ours: LoopMDMForMaskedLM,
    theirs: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of `transformers_model`, with what a token sees and where it stands written out, token by token."""
    length, block_size = ids.shape[1], ours.config.attention_block_size or ids.shape[1]
    positions, sources = torch.zeros_like(ids), torch.arange(length).repeat(len(ids), 1)
    visible = torch.zeros(len(ids), 1, length, length, dtype=torch.bool)
    for row, parts in enumerate(groups(mask, documents)):
        for part in parts:
            for position, column in enumerate(part):
                positions[row, column] = position
                sources[row, column] = part[max(position - 1, 0)]
                visible[row, 0, column, part[: (position // block_size + 1) * block_size]] = True
    additive = torch.zeros(visible.shape, dtype=ours.dtype).masked_fill(~visible, torch.finfo(ours.dtype).min)
    logits = theirs(ids, attention_mask=additive, position_ids=positions, use_cache=False).logits
    if ours.config.shift_logits:
        logits = torch.stack([row[columns] for row, columns in zip(logits, sources, strict=True)])
    return logits


def run_layers(model: LoopMDMForMaskedLM, indices, states: torch.Tensor, context) -> torch.Tensor:
    """The layers called one after the other."""
    for index in indices:
        states = model.model.layers[index](
            states, attention_mask=context.attention_mask, position_embeddings=context.position_embeddings
        )
    return states


def masks_and_their_sources(model: LoopMDMForMaskedLM, ids: torch.Tensor, mask, documents=None) -> torch.Tensor:
    """Positions that are [MASK], and with `shift_logits` those whose states predict one."""
    masked = ids == model.config.mask_token_id
    found = masked & mask.bool()
    for row, parts in enumerate(groups(mask, documents) if model.config.shift_logits else []):
        for part in parts:
            for before, column in pairwise(part):
                found[row, before] |= bool(masked[row, column])
    return found


def run_while_moving(
    model: LoopMDMForMaskedLM, ids: torch.Tensor, num_loops: int, goes_on: Callable, mask=None, documents=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Logits, and how often each position moved. `goes_on(index, before, after)` says after every loop which positions
    `(batch_size, length)` move on. Mid runs on all: what has stopped enters each layer as in its last loop, and what
    becomes of it is thrown away.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    start, stop = model.config.loop_start, model.config.loop_end
    states, context = model.model.prelude(ids, mask, document_ids=documents)
    moving, counts, inputs = mask.bool(), torch.zeros_like(ids), {}
    for loop in range(num_loops):
        current = states
        for index in range(start, stop):
            inputs[index] = torch.where(moving[..., None], current, inputs.get(index, current))
            current = run_layers(model, [index], inputs[index], context)
        before, states = states, torch.where(moving[..., None], current, states)
        counts += moving
        moving = moving & goes_on(loop, before, states)
    states = model.align(model.model.readout(states, context), mask, documents)
    return model.logits(states), counts
