# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Scores an answer by its final number, as the metric in `evaluation/metrics/final_number` does."""

from loopmdm.evaluation.final_number import final_number


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """`exact_match`: the number is that of the reference; `answered`: there is a number."""
    number = final_number(results[0])
    return {
        "exact_match": float(number is not None and number == final_number(doc["answer"])),
        "answered": float(number is not None),
    }
