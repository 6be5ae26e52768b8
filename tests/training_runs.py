# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What training tests share: examples, batches, arguments and trainers on tiny models, and files of runs."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import yaml
from tiny import tiny_model
from transformers import TrainerCallback, TrainingArguments

from loopmdm.training import ExampleStream, LoopMDMTrainer, MaskedDiffusionCollator, MuonAdamW

MASK, PAD = 22, 0
# Of the words of `word_tokenizer` in evaluation_models.py, and sizes of a model
TEXT = "\n\n".join(" ".join(f"w{(start + 3 * i) % 29}" for i in range(12)) for start in range(40))
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 32, "max_train_loops": 3}


def examples(count: int, length: int = 6, seed: int = 0) -> list[dict]:
    """Clean sequences of `tiny_config`'s vocabulary with their places in a run."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 22, (length,), generator=generator), "index": i} for i in range(count)]


def training_batch(length: int = 7, rows: int = 3) -> dict[str, torch.Tensor]:
    return MaskedDiffusionCollator(MASK, PAD, seed=1)(examples(rows, length))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """Bit for bit."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


def steps_logged(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class EachStep(TrainerCallback):
    """Calls `function(step)` after every optimiser step."""

    def __init__(self, function: Callable[[int], object]):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(state.global_step)


def training_args(folder, **overrides) -> TrainingArguments:
    values = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 5,
        "learning_rate": 1e-2,
    }
    return TrainingArguments(str(folder), **values | overrides)


def make_trainer(folder, model=None, rows: Iterable[dict] | None = None, args=None, cls=LoopMDMTrainer, **kwargs):
    """A trainer of a tiny model on a stream of ten examples, or of what a test says."""
    model = tiny_model(max_train_loops=4) if model is None else model
    if "train_dataset" not in kwargs:
        kwargs["train_dataset"] = ExampleStream(examples(10) if rows is None else list(rows), 96, seed=0)
    kwargs.setdefault("data_collator", MaskedDiffusionCollator(MASK, PAD))
    return cls(model=model, args=training_args(folder, **args or {}), **kwargs)


def build_run(folder, optimizer="adamw", ema=None, accumulation=1, max_steps=8, args=None, **kwargs):
    """A run with a checkpoint every other step."""
    model = tiny_model(max_train_loops=4)
    optimizers = (MuonAdamW(model, lr=1e-2) if optimizer == "muon" else None, None)
    args = {
        "save_strategy": "steps",
        "max_steps": max_steps,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "constant",
        **(args or {}),
    }
    return make_trainer(folder, model, args=args, optimizers=optimizers, ema_decay=ema, **kwargs)


def run_writer(folder: Path, values: dict) -> Callable[..., str]:
    """
    Returns `write(**changes)`, which writes the file of a run and returns its path. Changes last; of a dict single
    keys may change, and None leaves a value out.
    """

    def write(**changes) -> str:
        for name, value in changes.items():
            merges = isinstance(value, dict) and isinstance(values.get(name), dict)
            values[name] = {**values[name], **value} if merges else value
        given = {name: value for name, value in values.items() if value is not None}
        (folder / "run.yaml").write_text(yaml.safe_dump(given))
        return str(folder / "run.yaml")

    return write
