# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The families of checkpoints that can be converted, and how one is chosen. Each module has one of them."""

from ..family import Family
from ..source import Source
from . import (
    a2d,
    bd3lm,
    causal,
    diffugpt,
    diffullama,
    dream,
    fast_dllm,
    illada,
    llada,
    loopmdm,
    mdlm,
    open_dcoder,
    radd,
    sdar,
    smdm,
)

FAMILIES: list[Family] = [
    llada.FAMILY,
    illada.FAMILY,
    dream.FAMILY,
    *a2d.FAMILIES,
    open_dcoder.FAMILY,
    fast_dllm.FAMILY,
    sdar.FAMILY,
    bd3lm.FAMILY,
    mdlm.FAMILY,
    radd.FAMILY,
    smdm.FAMILY,
    diffugpt.FAMILY,
    diffullama.FAMILY,
    loopmdm.FAMILY,
    *causal.FAMILIES,
]

# Architectures that cannot be converted, by the beginning of their names, and why.
UNSUPPORTED = {
    "Bert": "its layers are normed after the residual, a LoopMDM's before",
    "A2DBert": "its layers are normed after the residual, a LoopMDM's before",
    "ModernBert": "most of its layers attend within a window, with a rotary base of their own",
    "A2DModernBert": "most of its layers attend within a window, with a rotary base of their own",
    "LLaDAMoE": "its MLPs are mixtures of experts",
    "LLaDA2": "its MLPs are mixtures of experts, and only half of each head is rotated",
    "SDARMoe": "its MLPs are mixtures of experts",
    "DiffusionGemma": "it is a causal encoder with a decoder that sees its keys and values, and a mixture of experts",
}


def choose_family(source: Source, name: str | None = None, from_causal: bool = False) -> Family:
    """
    The family of a checkpoint, recognised from its architecture and tensor names, or the one called `name`.

    Raises a ValueError for checkpoints that no family covers, with the reason where there is one.
    """
    if name is not None:
        families = {family.name: family for family in FAMILIES if not family.from_causal}
        if name not in families:
            raise ValueError(f"There is no family {name!r}; there are {', '.join(families)}.")
        return families[name]
    architecture = ", ".join(source.architectures) or "no architecture named in a config.json"
    for prefix, why in UNSUPPORTED.items():
        if any(found.startswith(prefix) for found in source.architectures):
            raise ValueError(f"{source.name} ({architecture}) cannot be converted: {why}.")
    if any(".experts." in tensor for tensor in source.tensors):
        raise ValueError(f"{source.name} ({architecture}) cannot be converted: its MLPs are mixtures of experts.")
    for family in FAMILIES:
        if family.from_causal == from_causal and family.matches(source):
            return family
    causal = next((family for family in FAMILIES if family.from_causal and family.matches(source)), None)
    if causal is not None:
        raise ValueError(
            f"{source.name} ({architecture}) says nothing of diffusion. Name its --family if it is a diffusion model "
            "stored in this format (diffullama, open-dcoder), or give --from-causal to start from a causal model."
        )
    if from_causal:
        names = ", ".join(family.models.split(" (")[0] for family in FAMILIES if family.from_causal)
        raise ValueError(
            f"{source.name} ({architecture}) is none of the causal models that can be converted: {names}."
        )
    if not source.config and not source.extras:
        raise ValueError(
            f"{source.folder} has no config.json, without which {source.name} cannot be recognised; put the one of "
            "the checkpoint there."
        )
    raise ValueError(
        f"{source.name} ({architecture}) is of no known format. Known are: "
        f"{'; '.join(family.models for family in FAMILIES if not family.from_causal)}."
    )
