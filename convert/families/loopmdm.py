# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A LoopMDM that was trained without loops: the same weights with another loop."""

from dataclasses import fields
from typing import Any

from ...configuration_loopmdm import LoopMDMConfig
from ..family import Family, Recipe, copy
from ..source import Source

# What a conversion decides anew
_DECIDED = {
    *("loop_start", "loop_end", "num_loops", "max_train_loops", "loop_update"),
    *("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id"),
}


def _config(source: Source) -> dict[str, Any]:
    if source.config.get("max_train_loops") != 1:
        raise ValueError(
            f"{source.name} is a looped model already (`max_train_loops` is {source.config.get('max_train_loops')}); "
            "only one trained without loops (`max_train_loops` 1) can be given another loop."
        )
    names = {field.name for field in fields(LoopMDMConfig)} - {
        field.name for field in fields(LoopMDMConfig.__mro__[1])
    }
    return {name: source.config[name] for name in sorted(names - _DECIDED) if name in source.config}


def _recipes(source: Source, config: dict[str, Any]) -> dict[str, Recipe]:
    return {name: copy(name) for name in source.tensors}


FAMILY = Family(
    name="loopmdm",
    models="LoopMDM trained with one loop",
    matches=lambda source: "LoopMDMForMaskedLM" in source.architectures,
    config=_config,
    recipes=_recipes,
    generation=lambda source: {
        name: value for name, value in source.generation_config.items() if name != "transformers_version"
    },
)
