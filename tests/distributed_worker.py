# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What test_distributed.py runs, on one process in the test itself and on two under torchrun:

torchrun --nproc_per_node 2 tests/distributed_worker.py ddp|fsdp FOLDER

Every rank leaves its results in FOLDER/rank<n>.pt.
"""

import datetime
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import tiny_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from loopmdm.evaluation import nelbo
from loopmdm.training import (
    ExampleStream,
    LoopMDMTrainer,
    MaskedDiffusionCollator,
    StreamedExamples,
    set_num_train_loops,
)

MASK, PAD = 22, 0
RANKS = 2
ACCUMULATION = 2  # micro-batches of a rank per optimiser step
BATCH = 2  # rows of a micro-batch
STEPS = 4


def examples(count: int = 11, shortest: int = 3, longest: int = 9, seed: int = 0) -> list[dict]:
    """Clean sequences of different lengths, some with a prompt."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int = 1) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    rows = []
    for i in range(count):
        tokens = draw(1, 22, int(draw(shortest, longest + 1)))
        rows.append({"input_ids": tokens, "prompt_length": i % 3})
    return rows


def make_model() -> nn.Module:
    """In float64, so that what differs is no rounding."""
    return tiny_model(max_train_loops=4).double()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; a copy of others."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    # accelerate wraps some layers for checkpointing
    return {name: full(parameter) for name, parameter in model.named_parameters()}


class Recorder(TrainerCallback):
    """Collects loops and gradients of every optimiser step."""

    def __init__(self):
        self.loops, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        looped = next(module for module in model.modules() if hasattr(module, "num_train_loops"))
        self.loops.append(looped.num_train_loops)
        self.gradients.append({name: full(parameter.grad) for name, parameter in model.named_parameters()})


def trainer_args(folder: Path, world_size: int, **overrides) -> TrainingArguments:
    """Those of a run whose optimiser steps see the same micro-batches on one process as on two."""
    values = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION * RANKS // world_size,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "ddp_backend": "gloo" if world_size > 1 else None,
        "ddp_timeout": 60,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 5,
    }
    return TrainingArguments(**values | overrides)


def make_trainer(args: TrainingArguments, stream: bool = False, model: nn.Module | None = None, **kwargs):
    rows = examples()
    data = ExampleStream(rows, STEPS * ACCUMULATION * RANKS * BATCH, seed=0)
    if stream:
        rows = examples(shortest=7, longest=7)
        data = StreamedExamples(lambda: rows)
    return LoopMDMTrainer(
        make_model() if model is None else model,
        args,
        train_dataset=data,
        eval_dataset=examples(3, seed=1),
        data_collator=MaskedDiffusionCollator(MASK, PAD),
        **kwargs,
    )


def train(folder: Path, world_size: int, resume: str | None = None, stream: bool = False, trainer_kwargs=None, **args):
    """Trains, and returns all that must not depend on the number of processes."""
    recorder = Recorder()
    trainer = make_trainer(
        trainer_args(folder, world_size, **args), stream, callbacks=[recorder], **(trainer_kwargs or {})
    )
    assert trainer.args.world_size == world_size, "torchrun's processes know of each other"
    trainer.train(resume_from_checkpoint=resume)
    # Averages over the time are the machine's business.
    timed = ("runtime", "per_second")
    log = [
        {name: value for name, value in entry.items() if not name.endswith(timed)}
        for entry in trainer.state.log_history
    ]
    return {
        "loops": recorder.loops,
        "gradients": recorder.gradients,
        "weights": full_state(trainer.model),
        "log": log,
        "wrapper": type(trainer.model_wrapped).__name__,
        "flops": trainer.state.total_flos,
        "steps": trainer.state.global_step,
    }


# Runs of the trainer, by name: arguments of `train`.
RUNS = {
    "saved loops": {
        "trainer_kwargs": {"gradient_loops": 2, "checkpoint_loops": True, "eval_loops": [1, 3], "eval_samples": 4},
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
    "distilled": {"trainer_kwargs": {"distillation": 0.5, "ema_decay": 0.9, "eval_loops": [2]}, "optim": "adamw_torch"},
    "stream": {"stream": True, "max_steps": 2},
}


def run_ddp(folder: Path) -> dict:
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    results = {name: train(folder / name, world_size, **settings) for name, settings in RUNS.items()}
    checkpoint = str(folder / "saved loops" / "checkpoint-2")
    resumed = {**RUNS["saved loops"], "save_strategy": "no"}
    results["resumed"] = train(folder / "resumed", world_size, resume=checkpoint, **resumed)
    return results


# --- FSDP2 ---

LOOPS = (1, 4, 3)  # of three steps
MODES = {
    "all loops": {},
    "last loops": {"gradient_loops": 2},
    "checkpointed": {"checkpoint_loops": True},
    "both": {"gradient_loops": 2, "checkpoint_loops": True},
}


def micro_batch(index: int) -> dict[str, torch.Tensor]:
    rows = examples()
    numbers = range(BATCH * index, BATCH * (index + 1))
    return MaskedDiffusionCollator(MASK, PAD)([{**rows[i % len(rows)], "index": i} for i in numbers])


def step_gradients(model: nn.Module, step: int, batches: list[int], rank: int = 0, world_size: int = 1) -> dict:
    """Gradients of one step of a training loop of one's own; the ranks share the micro-batches between them."""
    set_num_train_loops(model, LOOPS[step])
    batches = [micro_batch(len(batches) * step + index) for index in batches]
    num_labels = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    model.zero_grad()
    for batch in batches[rank::world_size]:
        # FSDP takes the mean over ranks.
        (model(**batch, num_items_in_batch=num_labels).loss * world_size).backward()
    return {name: full(parameter.grad) for name, parameter in model.named_parameters()}


def evaluation_rows() -> dict[str, torch.Tensor]:
    rows = [{**row, "index": index} for index, row in enumerate(examples(3, seed=1))]
    return MaskedDiffusionCollator(MASK, PAD).clean(rows)


def own_loop(model: nn.Module, rank: int = 0, world_size: int = 1) -> dict:
    """Three steps of SGD in every mode, and the NELBO in the end."""
    results, optimizer = {"gradients": {}}, torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for mode, settings in MODES.items():
        model.model.gradient_loops = settings.get("gradient_loops")
        model.model.checkpoint_loops = settings.get("checkpoint_loops", False)
        results["gradients"][mode] = []
        for step in range(len(LOOPS)):
            results["gradients"][mode].append(step_gradients(model, step, list(range(4)), rank, world_size))
            optimizer.step()
    set_num_train_loops(model, None)
    results["nelbo"] = nelbo(model, **evaluation_rows(), num_loops=[1, 3], num_samples=4, batch_size=5).nats
    results["training"] = model.training
    results["weights"] = full_state(model)
    return results


def run_fsdp(folder: Path) -> dict:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (world_size,))
    model = make_model()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    results = {"own loop": own_loop(model, rank, world_size)}
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        make_model().save_pretrained(folder / "gathered", state_dict=state)
    return results


def main():
    kind, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank = dist.get_rank()
    results = {"ddp": run_ddp, "fsdp": run_fsdp}[kind](folder)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
