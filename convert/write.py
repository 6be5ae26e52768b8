# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The files of a conversion: tensors, one at a time, in shards, in a folder that gets its name when it is complete."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers.dynamic_module_utils import custom_object_save

from ..data import share_weights, write_json
from ..modeling_loopmdm import LoopMDMForMaskedLM
from .plan import Plan, Result

# Bytes for all files other than weights, a generous guess
SMALL_FILES = 64 * 2**20
# Locked by the process that fills a folder
LOCK = ".conversion.lock"


def check_output(output: Path) -> None:
    """Raises a ValueError if `output` exists."""
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists already; name a new folder, or remove it.")


def check_shard_size(size: int | str) -> None:
    match = re.fullmatch(r"(\d+(\.\d+)?) *([KMGT]?B)?", str(size).strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"`max_shard_size` is {size!r}; give a number of bytes, or one with a unit such as 5GB.")


def check_space(plan: Result, output: Path) -> None:
    """Raises a ValueError if the disk has no room for the result."""
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    free, needed = shutil.disk_usage(existing).free, plan.num_bytes + SMALL_FILES
    left = _partial(output)
    if (left / LOCK).is_file():  # a killed conversion left it, and `new_folder` will empty it
        free += sum(path.stat().st_size for path in left.rglob("*") if path.is_file())
    if free < needed:
        raise ValueError(
            f"{output} needs {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free; make room, choose "
            "another disk, or a smaller --dtype."
        )


def _partial(output: Path) -> Path:
    """The name of `output` until it is complete."""
    return output.with_name(f".{output.name}.partial")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """
    A folder to fill, under a hidden name; at the end of the block it is renamed to `output`, and after an error it is
    removed. If the process is killed, the folder stays behind without config.json, and the next conversion to `output`
    empties and reuses it. Raises a ValueError if another process is filling it.
    """
    check_output(output)
    created = [parent for parent in output.absolute().parents if not parent.exists()]
    folder = _partial(output)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / LOCK).is_file():
        raise ValueError(f"{folder} is in the way, and no conversion has made it; move it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{output} cannot be made, as {error.filename} is a file; name another folder.") from error
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"Another conversion is writing {output}; wait for it, or name another folder.") from None
    try:
        for path in folder.iterdir():
            if path.name != LOCK:  # a killed conversion left it
                path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
        yield folder
        if output.exists():
            raise ValueError(f"{output} was made by someone else during the conversion; remove it, and convert again.")
        os.rename(folder, output)
        (output / LOCK).unlink()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    finally:
        lock.release()


def write_weights(
    plan: Result,
    folder: Path,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> None:
    """
    Writes the plan's tensors into safetensors files, with one shard at a time in memory. `progress(done, total)` is
    called with numbers of bytes. Raises a ValueError for NaN and infinite values.
    """
    for name, original in plan.copies.items():
        if not torch.equal(plan.source.read(name), plan.source.read(original)):
            raise ValueError(
                f"{name!r} of {plan.source.name} differs from {original!r}, but its config ties the two "
                "(`tie_word_embeddings`, `weight_tying`); correct whichever is wrong."
            )
    shards = split_torch_state_dict_into_shards(plan.shapes, max_shard_size=max_shard_size)
    done = 0
    for file, names in shards.filename_to_tensors.items():
        shard = {}
        for name in names:
            shard[name] = make_tensor(plan, name)
            done += shard[name].nbytes
            progress(done, plan.num_bytes)
        save_file(shard, folder / file, metadata={"format": "pt"})
    share_weights(folder)
    if shards.is_sharded:
        total = {"total_parameters": sum(tensor.numel() for tensor in plan.shapes.values()), **shards.metadata}
        index = {"metadata": total, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def make_tensor(plan: Result, name: str) -> torch.Tensor:
    """Makes one tensor of the result from those of the source. Raises a ValueError if it is not finite."""
    recipe, dtype = plan.recipes[name], plan.config.dtype
    result = recipe.compute(*(plan.source.read(source) for source in recipe.sources))
    made = torch.empty(result.shape, dtype=dtype).copy_(result)
    if made.numel() > 0 and not all(value.isfinite() for value in made.aminmax()):
        raise ValueError(
            f"{', '.join(recipe.sources)} of {plan.source.name} holds NaN or infinite values, or values that "
            f"{str(dtype).removeprefix('torch.')} cannot hold; the checkpoint is damaged, or try --dtype float32."
        )
    return made


def write_code(plan: Plan, folder: Path) -> None:
    """Writes the modeling files, so that the folder loads with `trust_remote_code=True` without this package."""
    with torch.device("meta"):
        model = LoopMDMForMaskedLM(plan.config)
    custom_object_save(model, folder)
