# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What `generate --html` checks and writes."""

from pathlib import Path
from typing import Any


def check_html(path: Path | None, columns: int | None) -> None:
    """Raises a ValueError where a page could not be written to `path`, or `columns` does not fit."""
    if path is None and columns is not None:
        raise ValueError("--html-columns is for the page that --html writes; give both, or neither.")
    if columns is not None and columns < 1:
        raise ValueError(f"--html-columns is {columns}; it must be at least 1.")
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        wrong = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise ValueError(f"--html is {path}, which {wrong}; give the path of a file.")


def write_trace(path: Path, output: Any, tokenizer: Any, model: str, names: list[str], columns: int | None) -> None:
    """Writes the page, in place of an older one."""
    from loopmdm.web.trace import trace_to_html, write_html

    name = Path(model).resolve().name if Path(model).is_dir() else model
    write_html(path, trace_to_html(output, tokenizer, f"How {name} wrote it", names, columns))
