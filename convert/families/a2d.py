# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A2D (dLLM): Llama, Qwen2 and Qwen3 with the causal mask removed; everything else is as in transformers."""

from ..family import Family
from ..llama_format import IGNORED, config, recipes

REFERENCES = {
    "A2DLlamaLMHeadModel": "Llama",
    "A2DQwen2LMHeadModel": "Qwen2",
    "A2DQwen3LMHeadModel": "Qwen3",
}


def _family(architecture: str, reference: str) -> Family:
    return Family(
        name=f"a2d-{reference.lower()}",
        models=f"A2D {reference}: dllm-hub's diffusion models",
        matches=lambda source: architecture in source.architectures,
        config=config,
        recipes=recipes,
        ignored=IGNORED,
        generation=lambda source: {"unmasking": "confidence"},
        reference=reference,
    )


FAMILIES = [_family(architecture, reference) for architecture, reference in REFERENCES.items()]
