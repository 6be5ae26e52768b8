# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What the tests of conversions share. The checkpoints in tests/fixtures are tiny random ones in published formats, with
logits that the authors' own code gave (ref.npz).
"""

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from loopmdm import LoopMDMForMaskedLM
from loopmdm.convert import Plan, Source, convert_checkpoint, open_source, plan_conversion

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/ref.npz"))

# What the files do not tell, as a user would give it.
OPTIONS: dict[str, dict[str, Any]] = {
    "a2d_llama3": {"mask_token_id": 125},
    "a2d_qwen3": {"mask_token_id": 125},
    "diffugpt": {"mask_token_id": 127},
    "diffullama": {"family": "diffullama", "mask_token_id": 127},
    "fast_dllm_v2": {"mask_token_id": 63},
    "mdlm_ckpt": {"allow_pickle": True},
    "open_dcoder": {"family": "open-dcoder", "mask_token_id": 63},
    "udlm_hf": {"sigma": 0.37, "mask_token_id": 63},
}
# A mistake of epsilon changes logits by 8e-4 in float32, rounding by less than 1e-5.
TOLERANCES = {"f32": 5e-5, "f64": 1e-10}
REMOVED = object()
LLADA = "model.transformer."


def meta(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name / "meta.json").read_text())


@functools.cache
def references(name: str) -> dict[str, torch.Tensor]:
    with numpy.load(FIXTURES / name / "ref.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


SHIFTED = [name for name in NAMES if meta(name)["shifted_logits"]]
PADDED = [name for name in NAMES if "right_f64" in references(name)]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """A folder's safetensors, read without any of our code."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


@functools.cache
def fixture_weights(name: str) -> dict[str, torch.Tensor]:
    return stored(FIXTURES / name)


def same_weights(first: Path, second: Path) -> bool:
    first, second = stored(first), stored(second)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# Sources


def edited(name: str, folder: Path, config=None, tensors=None, file="model.safetensors") -> Path:
    """
    A copy of a fixture in one file, with other values in config.json and other tensors; `REMOVED` removes. A tensor
    may be given as a function of the old one.
    """
    folder.mkdir(parents=True)
    settings = json.loads((FIXTURES / name / "config.json").read_text()) | (config or {})
    settings = {key: value for key, value in settings.items() if value is not REMOVED}
    (folder / "config.json").write_text(json.dumps(settings))
    weights = dict(fixture_weights(name))
    for key, tensor in (tensors or {}).items():
        weights[key] = tensor(weights[key]) if callable(tensor) else tensor
    weights = {key: tensor.clone() for key, tensor in weights.items() if tensor is not REMOVED}
    if file.endswith(".safetensors"):
        save_file(weights, folder / file)
    else:
        torch.save(weights, folder / file)
    return folder


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Another value in the middle of a tensor."""

    def change(tensor):
        changed = tensor.clone()
        changed.view(-1)[tensor.numel() // 2] = value
        return changed

    return change


def save_tokenizer(folder: Path, size: int, extra: tuple[str, ...] = (), template: str | None = None, **named) -> None:
    """A word-level tokenizer of tokens w0, w1, ... and then `extra`; `named` names special tokens."""
    model = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    model.pre_tokenizer = WhitespaceSplit()
    special = {f"{name}_token": token for name, token in named.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="w0", **special)
    tokenizer.add_tokens(list(extra), special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


# Conversions


def convert(name: str, out: Path, **options) -> dict[str, Any]:
    """Converts a fixture."""
    return convert_checkpoint(FIXTURES / name, out, **OPTIONS.get(name, {}) | options)


def load(folder: Path, **kwargs) -> LoopMDMForMaskedLM:
    return LoopMDMForMaskedLM.from_pretrained(folder, **kwargs).eval()


def refuse(source: str | Path, out: Path, *parts: str, **options) -> str:
    """Converts in vain: a ValueError whose message has all `parts`, and nothing is left."""
    with pytest.raises(ValueError) as error:
        convert_checkpoint(source, out, **options)
    assert os.listdir(out.parent) == []
    message = str(error.value)
    for part in parts:
        assert part in message, message
    return message


@torch.no_grad()
def logits_of(model, *args, **kwargs) -> torch.Tensor:
    return model(*args, **kwargs).logits


# Plans, in float64 too


def open_fixture(name: str) -> Source:
    options = OPTIONS.get(name, {})
    return open_source(FIXTURES / name, **{key: options[key] for key in ("allow_pickle", "sigma") if key in options})


def plan_fixture(name: str, source: Source | None = None) -> Plan:
    options = OPTIONS.get(name, {})
    return plan_conversion(
        source or open_fixture(name), **{key: options[key] for key in ("family", "mask_token_id") if key in options}
    )


@contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """
    With "f64", torch.float32 is another name of float64, as it was where the authors' code made the reference logits,
    so that no "upcast to float32" inside a model rounds.
    """
    default = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        if precision == "f64":
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch, "float", torch.float64)
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def build(plan: Plan, precision: str) -> LoopMDMForMaskedLM:
    """The model that a plan describes. Neither the recipes nor the model round below `precision`."""
    names = {name for recipe in plan.recipes.values() for name in recipe.sources}
    tensors = {name: plan.source.read(name) for name in names}  # safetensors reads real float32 only
    with computing_in(precision):
        dtype = torch.float32
        plan.config.dtype = dtype
        model = LoopMDMForMaskedLM(plan.config)
        made = {
            target: recipe.compute(*(tensors[name].to(dtype) for name in recipe.sources)).to(dtype)
            for target, recipe in plan.recipes.items()
        }
        loaded = model.load_state_dict(made, strict=False)
        model.tie_weights()
    assert loaded.missing_keys == (["lm_head.weight"] if plan.config.tie_word_embeddings else [])
    assert not loaded.unexpected_keys
    return model.eval()


def largest_difference(
    model: LoopMDMForMaskedLM, name: str, precision: str, without_padding_mask: bool = False
) -> float:
    """
    Largest difference between a model's logits at one loop and all those that are stored for a fixture: without
    padding, and with padding at the right and at the left, where only real positions count. Our row i predicts token
    i; where the source's row i - 1 does, it is compared with that, and the first one with its own, which is Dream's
    choice. [MASK], which we never predict, does not count.
    """
    arrays = references(name)
    worst = 0.0
    for case, padding in (("logits", None), ("right", "mask_right"), ("left", "mask_left")):
        if f"{case}_{precision}" not in arrays:
            continue
        mask = None if padding is None else arrays[padding]
        with computing_in(precision):
            ours = logits_of(model, arrays["input_ids"], None if without_padding_mask else mask, num_loops=1)
        theirs = arrays[f"{case}_{precision}"]
        assert ours.dtype == theirs.dtype
        columns = [index for index in range(theirs.shape[-1]) if index != model.config.mask_token_id]
        assert ours[..., columns].isfinite().all()
        real = torch.ones_like(arrays["input_ids"]) if mask is None else mask
        for row in range(len(real)):
            after = before = real[row].nonzero().flatten()
            if meta(name)["shifted_logits"]:
                before = torch.cat((after[:1], after[:-1]))
            difference = ours[row, after][:, columns] - theirs[row, before][:, columns]
            worst = max(worst, difference.abs().max().item())
    return worst
