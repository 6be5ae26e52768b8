# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm calibrate`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .application import MEASURE, app
from .options import (
    BlockLength,
    ConfidenceThreshold,
    Device,
    Dtype,
    MaxDenoisingSteps,
    TrustRemoteCode,
    at_least,
    given,
)
from .output import check_file, console, plus_minus_sign, progress, show_table


@app.command(rich_help_panel=MEASURE, epilog="Example: loopmdm calibrate my-model --data validation.jsonl")
def calibrate(
    model: Annotated[str, typer.Argument(help="Folder of a looped model.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            help='JSON lines {"prompt": ..., "answer": ...}; a prompt with mask tokens is filled in.',
            show_default=False,
        ),
    ],
    max_loss: Annotated[float, typer.Option(help="Quality that may be lost, as a share.")] = 0.005,
    quality: Annotated[
        str, typer.Option(help="exact (right answers), tokens (right tokens) or agreement (with the most loops).")
    ] = "exact",
    num_loops: Annotated[int | None, typer.Option(help="The most loops (default: the model's).")] = None,
    max_denoising_steps: MaxDenoisingSteps = None,
    block_length: BlockLength = None,
    confidence_threshold: ConfidenceThreshold = None,
    limit: Annotated[int | None, typer.Option(help="Use at most this many examples, from the first on.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples generated together.")] = 32,
    output: Annotated[Path | None, typer.Option(help="Write all measurements to this JSON file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, and leave the model as it is.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Find the cheapest loops that keep a model's quality, and make them its default."""
    from loopmdm import LoopMDMGenerationConfig
    from loopmdm.data import write_json
    from loopmdm.evaluation import calibrate_loops
    from loopmdm.evaluation.loading import load_model, load_tokenizer, read_model_config
    from loopmdm.evaluation.loop_budget import check_budget, read_examples

    at_least(1, limit=limit, batch_size=batch_size)
    if output is not None:
        check_file("--output", output)
    if not any((Path(model) / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{model} is not the folder of a model; the result is written into it, so download it first.")
    if not dry_run and not os.access(model, os.W_OK):
        raise ValueError(f"The result cannot be written into {model}; copy the model, or give --dry-run.")
    config = read_model_config(model)
    how = given(
        max_denoising_steps=max_denoising_steps, block_length=block_length, confidence_threshold=confidence_threshold
    )
    LoopMDMGenerationConfig(**how)  # checks
    examples = read_examples(data, load_tokenizer(model, trust_remote_code), config.mask_token_id)[:limit]
    check_budget(config, len(examples), num_loops, max_loss, quality)
    loaded = load_model(model, dtype, device)
    with progress("settings") as bar:
        budget = calibrate_loops(
            loaded,
            examples,
            num_loops=num_loops,
            max_loss=max_loss,
            quality=quality,
            batch_size=batch_size,
            progress=bar,
            **how,
        )
    if output is not None:
        write_json(output, {"model": model, "data": str(data), **budget.record()})
    written = [] if dry_run else _write(Path(model), budget, data)
    _show(budget, f"Half of {len(examples)} examples of {data}")
    for line in written:
        console.print(line)


def _write(model: Path, budget: Any, data: Path) -> list[str]:
    """Makes the chosen setting the default, and keeps what was measured and shows it in the card. Says what it did."""
    from loopmdm.data import write_json
    from loopmdm.evaluation.loop_budget import write_budget
    from loopmdm.hub import BUDGET, CARD, write_card

    lines = [f"{write_budget(model, budget.best.arguments)} is written."]
    write_json(model / BUDGET, {"data": data.name, **budget.record()})
    if write_card(model) is None:
        lines.append(f"{model / CARD} is yours, so it is left as it is; {model / BUDGET} has the figures.")
    else:
        lines.append(f"{model / CARD} shows what was measured.")
    return lines


def _show(budget: Any, title: str) -> None:
    from loopmdm.evaluation.loop_budget import describe

    sign = plus_minus_sign()
    measured = sorted(budget.results, key=lambda result: result.flops)
    results = [(describe(result.arguments), result) for result in measured]
    results += [("other half: all loops", budget.check_full)]
    results += [(f"other half: {describe(check.arguments)}", check) for check in budget.checks]
    rows = [
        [
            name,
            f"{100 * result.quality:.1f}{sign}{100 * result.standard_error:.1f}",
            f"{100 * result.loss:+.1f}{sign}{100 * result.loss_standard_error:.1f}",
            f"{result.mean_loops:.2f}",
            f"{result.forward_passes:.2f}",
            f"{result.flops / 1e9:,.3f}",
        ]
        for name, result in results
    ]
    show_table(title, ["setting", "quality, %", "loss, %", "loops", "passes", "GFLOP"], rows)
    share = budget.check.flops / budget.check_full.flops
    saved = f"{share:.2f} of the FLOPs, {budget.check.mean_loops:.2f} loops on average"
    console.print(f"Chosen: {describe(budget.best.arguments)} ({saved}).")
