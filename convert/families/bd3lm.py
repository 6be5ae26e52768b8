# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""BD3LM: MDLM's transformer with block-causal attention, with modulation or (`adaln` off) without."""

from typing import Any

from .. import dit_format
from ..family import Family
from ..source import Source

ROOT = "backbone."


def _config(source: Source) -> dict[str, Any]:
    dit_format.check_conditioning(source, source.setting("time_conditioning"))
    if source.config.get("causal"):
        raise ValueError(f"{source.name} is BD3LM's causal baseline (`causal`), not a diffusion model.")
    return {
        **dit_format.config(
            source, ROOT, source.setting("n_heads"), source.setting("model_length"), source.config.get("n_blocks")
        ),
        "attention_block_size": source.setting("block_size"),
    }


FAMILY = Family(
    name="bd3lm",
    models="BD3LM",
    matches=lambda source: "BD3LM" in source.architectures and f"{ROOT}vocab_embed.embedding" in source,
    config=_config,
    recipes=lambda source, config: dit_format.recipes(source, config, ROOT),
    # The noise range it was trained with
    ignored=(*dit_format.IGNORED, r"sampling_eps_(min|max)"),
    mask_token_id=dit_format.last_token(ROOT),
    generation=lambda source: {"unmasking": "ancestral"},
)
