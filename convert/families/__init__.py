# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The families of checkpoints that can be converted, one or more per module of this folder, and how one is chosen."""

import pkgutil
from importlib import import_module

import transformers

from ..family import Family
from ..source import Source

# Architectures that cannot be converted, by the prefixes of their names, and the reasons
UNSUPPORTED = {
    ("Bert", "A2DBert"): "its layers are normed after the residual, a LoopMDM's before",
    ("ModernBert", "A2DModernBert"): "most of its layers attend within a window, with a rotary base of their own",
    ("LLaDAMoE", "SDARMoe"): "its MLPs are mixtures of experts",
    ("LLaDA2",): "its MLPs are mixtures of experts, and only half of each head is rotated",
    ("DiffusionGemma",): (
        "it is a causal encoder with a decoder that sees its keys and values, and a mixture of experts"
    ),
}


def discover() -> list[Family]:
    """The families that the modules of this package list as `FAMILIES`."""
    modules = (import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return [family for module in modules for family in module.FAMILIES]


FAMILIES = discover()


def choose_family(source: Source, name: str | Family | None = None, from_causal: bool = False) -> Family:
    """
    The family of a checkpoint: the one called `name`, or the one that recognises it. A `Family` is returned as it is.
    Raises a ValueError if no family covers the checkpoint, or if several recognise it.
    """
    if isinstance(name, Family):
        return name
    if name is not None and from_causal:
        raise ValueError(f"--family {name} is a diffusion model; leave out either it or --from-causal.")
    if name is not None:
        families = {family.name: family for family in FAMILIES if not family.from_causal}
        if name not in families:
            raise ValueError(f"There is no family {name!r}; there are {', '.join(families)}.")
        family = families[name]
        same = (family.reference or name, "Mistral")  # Mistral computes what Llama does
        for found in source.architectures:
            if found not in family.architectures and not found.startswith(same) and hasattr(transformers, found):
                raise ValueError(
                    f"{source.name} is a {found}, which no {name} model is; give another --family, or none."
                )
        return family
    architecture = ", ".join(source.architectures) or "no architecture named in a config.json"
    for prefixes, why in UNSUPPORTED.items():
        if any(found.startswith(prefixes) for found in source.architectures):
            raise ValueError(f"{source.name} ({architecture}) cannot be converted: {why}.")
    if any(".experts." in tensor for tensor in source.tensors):
        raise ValueError(f"{source.name} ({architecture}) cannot be converted: its MLPs are mixtures of experts.")
    matching = [family for family in FAMILIES if family.matches(source)]
    wanted = [family for family in matching if family.from_causal == from_causal]
    if len(wanted) == 1:
        return wanted[0]
    if wanted:
        names = ", ".join(family.name for family in wanted)
        raise ValueError(f"{source.name} ({architecture}) can be of several families; give a --family: {names}.")
    if from_causal:
        names = ", ".join(family.models.split(" (")[0] for family in FAMILIES if family.from_causal)
        raise ValueError(f"{source.name} ({architecture}) is not a causal model that converts; these do: {names}.")
    if matching:
        raise ValueError(
            f"{source.name} ({architecture}) does not say that it is a diffusion model. If it is one in this format, "
            "name its --family (diffullama, open-dcoder); to start from a causal model, give --from-causal."
        )
    if not source.config and not source.extras:
        raise ValueError(f"{source.name} cannot be recognised without a config.json; put it into {source.folder}.")
    raise ValueError(
        f"{source.name} ({architecture}) is not in a known format. The known ones are: "
        f"{'; '.join(family.models for family in FAMILIES if not family.from_causal)}."
    )
