# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Which layers to loop: a default by depth, and a choice from data."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..evaluation.likelihood import nelbo
from ..modeling_loopmdm import LoopMDMForMaskedLM


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
    """NELBO of one window, in nats per token, and its standard error."""

    loop_start: int
    loop_end: int
    nelbo: float
    standard_error: float


def calibrate(
    model: LoopMDMForMaskedLM,
    input_ids: torch.LongTensor,
    width: int,
    num_loops: int = 2,
    num_samples: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> tuple[list[WindowScore], WindowScore]:
    """
    Measures the NELBO of `input_ids` with every candidate window applied `num_loops` times, with the same noise for
    all.

    Args:
        model: Any non-looped model as a LoopMDM; its window is left as it was.
        input_ids (`torch.LongTensor` of shape `(num_sequences, length)`): The text.
        width (`int`): Layers in a window.

    Returns:
        The scores of all windows from left to right, and that of the model without loops, whose window is empty.
    """
    config = model.config
    before = config.loop_start, config.loop_end
    settings = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed}
    windows = candidate_windows(config.num_hidden_layers, width)

    def score(loops: int) -> WindowScore:
        estimate = nelbo(model, input_ids, num_loops=loops, **settings)
        mean, error = estimate.per_token()
        return WindowScore(config.loop_start, config.loop_end, mean[0].item(), error[0].item())

    try:
        plain = score(1)
        plain.loop_end = plain.loop_start
        progress(1, len(windows) + 1)
        scores = []
        for config.loop_start, config.loop_end in windows:
            scores.append(score(num_loops))
            progress(len(scores) + 1, len(windows) + 1)
    finally:
        config.loop_start, config.loop_end = before
    return scores, plain


def calibration_record(scores: list[WindowScore], plain: WindowScore, num_loops: int) -> dict[str, Any]:
    best = min(scores, key=lambda score: score.nelbo)
    return {
        "num_loops": num_loops,
        "without_loops": {"nelbo": plain.nelbo, "standard_error": plain.standard_error},
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
