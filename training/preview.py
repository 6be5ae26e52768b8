# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A run before it is run: its first rows as they will be masked, what it costs, and what it takes in memory."""

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..data import load_tokenizer
from ..data.stream import StreamedExamples
from ..modeling_loopmdm import LoopMDMForMaskedLM
from ..objective import find_model
from .arguments import TrainConfig
from .loop_schedules import LoopSchedule, set_num_train_loops
from .optimizer import MuonAdamW
from .run import CHECKPOINTS, RunParts, check_run, load_trainable, make_optimizer, make_parts
from .trainer import training_flops

# Micro-batches that lengths and masks are counted on
_SAMPLES = 16
# A step is run and timed where that takes about so many seconds, and the model has at most so many parameters.
_CHEAP_SECONDS, _CHEAP_PARAMETERS = 10.0, 5e8
# Share of the speed of a large matrix product that training reaches, where no step is timed; a guess
_EFFICIENCY = 0.5


class Shape(NamedTuple):
    """Of a micro-batch: its rows, their length, and its masked tokens."""

    rows: int
    length: int
    masked: int


@dataclasses.dataclass
class Preview:
    """
    What [`preview`] finds.

    Args:
        rows (`list[list[tuple[str, str]]]`): The first rows of the first step: pieces of text, each of which is
            `"given"` (never learnt), `"visible"` (learnt in other steps) or `"masked"` (learnt in this one).
        num_loops (`int`): S of the first step.
        facts (`dict`): Rows, tokens, steps, loops, FLOPs and seconds of the run.
        is_measured (`bool`): Whether the seconds are those of a step that was run.
        memory (`dict[str, int]`): Bytes of each process, without sharding, by what they hold.
    """

    rows: list[list[tuple[str, str]]]
    num_loops: int
    facts: dict[str, Any]
    is_measured: bool
    memory: dict[str, int]


def preview(config: TrainConfig, resume: bool = False, num_rows: int = 3) -> Preview:
    """
    Looks at a run without starting it, and writes nothing. Raises the ValueErrors that the run would raise before its
    first step.

    Args:
        config: The run.
        resume (`bool`, defaults to `False`): As for [`train`].
        num_rows (`int`, defaults to 3): Rows to show, at most.
    """
    output = Path(config.output).expanduser()
    check_run(config, resume)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    parts = make_parts(config, tokenizer, output / CHECKPOINTS)
    batches = _sample_batches(parts)
    shapes = []
    for batch in batches:
        rows, length = batch["input_ids"].shape
        shapes.append(Shape(rows, length, int((batch["loss_weights"] != 0).sum())))
    arguments, schedule = parts.arguments, parts.schedule
    steps = _num_steps(parts)
    micro_batches = steps * arguments.gradient_accumulation_steps  # of a process
    shares = _loop_shares(schedule)
    mean_loops = sum(loops * share for loops, share in enumerate(shares, start=1))
    model = _empty_model(config, parts)
    flops = sum(
        share * _flops(config, parts, model, shape, loops) / len(shapes)
        for loops, share in enumerate(shares, start=1)
        for shape in shapes
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    timed = batches[0], shapes[0], round(mean_loops)
    seconds, is_measured = _seconds(config, tokenizer, parts, timed, flops, num_parameters)
    processes = arguments.world_size
    facts = {
        **_data_facts(parts),
        "steps": steps,
        "rows a step": arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes,
        "tokens of all steps": round(sum(one.rows * one.length for one in shapes) / len(shapes) * micro_batches)
        * processes,
        "parameters": num_parameters,
        "trained parameters": trained,
        "loops": f"1 to {schedule.max_loops}, on average {mean_loops:.2f}",
        "training FLOPs": float(flops * micro_batches * processes),
        "seconds": seconds * micro_batches,
    }
    shown = _show_rows(tokenizer, batches[0], num_rows)
    loops = schedule.draw(arguments.seed, 0, steps)
    return Preview(shown, loops, facts, is_measured, _memory(config, parts, model, shapes[0]))


# Rows


def _sample_batches(parts: RunParts) -> list[dict[str, torch.Tensor]]:
    """Micro-batches spread over the run, as the collator makes them; the first is the run's first."""
    size = parts.arguments.per_device_train_batch_size
    source: Any = parts.stream
    if isinstance(source, StreamedExamples):
        source = list(itertools.islice(source, size * _SAMPLES))
    count = math.ceil(len(source) / size)
    starts = [i * count // min(count, _SAMPLES) * size for i in range(min(count, _SAMPLES))]
    total = len(source)
    return [parts.collator([source[i] for i in range(start, min(start + size, total))]) for start in starts]


def _show_rows(tokenizer: Any, batch: dict[str, torch.Tensor], num_rows: int) -> list[list[tuple[str, str]]]:
    labels, weights, real = batch["labels"], batch["loss_weights"], batch["attention_mask"].bool()
    clean = torch.where(labels == -100, batch["input_ids"], labels)
    rows = []
    for i in range(min(num_rows, len(clean))):
        row = []
        for piece, label, weight, is_real in zip(
            _pieces(tokenizer, clean[i].tolist()), labels[i], weights[i], real[i], strict=True
        ):
            if is_real:
                row.append((piece, "masked" if weight else "given" if label == -100 else "visible"))
        rows.append(row)
    return rows


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text."""
    pieces, before = [], ""
    for i in range(len(ids)):
        start = max(0, i - 8)  # what a token adds depends on few before it
        before = tokenizer.decode(ids[start:i])
        text = tokenizer.decode(ids[start : i + 1])
        pieces.append(text[len(before) :] if text.startswith(before) and i > 0 else tokenizer.decode(ids[i : i + 1]))
    return pieces


def _data_facts(parts: RunParts) -> dict[str, Any]:
    if isinstance(parts.examples, StreamedExamples):
        return {"rows of data": "a stream"}
    lengths = [len(row["input_ids"]) for row in parts.examples]
    return {"rows of data": len(lengths), "tokens of data": sum(lengths)}


# Steps and FLOPs


def _num_steps(parts: RunParts) -> int:
    """As transformers' Trainer counts them."""
    arguments = parts.arguments
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = math.ceil(len(parts.stream) / (arguments.per_device_train_batch_size * arguments.world_size))
    return math.ceil(math.ceil(batches / arguments.gradient_accumulation_steps) * arguments.num_train_epochs)


def _loop_shares(schedule: LoopSchedule, points: int = 200) -> list[float]:
    """The share of the steps that have S = 1, ..., max_loops."""
    return torch.stack([schedule.probabilities((i + 0.5) / points) for i in range(points)]).mean(0).tolist()


def _flops(config: TrainConfig, parts: RunParts, model: nn.Module, shape: Shape, loops: int) -> float:
    """Of a micro-batch, as the log counts them."""
    looped = find_model(model)
    head = looped.flops(1, 1, 1, 1) - looped.flops(1, 1, 1, 0)
    settings = config.gradient_loops, config.checkpoint_loops, parts.arguments.gradient_checkpointing
    return training_flops(looped, shape.rows, shape.length, loops, 0, *settings) + 3 * head * shape.masked


# Memory


def _empty_model(config: TrainConfig, parts: RunParts) -> nn.Module:
    """The model that is trained, on the meta device, where it takes no memory, whatever its size."""
    with torch.device("meta"):
        model = LoopMDMForMaskedLM._from_config(parts.model_config, dtype=getattr(torch, config.dtype))
    lora = parts.lora
    if parts.adapter is not None:
        from peft import PeftConfig

        lora = PeftConfig.from_pretrained(config.model)
        lora.inference_mode = False
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    return model.train()


def _memory(config: TrainConfig, parts: RunParts, model: nn.Module, shape: Shape) -> dict[str, int]:
    """Bytes of a process at S_max."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    states = 2 * trained_bytes  # AdamW's two means
    if config.optimizer == "muon":
        muon = MuonAdamW(model, lr=1.0).muon.param_groups[0]["params"]
        states -= sum(parameter.nbytes for parameter in muon)  # of matrices it keeps one
    weights = sum(parameter.nbytes for parameter in model.parameters())
    loops = parts.schedule.max_loops
    found = {
        "weights": weights,
        "gradients": trained_bytes,
        "optimiser": states,
        f"activations at {loops} loops": _activations(config, parts, model, shape, loops),
    }
    if config.ema_decay is not None:
        found["moving average"] = weights
    return {**found, "together": sum(found.values())}


def _activations(config: TrainConfig, parts: RunParts, model: nn.Module, shape: Shape, loops: int) -> int:
    """
    Bytes that the forward pass keeps for the backward pass, counted by running it on shapes alone; and the gradient of
    the logits, which is there with them.
    """
    looped, settings = find_model(model), parts.model_config
    size = getattr(torch, config.dtype).itemsize
    hidden = shape.rows * shape.length * settings.hidden_size * size
    if parts.arguments.gradient_checkpointing:
        # Of every layer its input, and of one, in turn, what it computes
        layer = _saved(config, parts, looped, shape, 1) // settings.num_hidden_layers
        body = settings.num_executed_layers(loops) * hidden + layer
    elif config.checkpoint_loops:  # the same of loops
        body = loops * hidden + _saved(config, parts, looped, shape, 1)
    else:
        kept = loops if config.gradient_loops is None else min(loops, config.gradient_loops)
        body = _saved(config, parts, looped, shape, kept)
    # The logits, in float32 if they are not, the logarithm of their softmax, and their gradient
    return body + shape.masked * settings.vocab_size * (size + (4 if size < 4 else 0) + 4 + 4)


def _saved(config: TrainConfig, parts: RunParts, looped: nn.Module, shape: Shape, loops: int) -> int:
    """Bytes that the layers keep for the backward pass, parameters not counted."""
    seen: dict[int, tuple[int, Any]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    half = torch.bfloat16 if parts.arguments.bf16 else torch.float16
    uses_half = parts.arguments.bf16 or parts.arguments.fp16
    # Tensors of this mode have shapes, but no values. Unlike on the meta device, attention is computed as it will be.
    with (
        FakeTensorMode(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", half, enabled=uses_half),
    ):
        states = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in [*looped.model.named_parameters(), *looped.model.named_buffers()]
        }
        weights = {tensor.untyped_storage()._cdata for tensor in states.values()}
        # Embeddings, as token ids are read when they are checked
        size = (shape.rows, shape.length, parts.model_config.hidden_size)
        embeds = torch.zeros(size, dtype=getattr(torch, config.dtype), requires_grad=config.lora is None)
        inputs = {"inputs_embeds": embeds, "num_loops": loops}
        output = torch.func.functional_call(looped.model, states, (), inputs)
    found = sum(size for size, _ in seen.values())
    del output  # kept alive until now, and all that it needs with it
    return found


# Time


def _seconds(
    config: TrainConfig,
    tokenizer: Any,
    parts: RunParts,
    timed: tuple[dict[str, torch.Tensor], Shape, int],
    flops: float,
    num_parameters: int,
) -> tuple[float, bool]:
    """Of a micro-batch of `flops`, and whether one was run to find out: `timed`, a batch, its shape, and its loops."""
    batch, shape, loops = timed
    device = parts.arguments.device
    speed = _EFFICIENCY * _matmul_speed(device, parts.arguments.bf16)
    if num_parameters > _CHEAP_PARAMETERS or 3 * flops / speed > _CHEAP_SECONDS:
        return flops / speed, False
    model = load_trainable(config, tokenizer, parts).to(device).train()
    looped = find_model(model)
    looped.model.gradient_loops, looped.model.checkpoint_loops = config.gradient_loops, config.checkpoint_loops
    optimizer = make_optimizer(config, model, parts.arguments)
    if optimizer is None:
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5)
    set_num_train_loops(model, loops)
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    half = torch.bfloat16 if parts.arguments.bf16 else torch.float16
    seconds = math.inf
    for _ in range(3):  # the first one warms up, and others can be disturbed
        start = time.perf_counter()
        with torch.autocast(device.type, half, enabled=parts.arguments.bf16 or parts.arguments.fp16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds = min(seconds, time.perf_counter() - start)
    return seconds * flops / _flops(config, parts, model, shape, loops), True


def _matmul_speed(device: torch.device, bf16: bool) -> float:
    """FLOP/s of a large matrix product."""
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
