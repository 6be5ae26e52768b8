# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Dream: Qwen2's layers with attention over the whole sequence; the state of position i - 1 predicts token i."""

from .. import llama_format
from ..family import Family
from ..source import Source

# Dream's names of the commit rules; its default, "origin", is for comparisons only and never recommended.
RULES = {"origin": "entropy", "maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


def _matches(source: Source) -> bool:
    return "DreamModel" in source.architectures


def _config(source: Source) -> dict:
    if "model.layers.0.self_attn.q_norm.weight" in source:
        raise ValueError("This is a DreamReasoner (Qwen3 layers), which is not supported; Dream's layers are Qwen2's.")
    if source.config.get("use_mrope"):
        raise ValueError("`use_mrope` is on, which is not supported.")
    return {**llama_format.config(source), "shift_logits": True}


FAMILY = Family(
    name="dream",
    models="Dream v0 (Base, Instruct), Dream-Coder, DiffuCoder",
    matches=_matches,
    config=_config,
    recipes=llama_format.recipes,
    ignored=llama_format.IGNORED,
    generation=lambda source: {"unmasking": RULES.get(source.generation_config.get("alg"), "entropy")},
    reference="Qwen2",
)
