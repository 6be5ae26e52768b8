# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
MDLM, which sets the noise level to 0 in its conditioning, and UDLM, which does not and is converted at one level on
request.

The training repository's checkpoints hold the raw weights by name, and the averaged ones (EMA), which the published
results are from, as a bare list in the same order.
"""

from typing import Any

from .. import dit_format
from ..family import Family
from ..source import Source, StoredTensor, stub_value

ROOT = "backbone."


def _settings(source: Source) -> dict[str, Any]:
    """What the tensors do not tell, from config.json or from a training checkpoint's hyper-parameters."""
    if source.config:
        return {
            "num_heads": source.setting("n_heads"),
            "max_length": source.setting("model_length"),
            "num_layers": source.config.get("n_blocks"),
            "time_conditioning": source.setting("time_conditioning"),
        }
    hyper = stub_value(source.extras.get("hyper_parameters", {}))
    hyper = stub_value(hyper.get("config", {})) if isinstance(hyper, dict) else {}
    model = hyper.get("model") if isinstance(hyper, dict) else None
    if not isinstance(model, dict):
        raise ValueError(
            f"{source.name} has neither a config.json nor hyper-parameters that can be read; put a config.json with "
            "`n_heads`, `model_length` and `time_conditioning` beside it."
        )
    return {
        "num_heads": int(model["n_heads"]),
        "max_length": int(model["length"]),
        "num_layers": model.get("n_blocks"),
        "time_conditioning": bool(hyper["time_conditioning"]),
    }


def _config(source: Source) -> dict[str, Any]:
    settings = _settings(source)
    dit_format.check_conditioning(source, settings["time_conditioning"])
    if source.config.get("cfg"):
        raise ValueError(f"{source.name} is conditioned on classes (`cfg`), which is not supported.")
    return dit_format.config(source, ROOT, settings["num_heads"], settings["max_length"], settings["num_layers"])


def _use_averaged_weights(source: Source) -> Source:
    """Puts the EMA weights of a training checkpoint in place of the raw ones."""
    if not source.extras.get("ema"):
        return source
    shadow = source.extras["ema"]["shadow_params"]
    parameters = [name for name in source.tensors if not name.endswith("inv_freq")]
    if [tuple(average.shape) for average in shadow] != [source.shape(name) for name in parameters]:
        raise ValueError(
            f"{source.name} has {len(shadow)} averaged (EMA) weights that do not fit its {len(parameters)} "
            "parameters in order, so it cannot be told which is which."
        )
    for name, average in zip(parameters, shadow, strict=True):
        source.tensors[name] = StoredTensor(tuple(average.shape), average.dtype, lambda average=average: average)
    return source


def _mask_token_id(source: Source) -> int | None:
    # UDLM's corruption is uniform noise: its vocabulary has no mask token of its own.
    return None if "UDLM" in source.architectures else dit_format.last_token(ROOT)(source)


FAMILY = Family(
    name="mdlm",
    models="MDLM (Hub format, and the training repository's .ckpt with its averaged weights); UDLM at one --sigma",
    matches=lambda source: dit_format.is_modulated(source, ROOT) and "block_size" not in source.config,
    config=_config,
    recipes=lambda source, config: dit_format.recipes(source, config, ROOT),
    ignored=dit_format.IGNORED,
    mask_token_id=_mask_token_id,
    generation=lambda source: {"unmasking": "ancestral"},
    prepare=_use_averaged_weights,
)
