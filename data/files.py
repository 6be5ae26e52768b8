# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Documents and examples read from files and data sets, with their places; and files that are written atomically."""

import codecs
import contextlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

# Separators of the documents in a text file. A blank line may hold white space, as in WikiText.
BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
SEPARATORS: dict[str, str | re.Pattern[str] | None] = {"blank_line": BLANK_LINE, "line": "\n", "file": None}
# Most bytes of a line of JSON: more than any row needs, and few enough for the memory
LONGEST_LINE = 2**28
BYTE_ORDER_MARK = "\ufeff"


def read_rows(
    source: str | Path, documents: str = "blank_line", dataset: dict[str, Any] | None = None, keep_errors: bool = False
) -> Iterator[tuple[str, Any]]:
    """
    Yields the texts of a `.txt` or the objects of anything else, each after its name for errors: file and line, or
    data set and number.

    Args:
        source: A text file (`.txt`), a file with one JSON object per line (`.jsonl`), a `.parquet` file, or the name
            or folder of a data set that the `datasets` library loads.
        documents (`"blank_line"`, `"line"` or `"file"`, defaults to `"blank_line"`): What separates the texts of a
            `.txt`.
        dataset (`dict`, *optional*): Further arguments of `datasets.load_dataset` (`name`, `split`, ...).
        keep_errors (`bool`, defaults to `False`): For a line that is not a JSON object, yield the ValueError instead
            of raising it, and continue.

    Raises:
        ValueError: The source does not exist, is empty, or cannot be read.
    """
    path = Path(source).expanduser()
    if path.suffix in (".txt", ".jsonl", ".parquet") and not path.is_file():
        raise ValueError(f"{source} is not a file.")
    if documents not in SEPARATORS:
        raise ValueError(f"The documents are separated by {documents!r}; choose one of {', '.join(SEPARATORS)}.")
    unit = "line"
    rows: Iterator[tuple[int, Any]]
    if path.suffix == ".txt":
        rows = _documents(path, SEPARATORS[documents])
    elif path.suffix == ".jsonl":
        rows = _lines_or_errors(path) if keep_errors else json_lines(path)
    elif path.suffix == ".parquet":
        options = {"streaming": True, "data_files": str(path), **(dataset or {})}
        unit, rows = "example", _numbered(load_dataset_rows("parquet", options), source)
    elif path.is_file():
        raise ValueError(
            f"{source} is not a .txt, .jsonl or .parquet file. The `datasets` library reads other kinds: name the "
            f"kind instead of the file (json, csv), and the file as its `data_files`."
        )
    else:
        unit, rows = "example", _numbered(load_dataset_rows(str(source), dataset or {}), source)
    for number, row in rows:
        yield f"{source}, {unit} {number}", row


def read_documents(path: str | Path, separator: str | re.Pattern[str] | None = BLANK_LINE) -> Iterator[str]:
    """
    The documents of a text file in UTF-8, with or without a byte-order mark.

    Args:
        path: The file.
        separator (`str` or `re.Pattern`, *optional*, defaults to a blank line, which may hold white space): The
            separator of documents; with None the whole file is one document.
    """
    return (document for _, document in _documents(Path(path), separator))


def _documents(path: Path, separator: str | re.Pattern[str] | None) -> Iterator[tuple[int, str]]:
    """The documents that are not empty, each with the number of its first line."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} is not text in UTF-8: {error}. Save the file as UTF-8.") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    pattern = re.escape(separator) if isinstance(separator, str) else separator
    borders = () if pattern is None else (found.span() for found in re.finditer(pattern, text))
    start, line, is_empty = 0, 1, True
    for stop, following in (*borders, (len(text), len(text))):
        # Concatenated files have byte-order marks in the middle.
        begun = text[start:stop].lstrip().removeprefix(BYTE_ORDER_MARK).lstrip()
        if begun:
            yield line + text.count("\n", start, stop - len(begun)), begun.rstrip()
            is_empty = False
        line += text.count("\n", start, following)
        start = following
    if is_empty:
        raise ValueError(f"{path} holds no text.")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line. Empty lines are skipped; an error names the bad line."""
    return [row for _, row in json_lines(Path(path))]


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of [`read_jsonl`], each after the number of its line."""
    for number, row in _lines_or_errors(path):
        if isinstance(row, ValueError):
            raise row
        yield number, row


def _lines_or_errors(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Like [`json_lines`], with a ValueError in place of a line that is not an object."""
    is_empty = True
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
            where = f"{path}, line {number}"
            if len(line) <= LONGEST_LINE:
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                row = _object(line, where)
            else:
                while line and not line.endswith(b"\n"):  # the rest of it
                    line = file.readline(LONGEST_LINE)
                row = ValueError(f"{where} has more than {LONGEST_LINE >> 20} MiB; split it into several rows.")
            is_empty = False
            yield number, row
    if is_empty:
        raise ValueError(f"{path} holds no examples.")


def _object(line: bytes, where: str) -> dict[str, Any] | ValueError:
    try:
        # `json` would guess the encoding of bytes.
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_no_name_twice)
    except (ValueError, RecursionError) as error:
        return ValueError(f"{where} is not valid JSON: {error}.")
    return row if isinstance(row, dict) else ValueError(f"{where} is a {type(row).__name__}; it must be an object.")


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return row


def write_atomically(path: Path, text: str) -> None:
    """
    Writes a text in UTF-8, with backslash escapes for what UTF-8 cannot encode (file names in other encodings). At
    every moment `path` holds either what it held before or all of the text.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def share_weights(folder: Path) -> None:
    """Gives the weights the permissions of their folder: safetensors makes files that this user alone can read."""
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # of file systems without permissions
            path.chmod(folder.stat().st_mode & 0o666)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes strict JSON, in which NaN and infinities are null, atomically. Tensors become lists."""
    write_atomically(path, json.dumps(_plain(record), indent=2, ensure_ascii=False, default=str) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_dataset_rows(name: str, options: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The rows of a data set, by default its training split; `options` are arguments of `datasets.load_dataset`."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{name} is not a .txt or .jsonl file; `pip install datasets` to load data sets.") from error
    try:
        return load_dataset(name, **{"split": "train", **options})
    except Exception as error:  # of the network, the Hub, the data set's files
        reason = ": ".join(" ".join(str(each).split()) for each in (error, error.__cause__) if each is not None)
        raise ValueError(f"The data set {name} cannot be loaded: {reason}") from error


def all_rows(rows: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """
    All rows of a pass over the data. In the worker of a loader, a streamed data set of the `datasets` library would
    give a share of them, of which [`StreamedExamples`] would take a share again.
    """
    if not isinstance(rows, IterableDataset) or not hasattr(rows, "iter"):
        return rows
    batches = rows.iter(batch_size=1)  # `iter(rows)` is what splits
    return ({name: values[0] for name, values in batch.items()} for batch in batches)


def _numbered(rows: Iterable[dict[str, Any]], source: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields rows after their numbers, which also name a row of a stream that cannot be read."""
    rows = iter(all_rows(rows))
    for number in itertools.count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # of the network or the files, many kinds
            raise ValueError(f"{source}, example {number} cannot be read: {error}") from error
        yield number, row
