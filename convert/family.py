# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
A family of checkpoints: how to recognise it, how to translate its configuration, and, for every tensor of the result,
the recipe that makes it from tensors of the source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration_loopmdm import LoopMDMConfig
from .source import Source

# Fields of a configuration that are not the source's: those of the loop, and the ids of special tokens
LOOP_FIELDS = ("loop_start", "loop_end", "num_loops", "max_train_loops", "loop_update")
TOKEN_FIELDS = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
# All others that have an effect: what a plain model is
MODEL_FIELDS = LoopMDMConfig.__annotations__.keys() - {*LOOP_FIELDS, *TOKEN_FIELDS, "use_cache"}


@dataclass(frozen=True)
class Recipe:
    """
    How one tensor of the result is made.

    Args:
        sources (`tuple[str, ...]`): Names of the source's tensors.
        how (`str`): A short description of the computation, for the record.
        compute (`Callable`): The computation: takes the tensors in that order. It also runs on meta tensors, to find
            shapes.
    """

    sources: tuple[str, ...]
    how: str
    compute: Callable[..., torch.Tensor]


def copy(name: str) -> Recipe:
    return Recipe((name,), "copy", lambda tensor: tensor)


def rows(name: str, start: int, stop: int) -> Recipe:
    """A part of a fused tensor: `tensor[start:stop]`."""
    return Recipe((name,), f"rows {start}:{stop}", lambda tensor: tensor[start:stop])


def transposed(name: str, start: int | None = None, stop: int | None = None) -> Recipe:
    """The transposed columns `start:stop` of a weight that is stored as (in, out)."""
    part = "" if start is None else f" of columns {start}:{stop}"
    return Recipe((name,), f"transpose{part}", lambda tensor: tensor[:, start:stop].T)


def scaled(name: str, factor: float) -> Recipe:
    """`tensor * factor`, in float64; a copy if the factor is 1."""
    if factor == 1:
        return copy(name)
    return Recipe((name,), f"times {factor:.6g}", lambda tensor: tensor.double() * factor)


def zeros(like: str) -> Recipe:
    """A vector of zeros, one for each row of the source's tensor `like`."""
    return Recipe((like,), "0 for each row", lambda tensor: tensor.new_zeros(tensor.shape[0]))


def per_layer(num_layers: int, layer: Mapping[str, str | Recipe]) -> dict[str, Recipe]:
    """
    The recipes of all layers, from those of one layer by their names within it: `{i}` in names of the source becomes
    the index. A plain name is a copy.
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
        name (`str`): Its name for `--family`.
        models (`str`): The published models that it covers, for error messages.
        architectures (`tuple[str, ...]`):
            The names in config.json that identify it. A family whose files look like another's has none, and is used
            only on request (`--family`).
        tied_names (`tuple[str, ...]`):
            If the head shares the embedding's weight, the names under which it may be stored a second time.
        ignored (`tuple[str, ...]`): Regular expressions for whole names of tensors that are not needed.
        reference (`str`, *optional*):
            The transformers class (e.g. `"Qwen2"`) that computes the same as the source if attention is over the whole
            sequence; `--verify` loads the source into it.
        from_causal (`bool`): The source is autoregressive, so the family is used only with `--from-causal`.
        takes_sigma (`bool`): Its models may be conditioned on the noise level, at which `sigma` converts them.
        stored (`dict`, *optional*): The constant part of config.json, for formats that `loopmdm export` writes.
    """

    name: str
    models: str
    architectures: tuple[str, ...] = ()
    tied_names: tuple[str, ...] = ("lm_head.weight",)
    ignored: tuple[str, ...] = ()
    reference: str | None = None
    from_causal: bool = False
    takes_sigma: bool = False
    stored: dict[str, Any] | None = None

    def matches(self, source: Source) -> bool:
        """Whether the source is of this family. It must not match others'; `model_type` is too often wrong to help."""
        return not set(self.architectures).isdisjoint(source.architectures)

    def prepare(self, source: Source) -> Source:
        """Changes the source before anything else looks at it."""
        return source

    def config(self, source: Source) -> dict[str, Any]:
        """
        The arguments of a `LoopMDMConfig`, without those of the loop. Sizes come from tensors. The only special token
        is `mask_token_id`, for checkpoints that name it neither in config.json nor in the tokenizer.
        """
        raise NotImplementedError

    def recipes(self, source: Source, config: dict[str, Any]) -> dict[str, Recipe]:
        """The recipe of every tensor of the result; `config` is what the method `config` returned."""
        raise NotImplementedError

    def generation(self, source: Source) -> dict[str, Any]:
        """The family's usual settings of `generate`, which become defaults."""
        return {}

    def reference_name(self, name: str) -> str:
        """The name in the class `reference` of the source's tensor `name`."""
        return name

    def stored_config(self, config: LoopMDMConfig) -> dict[str, Any]:
        """The reverse of `config`: the config.json of a plain model, without special tokens and dtype."""
        raise NotImplementedError

    def stored_properties(self, config: LoopMDMConfig) -> dict[str, Any]:
        """The fields of a configuration whose values this format fixes for models like this one, and the values."""
        return {}

    def stored_name(self, name: str) -> str:
        """The reverse of `recipes`: the name in this format of the model's tensor `name`."""
        return name
