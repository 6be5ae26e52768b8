# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Perplexity of samples under a causal model: `evaluate.load("evaluation/metrics/generative_perplexity")`."""

import datasets
import evaluate

from loopmdm.evaluation import generative_perplexity
from loopmdm.evaluation.loading import load_judge

_DESCRIPTION = """Perplexity of samples under a causal language model, with what shows degenerate text: unigram
entropy, repeated 4-grams, distinct n-grams."""
_INPUTS = """
Args:
    predictions (`list[str]`): Samples.
    model_id (`str`): Folder or Hub id of the causal language model that judges.
    batch_size (`int`, defaults to 8), device (`str`, *optional*).

Returns:
    perplexity and its standard_error, nats_per_token, nats_standard_error, entropy (nats per token), repetition,
    distinct_1, distinct_2, distinct_3, samples, unscored, tokens.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class GenerativePerplexityMetric(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model_id, batch_size=8, device=None):
        judge, tokenizer = load_judge(model_id, device=device)
        return generative_perplexity(list(predictions), judge, tokenizer, batch_size=batch_size).summary()
