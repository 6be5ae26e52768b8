# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What test_distributed.py runs: on one process in the test itself, and on two, which are forks of it."""

import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from processes import as_rank
from tiny import tiny_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import Trainer, TrainerCallback, TrainingArguments

from loopmdm.evaluation import nelbo
from loopmdm.training import (
    ExampleStream,
    LoopMDMTrainer,
    LoopSamplingCallback,
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
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [
        {"input_ids": torch.randint(1, 22, (length,), generator=generator), "prompt_length": i % 3}
        for i, length in enumerate(lengths)
    ]


def make_model() -> nn.Module:
    """In float64, so that what differs is no rounding."""
    return tiny_model(max_train_loops=4).double()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; a copy of others."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
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
    args = TrainingArguments(**values | overrides)
    if args.fsdp:
        # accelerate shards models on GPUs only, and trains with DDP on CPUs without a word.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def make_trainer(
    args: TrainingArguments, stream: list[dict] | None = None, plain: bool = False, callbacks: Any = (), **kwargs
) -> Trainer:
    """A LoopMDMTrainer; `plain`: transformers' own with the callback that draws loops."""
    if plain:
        callbacks = [*callbacks, LoopSamplingCallback(4)]
    data = ExampleStream(examples(), STEPS * ACCUMULATION * RANKS * BATCH, seed=0)
    return (Trainer if plain else LoopMDMTrainer)(
        make_model(),
        args,
        train_dataset=data if stream is None else StreamedExamples(lambda: stream),
        eval_dataset=examples(3, seed=1),
        data_collator=MaskedDiffusionCollator(MASK, PAD),
        callbacks=list(callbacks),
        **kwargs,
    )


def train(
    folder: Path,
    world_size: int,
    resume: str | None = None,
    stream: list[dict] | None = None,
    trainer_kwargs: dict[str, Any] | None = None,
    **overrides,
) -> dict[str, Any]:
    """Trains, and returns what must not depend on the number of processes."""
    recorder = Recorder()
    args = trainer_args(folder, world_size, **overrides)
    trainer = make_trainer(args, stream, callbacks=[recorder], **(trainer_kwargs or {}))
    assert args.world_size == world_size, "the processes know of each other"
    trainer.train(resume_from_checkpoint=resume)
    timed = ("runtime", "per_second")  # the machine's business
    log = [
        {name: value for name, value in entry.items() if not name.endswith(timed)}
        for entry in trainer.state.log_history
    ]
    # The log has tokens and operations per second, of the same seconds.
    logged = [entry for entry in trainer.state.log_history if "flops_per_second" in entry]
    done = [0, *(entry["training_flops"] for entry in logged)]
    tokens = [
        entry["tokens_per_second"] * (after - before) / entry["flops_per_second"]
        for entry, before, after in zip(logged, done, done[1:], strict=False)
    ]
    return {
        "tokens": tokens,
        "loops": recorder.loops,
        "gradients": recorder.gradients,
        "weights": full_weights(trainer.model),
        "log": log,
        "wrapper": type(trainer.model_wrapped).__name__,
        "is_sharded": isinstance(trainer.model_wrapped, FSDPModule),
        "steps": trainer.state.global_step,
    }


# Arguments of `train`
SAVED = {
    "trainer_kwargs": {"gradient_loops": 2, "checkpoint_loops": True, "eval_loops": [1, 3], "eval_samples": 4},
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
}
DDP_RUNS = {
    "saved": SAVED,
    "averaged": {
        "trainer_kwargs": {"ema_decay": 0.9, "eval_loops": [2]},
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
    "stream": {"stream": examples(shortest=7, longest=7), "max_steps": 2},
    "stream of different lengths": {
        "stream": examples(),
        "max_steps": 2,
        "accelerator_config": {"dispatch_batches": False},
    },
}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LoopMDMLayer"]}}
FSDP_RUNS = {
    "saved": {**SAVED, **FSDP},
    "plain": {**FSDP, "trainer_kwargs": {"plain": True}, "save_strategy": "steps", "save_steps": 1, "max_steps": 1},
}


def run_trainers(folder: Path, world_size: int, runs: dict[str, dict]) -> dict[str, dict]:
    results = {name: train(folder / name, world_size, **settings) for name, settings in runs.items()}
    checkpoint = str(folder / "saved" / "checkpoint-2")
    results["resumed"] = train(folder / "resumed", world_size, resume=checkpoint, **runs["saved"])
    return results


def refusals(folder: Path, world_size: int) -> list[str]:
    """The errors of runs that could not be saved, not be resumed, or would count rows wrongly."""
    of_ddp, messages = str(folder / "ddp" / "saved" / "checkpoint-2"), []
    for resume, settings in (
        (of_ddp, FSDP_RUNS["saved"]),
        (None, {"accelerator_config": {"split_batches": True}}),
    ):
        try:
            train(folder / "refused", world_size, resume=resume, **settings)
        except ValueError as error:
            messages.append(str(error))
    sharded = {**FSDP["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}
    trainer = make_trainer(trainer_args(folder / "refused", world_size, fsdp=True, fsdp_config=sharded))
    try:
        trainer.save_model(str(folder / "unsaved"))
    except ValueError as error:
        messages.append(str(error))
    return messages


# --- a training loop of one's own ---

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
    results["weights"] = full_weights(model)
    return results


def run_sharded(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    mesh = dist.init_device_mesh("cpu", (world_size,))
    model = make_model()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    results = own_loop(model, rank, world_size)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        make_model().save_pretrained(folder / "gathered", state_dict=state)
    return results


def main(folder: Path, rank: int) -> None:
    """The work of a rank, in a process of its own, which leaves its results in `folder`."""
    as_rank(rank, RANKS)  # they meet in a file, not at a port
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60))
    results = {
        "own loop": run_sharded(folder, rank, RANKS),
        "ddp": run_trainers(folder / "ddp", RANKS, DDP_RUNS),
        "fsdp": run_trainers(folder / "fsdp", RANKS, FSDP_RUNS),
        "refused": refusals(folder, RANKS),
    }
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
