# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are complete or refused, the identity of a run, and the lock on the folder that it writes."""

import contextlib
import hashlib
import itertools
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from transformers.utils import logging

from ..data import ExampleStream, StreamedExamples, spread, write_json

if TYPE_CHECKING:
    from .trainer import LoopMDMTrainer

logger = logging.get_logger("transformers.loopmdm")

# Written last into a checkpoint, with the run's identity and the sizes and checksums of all files.
COMPLETE = "complete.json"
# Fields of a configuration and of `TrainingArguments` that may change when a run is resumed, since they change the
# weights by rounding at most. Any other name, such as one that a newer transformers adds, has to stay the same.
_FREE_CONFIG = {
    *("_name_or_path", "transformers_version", "dtype", "architectures", "auto_map", "num_loops", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),  # the Trainer copies these from the tokenizer
}
_FREE_ARGUMENTS = (
    "activation_checkpointing activation_checkpointing_kwargs auto_find_batch_size batch_eval_metrics bf16_full_eval "
    "dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory "
    "dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters "
    "ddp_static_graph ddp_timeout debug disable_tqdm do_eval do_predict do_train enable_jit_checkpoint "
    "eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy "
    "eval_use_gather_object fp16_full_eval fsdp fsdp_config full_determinism gradient_accumulation_steps "
    "gradient_checkpointing gradient_checkpointing_kwargs hub_always_push hub_model_id hub_private_repo hub_revision "
    "hub_strategy hub_token ignore_data_skip include_for_metrics include_num_input_tokens_seen label_names "
    "label_smoothing_factor liger_kernel_config local_rank log_level log_level_replica log_on_each_node "
    "logging_first_step logging_nan_inf_filter logging_steps logging_strategy max_steps num_train_epochs output_dir "
    "per_device_eval_batch_size per_device_train_batch_size prediction_loss_only project push_to_hub "
    "remove_unused_columns report_to restore_callback_states_from_checkpoint resume_from_checkpoint run_name "
    "save_on_each_node save_only_model save_steps save_strategy save_total_limit skip_memory_metrics torch_compile "
    "torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id "
    "trackio_static_space_id use_cache use_cpu use_liger_kernel"
)
_FREE_ADAPTER = {"base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"}


# Checkpoints


def complete_checkpoint(folder: Path, record: dict[str, Any]) -> None:
    """Makes a checkpoint complete: writes complete.json with `record` and the size and checksum of every file."""
    files = {path.relative_to(folder).as_posix(): _describe(path) for path in folder.rglob("*") if path.is_file()}
    write_json(folder / COMPLETE, {**record, "files": files})


def read_checkpoint(folder: Path, verify: bool = True) -> dict[str, Any]:
    """
    The contents of a checkpoint's complete.json. Raises a ValueError if the checkpoint was not finished, or, with
    `verify`, if one of its files is missing or has changed.
    """
    try:
        record = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        files = dict(record["files"])
    except OSError:
        raise ValueError(
            f"{folder} has no {COMPLETE}: it was not finished, or not written by this trainer. Resume from an "
            "earlier one (`resume_from_checkpoint=True` takes the last complete one)."
        ) from None
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{folder} is damaged: its {COMPLETE} does not list its files.") from None
    for name, described in files.items() if verify else ():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing. Resume from an earlier one.")
        if _describe(path) != described:
            raise ValueError(f"{folder} is damaged: {name} has changed since. Resume from an earlier one.")
    return record


def _describe(path: Path) -> list[int]:
    """Size and checksum of a file."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>`, complete or not, from the most steps to the fewest."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """
    The latest checkpoint in `folder` that is complete and undamaged, or None. The log warns of each damaged one that
    is passed over, since the run then repeats steps.
    """
    for path in checkpoints_in(folder):
        if (path / COMPLETE).exists():
            try:
                read_checkpoint(path)
                return str(path)
            except ValueError as error:
                logger.warning(str(error))
    return None


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint; complete.json goes first, so that a half-deleted one does not count as complete."""
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def rotate_checkpoints(folder: str | Path, limit: int | None, keep: set[Path]) -> None:
    """
    Deletes the oldest complete checkpoints until `limit` are left, and the unfinished ones of killed runs, but none
    of those in `keep`. A `limit` of None deletes nothing.
    """
    if limit is None or limit < 1:
        return
    found = checkpoints_in(folder)
    complete = [path for path in found if (path / COMPLETE).exists()]
    deletable = [path for path in reversed(complete) if path not in keep][: max(0, len(complete) - limit)]
    for path in [*deletable, *(path for path in found if path not in complete and path not in keep)]:
        remove_checkpoint(path)


def check_folder(folder: Path) -> list[Path]:
    """The folders to make so that `folder` exists, innermost first. Raises a ValueError if a file is in their way."""
    paths = [folder.absolute(), *folder.absolute().parents]
    missing = list(itertools.takewhile(lambda path: not path.exists(), paths))
    existing = paths[len(missing)]
    if not existing.is_dir():
        raise ValueError(f"{folder} cannot be made, as {existing} is a file; name another folder.")
    return missing


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Holds the lock of a folder inside the block. The folder is made if it is missing, and removed again if it stays
    empty. The operating system releases the lock when the process ends, even if it is killed. Raises a ValueError if
    another process holds the lock.
    """
    created = check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.absolute() / ".lock", timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"Another run is writing to {folder}; wait for it, or name another folder.") from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:  # the outermost of nested blocks
            with contextlib.suppress(OSError):
                (folder / ".lock").unlink()
                for path in created:
                    path.rmdir()
        lock.release()


# Identity


def run_identity(trainer: "LoopMDMTrainer") -> dict[str, Any]:
    """
    By name, everything that has to stay the same so that a resumed run repeats an uninterrupted one. Whatever does not
    change the result (logging, saving, devices) is left out, and so is the length of the run.
    """
    args, model, dataset = trainer.args, trainer.looped_model, trainer.train_dataset
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    transform = getattr(dataset, "transform", None)
    run = {
        "model": {name: value for name, value in model.config.to_dict().items() if name not in _FREE_CONFIG},
        "dtype": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained}),
        "trained parameters": sum(parameter.numel() for parameter in trained),
        **_adapter_identity(trainer.model),
        "data": data_fingerprint(dataset),
        "order": getattr(dataset, "seed", None),
        "transform": getattr(transform, "__qualname__", transform and _settings(transform)),
        "noise": _settings(trainer.data_collator),
        "number of rows in an optimiser step": trainer.get_total_train_batch_size(args),
        "number of rows in a micro-batch": args.train_batch_size,  # over which masks are spread
        "use of FSDP": trainer.is_fsdp_enabled,
        "mixed precision": trainer.accelerator.mixed_precision,  # also of `accelerate launch`
        "loop schedule": _settings(trainer.loop_schedule),
        "gradient loops": trainer.gradient_loops,
        "ema decay": trainer.ema_decay,
        **trainer.given_optimizer,
        **{name: value for name, value in args.to_dict().items() if name not in _FREE_ARGUMENTS.split()},
    }
    if not isinstance(dataset, ExampleStream):  # the number of workers changes the order of a stream
        run["dataloader_num_workers"] = args.dataloader_num_workers
    if args.metric_for_best_model is not None:  # the evaluation decides which weights are kept
        run["evaluation"] = [trainer.eval_loops, trainer.eval_samples, str(args.eval_strategy), args.eval_steps]
    return json.loads(json.dumps(run, default=_plain))


def optimizer_identity(optimizer: torch.optim.Optimizer | None, scheduler: Any) -> dict[str, Any]:
    """Optimiser and scheduler as far as the caller passed them in; None for those that the Trainer makes."""
    groups = [] if optimizer is None else optimizer.param_groups
    return {
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        "optimizer groups": [{**group, "params": len(group["params"])} for group in groups],
        "scheduler": None if scheduler is None else type(scheduler).__name__,
    }


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """The differences between two identities, in words."""
    found = []
    for name in sorted({*before, *now}):
        was, is_ = before.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(is_, dict):
            found += differences(was, is_, f"{prefix}{name}.")
        elif was != is_:
            found.append(f"its {prefix}{name} is {was}, here {is_}")
    return found


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _adapter_identity(model: nn.Module) -> dict[str, Any]:
    """A PEFT model's adapters, and a checksum of its base weights, which checkpoints do not hold; else nothing."""
    if not hasattr(model, "peft_config"):
        return {}
    adapters = {
        name: {key: value for key, value in config.to_dict().items() if key not in _FREE_ADAPTER}
        for name, config in model.peft_config.items()
    }
    checksum = 0
    for _, parameter in sorted(model.named_parameters()):
        for tensor in plain_tensors(parameter.detach()) if not parameter.requires_grad else ():
            checksum = zlib.crc32(tensor.cpu().contiguous().view(torch.uint8).numpy(), checksum)
    return {"adapter": adapters, "base weights": f"{checksum:08x}"}


def plain_tensors(tensor: Any) -> Iterator[torch.Tensor]:
    """Flat plain tensors: the parts of a quantised tensor, this rank's part of a sharded one, or the tensor itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    elif isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and tensor.numel() > 0:
        yield tensor.reshape(-1)


def _settings(thing: Any) -> str:
    """The class of an object and those of its attributes that are plain data, as text."""
    plain = {
        name: value
        for name, value in getattr(thing, "__dict__", {}).items()
        if isinstance(value, bool | int | float | str | tuple | list)
    }
    return f"{getattr(thing, '__qualname__', type(thing).__name__)} {json.dumps(plain, sort_keys=True, default=str)}"


def data_fingerprint(dataset: Any, num_examples: int = 256) -> str:
    """
    A hash of all examples of a list, of the first `num_examples` of a [`StreamedExamples`], or of the length of an
    indexable data set and `num_examples` rows spread over it. Other streams cannot be read twice: "stream".
    """
    examples = dataset.examples if isinstance(dataset, ExampleStream) else dataset
    digest = hashlib.sha256()
    chosen: Iterable[dict[str, Any]]
    if isinstance(examples, list | tuple):
        chosen = examples
    elif isinstance(examples, StreamedExamples):
        chosen = itertools.islice(examples.examples(), num_examples)
        digest.update(b"stream")
    elif hasattr(examples, "__len__") and hasattr(examples, "__getitem__"):
        chosen = spread(examples, num_examples)
        digest.update(f"{len(examples)}".encode())
    else:
        return "stream"
    for example in chosen:
        for name, value in sorted(example.items()):
            try:
                content = torch.as_tensor(value).numpy().tobytes()
            except (TypeError, ValueError, RuntimeError):  # not numbers
                content = repr(value).encode()
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]
