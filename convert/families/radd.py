# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""RADD: MDLM's transformer without any conditioning; its norms have weight and bias of their own."""

from typing import Any

from .. import dit_format
from ..family import Family
from ..source import Source


def _config(source: Source) -> dict[str, Any]:
    settings = source.setting("model")
    return dit_format.config(source, "", settings["n_heads"], settings["length"], settings.get("n_blocks"))


FAMILY = Family(
    name="radd",
    models="RADD",
    matches=lambda source: "vocab_embed.embedding" in source and "blocks.0.norm1.bias" in source,
    config=_config,
    recipes=lambda source, config: dit_format.recipes(source, config, ""),
    ignored=dit_format.IGNORED,
    mask_token_id=dit_format.last_token(""),
    generation=lambda source: {"unmasking": "ancestral"},
)
