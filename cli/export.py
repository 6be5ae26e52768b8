# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .application import SHARE, app
from .options import Model, TrustRemoteCode, check_idle
from .output import console, progress_bars, show_verification


@app.command(rich_help_panel=SHARE, epilog="Example: loopmdm export my-model plain --num-loops 2 --verify")
def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", show_default=False)],
    num_loops: Annotated[
        int | None, typer.Option(help="Loops to write out as layers; required, but for onnx.", show_default=False)
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="llada, dream, ... (default: what it was converted from), or onnx (graphs)."),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read the result back and compare its logits.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: the model's); of onnx float32 or int8.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, and memory used.")] = "5GB",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a model with its loops as layers, in a format that other engines read, or as ONNX graphs to loop over."""
    options = {name: value for name, value in locals().items() if name not in ("model", "output")}
    if format == "onnx":
        return _export_onnx(model, output, **options)
    if num_loops is None:  # said before torch is imported, which takes seconds
        raise ValueError("The number of loops to write out is missing; give --num-loops.")

    from transformers.utils import logging

    from loopmdm.convert import export_checkpoint

    logging.disable_progress_bar()  # transformers' own
    with progress_bars() as bars:
        record = export_checkpoint(model, output, **options, progress=bars)
    _show_result(record, output)


def _export_onnx(model: str, output: Path, dtype: str | None, revision: str | None, **idle: Any) -> None:
    idle["max_shard_size"] = None if idle["max_shard_size"] == "5GB" else idle["max_shard_size"]
    del idle["format"]
    check_idle("ONNX graphs are looped by who runs them, are always verified, and hold no tokenizer", **idle)

    from loopmdm.convert.onnx_graphs import export_onnx

    about = export_onnx(model, output, dtype or "float32", revision)
    size = sum(about["bytes"].values()) / 1e6
    console.print(
        f"{output} is written: three graphs of {size:,.1f} MB ({about['weights']}); probabilities differ by up to "
        f"{about['largest_difference']:.2g}. Beside them, onnx_runner.py runs them with onnxruntime and numpy."
    )


def _show_result(record: dict[str, Any], output: Path) -> None:
    for found in record["verification"]:
        show_verification(found)
    console.print(
        f"{output} is written: a {record['format']} model of {record['layers']} layers ({record['parameters']:,} "
        f"parameters, {record['dtype']}), which computes what {record['source']} does with {record['num_loops']} "
        "loops."
    )
