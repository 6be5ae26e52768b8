# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Exact match of the final number of answers: `evaluate.load("evaluation/metrics/final_number")`."""

import datasets
import evaluate

from loopmdm.evaluation.final_number import final_number

_DESCRIPTION = """Share of answers whose final number is that of the reference (GSM8K, arXiv 2110.14168): the number
behind the last `####`, or else the last one of the text; `1,000.0` equals `1000`."""
_INPUTS = """
Args:
    predictions (`list[str]`): Answers.
    references (`list[str]`): Right answers; each must hold a number.
    strict (`bool`, defaults to `False`): Take a number behind `####` alone from the predictions.

Returns:
    exact_match (`float`): Share of equal numbers, 0 to 1.
    answered (`float`): Share of predictions with a number.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class FinalNumber(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features
        )

    def _compute(self, predictions, references, strict=False):
        truth = [final_number(text) for text in references]
        for number, (text, value) in enumerate(zip(references, truth, strict=True), start=1):
            if value is None:
                raise ValueError(f"Reference {number} has no number: {text[:60]!r}.")
        given = [final_number(text, strict) for text in predictions]
        return {
            "exact_match": sum(a == b for a, b in zip(given, truth, strict=True)) / len(truth),
            "answered": sum(value is not None for value in given) / len(given),
        }
