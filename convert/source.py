# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
A published checkpoint, opened to be read tensor by tensor: a folder or Hub repository of safetensors files, a single
safetensors file, or, on request, pickled weights, which are read without running any code in them.
"""

import functools
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from ..data.pretrained import MERGE
from ..hub import CARD_FILES, SourceCard, read_source_card
from ..weight_files import read_header, read_index, read_json

TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "tokenization*.py"]
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GPT2_MASK = ".attn.bias"  # bytes or booleans in old checkpoints; not weights, so the family ignores them


@dataclass
class StoredTensor:
    """A tensor of the source: its shape and dtype, and a function that reads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


@dataclass
class Source:
    """
    A checkpoint to convert.

    Args:
        name (`str`): The name that the user gave.
        folder (`Path`): The folder of its files.
        weights (`Path`): The file of its weights, or the first one.
        tensors (`dict[str, StoredTensor]`): All tensors, by name.
        config (`dict`): The contents of config.json, or an empty dict.
        extras (`dict`): The entries of a training checkpoint other than its weights.
        sigma (`float`, *optional*): The noise level at which to convert a model that is conditioned on it.
    """

    name: str
    folder: Path
    weights: Path
    tensors: dict[str, StoredTensor]
    config: dict[str, Any]
    extras: dict[str, Any] = field(default_factory=dict)
    sigma: float | None = None

    @functools.cached_property
    def generation_config(self) -> dict[str, Any]:
        return read_json(self.folder / "generation_config.json")

    @functools.cached_property
    def card(self) -> SourceCard:
        return read_source_card(self.name, self.folder)

    @property
    def architectures(self) -> list[str]:
        names = self.config.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"`architectures` in the config of {self.name} is {names!r}; it must be a list of names.")
        return names

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ValueError(f"{self.name} has no tensor {name!r}; it is incomplete, or another format.")
        return self.tensors[name].shape

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a matrix. Raises a ValueError for any other tensor."""
        shape = self.shape(name)
        if len(shape) != 2:
            raise ValueError(f"{name!r} of {self.name} has shape {shape}; it must have rows and columns.")
        return shape[0], shape[1]

    def setting(self, name: str) -> Any:
        """A value of config.json. Raises a ValueError if it is missing."""
        if self.config.get(name) is None:
            raise ValueError(f"The config of {self.name} has no {name!r}; add it to config.json.")
        return self.config[name]

    def num_layers(self, template: str, declared: int | None) -> int:
        """
        The number of layers, counted by a tensor that each has, such as `"layers.{i}.norm.weight"`. Raises a
        ValueError if it is not the number that the config declares.
        """
        count = 0
        while template.format(i=count) in self.tensors:
            count += 1
        if count == 0:
            raise ValueError(f"{self.name} has no tensor {template.format(i=0)!r}, so no layers of this format.")
        if declared is not None and count != declared:
            raise ValueError(
                f"{self.name} has no tensor {template.format(i=count)!r} behind those of {count} layers, and its "
                f"config says {declared} layers; the checkpoint is incomplete, or the config another one's."
            )
        return count

    def read(self, name: str) -> torch.Tensor:
        try:
            return self.tensors[name].read()
        except (SafetensorError, OSError) as error:  # the file was damaged or removed after it had been opened
            raise ValueError(f"{name!r} of {self.name} cannot be read: {error}") from error


def open_source(
    source: str | Path, revision: str | None = None, allow_pickle: bool = False, sigma: float | None = None
) -> Source:
    """
    Opens a checkpoint without reading its weights.

    Args:
        source: A folder, a file of weights, or an id on the Hugging Face Hub (`owner/name`).
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        allow_pickle (`bool`, defaults to `False`): Read pickled weights (`.bin`, `.ckpt`, `.pt`, `.pth`) if there are
            no others.
        sigma (`float`, *optional*): See [`Source`].

    Raises:
        ValueError: There is no complete checkpoint, or it is an adapter, quantised, or pickled without permission.
    """
    path = Path(source).expanduser()
    if path.exists() and revision is not None:
        raise ValueError(f"Only the Hub has revisions ({revision}), but {source} is a local path; leave it out.")
    if not path.exists():
        path = _download(str(source), revision, allow_pickle)
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json") or read_json(folder / "lit_config.json")
    if not config and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{source} is an adapter, not a whole model. Merge it into its base model, and take the result: "
            f"`{MERGE.format(source)}`."
        )
    if re.search(r"-\d+-of-(?!0*1\.)\d+\.", path.name) and path.is_file():
        raise ValueError(f"{source} is one file of several; name their folder, {folder}.")
    files = [path] if path.is_file() else _weight_files(path)
    pickled = [file.name for file in files if file.suffix in PICKLES]
    if pickled and not allow_pickle:
        raise ValueError(
            f"{pickled[0]} is a pickle, which can contain any code; give --allow-pickle (`allow_pickle=True`) to read "
            "it with an unpickler that admits only tensors."
        )
    tensors, extras = {}, {}
    for file in files:
        if file.suffix == ".safetensors":
            found = _safetensors(file)
        elif file.suffix in PICKLES:
            found, extras = _pickled(file)
        else:
            raise ValueError(f"{file} is not a file of weights; they end in .safetensors, {', '.join(PICKLES)}.")
        repeated = sorted(tensors.keys() & found.keys())
        if repeated:
            raise ValueError(f"{file} holds {repeated[0]!r} again; remove one of the two.")
        tensors |= found
    _check_index(folder, files, tensors)
    return Source(str(source), folder, files[0], tensors, config, extras, sigma)


def _download(source: str, revision: str | None, allow_pickle: bool) -> Path:
    patterns = ["*.safetensors", *TOKENIZER_PATTERNS, *CARD_FILES] + [
        f"*{suffix}" for suffix in PICKLES if allow_pickle
    ]
    try:
        # Adapters are refused, so their weights are not fetched.
        options = {"allow_patterns": patterns, "ignore_patterns": ["adapter_model.*"]}
        return Path(snapshot_download(source, revision=revision, **options))
    except HFValidationError:
        raise ValueError(f"{source} does not exist, and is not an id of the Hugging Face Hub either.") from None
    except Exception as error:  # of the network, the file system, the Hub
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{source} is not a folder here, and the Hub does not give it: {reason}") from error


def _weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: those that an index names, or all of one kind."""
    for suffix in (".safetensors", ".bin"):
        for index_file in sorted(folder.glob(f"*{suffix}.index.json")):
            files = [folder / name for name in sorted(set(read_index(index_file, suffix).values()))]
            absent = [file.name for file in files if not file.is_file()]
            if absent:
                raise ValueError(
                    f"{index_file.name} names {absent[0]}, which is not in {folder}; the checkpoint is incomplete."
                )
            return files
        files = sorted(file for file in folder.glob(f"*{suffix}") if file.is_file())
        if files:
            break
    if not files:
        files = sorted(file for suffix in PICKLES for file in folder.glob(f"*{suffix}") if file.is_file())
    if not files:
        raise ValueError(f"{folder} holds no weights (*.safetensors).")
    if len(files) > 1 and not any("-of-" in file.name for file in files):
        raise ValueError(f"{folder} holds several files of weights ({', '.join(f.name for f in files)}); name one.")
    return files


def _check_index(folder: Path, files: list[Path], tensors: dict[str, StoredTensor]) -> None:
    for suffix in (".safetensors", ".bin"):
        for index_file in folder.glob(f"*{suffix}.index.json"):
            named = read_index(index_file, suffix)
            absent = sorted(name for name, file in named.items() if folder / file in files and name not in tensors)
            if absent:
                raise ValueError(f"{index_file.name} says that {named[absent[0]]} has {absent[0]!r}, but it does not.")


def _read_tensor(file: Path, name: str) -> torch.Tensor:
    # Opened for every tensor, so that only this one is mapped into memory.
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _safetensors(file: Path) -> dict[str, StoredTensor]:
    stored = read_header(file)
    for name, (dtype, _) in stored.items():
        if dtype not in DTYPES and not name.endswith(GPT2_MASK):
            raise _quantised(file, name, dtype)
    return {
        name: StoredTensor(shape, DTYPES.get(dtype, torch.bool), functools.partial(_read_tensor, file, name))
        for name, (dtype, shape) in stored.items()
    }


def _quantised(file: Path, name: str, dtype: Any) -> ValueError:
    return ValueError(
        f"{name!r} in {file.name} is {dtype}; quantised weights cannot be converted, only {', '.join(DTYPES)} ones. "
        "Convert the original checkpoint."
    )


class _Stub:
    """Replaces objects of all classes that tensors do not need: accepts any arguments, and keeps the state."""

    state: Any = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state


def _empty_dict(*args):
    """Replaces defaultdict, which the unpickler cannot fill."""
    return {}


def stub_value(value: Any) -> Any:
    """The plain data in a stub of an omegaconf object: a dict, a list, or a value."""
    if isinstance(value, _Stub):
        state = value.state if isinstance(value.state, dict) else {}
        value = state.get("_content", state.get("_val"))
    if isinstance(value, dict):
        return {key: stub_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [stub_value(item) for item in value]
    return value


def _pickled(file: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is not a complete file of torch.save's zip format; download it again.")
    try:
        # torch's unpickler admits what tensors consist of. All other classes in the file become stubs.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        stubs = [(_empty_dict if name == "collections.defaultdict" else _Stub, name) for name in names]
        with torch.serialization.safe_globals(stubs):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        # torch gives the reason in the second paragraph; the first one advises to trust the file.
        paragraphs = [part.strip() for part in str(error).split("\n\n") if part.strip()] or [type(error).__name__]
        reason = paragraphs[1 if len(paragraphs) > 1 else 0].splitlines()[0]
        raise ValueError(f"{file} cannot be read as pickled weights: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a dict of tensors.")
    extras = {}
    if isinstance(content.get("state_dict"), dict):
        extras = {key: value for key, value in content.items() if key != "state_dict"}
        content = content["state_dict"]
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{file} holds no tensors.")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values() and not name.endswith(GPT2_MASK):
            raise _quantised(file, name, tensor.dtype)
    return {name: StoredTensor(tuple(t.shape), t.dtype, t.detach) for name, t in tensors.items()}, extras
