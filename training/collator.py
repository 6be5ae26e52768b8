# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The masked diffusion objective: a collator that masks tokens and weights them, for any Trainer."""

from collections.abc import Sequence
from typing import Any

import torch

from ..randomness import seeded_generator


class MaskedDiffusionCollator:
    """
    Pads a batch of clean sequences to one length and masks them for the diffusion loss.

    Of a sequence's L maskable tokens, k are replaced by [MASK], with k uniform in 1..L. Every maskable token gets a
    label; the masked ones weigh L/k and the others 0, so that `LoopMDMForMaskedLM`'s loss estimates the negative ELBO
    in nats per maskable token without bias. The k of a batch are spread evenly (one random offset), which lowers the
    variance of the loss.

    A block-causal model learns as it decodes: one block of each sequence (or packed document), drawn uniformly, is
    masked; earlier blocks are clean, later ones out of its sight. With B blocks and L maskable tokens in the one
    drawn, the masked tokens weigh B L/k, and the loss is again unbiased.

    Args:
        mask_token_id (`int`): Id of [MASK].
        pad_token_id (`int`, *optional*): Id that fills short rows; needed when lengths differ.
        seed (`int`, defaults to 0): Seed of the noise.
        block_size (`int`, *optional*): The model's `config.attention_block_size`.
        mask_ratio (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
            Range that k/L is drawn from. A narrower one is no NELBO any more, but the mean over that range.
        complementary (`bool`, defaults to `False`):
            Each sequence gives two rows, one with its mask and one with all other tokens masked, so that every token
            is learnt from every sequence. A sequence that is masked whole is its own complement.
        learn_padding (`bool`, defaults to `False`):
            Rows are filled with tokens to be learnt instead of padding: a model fine-tuned with end tokens as padding
            learns to end its answers (LLaDA).
        max_length (`int`, *optional*): Longest sequence allowed, e.g. `config.max_position_embeddings`.

    Features are dicts with `input_ids` (the clean tokens), `index` (place in the run, see [`ExampleStream`]; the noise
    derives from it and the seed), optionally `maskable` (bools of the same length) or `prompt_length` (the tokens at
    the start that stay visible and are not learnt), and `document_ids` (ids of packed documents). Other keys are left
    out. Returns `input_ids`, `labels`, `attention_mask` and, of packed rows, `document_ids`, int64, and
    `loss_weights`, float32, each of shape `(batch_size, sequence_length)`.
    """

    def __init__(
        self,
        mask_token_id: int,
        pad_token_id: int | None = None,
        seed: int = 0,
        block_size: int | None = None,
        mask_ratio: tuple[float, float] = (0.0, 1.0),
        complementary: bool = False,
        learn_padding: bool = False,
        max_length: int | None = None,
    ):
        low, high = mask_ratio
        if not 0 <= low < high <= 1:
            raise ValueError(f"`mask_ratio` is {mask_ratio}; it must be a range within 0 and 1, such as (0.1, 0.9).")
        if learn_padding and pad_token_id is None:
            raise ValueError("`learn_padding` needs a `pad_token_id`, the token to learn.")
        if pad_token_id == mask_token_id:
            raise ValueError(f"`pad_token_id` is the mask token ({mask_token_id}); name another token.")
        self.mask_token_id = mask_token_id
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.block_size = block_size
        self.mask_ratio = mask_ratio
        self.complementary = complementary
        self.learn_padding = learn_padding
        self.max_length = max_length

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = self._read_all(features)
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_token_id is None and any(len(row["input_ids"]) != length for row in rows):
            raise ValueError("Rows of different lengths need a `pad_token_id`.")
        rows = [self._fill(row, length) for row in rows]
        offset = torch.rand((), generator=seeded_generator(self.seed, "mask rate", rows[0]["index"])).item()
        masks, weights = zip(
            *(self._mask(row, (offset + i / len(rows)) % 1.0) for i, row in enumerate(rows)), strict=True
        )
        batch = {
            name: torch.stack([row[name] for row in rows])
            for name in ("input_ids", "labels", "attention_mask", "document_ids")
            if name in rows[0]
        }
        masked, weights = torch.stack(masks), torch.stack(weights)
        if self.complementary:
            others, weights_of_others = zip(
                *(self._complement(*parts) for parts in zip(rows, masks, weights, strict=True)), strict=True
            )
            batch = {name: torch.cat((tensor, tensor)) for name, tensor in batch.items()}
            masked = torch.cat((masked, torch.stack(others)))
            weights = torch.cat((weights, torch.stack(weights_of_others)))
        batch["input_ids"] = batch["input_ids"].masked_fill(masked, self.mask_token_id)
        return {**batch, "loss_weights": weights}

    def clean(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        The same examples padded but not masked: `input_ids`, `attention_mask` and, of packed rows, `document_ids`,
        int64, and `maskable`, bool, each of shape `(batch_size, sequence_length)`, as
        [`~loopmdm.evaluation.nelbo`] takes them.
        """
        rows = self._read_all(features)
        length = max(len(row["input_ids"]) for row in rows)
        rows = [self._fill(row, length) for row in rows]
        names = ("input_ids", "attention_mask", "maskable", "document_ids")
        return {name: torch.stack([row[name] for row in rows]) for name in names if name in rows[0]}

    def _read_all(self, features: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = [self._read(feature) for feature in features]
        packed = [row["index"] for row in rows if "document_ids" in row]
        if packed and len(packed) != len(rows):
            raise ValueError(f"Example {packed[0]} has `document_ids`, and others of its batch have none.")
        return rows

    def _read(self, feature: dict[str, Any]) -> dict[str, Any]:
        """One example as tensors, checked."""
        if "index" not in feature:
            raise ValueError(
                "An example has no `index`, its place in the run, which its noise derives from; wrap the data set in "
                "`ExampleStream` (or `StreamedExamples`), and set `remove_unused_columns=False`."
            )
        index = int(feature["index"])
        tokens = torch.as_tensor(feature["input_ids"], dtype=torch.long)
        if self.max_length is not None and len(tokens) > self.max_length:
            raise ValueError(f"Example {index} has {len(tokens)} tokens, more than the {self.max_length} allowed.")
        if (tokens == self.mask_token_id).any():
            raise ValueError(f"Example {index} holds the mask token ({self.mask_token_id}); give clean tokens.")
        maskable = torch.ones(len(tokens), dtype=torch.bool)
        if feature.get("maskable") is not None:
            maskable = self._same_length("maskable", feature, index, len(tokens)).bool()
        if feature.get("prompt_length") is not None:
            maskable = maskable & (torch.arange(len(tokens)) >= int(feature["prompt_length"]))
        if not maskable.any():
            raise ValueError(f"Example {index} has no maskable token, so there is nothing to learn.")
        row = {"index": index, "input_ids": tokens, "maskable": maskable}
        if feature.get("document_ids") is not None:
            row["document_ids"] = self._same_length("document_ids", feature, index, len(tokens)).long()
        return row

    @staticmethod
    def _same_length(name: str, feature: dict[str, Any], index: int, length: int) -> torch.Tensor:
        values = torch.as_tensor(feature[name])
        if values.shape != (length,):
            raise ValueError(f"Example {index} has {length} tokens and `{name}` of shape {tuple(values.shape)}.")
        return values

    def _fill(self, row: dict[str, Any], length: int) -> dict[str, Any]:
        """Brings a row to the batch's length, and labels what is maskable."""
        missing = length - len(row["input_ids"])

        def fill(tensor: torch.Tensor, value: int | bool) -> torch.Tensor:
            return torch.nn.functional.pad(tensor, (0, missing), value=value)

        tokens = fill(row["input_ids"], self.mask_token_id if self.pad_token_id is None else self.pad_token_id)
        maskable = fill(row["maskable"], self.learn_padding)
        filled = {
            "index": row["index"],
            "input_ids": tokens,
            "maskable": maskable,
            "labels": tokens.masked_fill(~maskable, -100),
            "attention_mask": fill(torch.ones_like(row["input_ids"]), int(self.learn_padding)),
        }
        if "document_ids" in row:
            filled["document_ids"] = fill(row["document_ids"], int(row["document_ids"][-1]))
        return filled

    def _mask(self, row: dict[str, Any], uniform: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask of a row and its weights. `uniform` sets the number of masked tokens, and the block."""
        generator = seeded_generator(self.seed, "mask", row["index"])
        masked = torch.zeros_like(row["maskable"])
        weights = torch.zeros(masked.shape)
        for blocks in self._blocks(row):
            place = uniform * len(blocks)
            block = blocks[min(int(place), len(blocks) - 1)]
            low, high = self.mask_ratio
            share = low + (high - low) * (place - int(place))
            count = min(int(share * len(block)) + 1, len(block))
            chosen = block[torch.randperm(len(block), generator=generator)[:count]]
            masked[chosen] = True
            weights[chosen] = len(blocks) * len(block) / count
            # Packed documents draw for themselves, as each has a block of its own.
            uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
        return masked, weights

    def _blocks(self, row: dict[str, Any]) -> list[list[torch.Tensor]]:
        """Maskable positions: of the whole row, or of every document by block, where attention is block-causal."""
        positions = row["maskable"].nonzero().squeeze(-1)
        if self.block_size is None:
            return [[positions]]
        documents = row.get("document_ids", torch.zeros_like(row["input_ids"]))
        units = []
        for document in documents[positions].unique_consecutive():
            start = int((documents == document).nonzero()[0])
            own = positions[documents[positions] == document]
            block_of = (own - start) // self.block_size
            units.append([own[block_of == block] for block in block_of.unique()])
        return units

    def _complement(
        self, row: dict[str, Any], masked: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        others = torch.zeros_like(masked)
        new_weights = torch.zeros_like(weights)
        for blocks in self._blocks(row):
            block = next(block for block in blocks if masked[block].any())
            rest = block[~masked[block]]
            rest = block if len(rest) == 0 else rest
            others[rest] = True
            new_weights[rest] = len(blocks) * len(block) / len(rest)
        return others, new_weights
