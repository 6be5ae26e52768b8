# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm train`: a run that one file describes, from its data to a saved model."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from ..configuration_loopmdm import LoopMDMConfig
from ..data import (
    ExampleStream,
    StreamedExamples,
    adapter_base,
    check_tokenizer,
    load_tokenizer,
    locate,
    read_examples,
    share_weights,
    spread,
    this_process,
    turn_end,
    vocabulary_size,
    write_json,
)
from ..evaluation.loading import read_generation_config
from ..evaluation.loop_budget import BUDGET_ARGUMENTS
from ..hub import CARD, read_source_card, recorded, write_card
from ..modeling_loopmdm import LoopMDMForMaskedLM
from ..weight_files import read_json
from .adapters import adapter_to_continue, attach_adapter, lora_config
from .arguments import TrainConfig, listed, read_config
from .checkpoints import COMPLETE, check_folder, checkpoints_in, locked
from .checks import check_options
from .collator import MaskedDiffusionCollator
from .loop_schedules import LoopSchedule, make_loop_schedule
from .optimizer import MuonAdamW
from .texts import EvaluationTexts
from .trainer import LoopMDMTrainer

__all__ = ["TrainConfig", "read_config", "train"]

logger = logging.get_logger("transformers.loopmdm")
# Folders inside the output: checkpoints, and the final model until it is complete
CHECKPOINTS, SAVING = "checkpoints", ".saving"
# The last file that is written into SAVING, with the names of all files: from then on they only have to be moved.
RECORD = "training.json"


def train(config: TrainConfig, resume: bool = False) -> dict[str, Any]:
    """
    Trains, and saves the model, its tokenizer and `training.json` in `config.output`.

    Args:
        config: The run.
        resume (`bool`, defaults to `False`): Continue from the last complete checkpoint of `config.output`, if any.

    Returns:
        `dict`: The contents of `training.json`: the run, its cost, the last evaluation and the log. Empty on ranks
        other than 0 if there was nothing left to train.

    Raises:
        ValueError: A setting, a file or the output folder does not fit, or training has diverged.
    """
    output = Path(config.output).expanduser()
    _check_files(config)
    is_main = this_process().rank == 0
    with locked(output / CHECKPOINTS) if is_main else contextlib.nullcontext():
        return _train(config, output, resume, is_main)


def _train(config: TrainConfig, output: Path, resume: bool, is_main: bool) -> dict[str, Any]:
    is_begun = _is_begun(output)
    if is_main:
        _check_output(output, resume)
        if (output / SAVING / RECORD).exists():  # killed when only the moving of files was left
            _move(output)
            return read_json(output / RECORD)
    elif (output / SAVING / RECORD).exists() or _is_finished(output):
        return {}  # the main process moves the files, or raises
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    parts = make_parts(config, tokenizer, output / CHECKPOINTS)
    model = load_trainable(parts)
    trainer = LoopMDMTrainer(
        model=model,
        args=parts.arguments,
        train_dataset=parts.stream,
        eval_dataset=parts.eval_examples,
        data_collator=parts.collator,
        processing_class=tokenizer,
        optimizers=(make_optimizer(parts, model), None),
        loop_schedule=parts.schedule,
        checkpoint_loops=config.checkpoint_loops,
        **parts.options,
    )
    trainer.check_saves()
    if config.eval_texts:
        trainer.add_callback(EvaluationTexts(trainer, parts.eval_examples[: config.eval_texts], tokenizer))
    trainer.train(resume_from_checkpoint=is_begun or None)
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    record = {
        "run": {**dataclasses.asdict(config), "data": recorded(config.data), "eval_data": recorded(config.eval_data)},
        "steps": trainer.state.global_step,
        "training_flops": trainer.state.total_flos,
        "seconds": trainer.seconds,
        "resumed": trainer.resumed,
        "evaluation": metrics,
        "log": trainer.state.log_history,
    }
    _save(trainer, tokenizer, output, record)
    return record


def check_run(config: TrainConfig, resume: bool) -> None:
    """Raises a ValueError if a file of the run is missing or its output cannot be used; writes nothing."""
    output = Path(config.output).expanduser()
    _check_files(config)
    check_folder(output)
    if output.is_dir():
        _check_output(output, resume)


def _check_files(config: TrainConfig) -> None:
    """Raises a ValueError if a file or folder that the run names is missing."""
    for name in ("data", "eval_data"):
        for path in listed(getattr(config, name)):
            # Any other name may be a data set on the Hub.
            is_path = path.endswith((".txt", ".jsonl", ".parquet")) or path.startswith((".", "/", "~"))
            if is_path and not Path(path).expanduser().exists():
                raise ValueError(f"`{name}`: {path} is not a file.")
    for name in ("model", "tokenizer"):
        if getattr(config, name) is not None:
            locate(getattr(config, name), f"a {name}")


def _is_finished(output: Path) -> bool:
    return (output / "config.json").exists() or (output / "adapter_config.json").exists()


def _is_begun(output: Path) -> bool:
    return any((path / COMPLETE).exists() for path in checkpoints_in(output / CHECKPOINTS))


def _check_output(output: Path, resume: bool) -> None:
    """Raises a ValueError if the run cannot write into the folder."""
    is_saved = (output / SAVING / RECORD).exists()
    if _is_finished(output) and not (is_saved and resume):
        raise ValueError(f"{output} holds a finished model already; name another folder.")
    if (is_saved or _is_begun(output)) and not resume:
        raise ValueError(f"{output} holds checkpoints of a run; give --resume to go on, or name another folder.")
    own = {CHECKPOINTS, SAVING, *(_own_files(output) if resume else ())}
    foreign = sorted({path.name for path in output.iterdir()} - own) if not is_saved else []
    if foreign:
        raise ValueError(f"{output} holds {foreign[0]}, which no training wrote; name a new or an empty folder.")


def _own_files(output: Path) -> set[str]:
    """The names of the files that a finished training wrote."""
    try:
        return {RECORD, *read_json(output / RECORD)["files"]}
    except (ValueError, TypeError, KeyError):
        return set()


@dataclasses.dataclass
class RunParts:
    """A run and its parts except the weights, all of them checked."""

    config: TrainConfig
    tokenizer: Any
    source: str | None  # folder or Hub id of the weights; None: fresh ones
    model_config: LoopMDMConfig
    arguments: TrainingArguments
    schedule: LoopSchedule
    collator: MaskedDiffusionCollator
    examples: list[dict] | StreamedExamples
    stream: ExampleStream | StreamedExamples  # the examples in the order of the run
    eval_examples: list[dict] | None
    lora: Any  # the LoraConfig of a new adapter, or None
    adapter: str | None  # folder or Hub id of the adapter to continue
    options: dict[str, Any]  # further arguments of LoopMDMTrainer


def make_parts(config: TrainConfig, tokenizer: Any, checkpoints: Path) -> RunParts:
    """Makes the parts of a run. Raises a ValueError for everything wrong that shows without loading weights."""
    source = None if config.model is None else adapter_base(config.model) or locate(config.model, "a model")
    model_config = _make_model_config(config, source, tokenizer)
    rope_type = (model_config.rope_parameters or {}).get("rope_type")
    if config.isolate_documents and rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"`isolate_documents` is True, and `rope_type` is {rope_type!r}, whose frequencies depend on a row's "
            "length, not on those of its documents; leave `isolate_documents` out."
        )
    loops = {"schedule": "uniform", **config.loops}
    schedule = make_loop_schedule(loops.pop("schedule"), model_config, loops.pop("max_loops", None), **loops)
    if config.model_config.get("num_loops", 0) > schedule.max_loops:
        raise ValueError(
            f"`model_config.num_loops` is {model_config.num_loops}, the default of `generate`, but training draws at "
            f"most {schedule.max_loops} loops; lower it, or raise `loops.max_loops` or `max_train_loops`."
        )
    model_config.num_loops = min(model_config.num_loops, schedule.max_loops)
    arguments = _make_arguments(config, checkpoints)
    length = config.sequence_length or min(1024, model_config.max_position_embeddings)
    if length > model_config.max_position_embeddings:
        raise ValueError(
            f"`sequence_length` is {length}; the model takes 1 to {model_config.max_position_embeddings} positions."
        )
    eval_loops = None
    if config.eval_data is not None:
        usual = [n for n in (1, 2, 4, 8) if n < schedule.max_loops] + [schedule.max_loops]
        eval_loops = config.eval_loops or usual
    options: dict[str, Any] = {name: getattr(config, name) for name in ("gradient_loops", "ema_decay", "eval_samples")}
    options["eval_loops"] = eval_loops
    check_options(arguments, schedule, **options)
    # `accelerate launch` says so in the environment.
    uses_fsdp = bool(arguments.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if config.optimizer == "muon" and uses_fsdp:
        raise ValueError("`optimizer: muon` does not work with FSDP, which splits matrices between ranks; use adamw.")
    if config.eval_texts and uses_fsdp:
        raise ValueError("`eval_texts` does not work with FSDP, which splits weights between ranks; leave it out.")
    collator = _make_collator(config, model_config, tokenizer, length, arguments.seed)
    lora = None if config.lora is None else lora_config(model_config, **config.lora)
    adapter = adapter_to_continue(config.model, config.model_config, config.lora)
    examples = _read_examples(config, config.data, tokenizer, length, model_config)
    eval_examples = None
    if config.eval_data is not None:
        rows = _read_examples(config, config.eval_data, tokenizer, length, model_config)
        if isinstance(rows, StreamedExamples):
            rows = list(itertools.islice(rows.examples(), config.eval_sequences))
        eval_examples = spread(rows, config.eval_sequences)
    stream = _make_stream(examples, arguments)
    made = source, model_config, arguments, schedule, collator, examples, stream, eval_examples, lora, adapter
    return RunParts(config, tokenizer, *made, options)


def load_trainable(parts: RunParts) -> nn.Module:
    """The model to train, fresh or loaded, with its adapter if the run trains one."""
    base = _make_model(parts)
    if parts.adapter is not None:  # its folder's settings come before those of its base
        base.generation_config = read_generation_config(parts.adapter) or base.generation_config
    forget_loops(base)
    if parts.config.task == "answers":
        add_end_tokens(base, parts.tokenizer)
    return attach_adapter(base, parts.adapter, parts.lora)


def make_optimizer(parts: RunParts, model: nn.Module) -> MuonAdamW | None:
    """The optimiser, or None for the Trainer's own."""
    if parts.config.optimizer != "muon":
        return None
    return MuonAdamW(model, lr=parts.arguments.learning_rate, weight_decay=parts.arguments.weight_decay)


def _make_model_config(config: TrainConfig, source: str | None, tokenizer: Any) -> LoopMDMConfig:
    """The configuration of `source` or of a fresh model, with the run's changes, checked against the tokenizer."""
    try:
        if source is not None:
            values, _ = LoopMDMConfig.get_config_dict(source)
            if values.get("model_type") != "loopmdm":
                raise ValueError(
                    f"{source} does not hold a LoopMDM, but {values.get('model_type') or 'no model'}; `loopmdm "
                    "convert` turns a masked diffusion model into one."
                )
            made = LoopMDMConfig.from_pretrained(source, **config.model_config)
            _check_weights_fit(source, LoopMDMConfig.from_pretrained(source), made)
        else:
            special = {
                f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "pad", "bos", "eos")
            }
            values = {"vocab_size": vocabulary_size(tokenizer), **special, **config.model_config}
            if values["mask_token_id"] is None:
                raise ValueError(
                    f"The tokenizer {config.tokenizer} has no mask token; add one to it, or name a free id "
                    "(`model_config: {mask_token_id: ...}`)."
                )
            made = LoopMDMConfig(**values)
    except StrictDataclassError as error:
        raise ValueError(f"`model_config`: {error.__cause__ or error}") from error
    except OSError as error:  # transformers does not say what it looked for
        raise ValueError(f"`model`: {source} is not a folder here, and the Hub does not give it: {error}") from error
    size = vocabulary_size(tokenizer)
    if size > made.vocab_size:
        raise ValueError(
            f"The tokenizer has {size} tokens, and the model {made.vocab_size}; if it is the right tokenizer, "
            f"`model_config: {{vocab_size: {size}}}` gives the model more."
        )
    check_tokenizer(tokenizer, made)
    return made


def _check_weights_fit(model: str, before: LoopMDMConfig, after: LoopMDMConfig) -> None:
    """Raises a ValueError if a change of the configuration needs weights that the model does not have."""
    shapes = []
    for one in (before, after):
        with torch.device("meta"):
            made = LoopMDMForMaskedLM(one)
        # These have a row for each token, and `_make_model` adds or removes rows.
        rows = ("model.embed_tokens.", "lm_head.")
        shapes.append({name: part.shape[name.startswith(rows) :] for name, part in made.named_parameters()})
    differing = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if differing:
        raise ValueError(
            f"`model_config` needs other weights than {model} has ({differing[0]}); change only what keeps the "
            "weights (loops, limits, tokens), or leave out `model` to train a fresh one."
        )


def _make_model(parts: RunParts) -> LoopMDMForMaskedLM:
    dtype, changes = getattr(torch, parts.config.dtype), parts.config.model_config
    torch.manual_seed(parts.arguments.seed)
    if parts.source is None:
        return LoopMDMForMaskedLM(parts.model_config).to(dtype)
    # Ids of tokens may lie outside the vocabulary until it has been resized, so they are set last.
    tokens = {name: value for name, value in changes.items() if name.endswith("_token_id")}
    others = {name: value for name, value in changes.items() if name not in {"vocab_size", *tokens}}
    model = LoopMDMForMaskedLM.from_pretrained(parts.source, dtype=dtype, **others)
    if model.config.vocab_size != parts.model_config.vocab_size:
        model.resize_token_embeddings(parts.model_config.vocab_size)
    for name, value in {**tokens, "num_loops": parts.model_config.num_loops}.items():
        setattr(model.config, name, value)
    model.config.validate()
    return model


def _make_collator(config: TrainConfig, model_config: LoopMDMConfig, tokenizer: Any, length: int, seed: int):
    candidates = (model_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((token for token in candidates if token not in (None, model_config.mask_token_id)), None)
    return MaskedDiffusionCollator(
        model_config.mask_token_id,
        pad,
        seed=seed,
        block_size=model_config.attention_block_size,
        max_length=length,
        **config.collator,
    )


def _make_arguments(config: TrainConfig, checkpoints: Path) -> TrainingArguments:
    """transformers' arguments, with our defaults. Those that the run depends on cannot be changed."""
    needed = {
        "output_dir": str(checkpoints),
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "prediction_loss_only": True,
    }
    for name in config.trainer:
        if name in needed or name in ("do_train", "do_eval", "do_predict", "resume_from_checkpoint"):
            raise ValueError(f"`trainer` has a key `{name}`, which this command sets itself; leave it out.")
    evaluates = config.eval_data is not None
    defaults = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.02,
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        "report_to": "none",
        "eval_strategy": "steps" if evaluates else "no",
        # Every rank reads a stream itself, since its batches may differ in length.
        "accelerator_config": {"dispatch_batches": False},
        "ddp_find_unused_parameters": False,
        "use_cpu": not torch.cuda.is_available() and not torch.backends.mps.is_available(),
    }
    if evaluates:
        defaults["eval_steps"] = config.trainer.get("save_steps", defaults["save_steps"])
    try:
        made = TrainingArguments(**{**defaults, **config.trainer, **needed})
        tried = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        get_scheduler(made.lr_scheduler_type, tried, 1, 2, scheduler_specific_kwargs=made.lr_scheduler_kwargs)
        if config.optimizer == "adamw":
            try:
                Trainer.get_optimizer_cls_and_kwargs(made)  # raises where the optimiser's library is not installed
            except ValueError as error:
                if "need to pass a" not in str(error):  # some look for their weights in the model
                    raise
        for reporter in get_reporting_integration_callbacks(made.report_to):
            reporter()  # raises where its library is not installed
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"`trainer`: {error}") from error
    if made.eval_strategy != "no" and not evaluates:
        raise ValueError("`trainer.eval_strategy` needs `eval_data`, and there is none; give some, or leave it out.")
    if made.fp16 and made.use_cpu:
        raise ValueError("`trainer.fp16` has no effect on a CPU; leave it out, or use `bf16`.")
    return made


def rows_of_step(arguments: TrainingArguments) -> int:
    """Rows of an optimiser step, on all GPUs of all processes: without `torchrun` one process has several."""
    return arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps


def _make_stream(
    examples: list[dict] | StreamedExamples, arguments: TrainingArguments
) -> ExampleStream | StreamedExamples:
    """The examples in the order of the run. Sets `arguments` so that the Trainer passes over them once."""
    if isinstance(examples, StreamedExamples):
        if arguments.max_steps <= 0:
            raise ValueError("The length of a streamed data set is not known; set `trainer: {max_steps: ...}`.")
        return examples
    per_step = rows_of_step(arguments)
    if arguments.max_steps > 0:
        count = arguments.max_steps * per_step
    else:
        # Whole steps: in a part of one, several processes would get different rows from a single one.
        count = math.ceil(max(1, round(arguments.num_train_epochs * len(examples))) / per_step) * per_step
        arguments.num_train_epochs = 1
    return ExampleStream(examples, count, arguments.seed)


def _read_examples(
    config: TrainConfig, data: str | list[str], tokenizer: Any, length: int, model_config: LoopMDMConfig
) -> list[dict] | StreamedExamples:
    """Tokenised examples: a list, or a stream if the data set is streamed."""
    encoded = functools.partial(
        read_examples,
        listed(data),
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
    is_stream = config.dataset.get("streaming")
    examples = list(itertools.islice(encoded(), 1 if is_stream else None))
    if not examples:
        raise ValueError(f"{data} holds no examples of at most {length} tokens.")
    # The first example of a stream is made here too, so that faults that all rows share show before training.
    return StreamedExamples(encoded) if is_stream else examples


def forget_loops(model: LoopMDMForMaskedLM) -> None:
    """Removes from the generation config what was chosen for the loops of the weights before training."""
    for name in BUDGET_ARGUMENTS:
        value = getattr(model.generation_config, name)
        if value is not None:
            logger.warning(f"`{name}={value}` of generation_config.json was for other weights, and is left out.")
            setattr(model.generation_config, name, None)


def add_end_tokens(model: LoopMDMForMaskedLM, tokenizer: Any) -> None:
    """Adds the tokens that end answers in the training data to those that end `generate`."""
    known = model.generation_config.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    learnt = (tokenizer.eos_token_id, turn_end(tokenizer))
    ends += [token for token in dict.fromkeys(learnt) if token is not None and token not in ends]
    if ends:
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends


def _save(trainer: LoopMDMTrainer, tokenizer: Any, output: Path, record: dict[str, Any]) -> None:
    """Saves the model into a folder inside the output, and moves the files once all are complete."""
    folder = output / SAVING
    if trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(folder))
    if not trainer.is_world_process_zero():
        return
    share_weights(folder)
    tokenizer.save_pretrained(folder)
    # An adapter needs it too: it has learnt where to end.
    trainer.looped_model.generation_config.save_pretrained(folder)
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing needs
    (folder / CARD).unlink(missing_ok=True)  # peft's empty template
    base = record["run"]["model"]
    source = None if base is None else read_source_card(base)
    write_card(folder, output.absolute().name, config=trainer.looped_model.config, source=source, training=record)
    record["files"] = sorted(path.name for path in folder.iterdir())
    write_json(folder / RECORD, record)
    _move(output)


def _move(output: Path) -> None:
    """
    Moves a saved model to the output. The config goes next to last, since nothing loads without it, and the record
    last, so that a call that is killed can be repeated. Raises a ValueError instead of overwriting somebody's file.
    """
    folder, own = output / SAVING, _own_files(output)
    last = ("adapter_config.json", "config.json", RECORD)
    paths = sorted(folder.iterdir(), key=lambda path: last.index(path.name) if path.name in last else -1)
    foreign = [path.name for path in paths if (output / path.name).exists() and path.name not in own]
    if foreign:
        raise ValueError(
            f"{output} holds {foreign[0]}, which this training did not write; the trained model is complete in "
            f"{folder}. Move that file away, and give --resume."
        )
    for path in paths:
        os.replace(path, output / path.name)
    folder.rmdir()
