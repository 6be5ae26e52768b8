# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Documents and examples read from files and data sets."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# What stands between the documents of a text file
SEPARATORS = {"blank_line": "\n\n", "line": "\n", "file": None}


def read_rows(
    source: str | Path, documents: str = "blank_line", dataset: dict[str, Any] | None = None
) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """
    The texts of a `.txt` or the objects of anything else, each with what to call it in errors.

    Args:
        source: A text file (`.txt`), a file of one JSON object a line (`.jsonl`), or the name or folder of a data set
            that the `datasets` library loads.
        documents (`"blank_line"`, `"line"` or `"file"`, defaults to `"blank_line"`): What separates the texts of a
            `.txt`.
        dataset (`dict`, *optional*): Further arguments of `datasets.load_dataset` (`name`, `split`, ...).
    """
    path, unit = Path(source).expanduser(), "example"
    if path.suffix in (".txt", ".jsonl") and not path.is_file():
        raise ValueError(f"{source} is not a file.")
    if path.suffix == ".txt":
        if documents not in SEPARATORS:
            raise ValueError(f"The documents are separated by {documents!r}; choose one of {', '.join(SEPARATORS)}.")
        unit = "line" if documents == "line" else "document"
        rows: Iterable[Any] = read_documents(path, SEPARATORS[documents])
    else:
        rows = read_jsonl(path) if path.suffix == ".jsonl" else load_dataset_rows(str(source), dataset or {})
    for number, row in enumerate(rows, start=1):
        yield f"{source}, {unit} {number}", row


def read_documents(path: str | Path, separator: str | None = "\n\n") -> Iterator[str]:
    """
    The documents of a text file in UTF-8.

    Args:
        path: The file.
        separator (`str`, *optional*, defaults to a blank line): What stands between documents; None: the whole file
            is one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}.") from error
    documents = [text] if separator is None else text.split(separator)
    documents = [document.strip() for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{path} holds no text.")
    yield from documents


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line. Empty lines are skipped; a bad one is named by number."""
    path, rows = Path(path), []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)  # bytes, so that text in another encoding is an error of its line too
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is a {type(row).__name__}; it must be an object.")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no examples.")
    return rows


def load_dataset_rows(name: str, options: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The rows of a data set, its training split by default; `options` are arguments of `datasets.load_dataset`."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{name} is not a .txt or .jsonl file; `pip install datasets` to load data sets.") from error
    try:
        return load_dataset(name, **{"split": "train", **options})
    except Exception as error:  # of the network, the Hub, the data set's files
        raise ValueError(f"The data set {name} cannot be loaded: {' '.join(str(error).split())}") from error
