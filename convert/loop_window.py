# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Which layers to loop: a default by depth, or a choice by measurement."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..data import encode, read_documents
from ..modeling_loopmdm import LoopMDMForMaskedLM
from ..objective import nelbo


def default_window(num_layers: int, loop_update: str) -> tuple[int, int]:
    """
    The default `(loop_start, loop_end)` for this depth, at least one layer. Loops that will be trained (`"replace"`)
    get a sixth of the layers, from a twelfth of the depth on, like the early-middle layers in the paper (layers 1 and
    2 of 12). Loops without training (`"damped"`) get an eighth of the layers around 47.5 % of the depth, where arXiv
    2605.23872 finds that they do the least harm.
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
    """All windows of `width` layers. If the model has enough layers, head and tail keep at least one layer each."""
    first, last = (1, num_layers - 1) if width <= num_layers - 2 else (0, num_layers)
    return [(start, start + width) for start in range(first, last - width + 1)]


def check_width(width: int, num_layers: int) -> None:
    """Raises a ValueError if no window of `width` layers fits."""
    if not 1 <= width <= num_layers:
        raise ValueError(f"The width of the loop is {width}; the model has {num_layers} layers.")


def read_sequences(tokenizer: Any, text: Path, num_sequences: int, length: int) -> torch.LongTensor:
    """
    Up to `num_sequences` pieces of `length` tokens, spread over the whole text: `(num_sequences, length)`. Raises a
    ValueError if the file is not UTF-8, or too short for one piece.
    """
    ids = encode(tokenizer, next(read_documents(text, None)), str(text))
    count = min(len(ids) // length, num_sequences)
    if count == 0:
        raise ValueError(f"{text} has {len(ids)} tokens; calibration needs at least {length}.")
    starts = [index * (len(ids) - length) // max(1, count - 1) for index in range(count)]
    return torch.tensor([ids[start : start + length] for start in starts])


def calibrate(
    model: LoopMDMForMaskedLM,
    input_ids: torch.LongTensor,
    width: int,
    num_loops: int = 2,
    num_samples: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, Any]:
    """
    Measures the NELBO of `input_ids` with every candidate window looped `num_loops` times, under the same masks.

    Args:
        model: A non-looped model as a LoopMDM; its window is restored.
        input_ids (`torch.LongTensor` of shape `(num_sequences, length)`): The text.
        width (`int`): Number of layers in a window.
        num_loops (`int`, defaults to 2): Loops of every window.
        num_samples, batch_size, seed: As in [`~loopmdm.evaluation.nelbo`].
        progress (*optional*): Called as `progress(done, total)` with numbers of estimates.

    Returns:
        `dict`: `without_loops` has the NELBO in nats per token and its standard error. `windows` has the same for
        every window, from the first layers to the last, and the change against no loops with its standard error over
        sequences (NaN for one), which is much smaller, as both see the same masks. `best` is the window of the lowest
        NELBO.
    """
    config = model.config
    check_width(width, config.num_hidden_layers)
    before = config.loop_start, config.loop_end
    windows = candidate_windows(config.num_hidden_layers, width)

    def estimate(num_loops: int) -> tuple[torch.Tensor, dict[str, float]]:
        found = nelbo(model, input_ids, num_loops=num_loops, num_samples=num_samples, batch_size=batch_size, seed=seed)
        mean, error = found.per_token()
        return found.nats[0] / found.num_tokens.sum(), {"nelbo": mean.item(), "standard_error": error.item()}

    plain, without_loops = estimate(1)
    progress(1, len(windows) + 1)
    rows = []
    try:
        for window in windows:
            config.loop_start, config.loop_end = window
            looped, score = estimate(num_loops)
            change = looped - plain  # the part of each sequence
            error = len(change) ** 0.5 * change.std().item() if len(change) > 1 else float("nan")
            row = {"loop_start": window[0], "loop_end": window[1], **score}
            rows.append({**row, "change": change.sum().item(), "change_standard_error": error})
            progress(len(rows) + 1, len(windows) + 1)
    finally:
        config.loop_start, config.loop_end = before
    best = min(rows, key=lambda row: row["nelbo"])
    return {
        "num_loops": num_loops,
        "without_loops": without_loops,
        "windows": rows,
        "best": [best["loop_start"], best["loop_end"]],
    }


def plot_calibration(record: dict[str, Any], path: Path) -> None:
    """Plots the NELBO of every window against its first layer."""
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
