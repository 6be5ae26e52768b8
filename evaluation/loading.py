# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Models, judges and tokenizers, loaded to be measured."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..modeling_loopmdm import LoopMDMForMaskedLM
from .perplexity import check_judge


def load_model(model: str, dtype: str = "auto", device: str | None = None) -> LoopMDMForMaskedLM:
    """A LoopMDM in eval mode, on a GPU if there is one and no `device` is named."""
    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return LoopMDMForMaskedLM.from_pretrained(model, dtype=_dtype(dtype)).to(device).eval()


def load_judge(judge: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A causal language model in eval mode, from safetensors files alone, and its tokenizer. Both are checked."""
    logging.disable_progress_bar()
    if judge.startswith((".", "/", "~")) and not (Path(judge) / "config.json").is_file():
        raise ValueError(f"{judge} does not hold a model: there is no config.json in it.")
    kind = AutoConfig.from_pretrained(judge).model_type
    if kind == "loopmdm":
        raise ValueError(f"The judge {judge} is a LoopMDM; it must be a causal language model, such as GPT-2.")
    tokenizer = load_tokenizer(judge)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(judge, dtype=_dtype(dtype), use_safetensors=True).to(device).eval()
    check_judge(model, tokenizer)
    return model, tokenizer


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises many kinds, and speaks of backends
        raise ValueError(f"{model} does not have a tokenizer that loads; put its files beside the weights.") from error


def _dtype(name: str) -> Any:
    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"--dtype is {name!r}; use float32, bfloat16, float16 or auto.")
    return name
