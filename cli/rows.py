# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm generate MODEL --data`: the answers to many rows as a file."""

import sys
from typing import Any

from .options import check_idle, given
from .output import progress

# Options that mean nothing without --data, and those that mean nothing with it
OF_ROWS = ("output", "max_batch_tokens", "text_column", "split", "subset")
OF_PROMPTS = ("stream", "as_json", "html", "html_columns")


def write_rows(settings: dict[str, Any], options: dict[str, Any]) -> None:
    """Answers the rows of --data. `settings` are the options of the command, and `options` those of `generate`."""
    idle = {name.removeprefix("as_"): settings[name] for name in OF_PROMPTS}
    check_idle("--data writes a file of JSON lines", **idle)
    data, output = settings["data"], settings["output"]
    if settings["prompts"]:
        raise ValueError("There are prompts beside --data; give one of them.")
    if output is None:
        raise ValueError("--data needs --output, the file to write.")
    if data.endswith((".jsonl", ".parquet")):
        check_idle(f"{data} is a file", split=settings["split"], subset=settings["subset"])
    from loopmdm.data import this_process
    from loopmdm.evaluation.rows import generate_rows

    names = ("batch_size", "max_batch_tokens", "seed", "text_column", "dtype", "device", "trust_remote_code")
    arguments = {name: settings[name] for name in names}
    dataset = given(split=settings["split"], name=settings["subset"])
    with progress("rows") as bar:

        def show(passed: int, rows: int, speed: float) -> None:
            bar(passed, rows, f" ({speed:.1f} tokens/s)")

        report = show if this_process().rank == 0 else None
        result = generate_rows(
            settings["model"], data, output, dataset=dataset or None, report=report, **arguments, **options
        )
    print(_line(result, output), file=sys.stderr)


def _line(result: Any, output: Any) -> str:
    speed = (
        f"{result.tokens:,} tokens, {result.tokens / result.seconds:.1f}/s" if result.tokens else "nothing was left"
    )
    if result.missing:
        rest = f"{result.missing:,} rows are missing; the last process writes {output}, or the same command again"
    else:
        rest = f"{result.rows:,} rows are in {output}"
    wrong = f"; {result.errors:,} of them are errors, such as: {result.first_error}" if result.errors else ""
    return f"{speed}; {rest}{wrong}"
