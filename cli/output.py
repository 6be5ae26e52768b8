# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What commands show and write: tables, progress bars, folders of results, pictures."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Names of files and data are shown as they are, whatever markup they hold.
console = Console(markup=False, emoji=False, highlight=False)


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[..., None]]:
    """
    A function that shows how much is done: `show(what, done, total, note)`, one bar on stderr for each `what`, with
    the note (none by default) behind its name; of a total that is not known yet, None. The bars vanish at the end, and
    do not appear where stderr is not a terminal.
    """
    from rich.progress import Progress

    errors = Console(stderr=True)
    # Above the bar where both are on the screen; what is written elsewhere must not go through the bar's console.
    redirect = sys.stdout.isatty()
    bar = Progress(console=errors, transient=True, disable=not errors.is_terminal, redirect_stdout=redirect)
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int | None, note: str = "") -> None:
        bar.start()
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total, description=what + note)

    try:
        yield show
    finally:
        bar.stop()


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """One bar: a function of what is done, the total, and a note."""
    with progress_bars() as show:
        yield partial(show, what)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """
    Columns of text on the left, of numbers on the right; those without an entry are left out. Where the screen is too
    narrow, numbers are kept whole at the cost of margins and headings.
    """
    used = [i for i in range(len(columns)) if any(str(row[i]) for row in rows)]

    def table(narrow: bool) -> Table:
        made = Table(title=title, padding=(0, 0 if narrow else 1))
        for i in used:
            is_number = str(rows[-1][i])[:1] in "+-.0123456789"
            name = columns[i].replace(" ", "\n") if narrow and is_number else columns[i]
            justify: Any = "right" if is_number else "left"
            made.add_column(name, justify=justify, no_wrap=narrow and is_number, overflow="fold")
        for row in rows:
            made.add_row(*(str(row[i]) for i in used))
        return made

    wide = table(False)
    console.print(wide if console.measure(wide).maximum < console.width else table(True))


def show_facts(title: str, facts: dict[str, Any]) -> None:
    """Names and values, one pair a line."""
    table = Table(title=title, show_header=False)
    for name, value in facts.items():
        if isinstance(value, int):
            value = f"{value:,}"
        table.add_row(name.replace("_", " "), f"{value:,.6g}" if isinstance(value, float) else str(value))
    console.print(table)


def show_verification(found: dict[str, Any]) -> None:
    """What logits were compared with, and by how much they differ."""
    console.print(
        f"Verified against {found['against']}: largest difference {found['max_difference']:.2g} in logits up to "
        f"{found['max_logit']:.1f} ({found['dtype']})."
    )


def plus_minus_sign() -> str:
    """What stands between a value and its error, as far as the place that shows it has the character."""
    return " ± " if console.encoding.startswith("utf") else " +/- "


def plus_minus(value: float, error: float | None) -> str:
    """A value with its error, both to the second digit of the error."""
    if error is None or not 0 < error < math.inf:
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f}{plus_minus_sign()}{error:.{digits}f}"


@contextlib.contextmanager
def results_folder(path: Path | None, record: dict[str, Any]) -> Iterator[Path | None]:
    """A new folder that holds `record` as results.json and takes more; complete or absent. No folder for None."""
    from loopmdm.data import write_json
    from loopmdm.evaluation.protocol import output_folder

    if path is None:
        yield None
        return
    with output_folder(path) as folder:
        write_json(folder / "results.json", record)
        yield folder
    console.print(f"Written to {path}.")


def check_file(option: str, path: Path) -> None:
    """Raises a ValueError where a file could not be written to `path`, which `option` names."""
    wrong = None
    if path.is_dir():
        wrong = "it is a folder"
    elif not path.parent.is_dir():
        wrong = "it is in a folder that does not exist"
    elif not os.access(path.parent, os.W_OK):
        wrong = "nothing can be written into its folder"
    if wrong is not None:
        raise ValueError(f"{option} {path} cannot be written: {wrong}; name another file.")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """JSON lines."""
    text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def picture(path: Path, columns: int) -> Iterator[Any]:
    """Axes to draw on, side by side, which are saved as an image at the end of the block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 3.8), layout="constrained")
    yield figure.subplots(1, columns, squeeze=False)[0]
    figure.savefig(path, dpi=110)


def draw(axis: Any, rows: list[dict[str, Any]], name: str, label: str | None = None) -> None:
    """Draws what the rows call `name` over the number of loops, with bars of two standard errors."""
    loops, values = [row["num_loops"] for row in rows], [row[name] for row in rows]
    errors = [2 * (row["standard_error"] or 0) for row in rows]
    axis.errorbar(loops, values, yerr=errors, marker="o", capsize=3, label=label)
