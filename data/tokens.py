# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tokenisation of texts, and checks of tokens."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

# Most characters that are tokenised at once; a tokenizer takes over a hundred times their memory.
_PIECE = 2**20


def encode(tokenizer: Any, text: str, where: str) -> list[int]:
    """Tokens of a text, without special ones; `where` is its name in errors."""
    return [token for piece in _pieces(text) for token in tokenize(tokenizer, piece, where)["input_ids"]]


def encode_given(tokenizer: Any, text: str, where: str) -> list[int]:
    """
    Tokens of a text to continue or to fill in: with the special tokens that the tokenizer adds, but without the end
    token that some put behind every text, since nothing comes after an end.
    """
    ids = list(tokenize(tokenizer, text, where, add_special_tokens=True)["input_ids"])
    if ids[-1:] == [tokenizer.eos_token_id]:
        own = list(tokenize(tokenizer, text, where)["input_ids"])
        ids = ids[:-1] if ids[-1 - len(own) : -1] == own else ids
    return ids


def encode_with_bytes(tokenizer: Any, text: str, where: str) -> tuple[list[int], list[int] | None]:
    """
    The tokens of [`encode`], and the number of UTF-8 bytes of each: those up to the first character of the next token,
    so that they add up to the bytes of the text, including white space that the tokenizer drops. None instead for a
    tokenizer without offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        return encode(tokenizer, text, where), None
    ids: list[int] = []
    sizes: list[int] = []
    for piece in _pieces(text):
        encoded = tokenize(tokenizer, piece, where, return_offsets_mapping=True)
        # Tokens of parts of one character share its offsets, and all but one of them get no bytes.
        starts = [0, *(start for start, _ in encoded["offset_mapping"][1:]), len(piece)]
        sizes += [len(piece[a:b].encode()) for a, b in pairwise(starts)][: len(encoded["input_ids"])]
        ids += encoded["input_ids"]
    return ids, sizes


def tokenize(tokenizer: Any, text: str, where: str, **options: Any) -> Any:
    """Calls the tokenizer on a text. Raises a ValueError that names `where` if it cannot read the text."""
    try:
        return tokenizer(text, verbose=False, **{"add_special_tokens": False, **options})
    except Exception as error:  # the tokenizers library raises nothing more specific for unknown characters
        raise ValueError(f"The tokenizer cannot read {where}: {error}") from error


def _pieces(text: str) -> Iterator[str]:
    """The text in parts of bounded size, cut before a space, as tokenizers do."""
    start = 0
    while len(text) - start > _PIECE:
        limit = start + _PIECE
        cut = max(text.rfind(" ", start + 1, limit), text.rfind("\n", start + 1, limit))
        yield text[start : limit if cut < 0 else cut]
        start = limit if cut < 0 else cut
    yield text[start:]


def check_tokens(ids: list[int], vocab_size: int, where: str, mask_token_id: int | None = None) -> list[int]:
    """
    Returns the tokens. Raises a ValueError if one is outside a vocabulary of `vocab_size`, or is the mask token, which
    clean texts must not contain.
    """
    wrong = next((token for token in (max(ids, default=0), min(ids, default=0)) if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ValueError(
            f"{where} gives the token {wrong}, outside the model's vocabulary of {vocab_size}; is it the right "
            "tokenizer? If tokens were added to it, call `model.resize_token_embeddings(len(tokenizer))` first."
        )
    if mask_token_id in ids:
        raise ValueError(f"{where} holds the mask token ({mask_token_id}); give clean text.")
    return ids
