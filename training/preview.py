# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A preview of a run: its first rows as they will be masked, its cost, and the memory that it needs."""

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import StreamedExamples, load_tokenizer, spread
from ..modeling_loopmdm import LoopMDMForMaskedLM
from ..objective import find_model
from .arguments import TrainConfig
from .loop_schedules import LoopSchedule, set_num_train_loops
from .memory import Shape, StepSettings, training_memory
from .run import CHECKPOINTS, RunParts, check_run, load_trainable, make_optimizer, make_parts, rows_of_step
from .trainer import training_flops

# Micro-batches on which lengths and masks are counted
_SAMPLES = 16
# The most seconds that timing a step may take, and the most parameters of a model for which it is done
_CHEAP_SECONDS, _CHEAP_PARAMETERS = 10.0, 5e8
# If no step is timed: the share of the speed of a large matrix product that training reaches, a guess
_EFFICIENCY = 0.5


@dataclasses.dataclass
class Preview:
    """
    The result of [`preview`].

    Args:
        rows (`list[list[tuple[str, str]]]`): The first rows of the first step: pieces of text, each of which is
            `"given"` (never learnt), `"visible"` (learnt in other steps) or `"masked"` (learnt in this one).
        num_loops (`int`): S of the first step.
        facts (`dict`): Rows, tokens, steps, loops, FLOPs and seconds of the run.
        is_measured (`bool`): Whether the seconds were measured on a step, and not estimated.
        memory (`dict[str, int]`): Bytes that each process needs, without sharding, by what they hold.
    """

    rows: list[list[tuple[str, str]]]
    num_loops: int
    facts: dict[str, Any]
    is_measured: bool
    memory: dict[str, int]


def preview(config: TrainConfig, resume: bool = False, num_rows: int = 3) -> Preview:
    """
    Examines a run without starting it, and writes nothing.

    Args:
        config: The run.
        resume (`bool`, defaults to `False`): As in [`train`].
        num_rows (`int`, defaults to 3): Most rows to show.

    Raises:
        ValueError: Whatever the run would raise before its first step.
    """
    check_run(config, resume)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    parts = make_parts(config, tokenizer, Path(config.output).expanduser() / CHECKPOINTS)
    batches = _sample_batches(parts)
    shapes = []
    for batch in batches:
        rows, length = batch["input_ids"].shape
        shapes.append(Shape(rows, length, int(batch["loss_weights"].count_nonzero())))
    arguments, schedule = parts.arguments, parts.schedule
    steps = _num_steps(parts)
    micro_batches = steps * arguments.gradient_accumulation_steps  # of a process
    shares = _loop_shares(schedule)
    mean_loops = sum(loops * share for loops, share in enumerate(shares, start=1))
    model = _empty_model(parts)
    flops = sum(
        share * _flops(parts, model, shape, loops) / len(shapes)
        for loops, share in enumerate(shares, start=1)
        for shape in shapes
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    timed = batches[0], shapes[0], round(mean_loops)
    seconds, is_measured = _seconds(parts, timed, flops, num_parameters)
    processes = arguments.world_size
    facts = {
        **_data_facts(parts),
        "steps": steps,
        "rows a step": rows_of_step(arguments),
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
    return Preview(shown, loops, facts, is_measured, _memory(parts, model, shapes[0]))


# Rows


def _sample_batches(parts: RunParts) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of the collator, spread over the run; the first is the run's first."""
    size = parts.arguments.train_batch_size
    source: Any = parts.stream
    if isinstance(source, StreamedExamples):
        source = list(itertools.islice(source, size * _SAMPLES))
    batches = (range(start, min(start + size, len(source))) for start in spread(range(0, len(source), size), _SAMPLES))
    return [parts.collator([source[i] for i in batch]) for batch in batches]


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
    """The text that each token adds."""
    pieces, before = [], ""
    for i in range(len(ids)):
        start = max(0, i - 8)  # the text of a token depends on few tokens before it
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
    """The number of optimiser steps; the stream of a run by epochs holds whole ones."""
    if parts.arguments.max_steps > 0:
        return parts.arguments.max_steps
    return len(parts.stream) // rows_of_step(parts.arguments)


def _loop_shares(schedule: LoopSchedule, points: int = 200) -> list[float]:
    """The shares of the steps with S = 1, ..., max_loops."""
    return torch.stack([schedule.probabilities((i + 0.5) / points) for i in range(points)]).mean(0).tolist()


def _flops(parts: RunParts, model: nn.Module, shape: Shape, loops: int) -> float:
    """FLOPs of a micro-batch, counted as in the log."""
    config, masked = parts.config, shape.masked / shape.rows
    settings = config.gradient_loops, config.checkpoint_loops, parts.arguments.gradient_checkpointing
    return training_flops(find_model(model), shape.rows, shape.length, loops, masked, *settings)


# Memory


def _empty_model(parts: RunParts) -> nn.Module:
    """The model to train, on the meta device, where it takes no memory."""
    with torch.device("meta"):
        model = LoopMDMForMaskedLM._from_config(parts.model_config, dtype=getattr(torch, parts.config.dtype))
    lora = parts.lora
    if parts.adapter is not None:
        from peft import PeftConfig

        lora = PeftConfig.from_pretrained(parts.adapter)
        lora.inference_mode = False
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    return model.train()


def _memory(parts: RunParts, model: nn.Module, shape: Shape) -> dict[str, int]:
    """Bytes that a process needs at S_max."""
    config, arguments = parts.config, parts.arguments
    settings = StepSettings(
        getattr(torch, config.dtype),
        torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None,
        config.optimizer,
        config.ema_decay is not None,
        config.gradient_loops,
        config.checkpoint_loops,
        arguments.gradient_checkpointing,
    )
    return training_memory(model, shape, parts.schedule.max_loops, settings)


# Time


def _seconds(
    parts: RunParts, timed: tuple[dict[str, torch.Tensor], Shape, int], flops: float, num_parameters: int
) -> tuple[float, bool]:
    """
    Seconds of a micro-batch of `flops`, and whether they were measured, which is done on `timed`: a batch, its shape,
    and its loops.
    """
    batch, shape, loops = timed
    config, device = parts.config, parts.arguments.device
    speed = _EFFICIENCY * _matmul_speed(device, parts.arguments.bf16)
    if num_parameters > _CHEAP_PARAMETERS or 3 * flops / speed > _CHEAP_SECONDS:
        return flops / speed, False
    model = load_trainable(parts).to(device).train()
    looped = find_model(model)
    looped.model.gradient_loops, looped.model.checkpoint_loops = config.gradient_loops, config.checkpoint_loops
    optimizer = make_optimizer(parts, model)
    if optimizer is None:
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5)
    set_num_train_loops(model, loops)
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    half = torch.bfloat16 if parts.arguments.bf16 else torch.float16
    seconds = math.inf
    for _ in range(3):  # the first one warms up, and any other may be disturbed
        start = time.perf_counter()
        with torch.autocast(device.type, half, enabled=parts.arguments.bf16 or parts.arguments.fp16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds = min(seconds, time.perf_counter() - start)
    return seconds * flops / _flops(parts, model, shape, loops), True


def _matmul_speed(device: torch.device, bf16: bool) -> float:
    """FLOPs per second of a large matrix product."""
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
