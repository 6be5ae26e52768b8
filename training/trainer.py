# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""transformers' Trainer with what loops and masked diffusion need: draws of S, honest FLOPs, NELBO, exact resume."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback

from ..data import ExampleStream
from ..objective import check_settings, find_model, nelbo
from .collator import MaskedDiffusionCollator
from .loop_schedules import LoopSamplingCallback, LoopSchedule, make_loop_schedule

# Written last into a checkpoint; one without it was not finished.
COMPLETE = "complete.json"
EMA_FILE = "ema.safetensors"
# Of a configuration, what two runs may differ in all the same
_FREE = {"_name_or_path", "transformers_version", "dtype", "architectures", "auto_map", "num_loops"}


class _OwnCallback(TrainerCallback):
    """What a trainer does itself at these moments of the run."""

    def __init__(self, trainer: "LoopMDMTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._reset_counters()  # now that the state of a resumed run is loaded

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.ema is not None:
            self.trainer.ema.update_parameters(self.trainer.looped_model)


class LoopMDMTrainer(Trainer):
    """
    A `Trainer` for [`LoopMDMForMaskedLM`], wrapped by PEFT or not.

    - Draws S for every optimiser step, the same on all ranks and micro-batches, and after a resume.
    - Every log line has `training_flops` so far, those of the loops drawn and of the head at masked positions (counted
      as if all weights were trained), `flops_per_second` and `tokens_per_second`, padding included, on all ranks
      together, and `num_loops`, the mean since the last line.
    - With `eval_loops`, evaluation is the NELBO at those numbers of loops (`eval_nelbo_1`, ...), each rank computing
      all of it; `eval_loss` is that of the last one.
    - A checkpoint is complete when it has complete.json, which is written last; `resume_from_checkpoint=True` takes
      the last complete one, and refuses one of another model, data set or batch size.

    Args:
        loop_schedule (`str` or [`LoopSchedule`], defaults to `"uniform"`): Distribution of S, see
            [`make_loop_schedule`].
        max_loops (`int`, *optional*, defaults to `config.max_train_loops`): S_max.
        gradient_loops (`int`, *optional*): Backpropagate through the last so many loops; earlier ones pass the
            gradient on unchanged.
        checkpoint_loops (`bool`, defaults to `False`): Compute each loop's activations again in the backward pass, so
            that memory hardly grows with S.
        eval_loops (`Sequence[int]`, *optional*): See above. By default evaluation is the Trainer's own.
        eval_samples (`int`, defaults to 8): Masks per sequence of the NELBO.
        ema_decay (`float`, *optional*): Keep an exponential moving average of the weights, which is evaluated, and
            saved as the final model. Not with FSDP.
        args, kwargs: As for `Trainer`.
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
        largest = self.loop_schedule.max_loops
        if gradient_loops is not None and not 1 <= gradient_loops <= largest:
            raise ValueError(
                f"`gradient_loops` is {gradient_loops}; it must be from 1 to the most loops of training ({largest})."
            )
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"`ema_decay` is {ema_decay}; it must be between 0 and 1, e.g. 0.999.")
        if ema_decay is not None and self.is_fsdp_enabled:
            raise ValueError("`ema_decay` does not work with FSDP, whose ranks hold parts of the weights.")
        if ema_decay is not None and self.args.load_best_model_at_end:
            raise ValueError("`ema_decay` averages the whole run, so it does not work with `load_best_model_at_end`.")
        if eval_loops is not None:
            eval_loops = list(eval_loops)
            check_settings(eval_loops, eval_samples)
        if self.args.save_strategy != "no" and self.args.save_total_limit == 1:
            raise ValueError(
                "`save_total_limit` is 1, which deletes a checkpoint before the next one is complete; use 2 or more."
            )
        self.gradient_loops = gradient_loops
        self.checkpoint_loops = checkpoint_loops
        self.eval_loops = eval_loops
        self.ema_decay = ema_decay
        self.eval_samples = eval_samples
        self.ema = None
        if ema_decay is not None:
            self.ema = AveragedModel(self.looped_model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.add_callback(LoopSamplingCallback(self.loop_schedule))
        self.add_callback(_OwnCallback(self))
        self._reset_counters()

    def _reset_counters(self) -> None:
        self._head_positions = 0  # a tensor on the device once there are some, so that no step waits for it
        self._since = time.perf_counter()
        self._flops_before, self._tokens, self._loops = self.state.total_flos, 0, []

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no complete checkpoint to resume from.")
        if resume_from_checkpoint:
            self._check_same_run(Path(resume_from_checkpoint))
            if self.ema is not None:
                averages = load_file(Path(resume_from_checkpoint) / EMA_FILE)
                self.ema.load_state_dict(averages, strict=False)
        transformer = self.looped_model.model
        transformer.gradient_loops, transformer.checkpoint_loops = self.gradient_loops, self.checkpoint_loops
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            transformer.gradient_loops, transformer.checkpoint_loops = None, False

    def training_step(self, model, inputs, *args, **kwargs):
        self._tokens += inputs["input_ids"].numel()
        self._loops.append(self.looped_model.model.num_train_loops)
        return super().training_step(model, inputs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor | Any]) -> int:
        batch_size, length = inputs["input_ids"].shape
        if "loss_weights" in inputs:
            self._head_positions = self._head_positions + inputs["loss_weights"].count_nonzero()
        else:
            self._head_positions = self._head_positions + inputs["input_ids"].numel()
        transformer = self.looped_model.model
        return training_flops(
            self.looped_model,
            batch_size,
            length,
            transformer.num_train_loops,
            0,
            transformer.gradient_loops,
            transformer.checkpoint_loops,
            self.args.gradient_checkpointing,
        )

    def store_flos(self) -> None:
        head = self.looped_model.flops(1, 1, 1, 1) - self.looped_model.flops(1, 1, 1, 0)
        self.current_flos += 3.0 * head * int(self._head_positions)
        self._head_positions = 0
        super().store_flos()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # FSDP puts a class of its own in place of the model's, and that is not the one whose code is to be saved.
        cls = type(self.looped_model)
        names = cls.__module__, cls.__name__
        if cls.__module__.startswith("torch."):
            own = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
            cls.__module__, cls.__name__ = own.__module__, own.__name__
        try:
            super()._save(output_dir, state_dict)
        finally:
            cls.__module__, cls.__name__ = names

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._loops:
            seconds = time.perf_counter() - self._since
            flops = self.state.total_flos
            logs["num_loops"] = sum(self._loops) / len(self._loops)
            logs["tokens_per_second"] = self._tokens * self.args.world_size / seconds
            logs["training_flops"] = flops
            logs["flops_per_second"] = (flops - self._flops_before) / seconds
            self._reset_counters()
        super().log(logs, start_time)

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict) and self.eval_loops is not None:
            metrics = {}
            for name, dataset in eval_dataset.items():
                metrics |= self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        with self.averaged_weights():
            if self.eval_loops is None:
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
        self._since += metrics[f"{metric_key_prefix}_runtime"]  # no time of training
        return metrics

    def _clean_rows(self, dataset) -> dict[str, torch.Tensor]:
        if dataset is None or len(dataset) == 0:
            raise ValueError("`eval_loops` needs an `eval_dataset` with examples.")
        collator = self.data_collator
        if not isinstance(collator, MaskedDiffusionCollator):
            raise ValueError("`eval_loops` needs a MaskedDiffusionCollator, which reads the examples.")
        return collator.clean([{"index": index, **dataset[index]} for index in range(len(dataset))])

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Puts the moving average in place of the weights meanwhile, where there is one."""
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        # Checkpoints (internal calls) hold the weights that training goes on from.
        with contextlib.nullcontext() if _internal_call else self.averaged_weights():
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / COMPLETE).unlink(missing_ok=True)  # of a run that was here before
        super()._save_checkpoint(model, trial)
        if self.ema is not None and self.args.should_save:
            # Tied weights are one tensor under two names; one of them is enough.
            averages = {name: tensor.contiguous() for name, tensor in self.ema.module.named_parameters()}
            averages = {f"module.{name}": tensor for name, tensor in averages.items()}
            save_file({**averages, "n_averaged": self.ema.n_averaged.reshape(1)}, folder / EMA_FILE)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            record = {"step": self.state.global_step, "run": self._identity()}
            temporary = folder / f"{COMPLETE}.tmp"
            temporary.write_text(json.dumps(record, indent=2) + "\n")
            os.replace(temporary, folder / COMPLETE)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to repeat an uninterrupted one."""
        config = {name: value for name, value in self.looped_model.config.to_dict().items() if name not in _FREE}
        return {
            "model": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16],
            "data": data_fingerprint(self.train_dataset),
            "order": getattr(self.train_dataset, "seed", None),
            "noise": _settings(self.data_collator),
            "seed": self.args.seed,
            "batch_size": self.args.per_device_train_batch_size * self.args.world_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "loop_schedule": _settings(self.loop_schedule),
            "gradient_loops": self.gradient_loops,
            "ema_decay": self.ema_decay,
        }

    def _check_same_run(self, checkpoint: Path) -> None:
        if not (checkpoint / COMPLETE).is_file():
            raise ValueError(
                f"{checkpoint} has no {COMPLETE}: it was not finished, or not written by this trainer. Resume from an "
                "earlier one (`resume_from_checkpoint=True` takes the last complete one)."
            )
        before, now = json.loads((checkpoint / COMPLETE).read_text())["run"], self._identity()
        for name, value in now.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{checkpoint} is of another run: its {name.replace('_', ' ')} is {before.get(name)}, here "
                    f"{value}. Start anew in another folder."
                )


def _settings(thing: Any) -> str:
    """The class and the plain attributes of an object, as text."""
    plain = {name: value for name, value in vars(thing).items() if isinstance(value, bool | int | float | str | tuple)}
    return f"{type(thing).__name__} {json.dumps(plain, sort_keys=True)}"


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of the most steps in `folder` that is complete, or None."""
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{COMPLETE}")]
    found = [path for path in found if path.name.rpartition("-")[2].isdigit()]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def data_fingerprint(dataset: Any, num_examples: int = 256) -> str:
    """A hash of a data set's length and of examples spread over it; of a stream, "stream"."""
    examples = dataset.examples if isinstance(dataset, ExampleStream) else dataset
    if not hasattr(examples, "__len__") or not hasattr(examples, "__getitem__"):
        return "stream"
    digest = hashlib.sha256(str(len(examples)).encode())
    count = min(num_examples, len(examples))
    for i in range(count):
        example = examples[i * len(examples) // count]
        for name in ("input_ids", "maskable", "prompt_length", "document_ids"):
            if example.get(name) is not None:
                digest.update(torch.as_tensor(example[name]).to(torch.int64).numpy().tobytes())
    return digest.hexdigest()[:16]


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
    Floating point operations of one training step: the forward pass, twice as many for the backward pass, which leaves
    out loops without gradients, and what is computed again (an upper bound: torch stops recomputing where it needs no
    more). Arguments as in [`LoopMDMForMaskedLM.flops`].
    """
    once = model.flops(batch_size, sequence_length, 1, 0)
    mid = model.flops(batch_size, sequence_length, 2, 0) - once
    head = model.flops(batch_size, sequence_length, 1, num_logits) - once
    with_gradient = num_loops if gradient_loops is None else min(num_loops, gradient_loops)
    forward = once + (num_loops - 1) * mid
    differentiated = once + (with_gradient - 1) * mid
    again = with_gradient * mid * checkpoint_loops + differentiated * gradient_checkpointing
    return forward + 2 * differentiated + again + 3 * head
