# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm train`."""

import itertools
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .application import TRAIN, app
from .options import check_idle
from .output import console, show_facts

# Tokens of a row that a dry run shows
SHOWN = 200


@app.command(rich_help_panel=TRAIN, epilog="Example: loopmdm train run.yaml trainer.max_steps=100 --dry-run")
def train(
    config: Annotated[Path, typer.Argument(help="YAML file that describes the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, such as trainer.max_steps=100.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the first rows, and what the run takes; write nothing.")
    ] = False,
    init: Annotated[
        str | None, typer.Option(help="Write a file to start from: pretraining, answers or adapter.")
    ] = None,
) -> None:
    """Pretrain, fine-tune or adapt a model. Under torchrun it runs on all processes."""
    if init is not None:
        why = "--init writes a new file, and runs nothing"
        check_idle(why, resume=resume, dry_run=dry_run)
        if overrides:
            raise ValueError(f"{overrides[0]} has no effect: {why}; leave it out.")
        from ._run_files import write_template

        write_template(init, config)
        console.print(f"{config} is written. Fill in its paths; then: loopmdm train {config} --dry-run")
        return
    from loopmdm.data import this_process
    from loopmdm.training.run import read_config
    from loopmdm.training.run import train as run

    is_first = this_process().rank == 0
    settings = read_config(config, overrides or [])
    if not sys.stderr.isatty():  # bars are for those who watch
        from transformers.utils import logging

        logging.disable_progress_bar()
        settings.trainer.setdefault("disable_tqdm", True)
    if dry_run:
        from loopmdm.training.preview import preview

        found = preview(settings, resume)
        if is_first:
            _show_preview(found, str(config))
        return
    record = run(settings, resume=resume)
    if is_first:
        print(f"{record['run']['output']}: {record['steps']} steps, {record['training_flops']:.3g} FLOPs")
        for name, value in record["evaluation"].items():
            if "nelbo" in name and "error" not in name:
                print(f"{name}: {value:.4f} nats per token")


def _show_preview(found: Any, title: str) -> None:
    coloured = console.is_terminal and not console.no_color
    key = "in yellow: masked, and learnt; grey: given, never learnt" if coloured else "[[...]]: masked, and learnt"
    console.print(f"The first rows of the first step ({found.num_loops} loops; {key}):\n")
    for number, row in enumerate(found.rows, start=1):
        line = _show_row(row[:SHOWN], coloured)
        if len(row) > SHOWN:
            line.append(f" ... and {len(row) - SHOWN:,} tokens more")
        console.print(f"{number}:", line)
    console.print()
    facts = dict(found.facts)
    how = "measured on three steps" if found.is_measured else "an estimate, by the speed of a matrix product"
    facts["time"] = f"{_duration(facts.pop('seconds'))} ({how})"
    show_facts(title, facts)
    unit, size_of_unit = ("GiB", 2**30) if found.memory["together"] >= 2**28 else ("MiB", 2**20)
    memory = {name: f"{size / size_of_unit:,.2f} {unit}" for name, size in found.memory.items()}
    show_facts("Memory of each process, an estimate", memory)
    console.print("Nothing was written.")


def _show_row(row: list[tuple[str, str]], coloured: bool) -> Any:
    """A row as text: masked tokens in yellow, or, without colours, each run of them in double brackets."""
    from rich.text import Text

    line = Text()
    for kind, run in itertools.groupby(row, key=lambda pair: pair[1]):
        pieces = "".join(piece for piece, _ in run)
        text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in pieces)
        if coloured:
            line.append(text, {"given": "dim", "visible": "", "masked": "black on yellow"}[kind])
        elif kind == "masked":
            start = text[: len(text) - len(text.lstrip(" "))]
            line.append(f"{start}[[{text.removeprefix(start)}]]")
        else:
            line.append(text)
    return line


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
