# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What `generate --html` checks and writes."""

import os
from pathlib import Path
from typing import Any


def check_html(path: Path | None, columns: int | None, prompts: int, batch_size: int) -> None:
    """Raises a ValueError where a page could not be written to `path`, or `columns` or `prompts` do not fit."""
    if path is None and columns is not None:
        raise ValueError("--html-columns is for the page that --html writes; give both, or neither.")
    if columns is not None and columns < 1:
        raise ValueError(f"--html-columns is {columns}; it must be at least 1.")
    if path is not None and prompts > batch_size:
        raise ValueError(
            f"--html shows prompts of one batch, and there are {prompts} at a --batch-size of {batch_size}; give "
            f"--batch-size {prompts}, or fewer prompts."
        )
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        wrong = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise ValueError(f"--html is {path}, which {wrong}; give the path of a file.")
    if path is not None and not os.access(path.parent, os.W_OK):
        raise ValueError(f"--html is {path}, and nothing can be written into {path.parent}; put it elsewhere.")


def write_trace(path: Path, output: Any, tokenizer: Any, model: str, texts: list[str], columns: int | None) -> None:
    """Writes the page, in place of an older one. `texts` are the prompts; each has as many rows of `output`."""
    from loopmdm.web.trace import trace_to_html, write_html

    copies = len(output.sequences) // len(texts)
    of = [f" ({copy + 1} of {copies})" if copies > 1 else "" for copy in range(copies)]
    names = [text + which for text in texts for which in of]
    name = Path(model).resolve().name if Path(model).is_dir() else model
    write_html(path, trace_to_html(output, tokenizer, f"How {name} wrote it", names, columns))
