# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The arms of the studies, and the training of one: as many steps as its share of the FLOP budget pays for."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tasks import Task
from transformers import TrainingArguments

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM
from loopmdm.data import ExampleStream
from loopmdm.objective import seeded_generator
from loopmdm.training import (
    LoopMDMTrainer,
    LoopSchedule,
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
        schedule: Name of a loop schedule, see `make_loop_schedule`, or "flops", see below.
        options: Arguments of the schedule.
        depth: Physical layers, as a multiple of the task's; those that are added go to the tail.
        gradient_loops: Backpropagate through the last so many loops.
        second_exit: Weight of a second loss, read out after a smaller number of loops of the same pass.
        consistency: Weight of KL(p at S loops, without gradient || p at the second exit).
        budget: Share of the study's training FLOPs.
    """

    about: str
    mid: tuple[int, int] = (1, 2)
    max_loops: int = 6
    schedule: str = "uniform"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    depth: int = 1
    gradient_loops: int | None = None
    second_exit: float = 0.0
    consistency: float = 0.0
    budget: float = 1.0


ARMS: dict[str, Arm] = {
    # Claims 1 to 4
    "same_size": Arm("no loops", max_loops=1),
    "looped": Arm("LoopMDM: the middle third of the layers is looped, S ~ Uniform{1..6}"),
    "deeper": Arm("no loops, twice the layers: LoopMDM executes 1.83 times as many on average", max_loops=1, depth=2),
    # Where, and how much
    "mid_first": Arm("mid = first third", mid=(0, 1)),
    "mid_last": Arm("mid = last third", mid=(2, 3)),
    "mid_two": Arm("mid = first two thirds, S ~ Uniform{1..3}", mid=(0, 2), max_loops=3),
    "whole": Arm("mid = all layers, S ~ Uniform{1..3}: twice the layers on average", mid=(0, 3), max_loops=3),
    "s4": Arm("S ~ Uniform{1..4}", max_loops=4),
    "s8": Arm("S ~ Uniform{1..8}", max_loops=8),
    "s12": Arm("S ~ Uniform{1..12}", max_loops=12),
    "fixed4": Arm("S = 4 always", max_loops=4, schedule="fixed"),
    "gradient2": Arm("gradient through the last two loops", gradient_loops=2),
    "flops": Arm("p(S) ~ 1 / FLOPs(S)", schedule="flops"),
    "growing": Arm("S ~ Uniform{1..M}, M growing to 6 over the first half", schedule="growing"),
    "late": Arm("S = 1 for the first half, and in a quarter of the steps after; Uniform{3..6} else", schedule="late"),
    "late_s3": Arm(
        "S = 1 for the first half, and in a quarter of the steps after; Uniform{2, 3} else",
        max_loops=3,
        schedule="late",
    ),
    "late_high": Arm("S = 1 for the first half, Uniform{3..6} after", schedule="late", options={"plain": 0.0}),
    "late_half": Arm(
        "S = 1 for the first half, and in half of the steps after; Uniform{3..6} else",
        schedule="late",
        options={"plain": 0.5},
    ),
    "late_uniform": Arm(
        "S = 1 for the first half, Uniform{1..6} after", schedule="late", options={"min_loops": 1, "plain": 0.0}
    ),
    "later": Arm(
        "S = 1 for three quarters of the steps, Uniform{3..6} after",
        schedule="late",
        options={"start": 0.75, "plain": 0.0},
    ),
    "earlier": Arm(
        "S = 1 for the first quarter, and in a quarter of the steps after; Uniform{3..6} else",
        schedule="late",
        options={"start": 0.25},
    ),
    "never_late": Arm("S = 1 in a quarter of the steps, Uniform{3..6} else", schedule="late", options={"start": 0.0}),
    "late_consistency": Arm(
        "late, and a smaller S of the same pass learns its predictions",
        schedule="late",
        consistency=0.5,
    ),
    "two_exits": Arm("S ~ Uniform{1..6}, and a second loss at a smaller S of the same pass", second_exit=0.5),
}


# Other mids: the first layer of three, two layers, all, and a smaller part of a deeper model
ARMS |= {
    "late_mid_first": dataclasses.replace(ARMS["late"], about="late with mid = first third", mid=(0, 1)),
    "late_mid_two": dataclasses.replace(
        ARMS["late"], about="late with mid = first two thirds, up to 4 loops", mid=(0, 2), max_loops=4
    ),
    "late_whole": dataclasses.replace(
        ARMS["late"], about="late with mid = all layers, up to 4 loops", mid=(0, 3), max_loops=4
    ),
    "deeper_mid_one": dataclasses.replace(ARMS["late"], about="deeper, one layer of six looped as in late", depth=2),
}
# FLOPs that an arm needs: runs with whole schedules on parts of the budget
ARMS |= {
    f"{name}_{share}": dataclasses.replace(ARMS[name], about=f"{name} on {share} % of the FLOPs", budget=share / 100)
    for name in ("same_size", "deeper", "looped", "late", "late_s3")
    for share in (20, 30, 50, 70)
}


class FlopsLoops(LoopSchedule):
    """p(S) in proportion to 1 / FLOPs(S), so that every number of loops costs as much in all."""

    def __init__(self, config: LoopMDMConfig):
        super().__init__(config.max_train_loops)
        loops = range(1, self.max_loops + 1)
        costs = torch.tensor([config.num_executed_layers(num_loops) for num_loops in loops], dtype=torch.float64)
        self.weights = 1 / costs

    def probabilities(self, progress):
        return self.weights / self.weights.sum()


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


def build_schedule(arm: Arm, config: LoopMDMConfig) -> LoopSchedule:
    if arm.schedule == "flops":
        return FlopsLoops(config)
    return make_loop_schedule(arm.schedule, config, **arm.options)


def second_exit(arm: Arm, loops: int, seed: int, step: int) -> int | None:
    """Loops of the second exit of a step that runs `loops`, uniform over the smaller numbers; None without one."""
    if not (arm.second_exit or arm.consistency) or loops == 1:
        return None
    return int(torch.randint(1, loops, (), generator=seeded_generator(seed, "second exit", step)))


class ArmTrainer(LoopMDMTrainer):
    """A LoopMDMTrainer that can read out a pass a second time, after fewer loops, and learn from that as well."""

    def __init__(self, *args, arm: Arm, **kwargs):
        super().__init__(*args, **kwargs)
        self.arm = arm

    def _second(self) -> int | None:
        loops = self.looped_model.model.num_train_loops
        return second_exit(self.arm, loops, self.args.seed, self.state.global_step)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        second = self._second() if self.looped_model.training else None
        if second is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        looped, labels = self.looped_model, inputs["labels"]
        transformer, masked = looped.model, inputs["loss_weights"] != 0
        with self.compute_loss_context_manager():
            begin, context = transformer.prelude(inputs["input_ids"], inputs.get("attention_mask"))
            exits = []
            for loop, (states, _) in enumerate(transformer.iterate(begin, context, transformer.num_train_loops), 1):
                if loop in (second, transformer.num_train_loops):
                    exits.append(looped.logits(transformer.readout(states, context)[masked]))
        # Finite, so that 0 * inf does not come up; softmax makes it zero all the same.
        mask_token = torch.tensor([looped.config.mask_token_id])
        early, last = (logits.float().index_fill(-1, mask_token, -1e4).log_softmax(-1) for logits in exits)
        targets = labels[masked][:, None]
        losses = -last.gather(-1, targets).squeeze(-1)
        losses = losses - self.arm.second_exit * early.gather(-1, targets).squeeze(-1)
        teacher = last.detach()
        losses = losses + self.arm.consistency * (teacher.exp() * (teacher - early)).sum(-1)
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = (losses * inputs["loss_weights"][masked]).sum() / count
        return (loss, {"loss": loss}) if return_outputs else loss

    def floating_point_ops(self, inputs):
        flops = super().floating_point_ops(inputs)
        if self._second() is not None:
            batch_size, length = inputs["input_ids"].shape
            per_row = int(inputs["loss_weights"].count_nonzero()) / batch_size
            flops += exit_flops(self.looped_model, batch_size, length, per_row)
        return flops


def exit_flops(model: LoopMDMForMaskedLM, batch_size: int, length: int, num_logits: float) -> int:
    """Training FLOPs of one more readout: tail and head, forward and backward."""
    config = model.config
    layer = model.flops(batch_size, length, 1, 0) // config.num_hidden_layers
    head = model.flops(batch_size, length, 1, num_logits) - model.flops(batch_size, length, 1, 0)
    return 3 * ((config.num_hidden_layers - config.loop_end) * layer + head)


def plan(arm: Arm, task: Task, model: LoopMDMForMaskedLM, seed: int, flops: float) -> list[float]:
    """
    Training FLOPs after every optimiser step, for as many steps as come closest to `flops`. Exact for the loops that
    will be drawn, and in expectation for the number of masked tokens, whose part (the head) is small.
    """
    schedule = build_schedule(arm, model.config)
    lengths = [int(example["maskable"].sum()) for example in task.examples[:2000]]
    masked = sum((length + 1) / 2 for length in lengths) / len(lengths)
    size = task.batch_size, task.length
    costs = {
        loops: training_flops(model, *size, loops, masked, arm.gradient_loops) for loops in range(1, arm.max_loops + 1)
    }
    more = exit_flops(model, *size, masked)

    def totals(steps: int) -> list[float]:
        total, sums = 0.0, []
        for step in range(steps):
            loops = schedule.draw(seed, step, steps)
            total += costs[loops] + more * (second_exit(arm, loops, seed, step) is not None)
            sums.append(total)
        return sums

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
    trainer = ArmTrainer(
        arm=arm,
        model=trained,
        args=arguments,
        train_dataset=stream,
        data_collator=MaskedDiffusionCollator(config.mask_token_id, config.pad_token_id, seed=seed),
        optimizers=(None if lora else MuonAdamW(model, lr=task.learning_rate), None),
        loop_schedule=build_schedule(arm, config),
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
