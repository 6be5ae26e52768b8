# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
A published checkpoint, opened for reading tensor by tensor: a folder or a Hub repository of safetensors, a single
safetensors file, or, on request, pickled weights read without running anything that they contain.
"""

import contextlib
import json
import pickle
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "tokenization*.py"]
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class StoredTensor:
    """A tensor of the source: what it looks like, and how to get it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


class Source:
    """
    A checkpoint that is converted.

    Args:
        name (`str`): What the user called it.
        folder (`Path`): Where its files are.
        weights (`Path`): The file, or the first of the files, that the weights are in.
        tensors (`dict[str, StoredTensor]`): Every tensor by name.
        config (`dict`): config.json, or an empty dict.
        extras (`dict`): What else a training checkpoint holds beside its weights.
        sigma (`float`, *optional*): The noise level at which a model conditioned on it is to be converted.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        weights: Path,
        tensors: dict[str, StoredTensor],
        config: dict[str, Any],
        extras: dict[str, Any] | None = None,
        sigma: float | None = None,
    ):
        self.name, self.folder, self.weights = name, folder, weights
        self.tensors, self.config, self.extras = tensors, config, extras or {}
        self.sigma = sigma
        self.generation_config = read_json(folder / "generation_config.json")

    @property
    def architectures(self) -> list[str]:
        return self.config.get("architectures") or []

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ValueError(f"{self.name} has no tensor {name!r}; the checkpoint is incomplete, or another format.")
        return self.tensors[name].shape

    def setting(self, name: str) -> Any:
        """A value of config.json that a conversion cannot do without."""
        if self.config.get(name) is None:
            raise ValueError(f"The config of {self.name} has no {name!r}; add it to config.json.")
        return self.config[name]

    def num_layers(self, template: str, declared: int | None) -> int:
        """
        How many of `template`, e.g. `"layers.{i}.norm.weight"`, there are, counted from 0. Raises a ValueError where
        the config declares another number.
        """
        count = 0
        while template.format(i=count) in self.tensors:
            count += 1
        if count == 0:
            raise ValueError(
                f"{self.name} has no tensor {template.format(i=0)!r}, so it has no layers of this format."
            )
        if declared is not None and count != declared:
            raise ValueError(
                f"{self.name} has no tensor {template.format(i=count)!r} behind those of {count} layers, and its "
                f"config says {declared} layers; the checkpoint is incomplete, or the config another one's."
            )
        return count

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].read()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty dict where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


def open_source(
    source: str | Path, revision: str | None = None, allow_pickle: bool = False, sigma: float | None = None
) -> Source:
    """
    Opens a checkpoint without reading its weights.

    Args:
        source: A folder, a file of weights, or an id on the Hugging Face Hub (`owner/name`).
        revision: Branch, tag or commit on the Hub.
        allow_pickle: Whether pickled weights (`.bin`, `.ckpt`, `.pt`, `.pth`) are read where there are no others.
        sigma: See [`Source`].
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = _download(str(source), revision, allow_pickle)
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json") or read_json(folder / "lit_config.json")
    files = [path] if path.is_file() else _weight_files(path, allow_pickle)
    pickled = [file.name for file in files if file.suffix in PICKLES]
    if pickled and not allow_pickle:
        raise ValueError(
            f"{pickled[0]} is a pickle, which can hold anything; give --allow-pickle (`allow_pickle=True`) to read it "
            "through an unpickler that admits tensors alone."
        )
    tensors, extras = {}, {}
    for file in files:
        if file.suffix == ".safetensors":
            found = _safetensors(file)
        elif file.suffix in PICKLES:
            found, extras = _pickled(file)
        else:
            raise ValueError(f"{file} is no file of weights; they end in .safetensors, {', '.join(PICKLES)}.")
        repeated = sorted(tensors.keys() & found.keys())
        if repeated:
            raise ValueError(f"{file} holds {repeated[0]!r} again; which of the two counts?")
        tensors |= found
    _check_index(folder, files, tensors)
    return Source(str(source), folder, files[0], tensors, config, extras, sigma)


def _download(source: str, revision: str | None, allow_pickle: bool) -> Path:
    patterns = ["*.safetensors", *TOKENIZER_PATTERNS] + [f"*{suffix}" for suffix in PICKLES if allow_pickle]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise ValueError(f"{source} does not exist, and is no id of the Hugging Face Hub either.") from None
    except Exception as error:  # of the network, the file system, the Hub: all mean that it is not to be had
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{source} is no folder here and could not be had from the Hub: {reason}") from error


def _weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The files that hold a folder's weights: what an index names, or all of one kind."""
    for pattern, index in (("*.safetensors", "*.safetensors.index.json"), ("*.bin", "*.bin.index.json")):
        for index_file in sorted(folder.glob(index)):
            files = [folder / name for name in sorted(set(read_json(index_file).get("weight_map", {}).values()))]
            absent = [file.name for file in files if not file.is_file()]
            if absent:
                raise ValueError(
                    f"{index_file.name} names {absent[0]}, which is not in {folder}; the checkpoint is incomplete."
                )
            if files:
                return files
        files = sorted(folder.glob(pattern))
        if files:
            break
    if not files:
        files = sorted(file for suffix in PICKLES for file in folder.glob(f"*{suffix}"))
    if not files:
        raise ValueError(f"{folder} holds no weights (*.safetensors).")
    if len(files) > 1 and not any("-of-" in file.name for file in files):
        raise ValueError(f"{folder} holds several files of weights ({', '.join(f.name for f in files)}); name one.")
    return files


def _check_index(folder: Path, files: list[Path], tensors: dict[str, StoredTensor]) -> None:
    for index_file in folder.glob("*.index.json"):
        named = read_json(index_file).get("weight_map", {})
        absent = sorted(name for name, file in named.items() if folder / file in files and name not in tensors)
        if absent:
            raise ValueError(f"{index_file.name} says that {named[absent[0]]} holds {absent[0]!r}, but it does not.")


def _safetensors(file: Path) -> dict[str, StoredTensor]:
    def reader(name: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            # Opened for each tensor, so that no more than this one is mapped into memory.
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name)

        return read

    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
            stored = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no complete safetensors file: {error}") from error
    for name, (_, dtype) in stored.items():
        if dtype not in DTYPES:
            raise _quantised(file, name, dtype)
    return {name: StoredTensor(shape, DTYPES[dtype], reader(name)) for name, (shape, dtype) in stored.items()}


def _quantised(file: Path, name: str, dtype: Any) -> ValueError:
    return ValueError(
        f"{name!r} in {file.name} is {dtype}; quantised weights cannot be converted, only {', '.join(DTYPES)} ones. "
        "Convert the original checkpoint."
    )


class _Stub:
    """What stands for an object of a class that is not let in: takes any treatment, does nothing, keeps its state."""

    def __new__(cls, *args, **kwargs):
        stub = super().__new__(cls)
        stub.state, stub.items = None, {}
        return stub

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return _Stub()

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        self.items[key] = value

    def append(self, value):
        self.items[len(self.items)] = value

    def extend(self, values):
        for value in values:
            self.append(value)

    add = append


_ADMITTED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.serialization", "_get_layout"),
} | {
    ("torch", name) for name in dir(torch) if name.endswith("Storage") or isinstance(getattr(torch, name), torch.dtype)
}


class _TensorUnpickler(pickle.Unpickler):
    """Admits what tensors are made of; every other class or function of the file becomes an inert stub."""

    def find_class(self, module, name):
        if (module, name) in _ADMITTED:
            found = super().find_class(module, name)
            # A function of its own for every file, as a pickle may set attributes on what it is given.
            return (lambda *args: found(*args)) if isinstance(found, types.FunctionType) else found
        return type(name, (_Stub,), {"__module__": module})


def _load_pickle(file, **kwargs):
    return _TensorUnpickler(file, **kwargs).load()


_PICKLE_MODULE = types.SimpleNamespace(
    __name__="loopmdm.convert.source",
    Unpickler=_TensorUnpickler,
    load=_load_pickle,
    UnpicklingError=pickle.UnpicklingError,
)


def stub_value(value: Any) -> Any:
    """The plain data in a stub's state: a dict of the names it holds, a list of its items, or the value of a leaf."""
    if not isinstance(value, _Stub):
        return value
    state = value.state if isinstance(value.state, dict) else {}
    content = state.get("_content", state.get("_val", value.items or None))
    if isinstance(content, dict):
        return {key: stub_value(item) for key, item in content.items()}
    if isinstance(content, list):
        return [stub_value(item) for item in content]
    return content


def _pickled(file: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} is no complete file of torch.save's zip format; get it anew, or convert it to safetensors."
        )
    with zipfile.ZipFile(file) as archive:
        if any(entry.endswith("constants.pkl") for entry in archive.namelist()):
            raise ValueError(f"{file} is a TorchScript program, not weights.")
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=False, pickle_module=_PICKLE_MODULE)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{file} cannot be read as pickled weights: {error}") from error
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
        if tensor.dtype not in DTYPES.values():
            raise _quantised(file, name, tensor.dtype)
    return {name: StoredTensor(tuple(t.shape), t.dtype, lambda t=t: t.detach()) for name, t in tensors.items()}, extras


@contextlib.contextmanager
def explained(what: str):
    """Turns a file's damage, met while reading, into a ValueError that says where."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{what} cannot be read: {error}") from error
