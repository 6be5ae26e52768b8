# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The checkpoints in tests/fixtures: tiny random ones in published formats, with logits that the authors' own code gave.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from loopmdm import LoopMDMForMaskedLM
from loopmdm.convert import Plan, Source, open_source, plan_conversion

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


def meta(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name / "meta.json").read_text())


def references(name: str) -> dict[str, torch.Tensor]:
    with numpy.load(FIXTURES / name / "ref.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


SHIFTED = [name for name in NAMES if meta(name)["shifted_logits"]]
PADDED = [name for name in NAMES if "right_f64" in references(name)]


def source_tensors(name: str) -> dict[str, torch.Tensor]:
    """A fixture's safetensors, read without any of our code."""
    return {
        key: value
        for file in sorted((FIXTURES / name).glob("*.safetensors"))
        for key, value in load_file(file).items()
    }


def open_fixture(name: str) -> Source:
    options = OPTIONS.get(name, {})
    return open_source(FIXTURES / name, **{key: options[key] for key in ("allow_pickle", "sigma") if key in options})


def plan_fixture(name: str, source: Source | None = None) -> Plan:
    options = OPTIONS.get(name, {})
    return plan_conversion(
        open_fixture(name) if source is None else source,
        **{key: options[key] for key in ("family", "mask_token_id") if key in options},
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


def logits_of(model: LoopMDMForMaskedLM, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).logits


def largest_difference(
    model: LoopMDMForMaskedLM, name: str, precision: str, without_padding_mask: bool = False
) -> float:
    """
    Largest difference between a model's logits at one loop and all those that are stored for a fixture: without
    padding, and with padding at the right and at the left, where only real positions count. Our row i predicts token
    i; where the source's row i - 1 does, it is compared with that. SMDM's head lacks the row of [MASK], the last one.
    """
    stored = references(name)
    worst = 0.0
    for case, padding in (("logits", None), ("right", "mask_right"), ("left", "mask_left")):
        if f"{case}_{precision}" not in stored:
            continue
        mask = None if padding is None else stored[padding]
        with computing_in(precision):
            ours = logits_of(model, stored["input_ids"], None if without_padding_mask else mask, num_loops=1)
        theirs = stored[f"{case}_{precision}"]
        assert ours.dtype == theirs.dtype
        assert ours.isfinite().all()
        real = torch.ones_like(stored["input_ids"]) if mask is None else mask
        for row in range(len(real)):
            positions = real[row].nonzero().flatten()
            after, before = (positions[1:], positions[:-1]) if meta(name)["shifted_logits"] else (positions,) * 2
            difference = ours[row, after, : theirs.shape[-1]] - theirs[row, before]
            worst = max(worst, difference.abs().max().item())
    return worst
