# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The plan of a conversion, checked against the shape of every tensor before weights are read or written."""

import contextlib
import functools
import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration_loopmdm import LoopMDMConfig
from ..generation_utils import LoopMDMGenerationConfig
from ..modeling_loopmdm import LoopMDMForMaskedLM
from .families import choose_family
from .family import LOOP_FIELDS, Family, Recipe
from .loop_window import default_window
from .source import Source
from .tokenizer import (
    SpecialTokens,
    TokenizerFiles,
    find_special_tokens,
    find_turn_end,
    ids_without_token,
    load_tokenizer,
    token_ids,
)


@dataclass
class Result:
    """
    What a conversion or an export makes of a source.

    Args:
        source ([`Source`]): The checkpoint that it is made from.
        family ([`Family`]): The format that a conversion reads, or an export writes.
        config ([`LoopMDMConfig`]): The configuration of the result, including the dtype of its tensors.
        tokens, tokenizer: Its special tokens, and the tokenizer's files.
        recipes (`dict[str, Recipe]`): By name of the result's tensor, how it is made.
        copies (`dict[str, str]`): By name, tensors of the source that are not used, because they must equal another.
        shapes (`dict[str, torch.Tensor]`): The result's tensors on the meta device.
    """

    source: Source
    family: Family
    config: LoopMDMConfig
    tokens: SpecialTokens
    tokenizer: TokenizerFiles
    recipes: dict[str, Recipe]
    copies: dict[str, str]
    shapes: dict[str, torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.shapes.values())

    def record(self) -> dict[str, Any]:
        """The origin of the tensors as plain data."""
        return {
            "source": self.source.name,
            "dtype": str(self.config.dtype).removeprefix("torch."),
            "tensors": {
                target: {"from": list(recipe.sources), "how": recipe.how} for target, recipe in self.recipes.items()
            },
            "versions": {name: importlib.metadata.version(name) for name in ("loopmdm", "torch", "transformers")},
        }


@dataclass
class Plan(Result):
    """
    Everything about a conversion that is known before it is done.

    Args:
        loaded_tokenizer: The tokenizer of the result; None if there is none, or its own code may not run.
        generation ([`LoopMDMGenerationConfig`]): The defaults of `generate`.
        ignored (`list[str]`): Tensors of the source that are not needed.
        window_chosen (`str`): How the loop's place was chosen.
    """

    loaded_tokenizer: Any
    generation: LoopMDMGenerationConfig
    ignored: list[str]
    window_chosen: str

    def record(self) -> dict[str, Any]:
        """The plan as plain data, for `conversion.json`."""
        config = self.config
        counts = dict.fromkeys(("total", "head", "mid", "tail", "embeddings_and_head"), 0)
        for name, tensor in self.shapes.items():
            part, match = "embeddings_and_head", re.match(r"model\.layers\.(\d+)\.", name)
            if match is not None:
                index = int(match[1])
                part = "head" if index < config.loop_start else "mid" if index < config.loop_end else "tail"
            counts["total"] += tensor.numel()
            counts[part] += tensor.numel()
        return {
            "family": self.family.name,
            "parameters": counts,
            "layers": config.num_hidden_layers,
            "loop": {**{name: getattr(config, name) for name in LOOP_FIELDS}, "chosen": self.window_chosen},
            "special_tokens": asdict(self.tokens),
            **super().record(),
            "ignored": self.ignored,
            "copies": self.copies,
        }


def plan_conversion(
    source: Source,
    *,
    family: str | Family | None = None,
    from_causal: bool = False,
    shift_logits: bool | None = None,
    mask_token_id: int | None = None,
    dtype: str | None = None,
    num_loops: int = 1,
    loop_start: int | None = None,
    loop_end: int | None = None,
    loop_update: str | None = None,
    max_train_loops: int | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """
    Plans a conversion, without reading weights.

    Args:
        source ([`Source`]): The checkpoint, as [`open_source`] returns it.
        family (`str` or [`Family`], *optional*): The source's family, if its files do not tell.
        from_causal (`bool`, defaults to `False`): Convert a causal language model, to adapt it to diffusion.
        shift_logits (`bool`, *optional*, defaults to `True`): With `from_causal`, the state of position i - 1 still
            predicts token i.
        mask_token_id (`int`, *optional*): Id of [MASK], if neither config, tokenizer nor family names it.
        dtype (`"float32"`, `"bfloat16"`, `"float16"`, *optional*): By default the source's.
        num_loops (`int`, defaults to 1): The result's default number of loops.
        loop_start, loop_end (`int`, *optional*, default to [`~loopmdm.convert.default_window`]): The loop, mid, is
            `layers[loop_start:loop_end]`.
        loop_update (`"replace"` or `"damped"`, *optional*): By default `"damped"` if `num_loops` is above 1, since the
            loops are not trained yet, and otherwise `"replace"`, for training.
        max_train_loops (`int`, *optional*, defaults to 12): S_max of a later training.
        trust_remote_code (`bool`, defaults to `False`): Run the tokenizer's own code, to check that it loads.

    Raises:
        ValueError: Anything about the source or the arguments does not fit.
    """
    with in_words(source):
        family = choose_family(source, family, from_causal)
        if shift_logits is not None and not family.from_causal:
            raise ValueError("`shift_logits` is for --from-causal only; every other family decides it itself.")
        if source.sigma is not None and not family.takes_sigma:
            raise ValueError(f"`sigma` is {source.sigma}, but {family.name} models take none; leave it out.")
        source = family.prepare(source)
        settings = family.config(source)
        tokenizer = TokenizerFiles(source.folder)
        tokens = find_special_tokens(source, family, tokenizer, settings, mask_token_id)
        loaded_tokenizer = load_tokenizer(source, tokenizer, tokens, trust_remote_code)
        tokens.add_end(find_turn_end(tokenizer, loaded_tokenizer))
        recipes = family.recipes(source, settings)
        family_generation = family.generation(source)
    if shift_logits is not None:
        settings["shift_logits"] = shift_logits
    if tokens.mask_found == "new token" or tokens.mask_token_id == settings["vocab_size"]:
        recipes = _with_mask_row(recipes, tokens.mask_token_id)
        settings["vocab_size"] = max(settings["vocab_size"], tokens.mask_token_id + 1)
    loop, window_chosen = _loop(settings["num_hidden_layers"], num_loops, loop_start, loop_end, loop_update)
    if max_train_loops is not None:
        loop["max_train_loops"] = max_train_loops
    settings |= {**tokens.ids(), **loop, "dtype": result_dtype(source, recipes, dtype)}
    with in_words(source):
        config = LoopMDMConfig(**settings, architectures=["LoopMDMForMaskedLM"])
    ids = token_ids(source, tokenizer, loaded_tokenizer, config.vocab_size)
    ignored, copies = _account_for_all(source, family, recipes, config)
    never = {*ids_without_token(ids, tokens, config.vocab_size), *(family_generation.get("suppress_tokens") or ())}
    special = {name: value for name, value in tokens.ids().items() if name != "mask_token_id"}
    return Plan(
        source=source,
        family=family,
        config=config,
        tokens=tokens,
        tokenizer=tokenizer,
        loaded_tokenizer=loaded_tokenizer,
        generation=LoopMDMGenerationConfig(**family_generation | special | {"suppress_tokens": sorted(never) or None}),
        recipes=recipes,
        ignored=ignored,
        copies=copies,
        shapes=_result_shapes(source, recipes, config),
        window_chosen=window_chosen,
    )


def _loop(
    num_layers: int, num_loops: int, loop_start: int | None, loop_end: int | None, loop_update: str | None
) -> tuple[dict[str, Any], str]:
    """The settings of the loop, and how its place was chosen."""
    loop_update = loop_update or ("damped" if num_loops > 1 else "replace")
    window_chosen = "by hand"
    if loop_start is None and loop_end is None:
        loop_start, loop_end = default_window(num_layers, loop_update)
        window_chosen = "by depth"
    elif loop_start is None or loop_end is None:
        raise ValueError("`loop_start` and `loop_end` go together; give both, or neither for the default by depth.")
    loop = {"loop_start": loop_start, "loop_end": loop_end, "num_loops": num_loops, "loop_update": loop_update}
    return loop, window_chosen


@contextlib.contextmanager
def in_words(source: Source) -> Iterator[None]:
    """Turns the errors that damaged files of the source cause into a ValueError."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    except (TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"The config or tokenizer of {source.name} has a value that makes no sense ({type(error).__name__}: "
            f"{error})."
        ) from error


def _with_mask_row(recipes: dict[str, Recipe], index: int) -> dict[str, Recipe]:
    """Sets the mask token's row of embedding and head, a new one if necessary, to the mean of the rows before it."""

    def with_row(tensor: torch.Tensor) -> torch.Tensor:
        mean = tensor[:index].mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
        return torch.cat((tensor[:index], mean, tensor[index + 1 :]))

    changed = {
        name: Recipe(recipes[name].sources, f"row {index} = mean of the rows before it", with_row)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
        if name in recipes
    }
    return recipes | changed


def result_dtype(source: Source, recipes: dict[str, Recipe], dtype: str | None) -> str:
    """The name of the result's dtype: the requested one, or the source's. Raises a ValueError for other names."""
    if dtype is None:
        names = {name for recipe in recipes.values() for name in recipe.sources if name in source}
        stored = {source.tensors[name].dtype for name in names} or {torch.float32}
        return str(functools.reduce(torch.promote_types, stored)).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"`dtype` is {dtype!r}; it must be float32, bfloat16 or float16 (default: the source's).")
    return dtype


def _account_for_all(
    source: Source, family: Family, recipes: dict[str, Recipe], config: LoopMDMConfig
) -> tuple[list[str], dict[str, str]]:
    """
    The tensors of the source that no recipe uses: those that may be ignored, and those that must equal others. Raises
    a ValueError if there are any others, or if one is missing.
    """

    def listed(names: set[str]) -> str:
        return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")

    used = {name for recipe in recipes.values() for name in recipe.sources}
    missing = used - source.tensors.keys()
    if missing:
        raise ValueError(f"{source.name} lacks {len(missing)} tensors of the family {family.name}: {listed(missing)}.")
    left = source.tensors.keys() - used
    copies = {}
    if config.tie_word_embeddings:
        (embedding,) = recipes["model.embed_tokens.weight"].sources
        copies = {name: embedding for name in family.tied_names if name in left}
    ignored = {name for name in left if any(re.fullmatch(pattern, name) for pattern in family.ignored)}
    surplus = left - ignored - copies.keys()
    if surplus:
        raise ValueError(
            f"{source.name} has {len(surplus)} tensors that a {family.name} checkpoint does not have: "
            f"{listed(surplus)}; is it another format, or quantised, or an adapter?"
        )
    return sorted(ignored), copies


def saved_tensors(config: LoopMDMConfig) -> dict[str, torch.Tensor]:
    """The tensors that a model is saved with, in its order and dtype, on the meta device."""
    with torch.device("meta"):
        tensors = dict(LoopMDMForMaskedLM(config).to(dtype=config.dtype).state_dict())
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def _result_shapes(source: Source, recipes: dict[str, Recipe], config: LoopMDMConfig) -> dict[str, torch.Tensor]:
    """The tensors of the model. Runs all recipes on the meta device, and compares the shapes with theirs."""
    needed = saved_tensors(config)
    missing, unknown = sorted(needed.keys() - recipes.keys()), sorted(recipes.keys() - needed.keys())
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which the model does not have"
        raise ValueError(f"{source.name} {what}; its layers differ from each other, or it is incomplete.")
    for target, tensor in needed.items():
        recipe = recipes[target]
        try:
            inputs = [torch.empty(source.shape(name), device="meta") for name in recipe.sources]
            result = recipe.compute(*inputs).shape
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{', '.join(recipe.sources)} of {source.name} cannot become {target!r}: {error}"
            ) from error
        if result != tensor.shape:
            raise ValueError(
                f"{recipe.sources[0]!r} of {source.name} has shape {source.shape(recipe.sources[0])}, which gives "
                f"{tuple(result)} for {target!r} ({recipe.how}) where {tuple(tensor.shape)} is needed."
            )
    return needed
