# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What a family of checkpoints is to the converter: how to recognise it, its configuration in our words, and for every
tensor of the result the recipe that makes it from tensors of the source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration_loopmdm import LoopMDMConfig
from .source import Source


@dataclass(frozen=True)
class Recipe:
    """
    How one tensor of the result is made.

    Args:
        sources (`tuple[str, ...]`): Names of the source's tensors.
        how (`str`): What is done to them, in a few words, for the record.
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
    """`tensor * factor`, and a copy where the factor is 1."""
    return (
        copy(name) if factor == 1 else Recipe((name,), f"times {factor:.6g}", lambda tensor: tensor.double() * factor)
    )


def zeros(like: str) -> Recipe:
    """A vector of zeros, as long as the source's tensor `like` has rows."""
    return Recipe((like,), "0 for each row", lambda tensor: tensor.new_zeros(tensor.shape[0]))


def per_layer(num_layers: int, layer: Mapping[str, str | Recipe]) -> dict[str, Recipe]:
    """
    Repeats the recipes of one layer, by their names within it, for all layers: `{i}` in the source's names becomes the
    index. A plain name is a copy.
    """

    def expand(recipe: str | Recipe, index: int) -> Recipe:
        recipe = copy(recipe) if isinstance(recipe, str) else recipe
        return Recipe(tuple(name.format(i=index) for name in recipe.sources), recipe.how, recipe.compute)

    return {
        f"model.layers.{index}.{target}": expand(recipe, index)
        for index in range(num_layers)
        for target, recipe in layer.items()
    }


class Family:
    """
    One format of checkpoints. To add one, put a module into `convert/families/` whose `FAMILIES` is a list of objects
    of subclasses; or pass such an object as `convert_checkpoint(..., family=)`.

    Attributes:
        name (`str`): What `--family` calls it.
        models (`str`): The published models that it covers, for error messages.
        architectures (`tuple[str, ...]`):
            The names in config.json by which it is recognised. A family whose files nothing tells from another's has
            none, and is used on request (`--family`) alone.
        tied_names (`tuple[str, ...]`):
            Where the head shares the embedding's weight: names under which it may be stored once more.
        ignored (`tuple[str, ...]`): Patterns (whole-name regular expressions) of tensors that are not needed.
        reference (`str`, *optional*):
            The transformers class (e.g. `"Qwen2"`) that computes what the source computes, with attention over the
            whole sequence; `--verify` loads the source into it.
        from_causal (`bool`): The source is autoregressive: used with `--from-causal` alone.
        stored (`dict`, *optional*): What config.json says in every checkpoint of a format that can be written too.
    """

    name: str
    models: str
    architectures: tuple[str, ...] = ()
    tied_names: tuple[str, ...] = ("lm_head.weight",)
    ignored: tuple[str, ...] = ()
    reference: str | None = None
    from_causal: bool = False
    stored: dict[str, Any] | None = None

    def matches(self, source: Source) -> bool:
        """Recognises the family's checkpoints, and no other family's. `model_type` lies too often to be asked."""
        return not set(self.architectures).isdisjoint(source.architectures)

    def prepare(self, source: Source) -> Source:
        """Changes the source before anything else looks at it."""
        return source

    def config(self, source: Source) -> dict[str, Any]:
        """
        The arguments of a `LoopMDMConfig`, without the loop's. Sizes come from tensors. Of the special tokens only
        `mask_token_id`, for checkpoints of which neither config.json nor the tokenizer names it.
        """
        raise NotImplementedError

    def recipes(self, source: Source, config: dict[str, Any]) -> dict[str, Recipe]:
        """The recipe of every tensor of the result, given also what `config` returned."""
        raise NotImplementedError

    def generation(self, source: Source) -> dict[str, Any]:
        """Defaults of `generate`: the family's usual settings."""
        return {}

    def reference_name(self, name: str) -> str:
        """What the class `reference` calls the source's tensor `name`."""
        return name

    def stored_config(self, config: LoopMDMConfig) -> dict[str, Any]:
        """The reverse of `config`: config.json of a plain model, without special tokens and dtype."""
        raise NotImplementedError

    def stored_properties(self, config: LoopMDMConfig) -> dict[str, Any]:
        """Fields of a configuration that models like this one cannot choose in this format, and their values."""
        return {}

    def stored_name(self, name: str) -> str:
        """The reverse of `recipes`: what the format calls the model's tensor `name`."""
        return name
