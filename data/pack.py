# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tokenised documents packed into rows."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch


def pack_documents(
    documents: Iterable[list[int]], length: int, end_token_id: int | None = None, isolate: bool = False
) -> Iterator[dict[str, Any]]:
    """
    Packs tokenised documents, one after the other, into rows of `length` tokens; the last row may be shorter.

    Args:
        documents (`Iterable[list[int]]`): Token ids of each document. Empty ones are skipped.
        length (`int`): Tokens per row. A document that does not fit into the rest of a row continues in the next one.
        end_token_id (`int`, *optional*): Added to every document that does not end with it.
        isolate (`bool`, defaults to `False`):
            Add `document_ids`, which keep documents in one row from seeing each other. Otherwise attention is over the
            whole row, as is usual in pretraining.

    Returns:
        Iterator of `dict`: `input_ids` and, with `isolate`, `document_ids`, `(length,)` int64.
    """
    if length < 1:
        raise ValueError(f"`length` is {length}; it must be at least 1.")
    tokens, ids = [], []

    def row(start: int) -> dict[str, Any]:
        packed = {"input_ids": torch.tensor(tokens[start : start + length])}
        if isolate:
            packed["document_ids"] = torch.tensor(ids[start : start + length])
        return packed

    for document, part in enumerate(documents):
        if part and end_token_id is not None and part[-1] != end_token_id:
            part = [*part, end_token_id]
        tokens.extend(part)
        ids.extend([document] * len(part))
        whole = len(tokens) // length * length
        for start in range(0, whole, length):
            yield row(start)
        del tokens[:whole], ids[:whole]  # once per document, which may be a book
    if tokens:
        yield row(0)
