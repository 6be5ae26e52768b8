# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Models and tokenizers as commands and metrics load them: quietly, in eval mode, with errors that name what to do."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..configuration_loopmdm import LoopMDMConfig
from ..modeling_loopmdm import LoopMDMForMaskedLM
from .perplexity import check_judge


def read_model_config(model: str) -> LoopMDMConfig:
    """The configuration of the LoopMDM in a folder or on the Hub. Raises a ValueError for other models."""
    config = _read_config(model)
    if config.model_type != "loopmdm":
        raise ValueError(
            f"{model} is a {config.model_type!r} model, not a LoopMDM; `loopmdm convert` makes one of a masked "
            "diffusion model."
        )
    return config


def load_model(model: str, dtype: str = "auto", device: str | None = None) -> LoopMDMForMaskedLM:
    """A LoopMDM in eval mode, on a GPU if there is one and no `device` is named."""
    dtype, place = _check_dtype(dtype), _check_device(device)
    read_model_config(model)
    return LoopMDMForMaskedLM.from_pretrained(model, dtype=dtype).to(place).eval()


def load_judge(
    judge: str, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """
    A causal language model in eval mode, from safetensors files alone, and its tokenizer. Both are checked. Code that
    they bring along runs with `trust_remote_code` alone.
    """
    dtype, place = _check_dtype(dtype), _check_device(device)
    if _read_config(judge, trust_remote_code).model_type == "loopmdm":
        raise ValueError(f"The judge {judge} is a LoopMDM; it must be a causal language model, such as GPT-2.")
    tokenizer = load_tokenizer(judge, trust_remote_code)
    options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(judge, **options).to(place).eval()
    check_judge(model, tokenizer)
    return model, tokenizer


def load_tokenizer(model: str, trust_remote_code: bool = False, **options: Any) -> Any:
    """
    The tokenizer of a folder or Hub id. Raises a ValueError where there is none, and where it has code of its own that
    `trust_remote_code` does not admit. `options` are of `AutoTokenizer.from_pretrained`.
    """
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # transformers raises many kinds, and speaks of backends
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason and not trust_remote_code:
            raise ValueError(
                f"The tokenizer of {model} has code of its own, which runs on request alone; read it, and give "
                "--trust-remote-code (`trust_remote_code=True`)."
            ) from error
        raise ValueError(
            f"{model} does not have a tokenizer that loads ({reason}); put its files beside the weights."
        ) from error


def _read_config(model: str, trust_remote_code: bool = False) -> Any:
    logging.disable_progress_bar()
    # transformers would take the path of a missing folder for a misspelt Hub id.
    if model.startswith((".", "/", "~")) and not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model} does not hold a model: there is no config.json in it.")
    return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)


def _check_dtype(name: str) -> str:
    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"`dtype` is {name!r}; use float32, bfloat16, float16 or auto.")
    return name


def _check_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's, by kind of device
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"`device` is {name!r}, which does not work here ({reason}); try cpu.") from error
