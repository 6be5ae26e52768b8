# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What a family of checkpoints is to the converter: how to recognise it, its configuration in our words, and for every
tensor of the result the recipe that makes it from tensors of the source.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .source import Source


@dataclass(frozen=True)
class Recipe:
    """
    How one tensor of the result is made.

    Args:
        sources (`tuple[str, ...]`): Names of the source's tensors.
        how (`str`): What is done to them, in a few words, for the plan.
        compute (`Callable`): Does it: takes the tensors in that order. Runs on meta tensors too, for the shapes.
    """

    sources: tuple[str, ...]
    how: str
    compute: Callable[..., torch.Tensor]


def copy(name: str) -> Recipe:
    return Recipe((name,), "copy", lambda tensor: tensor)


def rows(name: str, start: int, stop: int) -> Recipe:
    """Part of a fused tensor: `tensor[start:stop]`."""
    return Recipe((name,), f"rows {start}:{stop}", lambda tensor: tensor[start:stop])


def transposed(name: str, start: int | None = None, stop: int | None = None) -> Recipe:
    """A weight stored as (in, out): columns `start:stop` of it, transposed."""
    part = "" if start is None else f" of columns {start}:{stop}"
    return Recipe((name,), f"transpose{part}", lambda tensor: tensor[:, start:stop].T)


def scaled(name: str, factor: float) -> Recipe:
    return Recipe((name,), f"times {factor:.6g}", lambda tensor: tensor.double() * factor)


def constant(value: float, like: str) -> Recipe:
    """A vector of `value`, as long as the source's tensor `like` has rows."""
    return Recipe((like,), f"{value:g} for each row", lambda tensor: tensor.new_full(tensor.shape[:1], value))


def per_layer(num_layers: int, template: dict[str, str | Recipe]) -> dict[str, Recipe]:
    """Repeats `template` for every layer: `{i}` in names becomes the layer's index. A plain name is a copy."""

    def expand(recipe: str | Recipe, index: int) -> Recipe:
        if isinstance(recipe, str):
            return copy(recipe.format(i=index))
        return Recipe(tuple(name.format(i=index) for name in recipe.sources), recipe.how, recipe.compute)

    return {
        target.format(i=index): expand(recipe, index)
        for index in range(num_layers)
        for target, recipe in template.items()
    }


@dataclass(frozen=True)
class Family:
    """
    One format of checkpoints. To add one, write a module in `convert/families/` with such an object and list it in
    `convert/families/__init__.py`.

    Args:
        name (`str`): What `--family` calls it.
        models (`str`): The published models that it covers.
        matches (`Callable[[Source], bool]`):
            Recognises it, from `architectures` and tensor names. A family whose files nothing tells from another's
            never matches, and is used on request (`--family`).
        config (`Callable[[Source], dict]`):
            The arguments of a `LoopMDMConfig`, but for the loop and the special tokens. Sizes come from tensors.
        recipes (`Callable[[Source, dict], dict[str, Recipe]]`):
            The recipe of every tensor of the result, given the source and that dict.
        tied_names (`tuple[str, ...]`):
            Where the head shares the embedding's weight: names under which it may be stored once more.
        ignored (`tuple[str, ...]`): Patterns (whole-name regular expressions) of tensors that are not needed.
        mask_token_id (`Callable[[Source], int | None]`): Id of [MASK] where neither config nor tokenizer tells.
        generation (`Callable[[Source], dict]`): Defaults of `generate`: the family's usual settings.
        reference (`str`, *optional*):
            The transformers class (e.g. `"Qwen2"`) that computes what the source computes, with attention over the
            whole sequence; `--verify` loads the source into it.
        reference_names (`Callable[[str], str]`, *optional*): Name of a source tensor in that class.
        prepare (`Callable[[Source], Source]`, *optional*): Changes the source before anything else looks at it.
        from_causal (`bool`): The source is autoregressive: used on request (`--from-causal`) alone.
    """

    name: str
    models: str
    matches: Callable[[Source], bool]
    config: Callable[[Source], dict[str, Any]]
    recipes: Callable[[Source, dict[str, Any]], dict[str, Recipe]]
    tied_names: tuple[str, ...] = ("lm_head.weight",)
    ignored: tuple[str, ...] = ()
    mask_token_id: Callable[[Source], int | None] = lambda source: None
    generation: Callable[[Source], dict[str, Any]] = lambda source: {}
    reference: str | None = None
    reference_names: Callable[[str], str] = lambda name: name
    prepare: Callable[[Source], Source] = lambda source: source
    from_causal: bool = False
