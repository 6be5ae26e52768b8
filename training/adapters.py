# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""PEFT on models with loops: which layers an adapter sits on."""

from typing import TYPE_CHECKING, Any

from ..configuration_loopmdm import LoopMDMConfig

if TYPE_CHECKING:
    from peft import LoraConfig

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def layers_of(config: LoopMDMConfig, part: str) -> list[int]:
    """Indices of the physical layers of `"all"`, `"head"`, `"mid"`, `"tail"` or `"head_tail"` (all but mid)."""
    head = list(range(config.loop_start))
    mid = list(range(config.loop_start, config.loop_end))
    tail = list(range(config.loop_end, config.num_hidden_layers))
    parts = {"all": head + mid + tail, "head": head, "mid": mid, "tail": tail, "head_tail": head + tail}
    if part not in parts:
        raise ValueError(f"The layers to adapt are {part!r}; choose one of {', '.join(parts)}.")
    if not parts[part]:
        raise ValueError(f"The model has no layers in {part}, so there is nothing to adapt.")
    return parts[part]


def lora_config(
    config: LoopMDMConfig, layers: str = "all", target_modules: Any = "all-linear", **options: Any
) -> "LoraConfig":
    """
    A peft `LoraConfig` for a LoopMDM.

    Args:
        config: The model's configuration.
        layers (`str`, defaults to `"all"`): Part of the model to adapt, see [`layers_of`].
        target_modules (defaults to `"all-linear"`): As in peft: names of projections, or all of them.
        options: Other arguments of `LoraConfig` (`r`, `lora_alpha`, `use_dora`, ...).
    """
    from peft import LoraConfig

    if layers != "all":
        # peft takes layers by index only together with names.
        if target_modules == "all-linear":
            target_modules = [name for name in PROJECTIONS if name != "gate_proj" or config.use_gated_mlp]
        options = {**options, "layers_to_transform": layers_of(config, layers), "layers_pattern": "layers"}
    try:
        # The task type under which `AutoPeftModelForCausalLM` and `generate` work.
        return LoraConfig(task_type="CAUSAL_LM", target_modules=target_modules, **options)
    except TypeError as error:
        raise ValueError(f"LoRA does not take these options: {error}.") from error
