# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What is masked and how it is weighed. The collator of training, the NELBO and the dynamics draw their masks here.

A sequence falls into B blocks: one, or those that a block-causal model decodes one after the other. A mask hides k of
the L maskable tokens of one block. Weighed by B L/k, the sum of -log p of the hidden tokens estimates the NELBO of the
sequence without bias when block and k are drawn uniformly.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..loop_context import document_starts

# Block ids count up within a document; those of the next document begin this much higher.
_DOCUMENT = 2**32


@dataclass
class Mask:
    """
    Masked tokens of one block of a sequence.

    Args:
        positions (`torch.LongTensor` of shape `(k,)`): The masked tokens, in no order.
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
        """The rest of the block; of a block that is masked whole, all of it again."""
        rest = self.block[~torch.isin(self.block, self.positions)]
        return Mask(self.block if len(rest) == 0 else rest, self.block, self.num_blocks)


def draw_mask(
    blocks: list[torch.Tensor], uniform: float, generator: torch.Generator, ratio: tuple[float, float] = (0.0, 1.0)
) -> Mask:
    """
    A mask by one number `uniform`, from 0 to 1: it names the block and, by its place within it, k, so that evenly
    spread numbers spread both. k/L comes from the range `ratio`. `generator` draws which tokens are masked.
    """
    place = uniform * len(blocks)
    block = blocks[min(int(place), len(blocks) - 1)]
    low, high = ratio
    share = low + (high - low) * (place - int(place))
    return _mask(blocks, block, min(int(share * len(block)), len(block) - 1) + 1, generator)


def draw_share(blocks: list[torch.Tensor], share: float, generator: torch.Generator) -> Mask:
    """A mask of a given share of a block, at least one token; `generator` draws the block too."""
    block = blocks[int(torch.randint(len(blocks), (), generator=generator))]
    return _mask(blocks, block, max(1, round(share * len(block))), generator)


def _mask(blocks: list[torch.Tensor], block: torch.Tensor, count: int, generator: torch.Generator) -> Mask:
    return Mask(block[torch.randperm(len(block), generator=generator)[:count]], block, len(blocks))


def block_ids(real: torch.Tensor, documents: torch.Tensor, block_size: int | None) -> torch.Tensor:
    """
    The block of every token, `(num_sequences, length)` int64, by position within each document; different documents
    never share a block. All 0 where attention is not block-causal (`block_size=None`).
    """
    if block_size is None:
        return torch.zeros_like(documents)
    starts = document_starts(documents)
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    positions = positions - (positions * starts).cummax(-1).values
    return positions // block_size + starts.cumsum(-1) * _DOCUMENT


def split_blocks(maskable: torch.Tensor, blocks: torch.Tensor) -> list[torch.Tensor]:
    """The maskable positions of a sequence by block; `maskable` and `blocks` have the shape `(length,)`."""
    positions = maskable.nonzero().squeeze(-1)
    return [positions[blocks[positions] == block] for block in blocks[positions].unique()]


def split_documents(maskable: torch.Tensor, blocks: torch.Tensor) -> list[list[torch.Tensor]]:
    """The same for every document, in order: each has blocks of its own."""
    documents = blocks // _DOCUMENT
    return [split_blocks(maskable & (documents == document), blocks) for document in documents[maskable].unique()]


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
        """The maskable positions of a row by block."""
        return split_blocks(self.maskable[row], self.blocks[row])


def clean_rows(
    config: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    maskable: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> CleanRows:
    """
    Checks sequences, of which `maskable` (by default all real tokens) will be masked. Raises a ValueError where shapes
    differ, a sequence has nothing to mask, or what is to be masked is the mask token already.
    """
    if input_ids.ndim != 2 or len(input_ids) == 0:
        raise ValueError(
            f"`input_ids` has shape {tuple(input_ids.shape)}; it needs (num_sequences, length), at least one sequence."
        )
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
