# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The file that describes a training run."""

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..data import SEPARATORS


@dataclass
class TrainConfig:
    """
    A training run. Every key of the YAML file is one of these; unknown ones raise.

    Args:
        output (`str`): Folder of the trained model. Checkpoints go into `checkpoints` inside.
        data (`str` or `list[str]`): Text files (`.txt`), files of one JSON object a line (`.jsonl`), or the name of a
            data set that the `datasets` library loads.
        model (`str`, *optional*): Folder or Hub id to start from. Without it a fresh model is made of `model_config`.
        model_config (`dict`): Arguments of [`LoopMDMConfig`]: all of a fresh model's, or what to change of `model`'s
            (`loop_update`, `max_train_loops`, ...).
        tokenizer (`str`, *optional*, defaults to `model`): Folder or Hub id.
        task (`"pretrain"` or `"answers"`, defaults to `"pretrain"`): Learn texts, or answers given prompts
            (`prompt` and `answer`, or `messages`).
        eval_data (*optional*): As `data`; evaluated by its NELBO.
        dataset (`dict`): Further arguments of `datasets.load_dataset` (`name`, `split`, `streaming`, ...).
        text_column (`str`, defaults to `"text"`): Where texts are in JSON and data sets.
        documents (`"blank_line"`, `"line"` or `"file"`, defaults to `"blank_line"`): What separates documents in text
            files.
        sequence_length (`int`, *optional*, defaults to `max_position_embeddings`, at most 1024): Tokens of a row.
        isolate_documents (`bool`, defaults to `False`): Keep documents in one row from seeing each other.
        skip_long (`bool`, defaults to `False`): Leave out answers longer than a row instead of raising.
        loops (`dict`): `schedule` (`"uniform"`), `max_loops`, and options of the schedule.
        gradient_loops (`int`, *optional*), checkpoint_loops (`bool`), ema_decay (`float`, *optional*): As in
            [`LoopMDMTrainer`].
        collator (`dict`): `mask_ratio`, `complementary`, `learn_padding` of [`MaskedDiffusionCollator`].
        lora (`dict`, *optional*): Train an adapter: `layers`, and arguments of peft's `LoraConfig`.
        optimizer (`"adamw"` or `"muon"`, defaults to `"adamw"`).
        dtype (`str`, defaults to `"float32"`): Of the weights. `trainer: {bf16: true}` computes in bfloat16 all the
            same.
        eval_loops (`list[int]`, defaults to 1, 2, 4 up to S_max): Numbers of loops of the evaluation.
        eval_sequences (`int`, defaults to 64): Rows of `eval_data` that are used.
        eval_samples (`int`, defaults to 8): Masks for each.
        trainer (`dict`): Arguments of transformers' `TrainingArguments`.
    """

    output: str
    data: str | list[str]
    model: str | None = None
    model_config: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    task: str = "pretrain"
    eval_data: str | list[str] | None = None
    dataset: dict[str, Any] = field(default_factory=dict)
    text_column: str = "text"
    documents: str = "blank_line"
    sequence_length: int | None = None
    isolate_documents: bool = False
    skip_long: bool = False
    loops: dict[str, Any] = field(default_factory=dict)
    gradient_loops: int | None = None
    checkpoint_loops: bool = False
    ema_decay: float | None = None
    collator: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    optimizer: str = "adamw"
    dtype: str = "float32"
    eval_loops: list[int] | None = None
    eval_sequences: int = 64
    eval_samples: int = 8
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, choices in (
            ("task", ("pretrain", "answers")),
            ("documents", tuple(SEPARATORS)),
            ("optimizer", ("adamw", "muon")),
            ("dtype", ("float32", "bfloat16", "float16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")
        if self.model is None and not self.model_config:
            raise ValueError(
                "There is no `model` to start from and no `model_config` to make one of; give one of them."
            )
        if self.model is None and self.tokenizer is None:
            raise ValueError("`tokenizer` is missing; a fresh model needs one (a folder, or an id on the Hub).")
        for name in ("model_config", "dataset", "loops", "collator", "trainer"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must hold names and values.")


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """
    Reads a run from a YAML file. `overrides` are `key=value`, with dots into nested keys (`trainer.max_steps=100`) and
    YAML values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must hold names and values.")
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not `key=value`.")
        *parents, last = name.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{override!r}: `{parent}` holds a single value, which has no {last!r}.")
        place[last] = yaml.safe_load(value)
    known = {one.name for one in dataclasses.fields(TrainConfig)}
    for name in values:
        check_key(name, known, f"{path}")
    for name in ("output", "data"):
        if name not in values:
            raise ValueError(f"{path} has no `{name}`.")
    return TrainConfig(**values)


def check_key(name: str, known: Iterable[str], where: str) -> None:
    """Raises a ValueError that names the nearest one where `name` is none of the `known` keys of `where`."""
    if name not in known:
        close = difflib.get_close_matches(str(name), list(known), n=1)
        raise ValueError(f"{where} has a key `{name}`, which does not exist{f'; `{close[0]}`?' if close else '.'}")
