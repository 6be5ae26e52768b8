# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm train`: a run described by one file, from its data to a saved model."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments

from ..configuration_loopmdm import LoopMDMConfig
from ..data import (
    ExampleStream,
    StreamedExamples,
    adapter_base,
    check_tokenizer,
    load_tokenizer,
    read_examples,
    turn_end,
    vocabulary_size,
)
from ..modeling_loopmdm import LoopMDMForMaskedLM
from .adapters import attach_adapter
from .arguments import TrainConfig, check_key, read_config
from .collator import MaskedDiffusionCollator
from .loop_schedules import LoopSchedule, make_loop_schedule
from .optimizer import MuonAdamW
from .trainer import LoopMDMTrainer, last_complete_checkpoint

__all__ = ["TrainConfig", "read_config", "train"]


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
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    trainer = _make_trainer(config, tokenizer, checkpoints)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
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


def _make_trainer(config: TrainConfig, tokenizer: Any, checkpoints: Path) -> LoopMDMTrainer:
    """The model, the data and all settings of a run; everything is checked that can be before the first step."""
    model = _make_model(config, tokenizer)
    check_tokenizer(tokenizer, model.config)
    if config.task == "answers":
        add_end_tokens(model, tokenizer)
    schedule = _make_schedule(config, model.config)
    length = config.sequence_length or min(1024, model.config.max_position_embeddings)
    if not 1 <= length <= model.config.max_position_embeddings:
        raise ValueError(
            f"`sequence_length` is {length}; the model takes 1 to {model.config.max_position_embeddings} positions."
        )
    examples = _read_examples(config, config.data, tokenizer, length, model.config)
    eval_examples = None
    if config.eval_data is not None:
        whole = dataclasses.replace(config, dataset={**config.dataset, "streaming": False})
        rows = _read_examples(whole, config.eval_data, tokenizer, length, model.config)
        count = min(config.eval_sequences, len(rows))
        eval_examples = [rows[i * len(rows) // count] for i in range(count)]
    arguments = _make_arguments(config, checkpoints, eval_examples is not None)
    stream, arguments = _make_stream(examples, arguments)
    eval_loops = config.eval_loops or [n for n in (1, 2, 4, 8) if n < schedule.max_loops] + [schedule.max_loops]
    adapter = None if config.model is None or adapter_base(config.model) is None else config.model
    trained = attach_adapter(model, adapter, config.lora)
    optimizer = None
    if config.optimizer == "muon":
        if arguments.fsdp:
            raise ValueError(
                "`optimizer: muon` does not work with FSDP, whose ranks hold parts of the matrices; use adamw."
            )
        optimizer = MuonAdamW(trained, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    return LoopMDMTrainer(
        model=trained,
        args=arguments,
        train_dataset=stream,
        eval_dataset=eval_examples,
        data_collator=_make_collator(config, model.config, tokenizer, length, arguments.seed),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        loop_schedule=schedule,
        gradient_loops=config.gradient_loops,
        checkpoint_loops=config.checkpoint_loops,
        eval_loops=eval_loops if eval_examples is not None else None,
        eval_samples=config.eval_samples,
        ema_decay=config.ema_decay,
    )


def _make_model(config: TrainConfig, tokenizer: Any) -> LoopMDMForMaskedLM:
    known = {one.name for one in dataclasses.fields(LoopMDMConfig)}
    for name in config.model_config:
        check_key(name, known, "`model_config`")
    try:
        if config.model is not None:
            source = adapter_base(config.model) or config.model
            return LoopMDMForMaskedLM.from_pretrained(
                source, dtype=getattr(torch, config.dtype), **config.model_config
            )
        special = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
        special |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        values = {"vocab_size": vocabulary_size(tokenizer), **special, **config.model_config}
        if values["mask_token_id"] is None:
            raise ValueError(
                f"The tokenizer {config.tokenizer} has no mask token; add one to it, or name an id that is free "
                "(`model_config: {mask_token_id: ...}`)."
            )
        torch.manual_seed(config.trainer.get("seed", 42))
        return LoopMDMForMaskedLM(LoopMDMConfig(**values)).to(getattr(torch, config.dtype))
    except StrictDataclassError as error:
        raise ValueError(f"`model_config`: {error.__cause__ or error}") from error


def _make_schedule(config: TrainConfig, model_config: LoopMDMConfig) -> LoopSchedule:
    options = {"schedule": "uniform", **config.loops}
    return make_loop_schedule(options.pop("schedule"), model_config, options.pop("max_loops", None), **options)


def _make_collator(config: TrainConfig, model_config: LoopMDMConfig, tokenizer: Any, length: int, seed: int):
    for name in config.collator:
        check_key(name, ("mask_ratio", "complementary", "learn_padding"), "`collator`")
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


def _make_arguments(config: TrainConfig, checkpoints: Path, evaluates: bool) -> TrainingArguments:
    """transformers' arguments, with defaults that suit; what the run needs cannot be changed."""
    needed = {
        "output_dir": str(checkpoints),
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "prediction_loss_only": True,
    }
    known = {one.name for one in dataclasses.fields(TrainingArguments)}
    for name in config.trainer:
        check_key(name, known, "`trainer`")
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


def _make_stream(examples: Any, arguments: TrainingArguments):
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


def _read_examples(
    config: TrainConfig, data: str | list[str], tokenizer: Any, length: int, model_config: LoopMDMConfig
) -> list[dict] | StreamedExamples:
    """Tokenised examples: a list, or a stream where the data set is streamed."""

    def encoded() -> Iterator[dict[str, Any]]:
        return read_examples(
            [data] if isinstance(data, str) else data,
            tokenizer,
            model_config,
            config.task,
            length,
            text_column=config.text_column,
            documents=config.documents,
            isolate_documents=config.isolate_documents,
            skip_long=config.skip_long,
            dataset=config.dataset,
        )

    if config.dataset.get("streaming"):
        return StreamedExamples(encoded)
    examples = list(encoded())
    if not examples:
        raise ValueError(f"{data} holds no examples of at most {length} tokens.")
    return examples


def add_end_tokens(model: LoopMDMForMaskedLM, tokenizer: Any) -> None:
    """Adds the tokens with which answers end, as they are learnt, to those that end `generate`."""
    known = model.generation_config.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    learnt = (tokenizer.eos_token_id, turn_end(tokenizer))
    ends += [token for token in dict.fromkeys(learnt) if token is not None and token not in ends]
    if ends:
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends


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
    trainer.looped_model.generation_config.save_pretrained(
        folder
    )  # with an adapter too, which has learnt where to end
    (folder / "training.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
    with contextlib.suppress(FileNotFoundError):
        (folder / "training_args.bin").unlink()  # a pickle, of no use to a model
    last = ("adapter_config.json", "config.json")
    for path in sorted(folder.iterdir(), key=lambda path: path.name in last):
        os.replace(path, output / path.name)
    folder.rmdir()
