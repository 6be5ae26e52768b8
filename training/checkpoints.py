# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are complete or refused, the identity of a run, and the lock on the folder that it writes."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from transformers.utils import logging

from ..data import ExampleStream, StreamedExamples

if TYPE_CHECKING:
    from .trainer import LoopMDMTrainer

logger = logging.get_logger("transformers.loopmdm")

# Written last into a checkpoint, with the run's identity and the sizes and checksums of all files.
COMPLETE = "complete.json"
# Of a configuration and of `TrainingArguments`, what two parts of one run may differ in: it changes no weight, or more
# than rounding of none. A name that is not here, such as one of a newer transformers, may not differ.
_FREE_CONFIG = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "architectures",
    "auto_map",
    "num_loops",
    "use_cache",
}
_FREE_CONFIG |= {"bos_token_id", "eos_token_id", "pad_token_id"}  # the Trainer takes these over from the tokenizer
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
    """Makes a checkpoint complete: writes `record` and what all of its files are."""
    files = {path.relative_to(folder).as_posix(): _describe(path) for path in folder.rglob("*") if path.is_file()}
    temporary = folder / f"{COMPLETE}.tmp"
    temporary.write_text(json.dumps({**record, "files": files}, indent=2) + "\n")
    os.replace(temporary, folder / COMPLETE)


def read_checkpoint(folder: Path, verify: bool = True) -> dict[str, Any]:
    """
    What complete.json of a checkpoint holds. Raises a ValueError where it was not finished, or, with `verify`, where a
    file of it is missing or has changed.
    """
    try:
        record = json.loads((folder / COMPLETE).read_text())
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
    The checkpoint of the most steps in `folder` that is complete and undamaged, or None. A damaged one is named in a
    warning: the run repeats the steps from the one before.
    """
    for path in checkpoints_in(folder):
        if not (path / COMPLETE).exists():
            continue
        try:
            read_checkpoint(path)
        except ValueError as error:
            logger.warning(str(error))
            continue
        return str(path)
    return None


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint, which is incomplete from the first moment."""
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def rotate_checkpoints(folder: str | Path, limit: int | None, keep: set[Path]) -> None:
    """
    Deletes the complete checkpoints of the fewest steps until `limit` are left, and those that a killed run left
    unfinished. `keep` names the ones that stay. A `limit` of None deletes none.
    """
    if limit is None or limit < 1:
        return
    found = checkpoints_in(folder)
    complete = [path for path in found if (path / COMPLETE).exists()]
    deletable = [path for path in reversed(complete) if path not in keep][: max(0, len(complete) - limit)]
    for path in [*deletable, *(path for path in found if path not in complete and path not in keep)]:
        remove_checkpoint(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Holds the lock of a folder, which is made where it is missing, and removed again if it stays empty. The lock ends
    with the process, however that ends. Raises a ValueError where another process holds it.
    """
    created = [parent for parent in (folder.absolute(), *folder.absolute().parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} cannot be made, as a file is in its way; name another folder.") from error
    lock = FileLock(folder.absolute() / ".lock", timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"Another run is writing to {folder}; wait for it, or name another folder.") from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:  # not within itself
            with contextlib.suppress(OSError):
                (folder / ".lock").unlink()
                for path in created:
                    path.rmdir()
        lock.release()


# Identity


def run_identity(trainer: "LoopMDMTrainer") -> dict[str, Any]:
    """
    Everything that has to be the same for a resumed run to repeat an uninterrupted one, by name. Left out is what
    changes no result (logging, saving, devices), and the length of the run, which may change.
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
        "batch size": args.per_device_train_batch_size * args.world_size,
        "gradient accumulation steps": args.gradient_accumulation_steps,
        "loop schedule": _settings(trainer.loop_schedule),
        "gradient loops": trainer.gradient_loops,
        "ema decay": trainer.ema_decay,
        **trainer.given_optimizer,
        **{name: value for name, value in args.to_dict().items() if name not in _FREE_ARGUMENTS.split()},
    }
    if not isinstance(dataset, ExampleStream):  # workers take turns at the rows of a stream
        run["dataloader_num_workers"] = args.dataloader_num_workers
    if args.metric_for_best_model is not None:  # then evaluation decides which weights are kept
        run["evaluation"] = [trainer.eval_loops, trainer.eval_samples, str(args.eval_strategy), args.eval_steps]
    return json.loads(json.dumps(run, default=_plain))


def optimizer_identity(optimizer: torch.optim.Optimizer | None, scheduler: Any) -> dict[str, Any]:
    """What the caller of a trainer made instead of it."""
    groups = [] if optimizer is None else optimizer.param_groups
    return {
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        "optimizer groups": [{**group, "params": len(group["params"])} for group in groups],
        "scheduler": None if scheduler is None else type(scheduler).__name__,
    }


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Where two identities differ, in words."""
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
    """Of a PEFT model: the adapters, and the weights below, which a checkpoint does not hold."""
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
    """The tensors that a quantised one, or this rank's part of a sharded one, consists of; of any other, itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    elif isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and tensor.numel() > 0:
        yield tensor.reshape(-1)


def _settings(thing: Any) -> str:
    """The class and the plain attributes of an object, as text."""
    plain = {
        name: value
        for name, value in getattr(thing, "__dict__", {}).items()
        if isinstance(value, bool | int | float | str | tuple)
    }
    return f"{getattr(thing, '__qualname__', type(thing).__name__)} {json.dumps(plain, sort_keys=True, default=str)}"


def data_fingerprint(dataset: Any, num_examples: int = 256) -> str:
    """
    A hash of a data set: of all examples of a list, of a [`StreamedExamples`]' first `num_examples`, of the length of
    others and as many examples spread over them; of other streams, "stream".
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
        count = min(num_examples, len(examples))
        chosen = (examples[i * len(examples) // count] for i in range(count))
        digest.update(f"{len(examples)}".encode())
    else:
        return "stream"
    for example in chosen:
        for name, value in sorted(example.items()):
            try:
                content = torch.as_tensor(value).numpy().tobytes()
            except (TypeError, ValueError, RuntimeError):  # no numbers
                content = repr(value).encode()
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]
