# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""PEFT on models with loops: which layers an adapter sits on."""

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..configuration_loopmdm import LoopMDMConfig
from ..data.pretrained import MERGE, adapter_base, load_adapter, locate
from ..modeling_loopmdm import LoopMDMForMaskedLM

if TYPE_CHECKING:
    from peft import LoraConfig

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Arguments of LoraConfig that hold names of modules
_NAMES = ("target_modules", "target_parameters", "modules_to_save", "exclude_modules", "rank_pattern", "alpha_pattern")
# The two ends of the model, which may share a weight
_ENDS = {"model.embed_tokens", "lm_head"}
# Arguments of LoraConfig that cannot work here, and why
_REFUSED = {
    "inference_mode": "nothing would be trained",
    "layer_replication": "the loops name layers by number, and the result cannot be saved",
    "megatron_config": "the model is not Megatron's",
    "alora_invocation_tokens": "only the wrapper knows where activated LoRA begins in a row",
}


def layers_of(config: LoopMDMConfig, part: str) -> list[int]:
    """Indices of the physical layers of `"all"`, `"head"`, `"mid"`, `"tail"` or `"head_tail"` (all but mid)."""
    head = list(range(config.loop_start))
    mid = list(range(config.loop_start, config.loop_end))
    tail = list(range(config.loop_end, config.num_hidden_layers))
    parts = {"all": head + mid + tail, "head": head, "mid": mid, "tail": tail, "head_tail": head + tail}
    if not isinstance(part, str) or part not in parts:
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

    Raises:
        ValueError: An option that does not exist, or a name or layer that the model does not have; peft would skip it
            silently.
    """
    from peft import LoraConfig

    for name, why in _REFUSED.items():
        if options.get(name):
            raise ValueError(f"`{name}` is {options[name]!r}, which does not work here: {why}; leave it out.")
    chosen = layers_of(config, layers)
    if not target_modules and not options.get("target_parameters"):
        raise ValueError(f"`target_modules` is {target_modules!r}; name projections, or use all-linear.")
    if layers != "all":
        if options.get("layers_to_transform") is not None:
            raise ValueError(f"`layers` is {layers!r}, and `layers_to_transform` names layers too; give one of them.")
        # peft accepts layer indices only together with names of modules.
        if target_modules == "all-linear":
            target_modules = [name for name in PROJECTIONS if name != "gate_proj" or config.use_gated_mlp]
        options = {**options, "layers_to_transform": chosen, "layers_pattern": "layers"}
    try:
        # The task type under which `AutoPeftModelForCausalLM` and `generate` work.
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=target_modules, **options)
    except TypeError as error:
        raise ValueError(f"LoRA does not take these options: {error}.") from error
    _check_names(config, lora)
    return lora


def _check_names(config: LoopMDMConfig, lora: "LoraConfig") -> None:
    """Raises a ValueError if the model lacks a name or layer that a `LoraConfig` has."""
    from peft.tuners.tuners_utils import check_target_module_exists

    with torch.device("meta"):
        model = LoopMDMForMaskedLM(config)
    modules = [name for name, _ in model.named_modules() if name]
    linear = sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    wanted = lora.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else list(wanted or [])
    wrong = [layer for layer in wanted if not 0 <= layer < config.num_hidden_layers]
    if wrong:
        raise ValueError(f"`layers_to_transform` names layer {wrong[0]}; the model has {config.num_hidden_layers}.")
    for option in _NAMES:
        names = getattr(lora, option) or []
        if names == "all-linear":
            continue
        is_pattern = isinstance(names, str) or option.endswith("_pattern")
        # `layers_to_transform` restricts only the targets.
        places = modules
        if option == "target_parameters":
            places = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        if option == "target_modules" and wanted:
            places = [name for name in modules if any(f".layers.{layer}." in name for layer in wanted)]
        for name in [names] if isinstance(names, str) else sorted(names):
            # As in peft, a string of targets has to match whole names, and anything else the end of a name.
            pattern = name if isinstance(names, str) else rf"(.*\.)?({name if is_pattern else re.escape(name)})"
            found = [place for place in places if re.fullmatch(pattern, place)]
            if not found:
                where = f"layers {wanted}" if option == "target_modules" and wanted else "the model"
                raise ValueError(f"`{option}` has {name!r}, which is not in {where}; use {', '.join(linear)}.")
            ends = {place.removesuffix(".weight") for place in found} & _ENDS
            if option == "target_modules":  # `exclude_modules` may leave them out
                ends = {end for end in ends if check_target_module_exists(lora, end)}
            if ends and option.startswith("target_") and config.tie_word_embeddings and not _unties(lora):
                raise ValueError(
                    f"`{option}` has {name!r}, whose weight embeddings and head share (`tie_word_embeddings`): a "
                    "merge would change both. Name embed_tokens or lm_head in `modules_to_save`, or single tokens in "
                    "`trainable_token_indices`."
                )
    tokens = lora.trainable_token_indices or []
    for token in itertools.chain(*(tokens.values() if isinstance(tokens, dict) else [tokens])):
        if not 0 <= token < config.vocab_size:
            raise ValueError(
                f"`trainable_token_indices` has {token}; the model's tokens are 0 to {config.vocab_size - 1}."
            )


def _unties(lora: "LoraConfig") -> bool:
    """Whether the embeddings or the head get a weight of their own."""
    return any(name.endswith(("embed_tokens", "lm_head")) for name in lora.modules_to_save or [])


def adapter_to_continue(model: str | None, changes: dict[str, Any], lora: dict[str, Any] | None) -> str | None:
    """
    The folder or Hub id of the adapter that a training continues, or None. Checks everything that can be checked
    before weights are loaded.

    Args:
        model (`str`, *optional*): Folder or Hub id that the training starts from.
        changes (`dict`): What the run changes in the model's configuration.
        lora (`dict`, *optional*): Arguments of [`lora_config`] for a new adapter.

    Raises:
        ValueError: There is no model for a new adapter, or another adapter below it; the configuration changes, which
            the adapter's folder does not record; the adapter is of soft prompts, or lies beside a whole model.
    """
    adapter = None if model is None or adapter_base(model) is None else locate(model, "an adapter")
    if adapter is None and lora is None:
        if model is not None and (Path(model).expanduser() / "adapter_config.json").is_file():
            raise ValueError(f"{model} holds an adapter beside a whole model; merge them: `{MERGE.format(model)}`.")
        return None
    if model is None:
        raise ValueError("`lora` needs a `model`: an adapter is saved without the weights that it adapts.")
    if adapter is not None and lora is not None:
        raise ValueError(
            f"{model} is an adapter, and `lora` asks for another one on top. Leave `lora` out to go on training "
            f"{model}, or merge it into its base model first: `{MERGE.format(model)}`."
        )
    if changes:
        raise ValueError(
            f"`model_config` changes {', '.join(changes)}, which the folder of an adapter does not record; change "
            "config.json of the base model itself (`loops: {max_loops: ...}` sets the loops of the training only)."
        )
    if adapter is not None:
        from peft import PeftConfig

        if PeftConfig.from_pretrained(adapter).is_prompt_learning:
            raise ValueError(f"{model} holds soft prompts, which the masked diffusion objective does not train.")
    return adapter


def attach_adapter(model: LoopMDMForMaskedLM, adapter: str | None, lora: "LoraConfig | None") -> nn.Module:
    """
    The model to train: a `PeftModel` of `model` and the `adapter` (folder or Hub id) to continue or a new one, `lora`;
    or `model` itself, if both are None.
    """
    if adapter is None and lora is None:
        return model
    from peft import get_peft_model

    adapted = get_peft_model(model, lora) if adapter is None else load_adapter(model, adapter, is_trainable=True)
    for settings in adapted.peft_config.values():
        base = settings.base_model_name_or_path
        if base and Path(base).is_dir():  # found from other folders too, and no other model of that name
            settings.base_model_name_or_path = str(Path(base).absolute())
    return adapted
