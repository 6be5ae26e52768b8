# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Folders and Hub ids: tokenizers, and the base models of adapters."""

import functools
import json
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

_adapter_file_of_hub = functools.lru_cache(find_adapter_config_file)  # which asks the Hub every time
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
ANY_TOKENIZER = ("*token*", "*vocab*", "merges*", "*.model")
# Code that merges an adapter into its base model
MERGE = 'loopmdm.convert.merge_adapter("{}", "merged")'


def locate(name: str, what: str) -> str:
    """
    The path of a folder, without `~`, or a Hub id. Raises a ValueError if `name` is neither; `what` is the thing that
    is looked for, such as "a model".
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    try:
        validate_repo_id(name)
        is_id = not name.startswith((".", "/", "~")) and not folder.exists()
    except HFValidationError:
        is_id = False
    if not is_id:
        raise ValueError(f"{name} does not hold {what}; it is not a folder, nor an id on the Hub (`owner/name`).")
    return name


def load_tokenizer(name: str, trust_remote_code: bool = False, **options: Any) -> Any:
    """
    Loads the tokenizer of a folder or Hub id; for an adapter without one, its base model's.

    Args:
        name (`str`): The folder or id.
        trust_remote_code (`bool`, defaults to `False`): Run the tokenizer's own code.
        options: Other arguments of `AutoTokenizer.from_pretrained`, such as `revision`.

    Raises:
        ValueError: There is no tokenizer, or it does not load.
    """
    place = locate(name, "a tokenizer")
    base = adapter_base(place, options.get("revision"))
    if base is not None and not any((Path(place) / file).is_file() for file in TOKENIZER_FILES):
        return load_tokenizer(base, trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason and not trust_remote_code:
            raise ValueError(
                f"The tokenizer of {name} has code of its own, which runs only on request; read it, and give "
                "--trust-remote-code (`trust_remote_code=True`)."
            ) from error
        folder, fix = Path(place), "as it is not a folder, the Hub was asked"
        if folder.is_dir():
            fix = "put its files beside the weights"
            if not any(file for pattern in ANY_TOKENIZER for file in folder.glob(pattern)):
                reason = (
                    "it holds none of a tokenizer's files, such as tokenizer.json"  # not what backends are missing
                )
        raise ValueError(f"{name} does not have a tokenizer that loads ({reason}); {fix}.") from error


def adapter_base(name: str, revision: str | None = None) -> str | None:
    """
    The base model of a PEFT adapter, given the adapter's folder or Hub id; None if it is not an adapter, or holds a
    whole model too. Raises a ValueError if the adapter is damaged.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return None
    file = folder / "adapter_config.json" if folder.is_dir() else _adapter_file_of_hub(name, revision=revision)
    if file is None or not Path(file).is_file():
        return None
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        base = settings["base_model_name_or_path"]
        if not isinstance(base, str):
            raise TypeError("`base_model_name_or_path` is not a text")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not name the adapter's model (`base_model_name_or_path`): {error}.") from error
    if folder.is_dir() and not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{name} is an adapter without adapter_model.safetensors; only safetensors files are read.")
    return locate(base, f"the base model of the adapter {name}")


def load_adapter(model: Any, adapter: str, is_trainable: bool = False, revision: str | None = None) -> Any:
    """
    A `PeftModel` of `model` and an adapter, given as a folder or Hub id. Raises a ValueError if its tensors do
    not fit its settings and the model. (transformers' own loading loses tensors of some kinds, such as DoRA's.)
    """
    from peft import PeftModel

    options = {"is_trainable": is_trainable, "autocast_adapter_dtype": is_trainable, "revision": revision}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # found again below
            adapted = PeftModel.from_pretrained(model, adapter, **options)
        found = adapted.load_adapter(adapter, "default", **options)
    except (RuntimeError, KeyError) as error:  # about shapes, and about modules that were saved whole
        raise ValueError(
            f"The adapter {adapter} does not fit its base model: {' '.join(str(error).split())}"
        ) from error
    tensors = dict(adapted.named_parameters(remove_duplicate=False))
    loaded = {id(tensor) for name, tensor in tensors.items() if name not in found.missing_keys}
    # VB-LoRA's layers hold the one bank of vectors under names of their own.
    missing = [name for name in found.missing_keys if id(tensors.get(name)) not in loaded]
    wrong = [*missing, *found.unexpected_keys]
    if wrong:
        raise ValueError(
            f"The tensors of the adapter {adapter} are not those of its adapter_config.json and its base model "
            f"({len(wrong)} differ: {', '.join(wrong[:3])})."
        )
    return adapted


def vocabulary_size(tokenizer: Any) -> int:
    """Rows that an embedding needs for all tokens. Ids can have gaps, so this may exceed the number of tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Raises a ValueError if the special tokens of a tokenizer do not fit a model with this `config`."""
    mask = tokenizer.mask_token_id
    if mask is not None and mask != config.mask_token_id:
        raise ValueError(
            f"The tokenizer's mask token is {tokenizer.mask_token!r} ({mask}), and the model's is "
            f"{config.mask_token_id}; is it the right tokenizer? (`model_config: {{mask_token_id: ...}}` changes the "
            "model's.)"
        )
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name)
        if token is not None and token >= config.vocab_size:
            raise ValueError(
                f"The tokenizer's `{name}` is {token}, outside the model's vocabulary of {config.vocab_size}; is it "
                "the right one? If tokens were added, call `model.resize_token_embeddings(len(tokenizer))` first."
            )
        if token == config.mask_token_id:
            raise ValueError(f"The tokenizer's `{name}` is the mask token ({token}); give it a token of its own.")
