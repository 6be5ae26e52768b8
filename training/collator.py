# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The masked diffusion objective: a collator that masks tokens and weights them, for any Trainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data import TOKEN_COLUMNS, UnusedColumns, read_columns
from ..objective.masking import Mask, block_ids, draw_mask, split_documents
from ..objective.seeds import seeded_generator


@dataclass(eq=False)
class MaskedDiffusionCollator:
    """
    Pads a batch of clean sequences to one length and masks them for the diffusion loss.

    In a sequence with L maskable tokens, k are replaced by [MASK], with k uniform in 1..L. Every maskable token gets a
    label; the masked ones weigh L/k and the others 0, so that the loss of `LoopMDMForMaskedLM` is an unbiased estimate
    of the negative ELBO in nats per maskable token. The k of a batch are spread evenly from one random offset, which
    lowers the variance of the loss.

    A block-causal model learns as it decodes: one block of each sequence (or packed document), drawn uniformly, is
    masked; it sees the earlier blocks clean, and does not see the later ones. With B blocks and L maskable tokens in
    the drawn one, the masked tokens weigh B L/k, and the loss is again unbiased.

    Args:
        mask_token_id (`int`): Id of [MASK].
        pad_token_id (`int`, *optional*): Id that fills short rows. It may be an end token's, since padding is neither
            seen nor learnt; by default it is any id but [MASK]'s.
        seed (`int`, defaults to 0): Seed of the noise.
        block_size (`int`, *optional*): The model's `config.attention_block_size`.
        mask_ratio (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
            Range that k/L is drawn from. With a narrower range the loss is the mean over it, and not the NELBO.
        complementary (`bool`, defaults to `False`):
            Each sequence gives two rows: one with its mask, and one with all its other maskable tokens masked, so that
            every token is learnt. A sequence that is masked entirely is its own complement.
        learn_padding (`bool`, defaults to `False`):
            Learn the tokens that fill short rows: filled with end tokens, they teach a model to end its answers
            (LLaDA).
        max_length (`int`, *optional*): Longest sequence allowed, e.g. `config.max_position_embeddings`.

    Features are dicts with `input_ids` (the clean tokens) and `index` (the place in the run, see [`ExampleStream`],
    which with the seed decides the noise). Optional are `attention_mask` (0 on padding), columns that say what is
    learnt (`labels`, -100 elsewhere; `maskable`, `assistant_masks`, `completion_mask`, 0 elsewhere; `prompt_length`,
    the number of tokens at the start that stay visible and are not learnt), and `document_ids` (ids of packed
    documents); see [`~loopmdm.data.read_columns`]. Padding is removed, and every batch is padded to its own length.

    A call returns `input_ids`, `labels`, `attention_mask` and, for packed rows, `document_ids`, int64, and
    `loss_weights`, float32, each of shape `(batch_size, sequence_length)`. It raises a ValueError for examples without
    anything to learn, and for columns that would change what is learnt but are not read; the log names, once, those
    that have no effect.
    """

    mask_token_id: int
    pad_token_id: int | None = None
    seed: int = 0
    block_size: int | None = None
    mask_ratio: tuple[float, float] = (0.0, 1.0)
    complementary: bool = False
    learn_padding: bool = False
    max_length: int | None = None

    def __post_init__(self):
        low, high = self.mask_ratio
        self.mask_ratio = low, high  # a list too, so that identities of runs compare it
        if not 0 <= low < high <= 1:
            raise ValueError(f"`mask_ratio` is {low, high}; it must be a range within 0 and 1, such as (0.1, 0.9).")
        if self.learn_padding and self.pad_token_id is None:
            raise ValueError("`learn_padding` needs a `pad_token_id`, the token to learn.")
        if self.pad_token_id == self.mask_token_id:
            raise ValueError(f"`pad_token_id` is the mask token ({self.mask_token_id}); name another token.")
        self._filler = int(self.mask_token_id == 0) if self.pad_token_id is None else self.pad_token_id
        self._unused = UnusedColumns()

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = self._read_all(features, self.learn_padding)
        batch = self._stack(rows, ("input_ids", "labels", "attention_mask", "document_ids"))
        generator = seeded_generator(self.seed, "mask rate", rows[0]["index"])
        offset = torch.rand((), generator=generator, dtype=torch.float32).item()
        masks = [self._draw(row, (offset + i / len(rows)) % 1.0) for i, row in enumerate(rows)]
        if self.complementary:
            masks += [[mask.complement() for mask in parts] for parts in masks]
            batch = {name: torch.cat((tensor, tensor)) for name, tensor in batch.items()}
        weights = torch.zeros(batch["input_ids"].shape, dtype=torch.float32)
        for row, parts in zip(weights, masks, strict=True):
            for mask in parts:
                row[mask.positions] = mask.weight
        batch["input_ids"] = batch["input_ids"].masked_fill(weights != 0, self.mask_token_id)
        return {**batch, "loss_weights": weights}

    def clean(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        The same examples, padded but not masked: `input_ids`, `attention_mask` and, for packed rows, `document_ids`,
        int64, and `maskable`, bool, each of shape `(batch_size, sequence_length)`, as arguments of
        [`~loopmdm.evaluation.nelbo`].
        """
        rows = self._read_all(features, learn_padding=False)  # the fill depends on the longest row, so it is no text
        return self._stack(rows, ("input_ids", "attention_mask", "maskable", "document_ids"))

    @staticmethod
    def _stack(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([row[name] for row in rows]) for name in names if name in rows[0]}

    def _read_all(self, features: Sequence[dict[str, Any]], learn_padding: bool) -> list[dict[str, Any]]:
        """The examples, checked and padded to the length of the longest."""
        rows = [self._read(feature) for feature in features]
        packed = [row["index"] for row in rows if "document_ids" in row]
        if packed and len(packed) != len(rows):
            raise ValueError(f"Example {packed[0]} has `document_ids`, and others of its batch have none.")
        length = max(len(row["input_ids"]) for row in rows)
        return [self._fill(row, length, learn_padding) for row in rows]

    def _read(self, feature: dict[str, Any]) -> dict[str, Any]:
        """One example as tensors, checked."""
        if "index" not in feature:
            raise ValueError(
                "An example has no `index`, its place in the run, which its noise depends on; wrap the data set "
                "(`ExampleStream(dataset, num_examples, seed)`, or of a stream `StreamedExamples(lambda: dataset)`), "
                "and set `remove_unused_columns=False`."
            )
        index = int(feature["index"])
        where = f"Example {index}"
        if isinstance(feature.get("row"), int):
            where += f" (row {feature['row'] + 1} of the data)"
        self._unused.note(feature, ("index", "row", *TOKEN_COLUMNS), "Columns of the examples")
        row = read_columns(feature, where, self.mask_token_id)
        length = len(row["input_ids"])
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"{where} has {length} tokens, more than the {self.max_length} allowed.")
        return {"index": index, **row}

    def _fill(self, row: dict[str, Any], length: int, learn_padding: bool) -> dict[str, Any]:
        """Pads a row to `length`, and labels its maskable tokens."""
        missing = length - len(row["input_ids"])

        def fill(tensor: torch.Tensor, value: int | bool) -> torch.Tensor:
            return torch.nn.functional.pad(tensor, (0, missing), value=value)

        tokens = fill(row["input_ids"], self._filler)
        maskable = fill(row["maskable"], learn_padding)
        filled = {
            "index": row["index"],
            "input_ids": tokens,
            "maskable": maskable,
            "labels": tokens.masked_fill(~maskable, -100),
            "attention_mask": fill(torch.ones_like(row["input_ids"]), int(learn_padding)),
        }
        if "document_ids" in row:
            filled["document_ids"] = fill(row["document_ids"], int(row["document_ids"][-1]))
        return filled

    def _draw(self, row: dict[str, Any], uniform: float) -> list[Mask]:
        """The masks of a row: one, or, with blocks, one for each packed document, since each has its own blocks."""
        generator = seeded_generator(self.seed, "mask", row["index"])
        documents = row.get("document_ids", torch.zeros_like(row["input_ids"]))
        blocks = block_ids(row["attention_mask"][None], documents[None], self.block_size)[0]
        masks = []
        for parts in split_documents(row["maskable"], blocks):
            masks.append(draw_mask(parts, uniform, generator, self.mask_ratio))
            uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
        return masks
