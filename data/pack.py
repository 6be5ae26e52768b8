# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tokenised documents packed into rows."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch


def pack_documents(
    documents: Iterable[list[int]], length: int, end_token_id: int | None = None, isolate: bool = False
) -> Iterator[dict[str, Any]]:
    """
    Packs tokenised documents one behind the other into rows of `length` tokens; what is left at the end makes a short
    row.

    Args:
        documents: Lists of token ids. Empty ones are left out.
        length (`int`): Tokens per row. A document that is longer, or does not fit into what is left of a row, goes on
            in the next one.
        end_token_id (`int`, *optional*): Put behind every document that does not end with it.
        isolate (`bool`, defaults to `False`):
            Whether documents in one row are kept from seeing each other (`document_ids`). Otherwise attention runs
            over the whole row, as is usual in pretraining.
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
        del tokens[:whole], ids[:whole]  # at once: a document may be a book
    if tokens:
        yield row(0)
