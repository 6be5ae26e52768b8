# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm convert`."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from .application import TRAIN, app
from .options import TrustRemoteCode
from .output import console, plus_minus_sign, progress_bars, show_facts, show_table, show_verification


@app.command(rich_help_panel=TRAIN, epilog="Example: loopmdm convert GSAI-ML/LLaDA-8B-Base looped --dry-run")
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder, file of weights or Hub id of a non-looped checkpoint.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", show_default=False)],
    num_loops: Annotated[int, typer.Option(help="Loops of an inference pass that names none.")] = 1,
    loop_start: Annotated[int | None, typer.Option(help="First looped layer (default: by depth).")] = None,
    loop_end: Annotated[int | None, typer.Option(help="Layer behind the last looped one.")] = None,
    loop_update: Annotated[
        str | None,
        typer.Option(help="replace (to be trained) or damped (works untrained; default if --num-loops is above 1)."),
    ] = None,
    max_train_loops: Annotated[int | None, typer.Option(help="S_max of a later training (default: 12).")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Text file: loop the layers that harm its NELBO least.")
    ] = None,
    calibrate_width: Annotated[int | None, typer.Option(help="Layers to loop, with --calibrate.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare with transformers' own class.")] = False,
    verify_against: Annotated[Path | None, typer.Option(help="Compare with reference logits (.npz).")] = None,
    family: Annotated[str | None, typer.Option(help="Format of the source, where its files do not tell.")] = None,
    from_causal: Annotated[bool, typer.Option("--from-causal", help="Start from a causal language model.")] = False,
    shift_logits: Annotated[
        bool | None, typer.Option(help="With --from-causal: position i - 1 goes on predicting token i (default).")
    ] = None,
    mask_token_id: Annotated[int | None, typer.Option(help="Id of the mask token, where it is not found.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Noise level of a time-conditioned source.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the source's).")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, and memory used.")] = "5GB",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights (tensors only).")] = False,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
) -> None:
    """Turn a non-looped diffusion model into a looped one that computes the same at one loop."""
    options = dict(locals())
    for name in ("source", "output", "dry_run"):
        del options[name]
    # What the function calls by other names than the options
    options["calibrate_on"] = options.pop("calibrate")
    options["calibration_width"] = options.pop("calibrate_width")

    from transformers.utils import logging

    from loopmdm.convert import convert_checkpoint

    def on_plan(plan: Any) -> None:
        _show_plan(plan.record())
        if dry_run:
            raise typer.Exit

    logging.disable_progress_bar()  # transformers' own
    with progress_bars() as bars:
        record = convert_checkpoint(source, output, **options, on_plan=on_plan, progress=bars)
    _show_result(record, output)


def _show_plan(record: dict[str, Any]) -> None:
    """The plan of a conversion: parameters, loop, special tokens and the mapping, layers summed up."""
    loop, tokens, parameters = record["loop"], record["special_tokens"], record["parameters"]
    facts = {"parameters": f"{parameters['total']:,} ({record['dtype']})"}
    bounds = pairwise((0, loop["loop_start"], loop["loop_end"], record["layers"]))
    for part, (start, end) in zip(("head", "mid", "tail"), bounds, strict=True):
        facts[part] = f"layers[{start}:{end}], {parameters[part]:,} parameters"
    facts["loop"] = f"chosen {loop['chosen']}; {loop['loop_update']}, num_loops {loop['num_loops']}"
    facts["mask token"] = f"{tokens['mask_token_id']} {tokens['mask_token'] or ''} (from {tokens['mask_found']})"
    facts |= {name: str(tokens[name]) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    show_facts(f"{record['source']} as {record['family']}", facts)
    _show_tensors(record["tensors"])
    if record["ignored"]:
        console.print(f"Not needed: {', '.join(record['ignored'][:5])}{', ...' if len(record['ignored']) > 5 else ''}")


def _show_tensors(tensors: dict[str, Any]) -> None:
    rows: Counter[tuple[str, ...]] = Counter()
    same = 0
    for target, recipe in tensors.items():
        if recipe == {"from": [target], "how": "copy"}:
            same += 1
            continue
        extra = f" and {len(recipe['from']) - 1} more" if len(recipe["from"]) > 1 else ""
        names = (re.sub(r"\.\d+\.", ".{i}.", name, count=1) for name in (target, recipe["from"][0]))
        rows[*names, recipe["how"] + extra] += 1
    if rows:
        columns = ["result", "source", "how", "count"]
        show_table("Tensors", columns, [[*names, count] for names, count in rows.items()])
    if same:
        console.print(f"{same} tensors are copied under their own names.")


def _show_result(record: dict[str, Any], output: Path) -> None:
    calibration, sign = record.get("calibration"), plus_minus_sign()
    if calibration:
        rows = []
        for score in [calibration["without_loops"], *calibration["windows"]]:
            bounds = [score.get("loop_start"), score.get("loop_end")]
            window = "none" if bounds[0] is None else f"layers[{bounds[0]}:{bounds[1]}]"
            chosen = " (chosen)" if bounds == calibration["best"] else ""
            change = f"{score['change']:+.4f}{sign}{score['change_standard_error']:.4f}" if "change" in score else ""
            rows.append([window + chosen, f"{score['nelbo']:.4f}{sign}{score['standard_error']:.4f}", change])
        loops, update = calibration["num_loops"], calibration["loop_update"]
        title = f"NELBO at {loops} loops ({update}) on {calibration['text']}"
        show_table(title, ["looped", "nats per token", "change"], rows)
    for name in ("verification", "verification_against_file"):
        if name in record:
            show_verification(record[name])
    todo = "train it before you loop it more"
    if record["loop"]["loop_update"] == "damped":
        todo = "damped loops change little, and gain little, untrained"
    console.print(f"{output} is written. It computes what its source does at num_loops=1; {todo}.")
    console.print(
        "Recipe: `loopmdm train` with `loops: {schedule: growing}` and all weights, for half of the FLOPs of its "
        "first training. On Sudokus, where training without loops had stalled, that paid with the first of two or "
        "three layers looped; not with the last, all of them or LoRA on mid, and not on text "
        "(docs/results/conversion.md)."
    )
