# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The arms of the studies, and the training of one: as many steps as its share of the FLOP budget pays for."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tasks import Task
from transformers import TrainingArguments

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM
from loopmdm.data import ExampleStream
from loopmdm.training import (
    LoopMDMTrainer,
    MaskedDiffusionCollator,
    MuonAdamW,
    last_complete_checkpoint,
    lora_config,
    make_loop_schedule,
    training_flops,
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """
    One way to spend the budget.

    Args:
        about: In words.
        mid: Edges of mid in thirds of the task's layers: (1, 2) is the middle one, (0, 3) all.
        max_loops: S_max; 1 trains without loops.
        schedule: Name of a loop schedule, see `make_loop_schedule`.
        options: Arguments of the schedule.
        depth: Physical layers, as a multiple of the task's; those that are added go to the tail.
        gradient_loops: Backpropagate through the last so many loops.
        budget: Share of the study's training FLOPs.
    """

    about: str
    mid: tuple[int, int] = (1, 2)
    max_loops: int = 6
    schedule: str = "uniform"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    depth: int = 1
    gradient_loops: int | None = None
    budget: float = 1.0


ARMS: dict[str, Arm] = {
    # Claims 1 to 4
    "same_size": Arm("no loops", max_loops=1),
    "looped": Arm("LoopMDM: the middle third of the layers is looped, S ~ Uniform{1..6}"),
    "deeper": Arm("no loops, twice the layers: LoopMDM executes 1.83 times as many on average", max_loops=1, depth=2),
    # Where, and which loops to draw
    "mid_first": Arm("mid = first third", mid=(0, 1)),
    "mid_last": Arm("mid = last third", mid=(2, 3)),
    "mid_two": Arm("mid = first two thirds, S ~ Uniform{1..3}", mid=(0, 2), max_loops=3),
    "whole": Arm("mid = all layers, S ~ Uniform{1..3}: twice the layers on average", mid=(0, 3), max_loops=3),
    "fixed4": Arm("S = 4 always", max_loops=4, schedule="fixed"),
    "gradient2": Arm("gradient through the last two loops", gradient_loops=2),
    "growing": Arm("S ~ Uniform{1..M}, M growing to 6 over the first half", schedule="growing"),
    "late": Arm("S = 1 for the first half, and in a quarter of the steps after; Uniform{3..6} else", schedule="late"),
    "late_s3": Arm(
        "S = 1 for the first half, and in a quarter of the steps after; Uniform{2, 3} else",
        max_loops=3,
        schedule="late",
    ),
}
# FLOPs that an arm needs: runs with whole schedules on parts of the budget
ARMS |= {
    f"{name}_{share}": dataclasses.replace(ARMS[name], about=f"{name} on {share} % of the FLOPs", budget=share / 100)
    for name in ("same_size", "deeper", "looped", "late", "late_s3")
    for share in (30, 50)
}


def build_config(arm: Arm, task: Task) -> LoopMDMConfig:
    layers = arm.depth * task.layers
    start, end = (edge * task.layers // 3 for edge in arm.mid)
    return task.config(
        num_hidden_layers=layers,
        loop_start=start,
        loop_end=end,
        num_loops=arm.max_loops,
        max_train_loops=arm.max_loops,
    )


def plan(arm: Arm, task: Task, model: LoopMDMForMaskedLM, seed: int, flops: float) -> list[float]:
    """
    Training FLOPs after every optimiser step, for as many steps as come closest to `flops`. Exact for the loops that
    will be drawn, and in expectation for the number of masked tokens, whose part (the head) is small.
    """
    schedule = make_loop_schedule(arm.schedule, model.config, **arm.options)
    lengths = [int(example["maskable"].sum()) for example in task.examples[:2000]]
    masked = sum((length + 1) / 2 for length in lengths) / len(lengths)
    size = task.batch_size, task.length
    costs = {
        loops: training_flops(model, *size, loops, masked, arm.gradient_loops) for loops in range(1, arm.max_loops + 1)
    }

    def totals(steps: int) -> list[float]:
        return list(itertools.accumulate(costs[schedule.draw(seed, step, steps)] for step in range(steps)))

    # The draws may depend on the progress, hence on the number of steps: approach it, then take the closest.
    steps, seen = max(1, round(flops / costs[1])), {}
    while steps not in seen:
        seen[steps] = totals(steps)
        steps = max(1, round(steps * flops / seen[steps][-1]))
    return min(seen.values(), key=lambda sums: abs(sums[-1] - flops))


def train(
    arm: Arm,
    task: Task,
    seed: int,
    flops: float,
    folder: Path,
    fast: bool = False,
    start: Path | None = None,
    lora: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Trains one arm, from its last complete checkpoint if there is one, and saves the model in `folder/model`.

    Args:
        start: Folder of a model to train further, with its layers and its mid.
        lora: Train an adapter with AdamW instead of all weights with Muon; arguments of `lora_config`. It is merged.
        fast: bfloat16 autocast and compiled layers: about twice the speed on a CPU with bfloat16 instructions.
    """
    torch.manual_seed(seed)
    fresh = start is None
    model = LoopMDMForMaskedLM(build_config(arm, task)) if fresh else LoopMDMForMaskedLM.from_pretrained(start)
    config = model.config
    sums = plan(arm, task, model, seed, flops * arm.budget)
    max_steps = len(sums)
    if fast:
        model.set_attn_implementation("eager")  # sequences are short: plain products that fuse
        for layer in model.model.layers:
            layer.compile()
    trained = get_peft_model(model, lora_config(config, **lora)) if lora else model
    stream = ExampleStream(task.examples, max_steps * task.batch_size, seed, transform=task.transform)
    save_steps = max(1, -(-max_steps // 10))
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=max_steps,
        per_device_train_batch_size=task.batch_size,
        train_sampling_strategy="sequential",
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": max_steps // 2, "decay_type": "linear"},
        warmup_steps=min(50, max_steps // 10),
        learning_rate=task.learning_rate,
        max_grad_norm=1.0,
        logging_steps=20,
        save_steps=save_steps,
        save_total_limit=2,
        seed=seed,
        bf16=fast,
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to="none",
    )
    trainer = LoopMDMTrainer(
        model=trained,
        args=arguments,
        train_dataset=stream,
        data_collator=MaskedDiffusionCollator(config.mask_token_id, config.pad_token_id, seed=seed),
        optimizers=(None if lora else MuonAdamW(model, lr=task.learning_rate), None),
        loop_schedule=make_loop_schedule(arm.schedule, config, **arm.options),
        gradient_loops=arm.gradient_loops,
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder / "checkpoints"))
    (trained.merge_and_unload() if lora else model).save_pretrained(folder / "model")
    loops = [entry["num_loops"] for entry in trainer.state.log_history if "num_loops" in entry]
    return {
        "steps": max_steps,
        "examples": max_steps * task.batch_size,
        "training_flops": trainer.state.total_flos,
        "mean_loops": sum(loops) / len(loops) if loops else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
