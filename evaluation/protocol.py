# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The protocol that makes a result repeatable (versions, hashes, settings, machine), and how results are written."""

import contextlib
import hashlib
import math
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..data import adapter_base
from ..objective import input_device

# The files that decide a model's results; generation_config.json holds the defaults of `generate`.
SETTINGS = ("config.json", "adapter_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
MODEL_FILES = ("*.safetensors", "*.jinja", *SETTINGS)
PACKAGES = ("loopmdm", "torch", "transformers", "datasets", "lm_eval", "evaluate")
TIMING = (
    "seconds of wall time (time.perf_counter) of the evaluation only: without imports, loading of models and data, "
    "and writing; without warm-up; the device is synchronised at both ends"
)


class Stopwatch:
    """Measures wall time as `TIMING` defines it: `with Stopwatch(device) as watch: ...`, then `watch.seconds`."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.seconds = math.nan

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> "Stopwatch":
        self._start = self._now()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = self._now() - self._start


def protocol(settings: dict[str, Any], model: Any = None, folder: str | None = None, **files: Any) -> dict[str, Any]:
    """
    The protocol of a result.

    Args:
        settings (`dict`): All arguments of the evaluation, including its seed.
        model (*optional*): The model that ran; its device, dtype and kind of attention are recorded.
        folder (`str`, *optional*): The folder or Hub id that it was loaded from.
        files: Further folders or files to hash, by their names in the protocol, e.g. `data="text.txt"`.

    Returns:
        `dict`: Plain data for JSON.
    """
    record: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "settings": settings,
        "timing": TIMING,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if model is not None:
        record["model"] = {
            "source": folder,
            "parameters": model.num_parameters(),
            "device": str(input_device(model)),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
            "sha256": hash_model(folder or ""),
        }
    files["base_model"] = None if folder is None else adapter_base(folder)
    for name, path in files.items():
        if path is not None:
            local = _local(str(path))
            is_model = local is not None and (local / "config.json").is_file()
            record[name] = {"source": str(path), "sha256": hash_files(local, MODEL_FILES if is_model else ("*",))}
    return record


def hash_files(path: Path | None, patterns: Iterable[str] = ("*",)) -> dict[str, str]:
    """SHA-256 by name of a file, or of a folder's files that match `patterns`; empty if the path does not exist."""
    if path is None or not path.exists():
        return {}
    files = [path] if path.is_file() else sorted({file for pattern in patterns for file in path.glob(pattern)})
    hashes = {}
    for file in files:
        if file.is_file():
            with file.open("rb") as stream:
                hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def hash_model(name: str) -> dict[str, str]:
    """SHA-256 by name of the files that decide the results of a folder's or Hub id's model; empty without a name."""
    return hash_files(_local(name) if name else None, MODEL_FILES)


def _local(name: str) -> Path | None:
    """The folder or file itself, or the folder in the cache of a Hub id; None for any other name."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (ValueError, OSError):  # not an id, or not in the cache, such as the name of a data set
        return None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The versions of packages, by name; None if one is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        found[name] = None
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def check_output(path: str | os.PathLike) -> Path:
    """Raises a ValueError if [`output_folder`] could not write `path`; returns it as a `Path`."""
    path = Path(path).expanduser()
    if path.exists():
        raise ValueError(f"{path} exists already; name another folder for the results.")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a folder; make it, or put the results elsewhere.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"Nothing can be written into {path.parent}; put the results elsewhere.")
    return path


@contextlib.contextmanager
def output_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to write results into. It is renamed to `path` at the end of the block, and removed after an error."""
    path = check_output(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        check_output(path)  # another process may have made it
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
