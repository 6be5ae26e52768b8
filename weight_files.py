# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Checks of weight files before anything else reads them: complete safetensors files in the model's folder."""

import json
import os
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel, _add_variant, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

MAX_JSON = 2**27  # far above any real file: JSON of tokenizers has some 40 MB
FLOATS = ("F64", "F32", "F16", "BF16")
# Arguments of `from_pretrained` that say where files come from, in transformers' order
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a JSON object; an empty dict if the file does not exist. Raises a ValueError for anything else."""
    path = Path(path)
    if not path.is_file():
        return {}
    size = path.stat().st_size
    if size > MAX_JSON:
        raise ValueError(f"{path} has {size:,} bytes; no file of JSON beside a model has more than {MAX_JSON:,}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


def read_index(path: str | os.PathLike, suffix: str = ".safetensors") -> dict[str, str]:
    """
    Reads an index: the name of the file that contains each tensor. Raises a ValueError if the index is damaged, or
    names anything but files in its own folder that end in `suffix`.
    """
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} has no `weight_map` that gives the file of every tensor.")
    for name in names.values():
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"{path} names {name!r}, which leads out of its folder; shards lie beside their index.")
        if not name.endswith(suffix):
            raise ValueError(f"{path} names {name!r}, which is not a {suffix} file.")
    return names


def read_header(path: str | os.PathLike) -> dict[str, tuple[str, tuple[int, ...]]]:
    """
    Reads the dtype (safetensors' name, such as `"BF16"`) and shape of each tensor from a safetensors header. Raises a
    ValueError if the file is incomplete, or longer than its tensors.
    """
    with open(path, "rb"):  # its errors name the file; those of the library do not
        pass
    try:
        with safe_open(path, framework="pt", backend="pread") as file:  # without mapping it into memory
            names = file.keys()
            slices = ((name, file.get_slice(name)) for name in names)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices}
    except Exception as error:  # the library's own class
        raise ValueError(f"{path} is not a complete safetensors file: {error}.") from error


class CheckedPreTrainedModel(PreTrainedModel):
    """Loads only complete safetensors files of floating point numbers, with exactly the tensors of the model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        As in transformers, but damaged files and missing or unexpected tensors raise a ValueError. Only safetensors
        files are read; pickles need `use_safetensors=False`.
        """
        kwargs.setdefault("use_safetensors", True)
        if kwargs["use_safetensors"] and pretrained_model_name_or_path is not None:
            check_folder(pretrained_model_name_or_path, **kwargs)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        wrong = [f"{name} is {kind}" for kind in ("missing", "unexpected") for name in sorted(info[f"{kind}_keys"])]
        if wrong:
            raise ValueError(
                f"The tensors of {pretrained_model_name_or_path} are not those of a {cls.__name__} with this "
                f"configuration ({len(wrong)} differ: {', '.join(wrong[:5])}). Is config.json that of these weights?"
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        if state_dict is None and load_config.use_safetensors:
            is_quantised = getattr(model.config, "quantization_config", None) is not None
            for file in checkpoint_files or []:
                check_file(file, is_quantised)
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)


def check_folder(name: str | os.PathLike, variant: str | None = None, **kwargs: Any) -> None:
    """
    Raises a ValueError for damaged files in a folder, and for a wrong index, also on the Hub. Weights on the Hub are
    checked after download, a folder's weights here, as transformers opens them to find the dtype before it loads them.
    """
    options = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    for error in ("missing_entries", "gated_repo", "connection_errors"):  # transformers reports these itself
        options[f"_raise_exceptions_for_{error}"] = False
    files = [_add_variant(SAFE_WEIGHTS_NAME, variant)]
    path = cached_file(name, _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant), **options)
    if path is not None:
        files += sorted(set(read_index(path).values()))
        if not isinstance(read_json(path).get("metadata"), dict):
            raise ValueError(f"{path} has no `metadata`; write the model anew with `save_pretrained`.")
    if os.path.isdir(name):
        folder = Path(name, kwargs.get("subfolder") or "")
        read_json(folder / "config.json")
        for file in (folder / one for one in files):
            if file.is_file():
                read_header(file)


def check_file(path: str, is_quantised: bool) -> None:
    """Raises a ValueError for an incomplete file of weights, or one of numbers that cannot be used directly."""
    if not path.endswith(".safetensors"):
        raise ValueError(f"{path} is not a safetensors file; give `use_safetensors=False` if you trust it.")
    for name, (dtype, _) in read_header(path).items():
        if dtype not in FLOATS and not is_quantised:
            raise ValueError(
                f"{name!r} in {path} is {dtype}, and config.json has no `quantization_config` that says what that "
                "means; load the original weights."
            )


__all__ = ["CheckedPreTrainedModel", "read_header", "read_index", "read_json"]
