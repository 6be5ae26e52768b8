# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Checks of a training: options that would give a wrong result, and numbers that are not finite."""

from typing import TYPE_CHECKING

import torch
from transformers import DataCollatorWithPadding, TrainingArguments, default_data_collator

from ..data import StreamedExamples
from ..objective import check_settings
from .checkpoints import plain_tensors
from .loop_schedules import LoopSchedule

if TYPE_CHECKING:
    from .trainer import LoopMDMTrainer

ENDLESS = "The evaluation set is a stream that starts again at its end; give a list of its first examples."
# Arguments of `TrainingArguments`: the values that work, and why others do not
NEUTRAL = {
    "label_smoothing_factor": ((0,), "the Trainer would replace the model's loss by its own, over all labels"),
    "use_liger_kernel": ((False,), "its kernels compute the loss of other models"),
    "label_names": ((None, ["labels"]), "the model finds its loss by `labels`"),
    "average_tokens_across_devices": ((True,), "tokens of a process with fewer of them would count more"),
    "auto_find_batch_size": ((False,), "it silently changes the batch size, and so the result"),
    "ignore_data_skip": ((False,), "a resumed run would see the same examples again"),
    "train_sampling_strategy": (
        ("sequential", "random", "batch_rebalance"),
        "its order is not drawn from the seed, so a resumed run would see other examples",
    ),
    "dataloader_in_order": ((True,), "the order of the examples would depend on the machine's load"),
}


def check_options(
    args: TrainingArguments,
    schedule: LoopSchedule,
    gradient_loops: int | None = None,
    ema_decay: float | None = None,
    eval_loops: list[int] | None = None,
    eval_samples: int = 8,
) -> None:
    """Raises a ValueError if settings of a [`LoopMDMTrainer`] cannot give a right result."""
    if gradient_loops is not None and not 1 <= gradient_loops <= schedule.max_loops:
        raise ValueError(f"`gradient_loops` is {gradient_loops}; it must be 1 to S_max ({schedule.max_loops}).")
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"`ema_decay` is {ema_decay}; it must be between 0 and 1, e.g. 0.999.")
    if ema_decay is not None and args.load_best_model_at_end:
        raise ValueError("`ema_decay` averages the whole run, so it does not work with `load_best_model_at_end`.")
    if eval_loops is not None:
        check_settings(eval_loops, eval_samples)
        metrics = ["loss", *(f"nelbo_{loops}" for loops in eval_loops)]
        if args.metric_for_best_model is not None and not args.metric_for_best_model.endswith(tuple(metrics)):
            raise ValueError(
                f"`metric_for_best_model` is {args.metric_for_best_model!r}, which evaluation does not give; choose "
                f"one of {', '.join(f'eval_{name}' for name in metrics)}."
            )
    if args.save_strategy != "no" and args.save_total_limit == 1:
        raise ValueError(
            "`save_total_limit` is 1, which leaves none if the last checkpoint is damaged; use 2 or more."
        )
    if args.train_sampling_strategy == "random" and not args.accelerator_config.use_seedable_sampler:
        raise ValueError(
            "`use_seedable_sampler` is False, so a resumed run would see the examples in another order; leave it out."
        )
    if args.accelerator_config.split_batches and args.world_size > 1:
        raise ValueError(
            "`split_batches` is True, which gives each process a part of `per_device_train_batch_size` rows; leave it "
            "out, and give each process its own number of rows."
        )
    for name, (neutral, why) in NEUTRAL.items():
        value = getattr(args, name)
        is_alone = name == "average_tokens_across_devices" and args.world_size == 1
        if value not in neutral and not is_alone:
            raise ValueError(f"`{name}` is {value!r}, which does not work here: {why}; leave it out.")


def check_parts(trainer: "LoopMDMTrainer") -> None:
    """Raises a ValueError for arguments of the Trainer that would give a wrong result, or that it would never call."""
    for name, fix in (("compute_loss_func", "leave it out"), ("model_init", "give the model itself")):
        if getattr(trainer, name) is not None:
            raise ValueError(f"`{name}` does not work here: the loss comes from the model that is given; {fix}.")
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        if trainer.eval_loops is not None and getattr(trainer, name) is not None:
            raise ValueError(f"`{name}` is never called with `eval_loops`, which is the NELBO; leave one of them out.")
    datasets = trainer.eval_dataset.values() if isinstance(trainer.eval_dataset, dict) else [trainer.eval_dataset]
    if trainer.eval_loops is not None and any(isinstance(dataset, StreamedExamples) for dataset in datasets):
        raise ValueError(ENDLESS)
    halves = [
        name
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad and parameter.dtype == torch.float16
    ]
    if halves:
        raise ValueError(
            f"{halves[0]} is trained in float16, which loses small updates and overflows; load the model in "
            "float32 (with `fp16=True` it still computes in float16) or in bfloat16."
        )
    if trainer.data_collator is default_data_collator or isinstance(trainer.data_collator, DataCollatorWithPadding):
        raise ValueError("There is no `data_collator` that masks tokens; give a MaskedDiffusionCollator.")


def check_weights(trainer: "LoopMDMTrainer", before: bool = False) -> None:
    """Raises a ValueError if a weight is NaN or infinite; `before` says that training has not begun."""
    for name, parameter in trainer.model.named_parameters():
        for tensor in plain_tensors(parameter.detach()):
            if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.isfinite().all():
                if before:
                    raise ValueError(f"{name} is NaN or infinite before the first step; its checkpoint is damaged.")
                raise diverged(trainer, f"The weight {name} holds NaN or infinite values", trainer.state.global_step)


def diverged(trainer: "LoopMDMTrainer", what: str, step: int) -> ValueError:
    """The error for a training that has diverged, with what to do about it."""
    args = trainer.args
    return ValueError(
        f"{what} in step {step}: training has diverged and stops, and the model is not saved. Lower `learning_rate` "
        f"({args.learning_rate:g}) or `max_grad_norm` ({args.max_grad_norm:g}), or warm up longer (`warmup_steps`)"
        f"{', or compute in bfloat16 (`bf16`)' if args.fp16 else ''}, and start a new run, from the weights of an "
        "earlier checkpoint if you like."
    )
