# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""DiffuGPT: GPT-2 under other names, without the causal mask; the state of position i - 1 predicts token i."""

from ..gpt2_format import GPT2Format

BODY, EMBEDDING = "denoise_model.", "embed_tokens.weight"


class DiffuGPT(GPT2Format):
    name = "diffugpt"
    models = "DiffuGPT (S, M)"

    def matches(self, source):
        return f"{BODY}h.0.attn.c_attn.weight" in source and EMBEDDING in source

    def names(self, source):
        return BODY, EMBEDDING

    def generation(self, source):
        return {"unmasking": "ancestral"}

    def reference_name(self, name):
        return "transformer.wte.weight" if name == EMBEDDING else name.replace(BODY, "transformer.")


FAMILIES = [DiffuGPT()]
