# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Rows of files and data sets as training examples, each checked when it is read."""

from collections.abc import Iterable, Iterator
from typing import Any

from .columns import REFUSED, TOKEN_COLUMNS, UnusedColumns, read_columns, refuse, says_what_is_learnt
from .encode import PROMPT_NAMES, columns_of_answer, encode_answer, text_of
from .files import read_rows
from .pack import pack_documents
from .tokens import check_tokens, encode

# Most characters of one token, in any tokenizer
_LONGEST_TOKEN = 256


def read_examples(
    sources: Iterable[str],
    tokenizer: Any,
    config: Any,
    task: str,
    length: int,
    text_column: str = "text",
    documents: str = "blank_line",
    isolate_documents: bool = False,
    skip_long: bool = False,
    dataset: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """
    Yields examples for [`~loopmdm.training.MaskedDiffusionCollator`].

    Args:
        sources, documents, dataset: Files and data sets, see [`read_rows`].
        tokenizer: The model's tokenizer.
        config ([`LoopMDMConfig`]): The model's configuration.
        task (`"pretrain"` or `"answers"`): Pack texts into rows, or read one prompt and answer per row with
            [`encode_answer`]. Both tasks also take rows of tokens (`input_ids`, see [`read_columns`]).
        length (`int`): Most tokens of a row.
        text_column (`str`, defaults to `"text"`): The field of JSON objects and data sets that holds the text.
        isolate_documents (`bool`, defaults to `False`): Keep packed documents from seeing each other.
        skip_long (`bool`, defaults to `False`): Skip examples longer than a row instead of raising an error.

    Raises:
        ValueError: A row that cannot be used, named by file and line.
    """
    rows = (row for source in sources for row in read_rows(source, documents, dataset))
    unused = UnusedColumns()
    if task == "answers":
        yield from _answers(rows, tokenizer, config, length, skip_long, unused)
        return
    texts = (_document(where, row, tokenizer, config, text_column, unused) for where, row in rows)
    yield from pack_documents(texts, length, tokenizer.eos_token_id, isolate_documents)


def _document(
    where: str, row: str | dict[str, Any], tokenizer: Any, config: Any, text_column: str, unused: UnusedColumns
) -> list[int]:
    """The tokens of a text, which may be empty."""
    if isinstance(row, dict):
        is_tokens = row.get("input_ids") is not None
        unused.note(row, TOKEN_COLUMNS if is_tokens else (text_column,), _source(where))
        if is_tokens:
            columns = read_columns(row, where, config.mask_token_id)
            if not columns["maskable"].all() or "document_ids" in columns:
                raise ValueError(f"{where} has tokens that are not learnt, or its own documents; use `task: answers`.")
            return check_tokens(columns["input_ids"].tolist(), config.vocab_size, where)
        refuse(row, REFUSED, where)
        if not isinstance(row.get(text_column), str) and {"messages", *PROMPT_NAMES} & row.keys():
            raise ValueError(f"{where} has no text in {text_column!r}, but prompt and answer; use `task: answers`.")
    ids = encode(tokenizer, text_of(row, text_column, where), where)
    return check_tokens(ids, config.vocab_size, where, config.mask_token_id)


def _answers(
    rows: Iterable[tuple[str, Any]], tokenizer: Any, config: Any, length: int, skip_long: bool, unused: UnusedColumns
) -> Iterator[dict[str, Any]]:
    for where, row in rows:
        # Tokenising takes a hundred times the memory of a text, so rows that cannot fit are not tokenised.
        least = least_tokens(row, columns_of_answer(row) - {"tools"}) if isinstance(row, dict) else 0
        example = None if least > length else _answer(where, row, tokenizer, config, unused)
        if example is not None and len(example["input_ids"]) <= length:
            yield example
        elif not skip_long:
            size = f"at least {least}" if example is None else len(example["input_ids"])
            raise ValueError(
                f"{where} has {size} tokens, more than `sequence_length` ({length}); raise it, or set "
                "`skip_long: true`."
            )


def _answer(where: str, row: Any, tokenizer: Any, config: Any, unused: UnusedColumns) -> dict[str, Any]:
    if isinstance(row, dict) and row.get("input_ids") is not None:
        unused.note(row, TOKEN_COLUMNS, _source(where))
        if not says_what_is_learnt(row):
            raise ValueError(
                f"{where} does not say which of its tokens are the answer; add `labels` (-100 elsewhere), "
                "`completion_mask`, `assistant_masks`, `maskable` or `prompt_length`, or use `task: pretrain`."
            )
        columns = read_columns(row, where, config.mask_token_id)
        check_tokens(columns["input_ids"].tolist(), config.vocab_size, where)
        return dict(columns)
    example = encode_answer(tokenizer, row, where)
    unused.note(row, columns_of_answer(row), _source(where))
    ids = check_tokens(example["input_ids"], config.vocab_size, where, config.mask_token_id)
    if example["prompt_length"] == len(ids):
        raise ValueError(f"{where} has an answer without tokens, so there is nothing to learn.")
    return example


def least_tokens(row: dict[str, Any], names: Iterable[str]) -> int:
    """A lower bound on the number of tokens in the fields `names` of a row, from their number of characters."""
    return sum(_characters(row.get(name)) for name in names) // _LONGEST_TOKEN


def _characters(value: Any) -> int:
    if isinstance(value, list | dict):
        return sum(map(_characters, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 0


def _source(where: str) -> str:
    """The name of a row's file or data set."""
    return where.rpartition(", ")[0]
