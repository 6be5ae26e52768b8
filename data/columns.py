# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Rows of tokens, and the columns that say which of them are learnt."""

import logging
from collections.abc import Iterable
from typing import Any

import torch

logger = logging.getLogger(__name__)

_MASKS = ("maskable", "assistant_masks", "completion_mask")
_OF_TOKENS = ("attention_mask", "labels", *_MASKS, "document_ids", "token_type_ids")
TOKEN_COLUMNS = ("input_ids", *_OF_TOKENS, "prompt_length")
_LEARNT = "say what is learnt with `labels` (-100 elsewhere) or `completion_mask`"
# Columns that would be lost in any row, and what to do about them
REFUSED = {
    **dict.fromkeys(("special_tokens_mask", "loss_mask", "prompt_mask", "labels_mask"), _LEARNT),
    **dict.fromkeys(
        ("loss_weights", "weight", "weights", "sample_weight"),
        "the objective sets the weights itself, so leave the column out",
    ),
    "position_ids": "positions are counted from `attention_mask` and `document_ids`",
    "seq_lengths": "give `document_ids`, the number of every token's document",
    "inputs_embeds": "give `input_ids`",
}


def read_columns(row: dict[str, Any], where: str, mask_token_id: int) -> dict[str, torch.Tensor]:
    """
    The tokens of a row without its padding, and which of them may be masked and learnt.

    Args:
        row (`dict`): `input_ids` and, optionally, further lists or tensors with a number for each token:
            `attention_mask` is 0 on padding; a token is learnt if `labels` is not -100 and `maskable`,
            `assistant_masks` and `completion_mask` are not 0; `document_ids` are numbers of packed documents. The
            first `prompt_length` (`int`) tokens that are not padding are not learnt.
        where (`str`): The name of the row in errors.
        mask_token_id (`int`): Id of [MASK], which rows must not contain.

    Returns:
        `dict`: `input_ids`, int64, `maskable`, bool, and `document_ids`, int64, if there are any, each `(length,)`.

    Raises:
        ValueError: Columns contradict one another, do not fit the tokens or would be lost, or nothing is learnt.
    """
    refuse(row, REFUSED, where)
    if row.get("input_ids") is None:
        raise ValueError(f"{where} has no `input_ids`; it has {', '.join(row) or 'nothing'}.")
    tokens = _integers(row["input_ids"], "input_ids", where)
    if tokens.ndim != 1:
        raise ValueError(f"{where}: `input_ids` has shape {tuple(tokens.shape)}; it must be one row of tokens.")
    if (tokens < 0).any():
        raise ValueError(f"{where} has the token {int(tokens.min())}; tokens are counted from 0.")
    found = {}
    for name in _OF_TOKENS:
        if row.get(name) is not None:
            found[name] = _integers(row[name], name, where)
            if found[name].shape != tokens.shape:
                raise ValueError(f"{where} has {len(tokens)} tokens and `{name}` of shape {tuple(found[name].shape)}.")
    if "attention_mask" in found:
        real = _mask(found, "attention_mask", where)
        tokens, found = tokens[real], {name: values[real] for name, values in found.items()}
    if found.pop("token_type_ids", tokens * 0).any():
        raise ValueError(f"{where} has `token_type_ids` that are not 0; the model has no types of tokens.")
    maskable = _learnt(found, tokens, where) & _behind_prompt(row.get("prompt_length"), tokens, where)
    if (tokens == mask_token_id).any():
        raise ValueError(f"{where} holds the mask token ({mask_token_id}); give clean tokens.")
    if not maskable.any():
        masks = [f"`{name}`" for name in ("assistant_masks", "completion_mask") if name in found]
        hint = f" Is {masks[0]} from a chat template without a generation block?" if masks else ""
        raise ValueError(f"{where} has no maskable token, so there is nothing to learn.{hint}")
    documents = {"document_ids": found["document_ids"]} if "document_ids" in found else {}
    return {"input_ids": tokens, "maskable": maskable, **documents}


def refuse(row: dict[str, Any], lost: dict[str, str], where: str) -> None:
    """Raises a ValueError if the row has a column of `lost`, whose values say what to do. Empty ones lose nothing."""
    for name, fix in lost.items():
        value = row.get(name)
        if value is not None and not (isinstance(value, str | list | dict) and not value):
            raise ValueError(f"{where} has `{name}`, which would be lost; {fix}.")


def says_what_is_learnt(row: dict[str, Any]) -> bool:
    """Whether a row of tokens has columns that say which tokens are learnt."""
    return any(row.get(name) is not None for name in ("labels", *_MASKS, "prompt_length"))


def _learnt(found: dict[str, torch.Tensor], tokens: torch.Tensor, where: str) -> torch.Tensor:
    maskable = torch.ones_like(tokens, dtype=torch.bool)
    for name in _MASKS:
        if name in found:
            maskable &= _mask(found, name, where)
    if "labels" in found:
        labels = found["labels"]
        wrong = ((labels != -100) & (labels != tokens)).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"{where}: token {wrong[0] + 1} is {int(tokens[wrong[0]])}, and its label {int(labels[wrong[0]])}; "
                "labels must be the tokens themselves, at their own places, and -100 where nothing is learnt."
            )
        maskable &= labels != -100
    return maskable


def _behind_prompt(length: Any, tokens: torch.Tensor, where: str) -> torch.Tensor:
    length = 0 if length is None else length
    if isinstance(length, torch.Tensor) and length.numel() == 1:
        length = length.item()
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= len(tokens):
        raise ValueError(
            f"{where}: `prompt_length` is {length!r}; it must be a number of tokens, from 0 to the row's "
            f"{len(tokens)}."
        )
    return torch.arange(len(tokens)) >= length


def _integers(values: Any, name: str, where: str) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:  # texts, ragged lists, numbers beyond int64
        raise ValueError(f"{where}: `{name}` does not hold integers: {error}.") from error
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"{where}: `{name}` holds {tensor.dtype} numbers; it must hold integers.")
    return tensor.long()


def _mask(found: dict[str, torch.Tensor], name: str, where: str) -> torch.BoolTensor:
    values = found[name]
    wrong = values[(values != 0) & (values != 1)]
    if len(wrong):
        raise ValueError(f"{where}: `{name}` holds {int(wrong[0])}; it must hold 0 and 1.")
    return values != 0


class UnusedColumns:
    """Warns in the log, once for each name, of columns that are not used."""

    def __init__(self):
        self._seen: set[str] = set()

    def note(self, row: dict[str, Any], used: Iterable[str], where: str) -> None:
        """Warns of the columns of `row` that are not in `used`; `where` is the name of the rows in the log."""
        unused = [name for name in row if name not in self._seen and name not in used]
        if unused:
            self._seen.update(unused)
            logger.warning("%s: not used: %s.", where, ", ".join(map(str, unused)))
