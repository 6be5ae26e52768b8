# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Exit rules of adaptive loops: which rows, or single positions, are settled before `num_loops` is reached."""

from typing import TYPE_CHECKING

import torch

from .configuration_loopmdm import check_num_loops

if TYPE_CHECKING:
    from .modeling_loopmdm import LoopContext


class LoopPolicy:
    """
    Decides after every loop what goes on looping. What does not keeps its state, and the others attend to it as it is.
    Subclass it, implement [`~LoopPolicy.goes_on`], and pass an instance as `loop_policy` to `forward` or `generate`.

    Set `per_position` to True to decide for single positions instead of rows; that passes no gradients on.
    """

    per_position = False

    def goes_on(self, index: int, before: torch.Tensor, after: torch.Tensor, part: "LoopContext") -> torch.BoolTensor:
        """
        Called after loop `index`, counted from 0, for the N rows and Q positions that still move.

        Args:
            before, after (`torch.FloatTensor` of shape `(N, Q, hidden_size)`): The states around the loop.
            part ([`LoopContext`]): `part.real` and `part.masked`, each `(N, Q)` bool, tell padding and [MASK]s.

        Returns:
            `(N,)` bool for the rows that go on, or `(N, Q)` with `per_position`.
        """
        raise NotImplementedError


class RowTolerance(LoopPolicy):
    """A row is settled when `||after - before|| / ||before||` over its real positions falls under `tolerance`."""

    def __init__(self, tolerance: float):
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance >= 0:
            raise ValueError(
                f"`loop_tolerance` is {tolerance!r}; it must be a number of at least 0, the relative change of the "
                "hidden state under which a row stops looping (e.g. 0.05)."
            )
        self.tolerance = tolerance

    def goes_on(self, index, before, after, part):
        dtype = torch.promote_types(before.dtype, torch.float32)
        before, change = before.to(dtype), after.to(dtype) - before.to(dtype)
        if part.real is not None:
            before, change = before * part.real[..., None], change * part.real[..., None]
        return change.flatten(1).norm(dim=1) >= self.tolerance * before.flatten(1).norm(dim=1)


class VisibleLoops(LoopPolicy):
    """
    Tokens that are not [MASK] loop `count` times at most (with `config.shift_logits`, a token before a [MASK] goes on
    with it, since its state predicts it).
    """

    per_position = True

    def __init__(self, count: int):
        self.count = check_num_loops(count, "visible_loops")

    def goes_on(self, index, before, after, part):
        return part.masked if index + 1 >= self.count else torch.ones_like(part.masked)


__all__ = ["LoopPolicy", "RowTolerance", "VisibleLoops"]
