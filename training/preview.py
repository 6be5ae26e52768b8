# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A run before it is run: its first rows as they will be masked, what it costs, and what it takes in memory."""

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..data import adapter_base, load_tokenizer
from ..data.stream import StreamedExamples
from ..modeling_loopmdm import LoopMDMForMaskedLM
from ..objective import find_model
from .adapters import lora_config
from .arguments import TrainConfig
from .loop_schedules import set_num_train_loops
from .optimizer import MuonAdamW
from .run import CHECKPOINTS, RunParts, check_run, load_trainable, make_optimizer, make_parts
from .trainer import training_flops

# Micro-batches that lengths and masks are counted on
_SAMPLES = 16
# A step is run and timed where that takes about so many seconds, and the model has at most so many parameters.
_CHEAP_SECONDS, _CHEAP_PARAMETERS = 10.0, 5e8
# Share of the speed of a large matrix product that training reaches, where no step is timed; a guess
_EFFICIENCY = 0.5


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
    check_run(config, output, resume)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    parts = make_parts(config, tokenizer, output / CHECKPOINTS)
    batches = _sample_batches(parts)
    arguments, schedule = parts.arguments, parts.schedule
    steps = _num_steps(parts)
    micro_batches = steps * arguments.gradient_accumulation_steps  # of a process
    positions = _mean([batch["input_ids"].numel() for batch in batches])
    with FakeTensorMode():
        model = _fake_model(config, parts)
        flops = _expected_flops(config, parts, model, batches)
        memory = _memory(config, parts, model, batches[0])
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    seconds, is_measured = _seconds(config, tokenizer, parts, batches[0], flops, num_parameters)
    processes = arguments.world_size
    facts = {
        **_data_facts(parts),
        "steps": steps,
        "rows a step": arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes,
        "tokens of all steps": round(positions * micro_batches * processes),
        "parameters": num_parameters,
        "trained parameters": trained,
        "loops": f"1 to {schedule.max_loops}, on average {_loop_shares(schedule) @ torch.arange(1, schedule.max_loops + 1.0):.2f}",
        "training FLOPs": float(flops * micro_batches * processes),
        "seconds": seconds * micro_batches,
    }
    loops = schedule.draw(arguments.seed, 0, steps)
    return Preview(_show_rows(tokenizer, batches[0], num_rows), loops, facts, is_measured, memory)


# Rows


def _sample_batches(parts: RunParts) -> list[dict[str, torch.Tensor]]:
    """Micro-batches spread over the run, as the collator makes them; the first is the run's first."""
    size = parts.arguments.per_device_train_batch_size
    if isinstance(parts.stream, StreamedExamples):
        rows = list(itertools.islice(parts.stream, size * _SAMPLES))
        starts, source = range(0, len(rows), size), rows
    else:
        count = math.ceil(len(parts.stream) / size)
        starts = [i * count // min(count, _SAMPLES) * size for i in range(min(count, _SAMPLES))]
        source = parts.stream
    total = len(source)
    return [parts.collator([source[i] for i in range(start, min(start + size, total))]) for start in starts]


def _show_rows(tokenizer: Any, batch: dict[str, torch.Tensor], num_rows: int) -> list[list[tuple[str, str]]]:
    labels, weights, real = batch["labels"], batch["loss_weights"], batch["attention_mask"].bool()
    clean = torch.where(labels == -100, batch["input_ids"], labels)
    rows = []
    for i in range(min(num_rows, len(clean))):
        kinds = [
            "masked" if w else "given" if n == -100 else "visible" for n, w in zip(labels[i], weights[i], strict=True)
        ]
        pieces = _pieces(tokenizer, clean[i].tolist())
        rows.append([pair for pair, is_real in zip(zip(pieces, kinds, strict=True), real[i], strict=True) if is_real])
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


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _loop_shares(schedule: Any, points: int = 200) -> torch.Tensor:
    """The share of the steps that have S = 1, ..., max_loops, `(max_loops,)`, float64."""
    return torch.stack([schedule.probabilities((i + 0.5) / points) for i in range(points)]).mean(0)


def _expected_flops(
    config: TrainConfig, parts: RunParts, model: nn.Module, batches: list[dict[str, torch.Tensor]]
) -> float:
    """Of a micro-batch, over the loops that are drawn, as the log counts them."""
    shares = _loop_shares(parts.schedule)
    return float(
        sum(
            share * _mean([_flops(config, parts, model, batch, loops) for batch in batches])
            for loops, share in enumerate(shares.tolist(), start=1)
            if share > 0
        )
    )


def _flops(
    config: TrainConfig, parts: RunParts, model: nn.Module, batch: dict[str, torch.Tensor], loops: int
) -> float:
    looped = find_model(model)
    head = looped.flops(1, 1, 1, 1) - looped.flops(1, 1, 1, 0)
    rows, length = batch["input_ids"].shape
    settings = config.gradient_loops, config.checkpoint_loops, parts.arguments.gradient_checkpointing
    masked = int((batch["loss_weights"] != 0).sum())
    return training_flops(looped, rows, length, loops, 0, *settings) + 3 * head * masked


# Memory


def _fake_model(config: TrainConfig, parts: RunParts) -> nn.Module:
    """The model that is trained, in shapes alone: it takes no memory, whatever its size."""
    model = LoopMDMForMaskedLM._from_config(parts.model_config, dtype=getattr(torch, config.dtype))
    lora = None
    if config.lora is not None:
        lora = lora_config(parts.model_config, **config.lora)
    elif config.model is not None and adapter_base(config.model) is not None:
        from peft import PeftConfig

        lora = PeftConfig.from_pretrained(config.model)
        lora.inference_mode = False
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora)
    return model.train()


def _memory(config: TrainConfig, parts: RunParts, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Bytes of a process at S_max."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    states = 2 * trained_bytes  # AdamW's two means
    if config.optimizer == "muon":
        muon = MuonAdamW(model, lr=1.0).muon.param_groups[0]["params"]
        states -= sum(parameter.nbytes for parameter in muon)  # of matrices it keeps one
    weights = sum(parameter.nbytes for parameter in model.parameters())
    loops = parts.schedule.max_loops
    rows, length = batch["input_ids"].shape
    found = {
        "weights": weights,
        "gradients": trained_bytes,
        "optimiser": states,
        f"activations at {loops} loops": _activations(config, parts, model, batch, loops),
    }
    if config.ema_decay is not None:
        found["moving average"] = weights
    return {**found, "together": sum(found.values())}


def _activations(
    config: TrainConfig, parts: RunParts, model: nn.Module, batch: dict[str, torch.Tensor], loops: int
) -> int:
    """
    Bytes that the forward pass keeps for the backward pass, counted by running it on shapes alone; and the gradient of
    the logits, which is there with them.
    """
    looped = find_model(model)
    settings = parts.model_config
    hidden = batch["input_ids"].numel() * settings.hidden_size * getattr(torch, config.dtype).itemsize
    again = 0  # what is kept to compute layers again
    if parts.arguments.gradient_checkpointing:
        # Of every layer its input, and of one all that it computes
        again, run_loops = settings.num_executed_layers(loops) * hidden, 1
    elif config.checkpoint_loops:
        again, run_loops = loops * hidden, 1  # of every loop its input, and of one all that it computes
    else:
        run_loops = loops if config.gradient_loops is None else min(loops, config.gradient_loops)
    masked = int((batch["loss_weights"] != 0).sum())
    body = _saved(config, parts, looped, batch["input_ids"].shape, run_loops)
    if parts.arguments.gradient_checkpointing:
        body //= settings.num_hidden_layers
    size = getattr(torch, config.dtype).itemsize
    # The logits, in float32 if they are not, the log of their softmax, and the gradient
    logits = masked * settings.vocab_size * (size + (4 if size < 4 else 0) + 4 + 4)
    return body + again + logits


def _saved(config: TrainConfig, parts: RunParts, looped: nn.Module, shape: torch.Size, loops: int) -> int:
    """Bytes that the layers keep for the backward pass, parameters not counted."""
    seen: dict[int, tuple[int, Any]] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in looped.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    # Embeddings, as the check of token ids reads them
    embeds = torch.zeros(*shape, parts.model_config.hidden_size, dtype=getattr(torch, config.dtype))
    embeds.requires_grad_(config.lora is None)
    half = torch.bfloat16 if parts.arguments.bf16 else torch.float16
    uses_half = parts.arguments.bf16 or parts.arguments.fp16
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", half, enabled=uses_half),
    ):
        output = looped.model(inputs_embeds=embeds, num_loops=loops)  # kept alive, and all that it needs with it
    found = sum(size for size, _ in seen.values())
    del output
    return found


# Time


def _seconds(
    config: TrainConfig,
    tokenizer: Any,
    parts: RunParts,
    batch: dict[str, torch.Tensor],
    flops: float,
    num_parameters: int,
) -> tuple[float, bool]:
    """Of a micro-batch, and whether one was run to find out."""
    device = parts.arguments.device
    speed = _EFFICIENCY * _matmul_speed(device, parts.arguments.bf16)
    if num_parameters > _CHEAP_PARAMETERS or 2 * flops / speed > _CHEAP_SECONDS:
        return flops / speed, False
    model = load_trainable(config, tokenizer, parts).to(device).train()
    looped = find_model(model)
    looped.model.gradient_loops, looped.model.checkpoint_loops = config.gradient_loops, config.checkpoint_loops
    optimizer = make_optimizer(config, model, parts.arguments)
    if optimizer is None:
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5)
    loops = max(
        1, round(float(_loop_shares(parts.schedule) @ torch.arange(1, parts.schedule.max_loops + 1.0).double()))
    )
    set_num_train_loops(model, loops)
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    half = torch.bfloat16 if parts.arguments.bf16 else torch.float16
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        with torch.autocast(device.type, half, enabled=parts.arguments.bf16 or parts.arguments.fp16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - start
    return seconds * flops / _flops(config, parts, model, batch, loops), True


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
