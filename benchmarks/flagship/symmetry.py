# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Random symmetries of Sudoku boards: digits relabelled, lines and bands permuted, transposed or not."""

import torch


class Symmetry:
    """
    One symmetry for each of `count` boards of tokens, `(count, 81)`, in which digits count from `first_digit` and
    other tokens stay.
    """

    def __init__(self, count: int, generator: torch.Generator, first_digit: int):
        def lines() -> torch.Tensor:
            bands = torch.rand(count, 3, generator=generator).argsort(-1)
            within = torch.rand(count, 3, 3, generator=generator).argsort(-1)
            return (3 * bands[..., None] + within.gather(1, bands[..., None].expand(-1, -1, 3))).flatten(1)

        cells = 9 * lines()[:, :, None] + lines()[:, None, :]
        is_transposed = torch.rand(count, generator=generator) < 0.5
        self.cells = torch.where(is_transposed[:, None, None], cells.transpose(1, 2), cells).flatten(1)
        self.digits = torch.rand(count, 9, generator=generator).argsort(-1)
        self.first_digit = first_digit

    def _relabel(self, boards: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
        number = boards - self.first_digit
        return torch.where(number >= 0, digits.gather(1, number.clamp(min=0)) + self.first_digit, boards)

    def apply(self, boards: torch.Tensor) -> torch.Tensor:
        return self._relabel(boards.gather(1, self.cells), self.digits)

    def undo(self, boards: torch.Tensor) -> torch.Tensor:
        return self._relabel(boards, self.digits.argsort(-1)).gather(1, self.cells.argsort(-1))
