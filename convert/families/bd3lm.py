# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""BD3LM: MDLM's transformer with block-causal attention, with or without (`adaln` off) modulation."""

from ..dit_format import DiTFormat


class BD3LM(DiTFormat):
    name = "bd3lm"
    models = "BD3LM"
    architectures = ("BD3LM",)
    # Buffers with the noise range of training
    ignored = (*DiTFormat.ignored, r"sampling_eps_(min|max)")

    def config(self, source):
        if source.config.get("causal"):
            raise ValueError(f"{source.name} is BD3LM's causal baseline (`causal`), not a diffusion model.")
        return super().config(source) | {"attention_block_size": source.setting("block_size")}


FAMILIES = [BD3LM()]
