# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Causal language models as a start for training a diffusion model (AR-to-diffusion adaptation), on request. Their layers
are converted exactly, but attention is over the whole sequence from now on, so nothing useful comes out before
training. The state of position i - 1 goes on predicting token i, which is what these models have learnt.
"""

from .. import llama_format
from ..family import Family
from .diffugpt import gpt2_config, gpt2_recipes


def _llama_like(reference: str) -> Family:
    return Family(
        name=f"causal-{reference.lower()}",
        models=f"{reference} (with --from-causal)",
        matches=lambda source: f"{reference}ForCausalLM" in source.architectures,
        config=lambda source: {**llama_format.config(source), "shift_logits": True},
        recipes=llama_format.recipes,
        ignored=llama_format.IGNORED,
        reference=reference,
        from_causal=True,
    )


def _body(source) -> str:
    # Published GPT-2 checkpoints were saved from the model without its head.
    return "" if "wte.weight" in source else "transformer."


_GPT2 = Family(
    name="causal-gpt2",
    models="GPT-2 (with --from-causal)",
    matches=lambda source: "GPT2LMHeadModel" in source.architectures and f"{_body(source)}wte.weight" in source,
    config=lambda source: gpt2_config(source, _body(source), f"{_body(source)}wte.weight"),
    recipes=lambda source, config: gpt2_recipes(config, _body(source), f"{_body(source)}wte.weight"),
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
    reference="GPT2",
    reference_names=lambda name: name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}",
    from_causal=True,
)

FAMILIES = [_llama_like("Llama"), _llama_like("Qwen2"), _llama_like("Qwen3"), _GPT2]
