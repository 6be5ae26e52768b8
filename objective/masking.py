# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Masks and their weights, for the collator of training, the NELBO and the dynamics.

A sequence consists of B blocks: a single one, or those that a block-causal model decodes one after the other. A mask
hides k of the L maskable tokens of one block. If the block and k are drawn uniformly, B L/k times the sum of -log p of
the hidden tokens is an unbiased estimate of the NELBO of the sequence.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from ..loop_context import count_positions, document_starts

# Block ids count up within a document. Those of the next document start this much higher.
_DOCUMENT = 2**32


@dataclass
class Mask:
    """
    Masked tokens of one block of a sequence.

    Args:
        positions (`torch.LongTensor` of shape `(k,)`): The masked tokens, in random order.
        block (`torch.LongTensor` of shape `(L,)`): The maskable tokens of the block.
        num_blocks (`int`): B, the number of blocks that this one was drawn from.
    """

    positions: torch.LongTensor
    block: torch.LongTensor
    num_blocks: int

    @property
    def share(self) -> float:
        """k/L, the timestep."""
        return len(self.positions) / len(self.block)

    @property
    def weight(self) -> float:
        """B L/k, the weight of every masked token."""
        return self.num_blocks * len(self.block) / len(self.positions)

    def complement(self) -> "Mask":
        """A mask of the rest of the block, or, if the block is masked entirely, of all of it again."""
        rest = self.block[~torch.isin(self.block, self.positions)]
        return Mask(self.block if len(rest) == 0 else rest, self.block, self.num_blocks)


def draw_mask(
    blocks: list[torch.Tensor], uniform: float, generator: torch.Generator, ratio: tuple[float, float] = (0.0, 1.0)
) -> Mask:
    """
    Draws a mask. The number `uniform`, from 0 to 1, decides both the block and k, so that evenly spread numbers spread
    both evenly. k/L lies in the range `ratio`. `generator` draws the k tokens.
    """
    place = uniform * len(blocks)
    block = blocks[min(int(place), len(blocks) - 1)]
    low, high = ratio
    share = low + (high - low) * (place - int(place))
    return _mask(blocks, block, min(int(share * len(block)), len(block) - 1) + 1, generator)


def draw_share(blocks: list[torch.Tensor], share: float, generator: torch.Generator) -> Mask:
    """Draws a mask of a given share of a block, at least one token; `generator` also draws the block."""
    block = blocks[int(torch.randint(len(blocks), (), generator=generator))]
    return _mask(blocks, block, max(1, round(share * len(block))), generator)


def _mask(blocks: list[torch.Tensor], block: torch.Tensor, count: int, generator: torch.Generator) -> Mask:
    return Mask(block[torch.randperm(len(block), generator=generator)[:count]], block, len(blocks))


def block_ids(real: torch.Tensor, documents: torch.Tensor, block_size: int | None) -> torch.Tensor:
    """
    The id of every token's block, `(num_sequences, length)` int64. Blocks are counted within each document, and
    documents never share ids. Without block-causal attention (`block_size=None`) all ids are 0.
    """
    if block_size is None:
        return torch.zeros_like(documents)
    numbers = document_starts(documents).cumsum(-1)
    return count_positions(real, documents) // block_size + numbers * _DOCUMENT


def split_blocks(maskable: torch.Tensor, blocks: torch.Tensor) -> list[torch.Tensor]:
    """The maskable positions of each block of a sequence, given `maskable` and `blocks` of shape `(length,)`."""
    positions = maskable.nonzero().squeeze(-1)
    _, sizes = blocks[positions].unique_consecutive(return_counts=True)  # the ids of blocks never fall
    return list(positions.split(sizes.tolist()))


def split_documents(maskable: torch.Tensor, blocks: torch.Tensor) -> list[list[torch.Tensor]]:
    """The result of [`split_blocks`] for each document, in order."""
    parts = split_blocks(maskable, blocks)
    return [list(group) for _, group in itertools.groupby(parts, lambda part: int(blocks[part[0]]) // _DOCUMENT)]


@dataclass
class CleanRows:
    """
    Clean sequences on the CPU, checked, each of shape `(num_sequences, length)`.

    Args:
        input_ids (`torch.LongTensor`): Tokens.
        real (`torch.BoolTensor`): False on padding.
        maskable (`torch.BoolTensor`): The tokens that may be masked.
        documents (`torch.LongTensor`): Ids of packed documents.
        blocks (`torch.LongTensor`): As [`block_ids`] gives them.
        packed (`bool`): Whether there are several documents to keep apart.
    """

    input_ids: torch.LongTensor
    real: torch.BoolTensor
    maskable: torch.BoolTensor
    documents: torch.LongTensor
    blocks: torch.LongTensor
    packed: bool

    def split(self, row: int) -> list[torch.Tensor]:
        """The maskable positions of each block of a row."""
        return split_blocks(self.maskable[row], self.blocks[row])


def clean_rows(
    config: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    maskable: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> CleanRows:
    """
    Checks sequences whose `maskable` tokens (by default all but padding) are going to be masked. Raises a ValueError
    if shapes differ, a sequence has no maskable token, or one of them is the mask token.
    """
    if input_ids.ndim != 2 or len(input_ids) == 0:
        raise ValueError(f"`input_ids` has shape {tuple(input_ids.shape)}; it needs (num_sequences > 0, length).")
    for name, tensor in (("attention_mask", attention_mask), ("maskable", maskable), ("document_ids", document_ids)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}; `input_ids` has {tuple(input_ids.shape)}.")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`input_ids` is {input_ids.dtype}; it must be int64 or int32.")
    input_ids = input_ids.cpu().long()
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.cpu() != 0
    maskable = real if maskable is None else real & maskable.cpu().bool()
    empty = (~maskable.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"Sequences {empty[:5]} have no maskable token, so there is nothing to predict.")
    if (input_ids[maskable] == config.mask_token_id).any():
        raise ValueError(f"`input_ids` holds the mask token ({config.mask_token_id}); give clean tokens.")
    documents = torch.zeros_like(input_ids) if document_ids is None else document_ids.cpu()
    blocks = block_ids(real, documents, config.attention_block_size)
    return CleanRows(input_ids, real, maskable, documents, blocks, document_ids is not None)
