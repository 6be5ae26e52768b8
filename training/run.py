# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm train`: a run described by one file, from its data to a saved model."""

import contextlib
import dataclasses
import difflib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, TrainingArguments

from ..configuration_loopmdm import LoopMDMConfig
from ..modeling_loopmdm import LoopMDMForMaskedLM
from .adapters import lora_config
from .collator import MaskedDiffusionCollator
from .data import (
    SEPARATORS,
    ExampleStream,
    StreamedExamples,
    encode_answer,
    load_dataset_rows,
    pack_documents,
    read_documents,
    read_jsonl,
)
from .loop_sampling import make_loop_schedule
from .optimizer import MuonAdamW
from .trainer import LoopMDMTrainer, last_complete_checkpoint


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
        gradient_loops (`int`, *optional*), checkpoint_loops (`bool`), ema_decay (`float`, *optional*), distillation
            (`float`): As in [`LoopMDMTrainer`].
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
    distillation: float = 0.0
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
        raise ValueError(f"{path} is no file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must hold names and values.")
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is no `key=value`.")
        *parents, last = name.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{override!r}: `{parent}` holds a single value, which has no {last!r}.")
        place[last] = yaml.safe_load(value)
    known = {one.name for one in dataclasses.fields(TrainConfig)}
    for name in values:
        _known(name, known, f"{path}")
    for name in ("output", "data"):
        if name not in values:
            raise ValueError(f"{path} has no `{name}`.")
    return TrainConfig(**values)


def _known(name: str, known: Iterable[str], where: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(str(name), list(known), n=1)
        raise ValueError(f"{where} has a key `{name}`, which does not exist{f'; `{close[0]}`?' if close else '.'}")


def train(config: TrainConfig, resume: bool = False) -> dict[str, Any]:
    """
    Runs a training and saves the model, its tokenizer and `training.json` in `config.output`.

    Args:
        config: The run.
        resume (`bool`): Go on from the last complete checkpoint of `config.output`, if there is one.

    Returns:
        `dict`: What `training.json` holds: the run, its cost, and the last evaluation.
    """
    output = Path(config.output).expanduser()
    checkpoints = output / "checkpoints"
    if (output / "config.json").exists() or (output / "adapter_config.json").exists():
        raise ValueError(f"{output} holds a finished model already; name another folder.")
    checkpoint = last_complete_checkpoint(checkpoints)
    if checkpoint is not None and not resume:
        raise ValueError(f"{output} holds checkpoints of a run; give --resume to go on, or name another folder.")

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer or config.model)
    model = _make_model(config, tokenizer)
    schedule = _make_schedule(config, model.config)
    length = config.sequence_length or min(1024, model.config.max_position_embeddings)
    if not 1 <= length <= model.config.max_position_embeddings:
        raise ValueError(
            f"`sequence_length` is {length}; the model takes 1 to {model.config.max_position_embeddings} positions."
        )
    examples = _examples(config, config.data, tokenizer, length, model.config.vocab_size)
    eval_examples = None
    if config.eval_data is not None:
        rows = _examples(
            dataclasses.replace(config, dataset={**config.dataset, "streaming": False}),
            config.eval_data,
            tokenizer,
            length,
            model.config.vocab_size,
        )
        count = min(config.eval_sequences, len(rows))
        eval_examples = [rows[i * len(rows) // count] for i in range(count)]

    arguments = _arguments(config, checkpoints, eval_examples is not None)
    stream, arguments = _stream(examples, arguments)
    eval_loops = config.eval_loops or [n for n in (1, 2, 4, 8) if n < schedule.max_loops] + [schedule.max_loops]
    collator = _make_collator(config, model.config, tokenizer, length, arguments.seed)
    trained = model
    if config.lora is not None:
        from peft import get_peft_model

        trained = get_peft_model(model, lora_config(model.config, **config.lora))
    optimizers = (None, None)
    if config.optimizer == "muon" and arguments.fsdp:
        raise ValueError("`optimizer: muon` does not go with FSDP, whose ranks hold parts of the matrices; use adamw.")
    if config.optimizer == "muon":
        optimizers = (MuonAdamW(trained, lr=arguments.learning_rate, weight_decay=arguments.weight_decay), None)
    trainer = LoopMDMTrainer(
        model=trained,
        args=arguments,
        train_dataset=stream,
        eval_dataset=eval_examples,
        data_collator=collator,
        processing_class=tokenizer,
        optimizers=optimizers,
        loop_schedule=schedule,
        gradient_loops=config.gradient_loops,
        checkpoint_loops=config.checkpoint_loops,
        eval_loops=eval_loops if eval_examples is not None else None,
        eval_samples=config.eval_samples,
        ema_decay=config.ema_decay,
        distillation=config.distillation,
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() if eval_examples is not None else {}
    record = {
        "run": dataclasses.asdict(config),
        "steps": trainer.state.global_step,
        "training_flops": trainer.state.total_flos,
        "seconds": result.metrics["train_runtime"],
        "evaluation": metrics,
        "log": trainer.state.log_history,
    }
    _save(trainer, tokenizer, output, record)
    return record


def _make_model(config: TrainConfig, tokenizer: Any) -> LoopMDMForMaskedLM:
    known = {one.name for one in dataclasses.fields(LoopMDMConfig)}
    for name in config.model_config:
        _known(name, known, "`model_config`")
    try:
        if config.model is not None:
            return LoopMDMForMaskedLM.from_pretrained(
                config.model, dtype=getattr(torch, config.dtype), **config.model_config
            )
        special = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
        special |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        values = {"vocab_size": len(tokenizer), **special, **config.model_config}
        if values["mask_token_id"] is None:
            raise ValueError(
                f"The tokenizer {config.tokenizer} has no mask token; add one to it, or name an id that is free "
                "(`model_config: {mask_token_id: ...}`)."
            )
        torch.manual_seed(config.trainer.get("seed", 42))
        return LoopMDMForMaskedLM(LoopMDMConfig(**values)).to(getattr(torch, config.dtype))
    except StrictDataclassError as error:
        raise ValueError(f"`model_config`: {error.__cause__ or error}") from error


def _make_schedule(config: TrainConfig, model_config: LoopMDMConfig):
    options = {"schedule": "uniform", **config.loops}
    return make_loop_schedule(options.pop("schedule"), model_config, options.pop("max_loops", None), **options)


def _make_collator(config: TrainConfig, model_config: LoopMDMConfig, tokenizer: Any, length: int, seed: int):
    for name in config.collator:
        _known(name, ("mask_ratio", "complementary", "learn_padding"), "`collator`")
    candidates = (model_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((token for token in candidates if token not in (None, model_config.mask_token_id)), None)
    options = dict(config.collator)
    if "mask_ratio" in options:
        options["mask_ratio"] = tuple(options["mask_ratio"])
    return MaskedDiffusionCollator(
        model_config.mask_token_id,
        pad,
        seed=seed,
        block_size=model_config.attention_block_size,
        max_length=length,
        **options,
    )


def _arguments(config: TrainConfig, checkpoints: Path, evaluates: bool) -> TrainingArguments:
    """transformers' arguments, with defaults that suit; what the run needs cannot be changed."""
    needed = {
        "output_dir": str(checkpoints),
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "prediction_loss_only": True,
    }
    known = {one.name for one in dataclasses.fields(TrainingArguments)}
    for name in config.trainer:
        _known(name, known, "`trainer`")
        if name in needed:
            raise ValueError(f"`trainer` has a key `{name}`, which this command sets itself; leave it out.")
    defaults = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.02,
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        "report_to": "none",
        "eval_strategy": "steps" if evaluates else "no",
        # Each rank reads a stream for itself, as batches of it may differ in length.
        "accelerator_config": {"dispatch_batches": False},
        "ddp_find_unused_parameters": False,
        "use_cpu": not torch.cuda.is_available() and not torch.backends.mps.is_available(),
    }
    if evaluates:
        defaults["eval_steps"] = config.trainer.get("save_steps", defaults["save_steps"])
    try:
        return TrainingArguments(**{**defaults, **config.trainer, **needed})
    except (TypeError, ValueError) as error:
        raise ValueError(f"`trainer`: {error}") from error


def _stream(examples: Any, arguments: TrainingArguments):
    """The examples in the order of the run, and arguments that make one pass over that."""
    if isinstance(examples, StreamedExamples):
        if arguments.max_steps <= 0:
            raise ValueError("A streamed data set has no known end; say `trainer: {max_steps: ...}`.")
        return examples, arguments
    per_step = arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    if arguments.max_steps > 0:
        count = arguments.max_steps * per_step
    else:
        count = max(per_step, round(arguments.num_train_epochs * len(examples)))
        arguments.num_train_epochs = 1
    return ExampleStream(examples, count, arguments.seed), arguments


def _examples(config: TrainConfig, data: str | list[str], tokenizer: Any, length: int, vocab_size: int) -> Any:
    """Tokenised examples: a list, or a stream where the data set is streamed."""
    if config.dataset.get("streaming"):
        return StreamedExamples(lambda: _encode(config, _rows(config, data), tokenizer, length))
    examples = list(_encode(config, _rows(config, data), tokenizer, length))
    if not examples:
        raise ValueError(f"{data} holds no examples of at most {length} tokens.")
    largest = max(int(max(example["input_ids"])) for example in examples)
    if largest >= vocab_size:
        raise ValueError(
            f"{data} gives the token {largest}, outside the model's vocabulary of {vocab_size}; is it the right "
            "tokenizer?"
        )
    return examples


def _rows(config: TrainConfig, data: str | list[str]) -> Iterator[tuple[str, Any]]:
    """Documents or examples, each with what to call it in errors."""
    for name in [data] if isinstance(data, str) else data:
        path = Path(name).expanduser()
        if path.suffix in (".txt", ".jsonl") and not path.is_file():
            raise ValueError(f"{name} is no file.")
        if path.suffix == ".txt":
            if config.task != "pretrain":
                raise ValueError(f"{name} is a text; `task: answers` needs prompts and answers (.jsonl).")
            for number, text in enumerate(read_documents(path, SEPARATORS[config.documents]), start=1):
                yield f"{name}, document {number}", text
            continue
        rows = read_jsonl(path) if path.suffix == ".jsonl" else load_dataset_rows(name, config.dataset)
        for number, row in enumerate(rows, start=1):
            where = f"{name}, example {number}"
            if config.task == "answers":
                yield where, row
            elif isinstance(row.get(config.text_column), str):
                yield where, row[config.text_column]
            else:
                raise ValueError(f"{where} has no text in {config.text_column!r}; it has {', '.join(row)}.")


def _encode(config: TrainConfig, rows: Iterable[tuple[str, Any]], tokenizer: Any, length: int) -> Iterator[dict]:
    if config.task == "pretrain":
        documents = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for _, text in rows)
        yield from pack_documents(documents, length, tokenizer.eos_token_id, config.isolate_documents)
        return
    for where, row in rows:
        example = encode_answer(tokenizer, row, where)
        if len(example["input_ids"]) <= length:
            yield example
        elif not config.skip_long:
            raise ValueError(
                f"{where} has {len(example['input_ids'])} tokens, more than `sequence_length` ({length}); raise "
                "it, or set `skip_long: true`."
            )


def _save(trainer: LoopMDMTrainer, tokenizer: Any, output: Path, record: dict[str, Any]) -> None:
    """Saves beside the output and moves over, the file without which nothing loads at the end."""
    folder = output / ".saving"
    if trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(folder))
    if not trainer.is_world_process_zero():
        return
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
    with contextlib.suppress(FileNotFoundError):
        (folder / "training_args.bin").unlink()  # a pickle, of no use to a model
    last = ("adapter_config.json", "config.json")
    for path in sorted(folder.iterdir(), key=lambda path: path.name in last):
        os.replace(path, output / path.name)
    folder.rmdir()
