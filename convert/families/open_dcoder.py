# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Open-dCoder: stock Qwen2 files, run without the causal mask; the state of position i - 1 predicts token i."""

from ..llama_format import LlamaFormat


class OpenDCoder(LlamaFormat):
    name = "open-dcoder"
    models = "Open-dCoder 0.5B (on request: nothing in its files tells it from the causal Qwen2)"
    reference = "Qwen2"
    shift_logits = True


FAMILIES = [OpenDCoder()]
