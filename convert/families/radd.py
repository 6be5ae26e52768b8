# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""RADD: MDLM's transformer without any conditioning; its norms have weight and bias of their own."""

from ..dit_format import DiTFormat


class RADD(DiTFormat):
    name = "radd"
    models = "RADD"
    root = ""

    def matches(self, source):
        return "vocab_embed.embedding" in source and "blocks.0.norm1.bias" in source

    def settings(self, source):
        return {**source.setting("model"), "time_conditioning": False}


FAMILIES = [RADD()]
