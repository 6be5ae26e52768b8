# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""NELBO of texts under a LoopMDM: `evaluate.load("evaluation/metrics/masked_nelbo")`."""

import datasets
import evaluate

from loopmdm.data import encode_with_bytes
from loopmdm.evaluation import Text, text_likelihood
from loopmdm.evaluation.loading import load_model, load_tokenizer

_DESCRIPTION = """Negative evidence lower bound of texts under a masked diffusion model with loops, an upper bound on
their negative log-likelihood, estimated by masking (arXiv 2502.09992)."""
_INPUTS = """
Args:
    predictions (`list[str]`): Texts.
    model_id (`str`): Folder or Hub id of a LoopMDM.
    num_loops (`list[int]`, *optional*): Numbers of loops; by default the model's.
    num_samples (`int`, defaults to 32): Masks per text; even.
    batch_size (`int`, defaults to 16), seed (`int`, defaults to 0), device (`str`, *optional*).

Returns, each a list with one entry per number of loops:
    num_loops, nats_per_token, standard_error (sampling of masks), perplexity_bound, bits_per_byte; and
    nats (`list[list[float]]`): of each text.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class MaskedNelbo(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model_id, num_loops=None, num_samples=32, batch_size=16, seed=0, device=None):
        model, tokenizer = load_model(model_id, device=device), load_tokenizer(model_id)
        texts = []
        for number, prediction in enumerate(predictions, start=1):
            ids, num_bytes = encode_with_bytes(tokenizer, prediction, f"text {number}")
            if not ids:
                raise ValueError(f"Text {number} does not have a token to score; it is too short.")
            texts.append(Text(f"text {number}", ids, [True] * len(ids), num_bytes))
        result = text_likelihood(model, texts, num_loops, num_samples=num_samples, batch_size=batch_size, seed=seed)
        nats, error = result.per_token()
        bits = result.bits_per_byte()
        return {
            "num_loops": result.estimate.num_loops,
            "nats_per_token": nats.tolist(),
            "standard_error": error.tolist(),
            "perplexity_bound": result.perplexity_bound()[0].tolist(),
            "bits_per_byte": None if bits is None else bits[0].tolist(),
            "nats": [list(values) for values in zip(*(row["nats"] for row in result.by_text()), strict=True)],
        }
