# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Which layers to loop: a default by depth, and a choice from data."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..modeling_loopmdm import LoopMDMForMaskedLM
from ..objective import NelboEstimate, nelbo


def default_window(num_layers: int, loop_update: str) -> tuple[int, int]:
    """
    `(loop_start, loop_end)` by depth. Loops that will be trained (`"replace"`): a sixth of the layers, from a twelfth
    of the depth on, the early-middle layers that the paper loops (layers 1 and 2 of 12). Loops without training
    (`"damped"`): an eighth of the layers around 47.5 % of the depth, where arXiv 2605.23872 finds that they do least
    harm. Never fewer than one layer.
    """
    if loop_update == "damped":
        width = max(1, round(num_layers / 8))
        start = round(0.475 * num_layers - width / 2)
    else:
        width = max(1, round(num_layers / 6))
        start = max(1, round(num_layers / 12))
    start = max(0, min(start, num_layers - width))
    return start, start + width


def candidate_windows(num_layers: int, width: int) -> list[tuple[int, int]]:
    """
    Every window of `width` layers that leaves at least one layer to head and one to tail, where there are so many.
    """
    first, last = (1, num_layers - 1) if width <= num_layers - 2 else (0, num_layers)
    return [(start, start + width) for start in range(first, last - width + 1)]


@dataclass
class WindowScore:
    """
    NELBO with one window looped, in nats per token, and its standard error; and how it differs from the NELBO without
    loops, whose standard error (over sequences) is much smaller, as both see the same masks.
    """

    loop_start: int
    loop_end: int
    nelbo: float
    standard_error: float
    change: float
    change_standard_error: float


def calibrate(
    model: LoopMDMForMaskedLM,
    input_ids: torch.LongTensor,
    width: int,
    num_loops: int = 2,
    num_samples: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> tuple[list[WindowScore], NelboEstimate]:
    """
    Measures the NELBO of `input_ids` with every candidate window applied `num_loops` times, with the same noise for
    all.

    Args:
        model: Any non-looped model as a LoopMDM; its window is left as it was.
        input_ids (`torch.LongTensor` of shape `(num_sequences, length)`): The text.
        width (`int`): Layers in a window.

    Returns:
        The scores of all windows from left to right, and the estimate without loops.
    """
    config = model.config
    before = config.loop_start, config.loop_end
    settings = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed}
    windows = candidate_windows(config.num_hidden_layers, width)

    plain = nelbo(model, input_ids, num_loops=1, **settings)
    total = plain.num_tokens.sum()

    def score(estimate: NelboEstimate) -> WindowScore:
        mean, error = estimate.per_token()
        change = estimate.nats[0] - plain.nats[0]
        change_error = len(change) ** 0.5 * change.std() / total if len(change) > 1 else torch.tensor(torch.nan)
        values = (mean[0], error[0], change.sum() / total, change_error)
        return WindowScore(config.loop_start, config.loop_end, *(value.item() for value in values))

    scores = []
    progress(1, len(windows) + 1)
    try:
        for window in windows:
            config.loop_start, config.loop_end = window
            scores.append(score(nelbo(model, input_ids, num_loops=num_loops, **settings)))
            progress(len(scores) + 1, len(windows) + 1)
    finally:
        config.loop_start, config.loop_end = before
    return scores, plain


def calibration_record(scores: list[WindowScore], plain: NelboEstimate, num_loops: int) -> dict[str, Any]:
    """What calibration.json keeps; `best` is the window of the lowest NELBO."""
    mean, error = plain.per_token()
    best = min(scores, key=lambda score: score.nelbo)
    return {
        "num_loops": num_loops,
        "without_loops": {"nelbo": mean[0].item(), "standard_error": error[0].item()},
        "windows": [asdict(score) for score in scores],
        "best": [best.loop_start, best.loop_end],
    }


def plot_calibration(record: dict[str, Any], path: Path) -> None:
    """Draws the NELBO of every window over its first layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    windows = record["windows"]
    axes.errorbar(
        [window["loop_start"] for window in windows],
        [window["nelbo"] for window in windows],
        yerr=[window["standard_error"] for window in windows],
        marker="o",
        capsize=3,
        label=f"{record['num_loops']} loops",
    )
    axes.axhline(record["without_loops"]["nelbo"], color="gray", linestyle="--", label="no loops")
    width = windows[0]["loop_end"] - windows[0]["loop_start"]
    axes.set_xlabel(f"first looped layer (of {width})")
    axes.set_ylabel("NELBO, nats per token")
    axes.legend()
    figure.savefig(path, dpi=150)
