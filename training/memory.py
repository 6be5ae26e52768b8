# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The memory of a training step, computed from shapes alone, so for models of any size."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..objective import find_model
from .optimizer import MuonAdamW


class Shape(NamedTuple):
    """A micro-batch: its rows, their length, and its masked tokens."""

    rows: int
    length: int
    masked: int


class StepSettings(NamedTuple):
    """Settings of a run that change the memory of a step; the names in comments are those of `TrainConfig`."""

    dtype: torch.dtype = torch.float32  # of the weights
    autocast: torch.dtype | None = None  # `bf16` and `fp16`
    optimizer: str = "adamw"
    has_average: bool = False  # `ema_decay`
    gradient_loops: int | None = None
    checkpoint_loops: bool = False
    checkpoint_layers: bool = False  # `gradient_checkpointing`


def training_memory(model: nn.Module, shape: Shape, loops: int, settings: StepSettings) -> dict[str, int]:
    """
    Bytes that a process needs, without sharding, by what they hold.

    The gradient of a weight takes as much as the weight, AdamW's state twice as much, and Muon's as much again.
    Activations are the tensors that the forward pass keeps for the backward pass at this number of loops, and the
    logits of masked tokens with their gradient. Attention masks and temporary buffers are not counted.

    Args:
        model: A [`LoopMDMForMaskedLM`], with its adapter if it has one; it may be on the meta device.
        shape ([`Shape`]): The micro-batch.
        loops (`int`): S.
        settings ([`StepSettings`]): The settings of the run.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    states = 2 * trained_bytes  # AdamW's two means
    if settings.optimizer == "muon":
        muon = MuonAdamW(model, lr=1.0).muon.param_groups[0]["params"]
        states -= sum(parameter.nbytes for parameter in muon)  # Muon keeps one mean
    weights = sum(parameter.nbytes for parameter in model.parameters())
    found = {
        "weights": weights,
        "gradients": trained_bytes,
        "optimiser": states,
        f"activations at {loops} loops": activations(model, shape, loops, settings),
    }
    if settings.has_average:
        # In float32 where weights are trained
        found["moving average"] = weights + sum(max(4 - one.itemsize, 0) * one.numel() for one in trained)
    return {**found, "together": sum(found.values())}


def activations(model: nn.Module, shape: Shape, loops: int, settings: StepSettings) -> int:
    """Bytes of activations; arguments as in [`training_memory`]."""
    config, size = find_model(model).config, settings.dtype.itemsize
    hidden = shape.rows * shape.length * config.hidden_size * size
    if settings.checkpoint_layers:
        # The input of every layer, and what a single layer computes, one after the other
        layer = _saved(model, shape, 1, settings) // config.num_hidden_layers
        body = config.num_executed_layers(loops) * hidden + layer
    elif settings.checkpoint_loops:  # the same, by loops
        body = loops * hidden + _saved(model, shape, 1, settings)
    else:
        kept = loops if settings.gradient_loops is None else min(loops, settings.gradient_loops)
        body = _saved(model, shape, kept, settings)
    # The logits, their copy in float32 if they are smaller, the logarithm of the softmax, and the gradient
    return body + shape.masked * config.vocab_size * (size + (4 if size < 4 else 0) + 4 + 4)


def _saved(model: nn.Module, shape: Shape, loops: int, settings: StepSettings) -> int:
    """Bytes that the layers keep for the backward pass, without the parameters."""
    looped, seen = find_model(model), dict[int, tuple[int, Any]]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    # Fake tensors have shapes but no values. Unlike meta tensors they go through the attention kernel of the run.
    with (
        FakeTensorMode(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", settings.autocast or torch.bfloat16, enabled=settings.autocast is not None),
    ):
        states = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in [*looped.model.named_parameters(), *looped.model.named_buffers()]
        }
        weights = {tensor.untyped_storage()._cdata for tensor in states.values()}
        # Embeddings instead of token ids, whose check reads values. Below an adapter they have no gradient.
        learns_all = all(parameter.requires_grad for parameter in model.parameters())
        size = (shape.rows, shape.length, looped.config.hidden_size)
        embeds = torch.zeros(size, dtype=settings.dtype, requires_grad=learns_all)
        output = torch.func.functional_call(looped.model, states, (), {"inputs_embeds": embeds, "num_loops": loops})
    found = sum(size for size, _ in seen.values())
    del output  # kept until here, as it keeps the tensors alive
    return found
