# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Loading of models and tokenizers for commands and metrics: quiet, in eval mode, with errors that name a fix."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from ..configuration_loopmdm import LoopMDMConfig
from ..data import adapter_base, load_adapter, load_tokenizer, locate
from ..generation_utils import LoopMDMGenerationConfig
from ..modeling_loopmdm import LoopMDMForMaskedLM
from ..weight_files import check_folder, read_json
from .perplexity import check_judge

__all__ = ["check_device", "load_judge", "load_model", "load_tokenizer", "read_generation_config", "read_model_config"]


def read_model_config(model: str, revision: str | None = None) -> LoopMDMConfig:
    """
    The configuration of a LoopMDM, given its folder or Hub id or that of a PEFT adapter on it. Raises a ValueError for
    other models.
    """
    place, revision = _place(model, revision)
    is_of_adapter = adapter_base(model) is not None and not Path(place).exists()
    with _in_words(f"{place}, the base model in adapter_config.json of {model}," if is_of_adapter else place):
        kind = PreTrainedConfig.get_config_dict(place, revision=revision)[0].get("model_type")
    if kind not in (None, "loopmdm"):  # the class of another model may be code, which transformers would ask for
        raise ValueError(
            f"{model} is a {kind!r} model, not a LoopMDM; `loopmdm convert` turns a masked diffusion model into one."
        )
    with _in_words(place):
        return AutoConfig.from_pretrained(place, trust_remote_code=False, revision=revision)  # does not ask either


def read_generation_config(model: str) -> LoopMDMGenerationConfig | None:
    """The generation config of a model, or of an adapter or else its base model; None if there is none."""
    for place in (model, adapter_base(model)):
        folder = Path(place or "").expanduser()
        if place is None or (folder.is_dir() and not (folder / "generation_config.json").is_file()):
            continue
        if folder.is_dir():
            return LoopMDMGenerationConfig.from_pretrained(folder)
        with contextlib.suppress(OSError):  # nothing on the Hub
            return LoopMDMGenerationConfig.from_pretrained(place)
    return None


def load_model(
    model: str, dtype: str = "auto", device: str | None = None, revision: str | None = None
) -> LoopMDMForMaskedLM:
    """
    Loads a LoopMDM in eval mode.

    Args:
        model (`str`): Folder or Hub id of a model, or of an adapter, which is loaded together with its base model.
        dtype (`str`, defaults to `"auto"`): float32, bfloat16, float16, or auto for the dtype of the files.
        device (`str`, *optional*): By default a GPU if there is one.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        ValueError: It is not a LoopMDM or not complete, or the dtype or device does not work.
    """
    read_model_config(model, revision)
    source, base = locate(model, "a model"), adapter_base(model, revision)
    if base is not None:
        base_revision = _check_adapter(model, source, revision)
        adapted = load_adapter(load_model(base, dtype, device, base_revision), source, revision=revision)
        loaded = adapted.get_base_model()
        loaded.generation_config = read_generation_config(model) or loaded.generation_config
        return loaded.eval()
    dtype, place = _check_dtype(dtype), check_device(device)
    options = {"dtype": dtype, "revision": revision or "main", "ignore_mismatched_sizes": True}
    with _in_words(source):
        loaded, info = LoopMDMForMaskedLM.from_pretrained(source, output_loading_info=True, **options)
    for name, found, needed in sorted(info["mismatched_keys"]):
        raise ValueError(f"{name!r} of {model} has shape {tuple(found)}; its config.json asks for {tuple(needed)}.")
    return loaded.to(place).eval()


def _check_adapter(model: str, source: str, revision: str | None) -> str | None:
    """Raises a ValueError if an adapter is not one of the weights. Returns the revision of its base model."""
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ValueError(f"{model} is an adapter; `pip install peft` to load it.") from error
    settings = PeftConfig.from_pretrained(source, revision=revision)
    if settings.is_prompt_learning:
        raise ValueError(
            f"{model} is an adapter of soft prompts ({settings.peft_type.value}), which commands do not apply; use an "
            "adapter of the weights (LoRA, DoRA, IA3)."
        )
    return settings.revision


def load_judge(
    judge: str, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """
    Loads a causal language model, from safetensors files only, in eval mode, and its tokenizer. Their own code runs
    only with `trust_remote_code`. Raises a ValueError if they do not load or do not fit [`generative_perplexity`].
    """
    dtype, place = _check_dtype(dtype), check_device(device)
    source, revision = _place(judge)
    with _in_words(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
    if config.model_type == "loopmdm":
        raise ValueError(f"The judge {judge} is a LoopMDM; it must be a causal language model, such as GPT-2.")
    tokenizer = load_tokenizer(judge, trust_remote_code)
    options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    check_folder(judge)
    with _in_words(judge):
        model = AutoModelForCausalLM.from_pretrained(judge, **options).to(place).eval()
    check_judge(model, tokenizer)
    return model, tokenizer


def _place(model: str, revision: str | None = None) -> tuple[str, str]:
    """Where the config of a model, or of an adapter's base model, is: a folder or Hub id, and its revision."""
    logging.disable_progress_bar()
    place = locate(model, "a model: there is no config.json in it")
    base = adapter_base(place, revision)
    if base is not None:
        place, revision = base, None
    # Without this check, transformers would report a misspelt Hub id.
    if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        of_adapter = "" if base is None else f", the base model of the adapter {model},"
        raise ValueError(f"{place}{of_adapter} does not hold a model: there is no config.json in it.")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json") if Path(place).is_dir() else ():
        read_json(Path(place) / name)  # checks
    return place, revision or "main"


@contextlib.contextmanager
def _in_words(model: str) -> Iterator[None]:
    """
    Turns the errors that transformers raises for a model's damaged files into a ValueError, and silences its
    warnings.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (ValueError, StrictDataclassError):
        raise
    except OSError as error:
        if Path(model).exists():
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{model} is not a folder here, and the Hub does not give it: {reason}") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{model} cannot be loaded; is it damaged? ({type(error).__name__}: {reason})") from error
    finally:
        logging.set_verbosity(verbosity)


def _check_dtype(name: str) -> str:
    dtype = getattr(torch, name, None)
    if name != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(f"`dtype` is {name!r}; use float32, bfloat16, float16 or auto.")
    return name


def check_device(name: str | None) -> torch.device:
    """The device called `name`, by default a GPU if there is one. Raises a ValueError if it does not work."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(name).type == "meta":
            raise NotImplementedError("it computes nothing")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # depending on the kind of device
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"`device` is {name!r}, which does not work here ({reason}); try cpu.") from error
