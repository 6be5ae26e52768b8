# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""transformers' Trainer for loops and masked diffusion: draws of S, FLOPs, evaluation by NELBO, exact resume."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..data import StreamedExamples, check_passes
from ..objective import find_model, nelbo
from .checkpoints import (
    complete_checkpoint,
    differences,
    last_complete_checkpoint,
    locked,
    optimizer_identity,
    read_checkpoint,
    remove_checkpoint,
    rotate_checkpoints,
    run_identity,
)
from .checks import ENDLESS, check_options, check_parts, check_weights, diverged
from .collator import MaskedDiffusionCollator
from .loop_schedules import LoopSamplingCallback, LoopSchedule, make_loop_schedule

EMA_FILE = "ema.safetensors"


class _OwnCallback(TrainerCallback):
    """Calls the trainer when training begins, and after every optimiser step."""

    def __init__(self, trainer: "LoopMDMTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin()

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.ema is not None:
            self.trainer.ema.update_parameters(self.trainer.looped_model)


class LoopMDMTrainer(Trainer):
    """
    A `Trainer` for [`LoopMDMForMaskedLM`], wrapped by PEFT or not.

    - It draws S for every optimiser step: the same S on all ranks and micro-batches, and after a resume.
    - Every log line has `training_flops`, the FLOPs so far on all ranks (of the loops that were drawn, with the head
      at masked positions only, and as if all weights were trained), `flops_per_second` and `tokens_per_second` (on
      all ranks, padding included), and `num_loops`, the mean since the last line.
    - With `eval_loops`, evaluation is the NELBO in nats per token at those numbers of loops (`eval_nelbo_1`, ...), all
      of which every rank computes; `eval_loss` is the NELBO at the last one.
    - A checkpoint is complete when it has complete.json, which is written last. `resume_from_checkpoint=True` takes
      the latest complete and undamaged one. A checkpoint of another run is refused: everything that changes the result
      has to be the same, except the length of the run. `output_dir` is locked during training.
    - A loss, gradient or weight that is not finite stops the run with a ValueError, and is never saved.

    Args:
        loop_schedule (`str` or [`LoopSchedule`], defaults to `"uniform"`): Distribution of S, see
            [`make_loop_schedule`].
        max_loops (`int`, *optional*, defaults to `config.max_train_loops`): S_max.
        gradient_loops (`int`, *optional*): Backpropagate through only this many of the last loops; the gradient passes
            through the earlier ones unchanged. By default through all loops.
        checkpoint_loops (`bool`, defaults to `False`): Recompute each loop's activations in the backward pass, so that
            memory hardly grows with S.
        eval_loops (`Sequence[int]`, *optional*): Numbers of loops to evaluate at, see above. By default evaluation is
            the Trainer's own.
        eval_samples (`int`, defaults to 8): Masks per sequence of the NELBO; even.
        ema_decay (`float`, *optional*): Decay of an exponential moving average of the weights, which is then what is
            evaluated and saved as the final model; it is kept in float32. Not with FSDP.
        args, kwargs: As for `Trainer`.

    Raises:
        ValueError: Arguments that cannot give a right result, or that would never be used.
    """

    def __init__(
        self,
        *args,
        loop_schedule: str | LoopSchedule = "uniform",
        max_loops: int | None = None,
        gradient_loops: int | None = None,
        checkpoint_loops: bool = False,
        eval_loops: Sequence[int] | None = None,
        eval_samples: int = 8,
        ema_decay: float | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.looped_model = find_model(self.model)
        config = self.looped_model.config
        self.loop_schedule = make_loop_schedule(loop_schedule, config, max_loops)
        eval_loops = None if eval_loops is None else list(eval_loops)
        check_options(self.args, self.loop_schedule, gradient_loops, ema_decay, eval_loops, eval_samples)
        if ema_decay is not None and self.is_fsdp_enabled:
            raise ValueError("`ema_decay` does not work with FSDP, which splits the weights between ranks.")
        self.gradient_loops = gradient_loops
        self.checkpoint_loops = checkpoint_loops
        self.eval_loops = eval_loops
        self.eval_samples = eval_samples
        self.ema_decay = ema_decay
        self.ema = None if ema_decay is None else _moving_average(self.looped_model, ema_decay)
        check_parts(self)
        self.given_optimizer = optimizer_identity(self.optimizer, self.lr_scheduler)
        self.add_callback(LoopSamplingCallback(self.loop_schedule))
        self.add_callback(_OwnCallback(self))
        self._history: dict[str, Any] = {}
        self.resumed: list[dict[str, int]] = []  # of every resume the step, and the `max_steps` planned before it
        self._reset_counters()

    def _reset_counters(self) -> None:
        self._head_positions = 0  # later a tensor on the device, so that no step waits to read it
        self._since = time.perf_counter()
        self._flops_before, self._loops = self.state.total_flos, []
        self._tokens = self._tokens_of_all = 0  # of this rank, and, as of `store_flos`, of all ranks

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        saves = self.args.save_strategy != "no" and self.is_world_process_zero()
        with locked(Path(self.args.output_dir)) if saves else contextlib.nullcontext():
            self._run, self._history = run_identity(self), {}
            verify = resume_from_checkpoint is not True  # `last_complete_checkpoint` verifies by itself
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
                if resume_from_checkpoint is None:
                    raise ValueError(f"{self.args.output_dir} holds no complete checkpoint to resume from.")
            if resume_from_checkpoint:
                self._history = self._read_history(Path(resume_from_checkpoint), verify)
                if self.ema is not None:
                    averages = load_file(Path(resume_from_checkpoint) / EMA_FILE)
                    self.ema.load_state_dict(averages, strict=False)
            transformer = self.looped_model.model
            transformer.gradient_loops, transformer.checkpoint_loops = self.gradient_loops, self.checkpoint_loops
            try:
                output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
            finally:
                transformer.gradient_loops, transformer.checkpoint_loops = None, False
                transformer.num_train_loops = None  # also after an error
            check_weights(self)
            return output

    def _read_history(self, checkpoint: Path, verify: bool) -> dict[str, Any]:
        """The contents of complete.json. Raises a ValueError if this run cannot continue from the checkpoint."""
        record = read_checkpoint(checkpoint, verify)
        if "scheduler.pt" not in record["files"] and not self.is_deepspeed_enabled:
            raise ValueError(
                f"{checkpoint} holds only the model (`save_only_model`), so a run cannot continue from it. Start a "
                "new run in another folder, from its weights if you like."
            )
        stateful = [one for one in self.callback_handler.callbacks if isinstance(one, ExportableState)]
        if stateful and not self.args.restore_callback_states_from_checkpoint:
            raise ValueError(
                f"{type(stateful[0]).__name__} has a state, which would be reset; set "
                "`restore_callback_states_from_checkpoint=True`, or leave it out."
            )
        found = differences(record["run"], self._run)
        if found:
            raise ValueError(f"{checkpoint} is of another run: {'; '.join(found)}. Start a new run in another folder.")
        return record

    def set_initial_training_values(self, args, dataloader):
        epochs, steps_per_epoch, *others = super().set_initial_training_values(args, dataloader)
        step, max_steps = self._history.get("step", 0), others[-1]
        check_passes(self.train_dataset, epochs, max_steps * self.get_total_train_batch_size(args))
        if step > max_steps:
            raise ValueError(f"The checkpoint is of step {step}, but the run has only {max_steps}; train for longer.")
        if step == max_steps:  # An epoch of a stream does not end, so the Trainer would take one more step.
            epochs = step // steps_per_epoch
        return epochs, steps_per_epoch, *others

    def _begin(self) -> None:
        """Called when training begins, after the state of a resumed run has been loaded."""
        self._reset_counters()
        self._began = time.perf_counter()
        check_weights(self, before=True)
        # A resumed state has the intervals of the run before, and the arguments' would be ignored.
        self.state.compute_steps(self.args, self.state.max_steps)
        self.resumed = list(self._history.get("resumed", []))
        if self._history:
            self.resumed.append({"step": self._history["step"], "max_steps_before": self._history["max_steps"]})
        best = self.state.best_global_step
        if self._history and best:  # the state has an absolute path, and the folder may have moved
            folder = Path(self.args.output_dir) / f"checkpoint-{best}"
            if not folder.is_dir() and self.args.load_best_model_at_end:
                raise ValueError(f"{folder}, the best checkpoint so far, is missing, and cannot be loaded at the end.")
            self.state.best_model_checkpoint = str(folder) if folder.is_dir() else None

    @property
    def seconds(self) -> float:
        """Seconds of training so far, with those before the checkpoint that the run was resumed from."""
        return self._history.get("seconds", 0.0) + time.perf_counter() - self._began

    def training_step(self, model, inputs, *args, **kwargs):
        self._tokens += inputs["input_ids"].numel()
        self._loops.append(self.looped_model.model.num_train_loops)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not loss.isfinite().all():
            raise diverged(self, f"The loss is {loss.tolist()}", self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        value = 0.0 if norm is None else float(norm)
        if not math.isfinite(value):
            scaler = self.accelerator.scaler  # with float16 it lowers its scale and skips the step
            if scaler is None or scaler.get_scale() < 1:
                raise diverged(self, f"The norm of the gradient is {value}", self.state.global_step + 1)
        return norm

    def floating_point_ops(self, inputs: dict[str, torch.Tensor | Any]) -> int:
        batch_size, length = inputs["input_ids"].shape
        weights, loops = inputs.get("loss_weights"), self.looped_model.model.num_train_loops
        num_logits = batch_size * length if weights is None else weights.count_nonzero()
        self._head_positions = self._head_positions + num_logits
        settings = self.gradient_loops, self.checkpoint_loops, self.args.gradient_checkpointing
        return training_flops(self.looped_model, batch_size, length, loops, 0, *settings)

    def store_flos(self) -> None:
        head = self.looped_model.flops(1, 1, 1, 1) - self.looped_model.flops(1, 1, 1, 0)
        self.current_flos += 3.0 * head * int(self._head_positions)
        self._head_positions = 0
        tokens = torch.tensor([self._tokens], device=self.args.device)
        self._tokens_of_all = int(self.accelerator.gather(tokens).sum())
        super().store_flos()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._loops:
            seconds = time.perf_counter() - self._since
            flops = self.state.total_flos
            logs["num_loops"] = sum(self._loops) / len(self._loops)
            logs["tokens_per_second"] = self._tokens_of_all / seconds
            logs["training_flops"] = flops
            logs["flops_per_second"] = (flops - self._flops_before) / seconds
            self._reset_counters()
        if self.state.global_step == self._history.get("step"):
            logs.pop("train_loss", None)  # no step was trained, so there is no mean
        super().log(logs, start_time)

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):  # the Trainer calls this method for each
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        with self.averaged_weights():
            if self.eval_loops is None:
                with torch.random.fork_rng(devices=[]):  # the loader draws a number, and training would draw others
                    return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            start = time.perf_counter()
            rows = self._clean_rows(eval_dataset)
            mean, error = nelbo(
                self.model_wrapped if self.is_fsdp_enabled else self.model,
                **rows,
                num_loops=self.eval_loops,
                num_samples=self.eval_samples,
                batch_size=self.args.per_device_eval_batch_size,
                seed=self.args.seed,
            ).per_token()
        metrics = {f"{metric_key_prefix}_loss": mean[-1].item()}
        for i, loops in enumerate(self.eval_loops):
            metrics[f"{metric_key_prefix}_nelbo_{loops}"] = mean[i].item()
            metrics[f"{metric_key_prefix}_nelbo_{loops}_standard_error"] = error[i].item()
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += metrics[f"{metric_key_prefix}_runtime"]  # does not count as training
        return metrics

    def _clean_rows(self, dataset) -> dict[str, torch.Tensor]:
        if isinstance(dataset, StreamedExamples):
            raise ValueError(ENDLESS)
        # Data sets without a length are finite streams of the `datasets` library.
        rows = [dataset[i] for i in range(len(dataset))] if hasattr(dataset, "__len__") else list(dataset or ())
        if not rows:
            raise ValueError("`eval_loops` needs an `eval_dataset` with examples.")
        collator = self.data_collator
        if not isinstance(collator, MaskedDiffusionCollator):
            raise ValueError("`eval_loops` needs a MaskedDiffusionCollator, which reads the examples.")
        return collator.clean([{"index": index, **row} for index, row in enumerate(rows)])

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Replaces the weights by their moving average inside the block, if there is one."""
        if self.ema is None or self.ema.n_averaged == 0:
            yield
            return
        parameters = dict(self.looped_model.named_parameters())
        kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with torch.no_grad():
            for name, average in self.ema.module.named_parameters():
                parameters[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)

    # Checkpoints

    def check_saves(self) -> None:
        """Raises a ValueError if FSDP would make the Trainer save no model, without a word."""
        kind = self.accelerator.state.fsdp_plugin.state_dict_type if self.is_fsdp_enabled else "FULL"
        if "FULL" not in str(kind):
            raise ValueError(
                f"FSDP's `state_dict_type` is {getattr(kind, 'name', kind)}, with which no model is saved; set it to "
                "FULL_STATE_DICT (in `fsdp_config`, or by `accelerate launch --fsdp_state_dict_type`)."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        if not _internal_call:
            self.check_saves()
        # Checkpoints (internal calls) hold the raw weights, from which training continues.
        with contextlib.nullcontext() if _internal_call else self.averaged_weights():
            check_weights(self)
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            remove_checkpoint(folder)  # an earlier run may have left one
        self.accelerator.wait_for_everyone()
        # The Trainer would delete old checkpoints before this one is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.ema is not None and self.args.should_save:
            # `named_parameters` lists tied weights once, as safetensors needs it.
            averages = {f"module.{name}": part.contiguous() for name, part in self.ema.module.named_parameters()}
            save_file({**averages, "n_averaged": self.ema.n_averaged.reshape(1)}, folder / EMA_FILE)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            progress = {"step": self.state.global_step, "max_steps": self.state.max_steps, "seconds": self.seconds}
            complete_checkpoint(folder, {**progress, "resumed": self.resumed, "run": self._run})
            best = self.state.best_model_checkpoint
            rotate_checkpoints(folder.parent, limit, {folder, *([] if best is None else [Path(best)])})


def _moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """An average of the weights, in float32 at least: its steps are so small that bfloat16 would lose them."""
    update = get_ema_multi_avg_fn(decay)

    def step(averages: list[torch.Tensor], weights: list[torch.Tensor], count: torch.Tensor) -> None:
        update(averages, [weight.to(average.dtype) for average, weight in zip(averages, weights, strict=True)], count)

    averaged = AveragedModel(model, multi_avg_fn=step)
    for parameter in averaged.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return averaged


def training_flops(
    model: nn.Module,
    batch_size: int,
    sequence_length: int,
    num_loops: int,
    num_logits: float,
    gradient_loops: int | None = None,
    checkpoint_loops: bool = False,
    gradient_checkpointing: bool = False,
) -> int:
    """
    Floating point operations of one training step: the forward pass; the backward pass, which takes twice as many but
    skips loops without gradients; and what checkpointing recomputes (an upper bound, since torch stops early).
    `num_logits` is the mean number of logits computed per row. The other arguments are those of
    [`LoopMDMForMaskedLM.flops`] and [`LoopMDMTrainer`].
    """
    once = model.flops(batch_size, sequence_length, 1, 0)
    mid = model.flops(batch_size, sequence_length, 2, 0) - once
    head = model.flops(batch_size, sequence_length, 1, num_logits) - once
    with_gradient = num_loops if gradient_loops is None else min(num_loops, gradient_loops)
    forward = once + (num_loops - 1) * mid
    differentiated = once + (with_gradient - 1) * mid
    again = with_gradient * mid * checkpoint_loops + differentiated * gradient_checkpointing
    return forward + 2 * differentiated + again + 3 * head
