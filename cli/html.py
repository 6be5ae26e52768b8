# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What `generate --html` checks and writes."""

from pathlib import Path
from typing import Any

from .options import at_least
from .output import check_file


def check_html(path: Path | None, columns: int | None, prompts: int, batch_size: int) -> None:
    """Raises a ValueError where a page could not be written to `path`, or `columns` or `prompts` do not fit."""
    if path is None:
        if columns is not None:
            raise ValueError("--html-columns is for the page that --html writes; give both, or neither.")
        return
    at_least(1, html_columns=columns)
    if prompts > batch_size:
        raise ValueError(
            f"--html shows prompts of one batch, and there are {prompts} at a --batch-size of {batch_size}; give "
            f"--batch-size {prompts}, or fewer prompts."
        )
    check_file("--html", path)
    if path.exists():
        raise ValueError(f"--html {path} exists already; name a new file.")


def write_trace(path: Path, output: Any, tokenizer: Any, model: str, texts: list[str], columns: int | None) -> None:
    """Writes the page. `texts` are the prompts; each has as many rows of `output`."""
    from loopmdm.web.trace import trace_to_html, write_html

    copies = len(output.sequences) // len(texts)
    of = [f" ({copy + 1} of {copies})" if copies > 1 else "" for copy in range(copies)]
    names = [text + which for text in texts for which in of]
    name = Path(model).resolve().name if Path(model).is_dir() else model
    write_html(path, trace_to_html(output, tokenizer, f"How {name} wrote it", names, columns))
