# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The masked diffusion objective: a collator that masks tokens and weights them, for any Trainer."""

from collections.abc import Sequence
from typing import Any

import torch

from .data import seeded_generator


class MaskedDiffusionCollator:
    """
    Pads a batch of clean sequences to one length and masks them for the diffusion loss.

    Of a sequence's L maskable tokens, k are replaced by [MASK], with k uniform in 1..L. Every maskable token gets a
    label; the masked ones weigh L/k and the others 0, so that `LoopMDMForMaskedLM`'s loss estimates the negative ELBO
    in nats per maskable token without bias. The k of a batch are spread evenly (one random offset), which lowers the
    variance of the loss.

    Args:
        mask_token_id (`int`): Id of [MASK].
        pad_token_id (`int`, *optional*): Id that fills short rows; needed when lengths differ.
        seed (`int`, defaults to 0): Seed of the noise.

    Features are dicts with `input_ids` (the clean tokens), `index` (place in the run, see [`ExampleStream`]; the noise
    derives from it and the seed) and optionally `maskable` (bools of the same length; by default every token). Other
    keys are left out. Returns `input_ids`, `labels` and `attention_mask`, int64, and `loss_weights`, float32, each
    of shape `(batch_size, sequence_length)`.
    """

    def __init__(self, mask_token_id: int, pad_token_id: int | None = None, seed: int = 0):
        self.mask_token_id = mask_token_id
        self.pad_token_id = pad_token_id
        self.seed = seed

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [torch.as_tensor(feature["input_ids"], dtype=torch.long) for feature in features]
        length = max(len(row) for row in rows)
        if self.pad_token_id is None and any(len(row) != length for row in rows):
            raise ValueError("Rows of different lengths need a `pad_token_id`.")
        fill = self.mask_token_id if self.pad_token_id is None else self.pad_token_id
        input_ids = torch.full((len(rows), length), fill)
        labels = torch.full_like(input_ids, -100)
        attention_mask = torch.zeros_like(input_ids)
        loss_weights = torch.zeros(input_ids.shape)

        offset = torch.rand((), generator=seeded_generator(self.seed, "mask rate", features[0]["index"])).item()
        for i, (row, feature) in enumerate(zip(rows, features, strict=True)):
            maskable = torch.as_tensor(feature.get("maskable", [True] * len(row)), dtype=torch.bool)
            positions = maskable.nonzero().squeeze(-1)
            if len(positions) == 0:
                raise ValueError(f"Example {feature['index']} has no maskable token, so there is nothing to learn.")
            num_masked = int((offset + i / len(rows)) % 1.0 * len(positions)) + 1
            order = torch.randperm(len(positions), generator=seeded_generator(self.seed, "mask", feature["index"]))
            masked = positions[order[:num_masked]]

            input_ids[i, : len(row)] = row
            attention_mask[i, : len(row)] = 1
            labels[i, positions] = row[positions]
            input_ids[i, masked] = self.mask_token_id
            loss_weights[i, masked] = len(positions) / num_masked
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "loss_weights": loss_weights,
        }
