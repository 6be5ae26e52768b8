# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Exit rules for adaptive loops: they decide which rows or positions stop before `num_loops` is reached."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from .cache_utils import CacheView, LoopMDMCache
from .configuration_loopmdm import check_num_loops
from .loop_context import LoopContext, check_mask


class LoopPolicy:
    """
    Decides after every loop which rows or positions go on. The others keep their states, and can still be attended to.

    Subclass it, implement [`~LoopPolicy.goes_on`], and pass an instance as `loop_policy` to `forward` or `generate`.
    Set `per_position = True` to decide for single positions instead of rows. Such a policy cannot be used in training.
    """

    per_position = False

    def goes_on(self, index: int, before: torch.Tensor, after: torch.Tensor, part: LoopContext) -> torch.BoolTensor:
        """
        Called after loop `index`, counted from 0, for the N rows and Q positions that still loop.

        Args:
            before, after (`torch.FloatTensor` of shape `(N, Q, hidden_size)`): The states before and after the loop.
            part ([`LoopContext`]): `part.real` is False on padding and `part.masked` True on [MASK]s, both `(N, Q)`.

        Returns:
            `(N,)` bool for the rows that go on, or `(N, Q)` with `per_position`.
        """
        raise NotImplementedError


class RowTolerance(LoopPolicy):
    """A row stops when `||after - before|| / ||before||` over its real positions falls below `tolerance`."""

    def __init__(self, tolerance: float):
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance >= 0:
            raise ValueError(f"`loop_tolerance` is {tolerance!r}; it must be a number of at least 0, such as 0.05.")
        self.tolerance = tolerance

    def goes_on(self, index, before, after, part):
        dtype = torch.promote_types(before.dtype, torch.float32)
        before, change = before.to(dtype), after.to(dtype) - before.to(dtype)
        if part.real is not None:
            before, change = before * part.real[..., None], change * part.real[..., None]
        return change.flatten(1).norm(dim=1) >= self.tolerance * before.flatten(1).norm(dim=1)


class VisibleLoops(LoopPolicy):
    """
    Tokens that are not [MASK] loop at most `count` times. With `config.shift_logits`, the token before a [MASK] goes
    on looping, since its state predicts the [MASK].
    """

    per_position = True

    def __init__(self, count: int):
        self.count = check_num_loops(count, "visible_loops")

    def goes_on(self, index, before, after, part):
        return part.masked if index + 1 >= self.count else torch.ones_like(part.masked)


def resolve_policy(
    config, loop_tolerance, visible_loops, loop_policy, trains=False, has_ids=True
) -> LoopPolicy | None:
    """Returns the exit rule that the arguments describe. Raises a ValueError if the model cannot run it."""
    given = {"loop_tolerance": loop_tolerance, "visible_loops": visible_loops, "loop_policy": loop_policy}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    if loop_policy is not None and not isinstance(loop_policy, LoopPolicy):
        raise ValueError(f"`loop_policy` is {loop_policy!r}; give an instance of a LoopPolicy.")
    policy = loop_policy if loop_tolerance is None else RowTolerance(loop_tolerance)
    policy = policy if visible_loops is None else VisibleLoops(visible_loops)
    wrong = None
    if len(names) > 1:
        wrong = f"`{names[1]}` is given too; choose one exit rule"
    elif config.loop_update == "damped":
        wrong = 'it needs `loop_update="replace"`, as damped steps depend on `num_loops`; choose that'
    elif policy.per_position and trains:
        wrong = "positions that stop pass no gradients on; call `model.eval()`"
    elif policy.per_position and config._attn_implementation not in ("sdpa", "eager"):
        wrong = 'single positions need another attention; call `model.set_attn_implementation("sdpa")`'
    elif visible_loops is not None and not has_ids:
        wrong = "it has to know which tokens are [MASK]; give `input_ids`"
    if wrong is not None:
        raise ValueError(f"`{names[0]}` cannot be used: {wrong}.")
    return policy


def iterate_while_moving(
    model, states: torch.Tensor, context: LoopContext, num_loops: int, policy: LoopPolicy
) -> Iterator[tuple[torch.Tensor, torch.BoolTensor]]:
    """`LoopMDMModel.iterate` with a policy: later loops compute only the rows or positions that go on."""
    batch_size, length = states.shape[:2]
    if policy.per_position and context.cache is None:
        # Keys and values of this pass only, stored by column
        memory = LoopMDMCache(model.config, 1, batch_size, length, share_loops=True)
        columns = torch.arange(length, device=states.device).expand(batch_size, -1)
        context = replace(context, cache=CacheView(memory, None, columns, torch.tensor([length])))
    moving = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    moving = moving if context.real is None else context.real
    # The part that still loops: its context, and its index in `states` and `moving`
    part = context
    place: tuple[torch.Tensor, ...] = (torch.arange(batch_size, device=states.device),)
    for index in range(num_loops):
        before, moves = states[place], moving[place]
        if part is not context and context.cache is not None:
            context.cache.carry(index, states)  # stopped positions keep the keys and values of their last loop
        after = model.loop(before, part, index)
        goes_on = policy.goes_on(index, before, after, part)
        expected = moves.shape if policy.per_position else moves.shape[:1]
        fix = "; with `per_position = True` it decides for positions, otherwise for rows"
        check_mask(f"{type(policy).__name__}.goes_on", goes_on, tuple(expected), fix)
        goes_on = moves & (goes_on if policy.per_position else goes_on[:, None])
        states = states.index_put(place, torch.where(moves[..., None], after, before))
        yield states, moving
        if index + 1 == num_loops or torch.equal(goes_on, moves):
            continue
        moving = torch.zeros_like(moving).index_put(place, goes_on)
        rows = moving.any(-1).nonzero().squeeze(-1)
        if len(rows) == 0:
            break
        if policy.per_position:
            # Rows with fewer moving positions are filled up.
            order = moving[rows].long().argsort(dim=-1, descending=True, stable=True)
            positions = order[:, : int(moving.sum(-1).max())]
            place = rows[:, None], positions
            part = context.narrow(rows, positions, moving[place])
        elif context.can_narrow:
            place, part = (rows,), context.narrow(rows)
    if policy.per_position:
        for rest in range(index + 1, num_loops):  # later passes read every loop's keys and values
            context.cache.carry(rest, states)


__all__ = ["LoopPolicy", "RowTolerance", "VisibleLoops", "iterate_while_moving", "resolve_policy"]
