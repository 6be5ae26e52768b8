# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A whole conversion: the plan, the new folder, and, on request, calibration and verification."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..data import write_json
from ..hub import write_card
from ..modeling_loopmdm import LoopMDMForMaskedLM
from .loop_window import calibrate, check_width, plot_calibration, read_sequences
from .plan import Plan, plan_conversion
from .source import open_source
from .tokenizer import write_tokenizer
from .verify import read_reference, verify_with_file, verify_with_transformers
from .write import check_output, check_shard_size, check_space, new_folder, write_code, write_weights


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    sigma: float | None = None,
    max_shard_size: int | str = "5GB",
    calibrate_on: str | Path | None = None,
    calibration_width: int | None = None,
    calibration_sequences: int = 16,
    calibration_length: int = 256,
    verify: bool = False,
    verify_against: str | Path | None = None,
    on_plan: Callable[[Plan], Any] = lambda plan: None,
    progress: Callable[[str, int, int], Any] = lambda what, done, total: None,
    **plan_options: Any,
) -> dict[str, Any]:
    """
    Turns a non-looped checkpoint into a LoopMDM that computes the same at `num_loops=1`.

    The result is an initialisation. Before it runs with more loops, it has to be trained (`loop_update="replace"`), or
    it loops in damped sub-steps (`"damped"`), which without training change little and gain little.

    Args:
        source: A folder, a file of weights, or an id on the Hugging Face Hub.
        output: The folder to write, which must not exist. It appears complete or not at all.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        allow_pickle (`bool`, defaults to `False`): Unpickle the tensors of weights that have no other form.
        sigma (`float`, *optional*): Noise level at which a time-conditioned source (UDLM) is converted.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): Size of the largest file of weights, in bytes or with a
            unit. The conversion needs as much memory.
        calibrate_on (*optional*): A text file. The loop goes where the NELBO of this text is lowest, at 2 loops or
            `num_loops`, whichever is more. The measurements are in the record and, with a plot, in the folder.
        calibration_width (`int`, *optional*): Layers of a candidate window; by default those of the default window.
        calibration_sequences, calibration_length (`int`, default to 16 and 256): Sequences to use, and their length.
        verify (`bool`, defaults to `False`): Compare, in float32, with the source in transformers' own class.
        verify_against (*optional*): Compare with the logits in a file of `convert/write_reference.py`.
        on_plan (*optional*): Called with the [`Plan`] before anything is written.
        progress (*optional*): Called as `progress(what, done, total)`.
        plan_options: Further arguments of [`plan_conversion`]: `num_loops`, `loop_start`, `family`, `dtype`,
            `trust_remote_code`, ...

    Returns:
        `dict`: The contents of `conversion.json`: tensors, parameter counts, the loop, calibration and verification.

    Raises:
        ValueError: Anything about the source or the arguments does not fit. Nothing is left behind.
    """
    output = Path(output).expanduser()
    check_output(output)
    check_shard_size(max_shard_size)
    size = calibration_sequences, calibration_length
    _check_options(calibrate_on, calibration_width, size, verify_against, sigma, plan_options)
    plan = plan_conversion(open_source(source, revision, allow_pickle, sigma), **plan_options)
    _check_possible(plan, calibrate_on, calibration_width, verify, verify_against)
    input_ids = None
    if calibrate_on is not None:
        length = min(calibration_length, plan.config.max_position_embeddings)
        input_ids = read_sequences(plan.loaded_tokenizer, Path(calibrate_on), calibration_sequences, length)
    check_space(plan, output)
    on_plan(plan)
    with new_folder(output) as folder:
        write_weights(plan, folder, max_shard_size, lambda done, total: progress("writing", done, total))
        found: dict[str, Any] = {"tokenizer_files": write_tokenizer(plan.tokenizer, plan.tokens, folder)}
        plan.generation.save_pretrained(folder)
        write_code(plan, folder)
        if input_ids is not None:
            found["calibration"] = _calibrate(plan, folder, Path(calibrate_on), input_ids, calibration_width, progress)
        model = load_written(plan, folder, torch.float32) if verify or verify_against is not None else None
        if verify:
            found["verification"] = verify_with_transformers(model, plan)
        if verify_against is not None:
            found["verification_against_file"] = verify_with_file(model, verify_against)
        record = {**plan.record(), **found}
        write_json(folder / "conversion.json", record)
        write_card(folder, output.name, config=plan.config, source=plan.source.card, conversion=record)
        # Last, since a folder without it does not load
        plan.config.save_pretrained(folder)
    return record


def _check_options(
    calibrate_on, calibration_width, size: tuple[int, int], verify_against, sigma, plan_options: dict[str, Any]
) -> None:
    """Raises a ValueError for arguments that contradict one another, and for missing files."""
    if sigma is not None and not 0 <= sigma < math.inf:
        raise ValueError(f"`sigma` is {sigma}; a noise level is at least 0, and finite.")
    is_placed = any(plan_options.get(name) is not None for name in ("loop_start", "loop_end"))
    if calibrate_on is not None and is_placed:
        raise ValueError("Calibration chooses the loop's place; leave out `loop_start` and `loop_end`.")
    if calibrate_on is None and calibration_width is not None:
        raise ValueError("The calibration's width is given without a text; add --calibrate FILE, or leave it out.")
    for name, value in zip(("calibration_sequences", "calibration_length"), size, strict=True):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")
    for path in (calibrate_on, verify_against):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{path} is not a file.")
    if calibrate_on is not None and Path(calibrate_on).suffix in (".json", ".jsonl"):
        raise ValueError(f"{calibrate_on} is JSON, which would be read as it stands; calibrate on plain text (.txt).")


def _check_possible(plan: Plan, calibrate_on, calibration_width: int | None, verify: bool, verify_against) -> None:
    """Raises a ValueError if calibration or verification lacks something."""
    if calibration_width is not None:
        check_width(calibration_width, plan.config.num_hidden_layers)
    if verify_against is not None:
        read_reference(verify_against, plan.config.vocab_size)
    if calibrate_on is not None and not plan.tokenizer:
        raise ValueError(f"{plan.source.name} has no tokenizer, which calibration needs to read {calibrate_on}.")
    if calibrate_on is not None and plan.loaded_tokenizer is None:
        raise ValueError(
            f"Calibration needs the tokenizer of {plan.source.name}, which has code of its own; read the code, and "
            "give --trust-remote-code (`trust_remote_code=True`) to run it."
        )
    if verify and plan.family.reference is None:
        raise ValueError(
            f"transformers has no class of its own for {plan.family.name}; make reference logits where the source "
            "still runs (convert/write_reference.py says how) and give --verify-against FILE.npz."
        )


def load_written(plan: Plan, folder: Path, dtype: torch.dtype) -> LoopMDMForMaskedLM:
    """The model in a folder that does not have its config.json yet."""
    return LoopMDMForMaskedLM.from_pretrained(folder, config=plan.config, dtype=dtype).eval()


def _calibrate(
    plan: Plan,
    folder: Path,
    text: Path,
    input_ids: torch.Tensor,
    width: int | None,
    progress: Callable[[str, int, int], Any],
) -> dict[str, Any]:
    """Moves the plan's loop to the best window on `text`, and writes and returns the measurements."""
    config = plan.config
    record = calibrate(
        load_written(plan, folder, config.dtype),
        input_ids,
        config.num_mid_layers if width is None else width,
        max(2, config.num_loops),
        progress=lambda done, total: progress("calibrating", done, total),
    )
    num_sequences, length = input_ids.shape
    record |= {"text": text.name, "sequences": num_sequences, "length": length, "loop_update": config.loop_update}
    config.loop_start, config.loop_end = record["best"]
    plan.window_chosen = f"by calibration on {text.name}"
    write_json(folder / "calibration.json", record)
    plot_calibration(record, folder / "calibration.png")
    return record
