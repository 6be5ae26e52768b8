# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Texts to evaluate a model on: read from files and data sets, tokenised, and cut into windows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..data import check_tokens, encode, encode_answer, encode_with_bytes, first_text, read_rows, spread, text_of
from ..data.encode import ANSWER_NAMES
from ..generation_utils import check_argument


@dataclass
class Text:
    """
    A tokenised text.

    Args:
        name (`str`): Its name in errors and results.
        input_ids (`list[int]`): Its tokens.
        maskable (`list[bool]`): Which tokens to score; the others are given.
        num_bytes (`list[int]`, *optional*): UTF-8 bytes that each token stands for; None if they are not known (slow
            tokenizers, conversations, texts to fill in).
    """

    name: str
    input_ids: list[int]
    maskable: list[bool]
    num_bytes: list[int] | None = None


@dataclass
class Window:
    """
    The part of a text that goes through the model at once.

    Args:
        text (`int`): Index of the text.
        start (`int`): Position in the text of the window's first token.
        input_ids (`list[int]`): The window's tokens.
        maskable (`list[bool]`): Which tokens this window scores. Every token of a text is scored in one window.
        num_bytes (`int`, *optional*): UTF-8 bytes of the scored tokens.
    """

    text: int
    start: int
    input_ids: list[int]
    maskable: list[bool]
    num_bytes: int | None


def make_windows(
    texts: Sequence[Text], length: int, stride: int | None = None, max_windows: int | None = None
) -> list[Window]:
    """
    Cuts texts into windows. The first window of a text scores its first `length` tokens; each further window scores
    the next `stride` tokens and sees the `length - stride` tokens before them. By the chain rule, the sum over the
    windows is a bound on the negative log-likelihood of the text, like one pass over all of it, but with less context.

    Args:
        texts (`list[Text]`): The texts.
        length (`int`): Tokens of a window.
        stride (`int`, *optional*, defaults to `length`): Tokens that each further window scores, 1 to `length`. A
            smaller stride gives tokens more context, and costs more passes.
        max_windows (`int`, *optional*): Return only this many windows, evenly spread.
    """
    stride = length if stride is None else stride
    if length < 1:
        raise ValueError(f"The window is {length} tokens long; it must be at least 1.")
    if not 1 <= stride <= length:
        raise ValueError(f"The stride is {stride}; it must be 1 to the length of the window ({length}).")
    if max_windows is not None:
        check_argument("max_windows", max_windows, int, 1)
    windows = []
    for index, text in enumerate(texts):
        fresh = 0
        while fresh < len(text.input_ids):
            start = max(0, fresh - (length - stride))
            end = min(start + length, len(text.input_ids))
            maskable = [position >= fresh and text.maskable[position] for position in range(start, end)]
            if any(maskable):
                size = None
                if text.num_bytes is not None:
                    size = sum(text.num_bytes[start + i] for i, scored in enumerate(maskable) if scored)
                windows.append(Window(index, start, text.input_ids[start:end], maskable, size))
            fresh = end
    return spread(windows, max_windows or len(windows))


def pad_windows(windows: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    `input_ids` and `attention_mask`, int64, and `maskable`, bool, each `(len(windows), length of the longest)`, padded
    on the right.
    """
    input_ids, attention_mask = pad([window.input_ids for window in windows], "right")
    maskable, _ = pad([window.maskable for window in windows], "right")
    return input_ids, attention_mask, maskable.bool()


def batches_by_length(
    rows: Sequence[Sequence[int]], batch_size: int | None, max_tokens: int | None = None, new: int = 0
) -> Iterator[list[int]]:
    """
    Indices of `rows` in batches of similar length, which need little padding, the shortest rows first. Empty rows get
    batches of their own, since among others they would be nothing but padding.

    Args:
        rows: The tokens of every row.
        batch_size (`int`, *optional*): Most rows of a batch.
        max_tokens (`int`, *optional*): Most tokens of a batch, including padding and `new` tokens per row. A row with
            more tokens gets a batch of its own.
        new (`int`, defaults to 0): Tokens to be generated for every row.
    """
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        is_full = len(batch) == batch_size or (batch and not len(rows[batch[0]]) and len(rows[index]) > 0)
        if max_tokens is not None:
            is_full = is_full or (len(batch) + 1) * (len(rows[index]) + new) > max_tokens
        if is_full and batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(rows: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64, each `(len(rows), length of the longest)`; `side` is left or right."""
    ids = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    input_ids, mask = (pad_sequence(part, batch_first=True, padding_side=side) for part in (ids, ones))
    return input_ids, mask


def read_texts(
    source: str | Path,
    tokenizer: Any,
    config: Any,
    task: str = "texts",
    text_column: str = "text",
    documents: str = "file",
    dataset: dict[str, Any] | None = None,
    limit: int | None = None,
) -> list[Text]:
    """
    Reads and tokenises texts, without special tokens.

    Args:
        source: A text file (`.txt`), a file with one JSON object per line (`.jsonl`), a `.parquet` file, or the name
            or folder of a data set that the `datasets` library loads.
        tokenizer: The model's tokenizer.
        config ([`LoopMDMConfig`]): The model's configuration.
        task (`"texts"`, `"answers"` or `"fill"`, defaults to `"texts"`):
            `"texts"` scores every token. `"answers"` scores answers given prompts, as
            [`~loopmdm.training.encode_answer`] reads them. `"fill"` scores the tokens in place of mask tokens; its
            rows are a text with mask tokens and the complete text, separated by white space on a line (`.txt`), or as
            `masked` and `text` (`.jsonl`, data sets).
        text_column (`str`, defaults to `"text"`): The field of JSON objects and data sets that holds the text.
        documents (`"file"`, `"blank_line"` or `"line"`, defaults to `"file"`): What separates the texts of a `.txt`.
        dataset (`dict`, *optional*): Further arguments of `datasets.load_dataset` (`name`, `split`, ...).
        limit (`int`, *optional*): Read only the first `limit` texts.

    Raises:
        ValueError: A line or example (named by its number) that is damaged, has tokens that the model does not have or
            mask tokens that do not belong there, or has nothing to score (empty `"texts"` are allowed).
    """
    readers = {"texts": _read_text, "answers": _read_answer, "fill": _read_masked}
    if task not in readers:
        raise ValueError(f"The task is {task!r}; choose one of {', '.join(readers)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"The limit is {limit} texts; it must be at least 1.")
    rows = read_rows(source, "line" if task == "fill" else documents, dataset)
    texts = []
    for where, row in islice(rows, limit):
        text = readers[task](where, row, tokenizer, config, text_column)
        if not any(text.maskable) and task != "texts":  # data sets of texts hold empty ones, which add nothing
            raise ValueError(f"{where} has no token to score; it is too short.")
        check_tokens(text.input_ids, config.vocab_size, where)
        if config.mask_token_id in text.input_ids:
            fix = "" if task == "fill" else '; the task "fill" scores what stands for mask tokens'
            raise ValueError(f"{where} holds the mask token ({config.mask_token_id}); give clean text{fix}.")
        texts.append(text)
    return texts


def _read_text(where: str, row: Any, tokenizer: Any, config: Any, text_column: str) -> Text:
    ids, num_bytes = encode_with_bytes(tokenizer, text_of(row, text_column, where), where)
    return Text(where, ids, [True] * len(ids), num_bytes)


def _read_answer(where: str, row: Any, tokenizer: Any, config: Any, text_column: str) -> Text:
    example = encode_answer(tokenizer, row, where)
    ids, prompt_length = example["input_ids"], example["prompt_length"]
    num_bytes = None
    if row.get("messages") is None and not any(isinstance(row.get(name), list) for name in ANSWER_NAMES):
        _, num_bytes = encode_with_bytes(tokenizer, first_text(row, ANSWER_NAMES, where), where)
    if num_bytes is not None:  # the bytes of the prompt are not needed, and an end token has none
        num_bytes = [0] * prompt_length + num_bytes
        num_bytes += [0] * (len(ids) - len(num_bytes))
    return Text(where, list(ids), [position >= prompt_length for position in range(len(ids))], num_bytes)


def _read_masked(where: str, row: Any, tokenizer: Any, config: Any, text_column: str) -> Text:
    if isinstance(row, str):
        fields = row.split()
        if len(fields) != 2:
            raise ValueError(f"{where} has {len(fields)} fields; give two, the text with mask tokens and without.")
        masked, text = fields
    else:
        masked, text = text_of(row, "masked", where), text_of(row, text_column, where)
    masked_ids, ids = encode(tokenizer, masked, where), encode(tokenizer, text, where)
    check_filled(masked_ids, ids, config.mask_token_id, where)
    maskable = [token == config.mask_token_id for token in masked_ids]
    if not any(maskable):
        raise ValueError(f"{where} holds no mask token ({config.mask_token_id}), so there is nothing to fill in.")
    return Text(where, ids, maskable)


def check_filled(masked: Sequence[int], ids: Sequence[int], mask_token_id: int, where: str) -> None:
    """Raises a ValueError unless the tokens `ids` are those of `masked` with its mask tokens filled in."""
    if len(masked) != len(ids):
        raise ValueError(
            f"{where}: {len(masked)} tokens with mask tokens, but {len(ids)} in the complete text, which has to hold "
            "one token for each mask token and to repeat the others."
        )
    for position, (given, token) in enumerate(zip(masked, ids, strict=True), start=1):
        if given not in (mask_token_id, token):
            raise ValueError(f"{where}: token {position} is {given} with mask tokens, and {token} without.")
