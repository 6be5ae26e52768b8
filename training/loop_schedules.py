# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The number of loops of every training step: schedules, and how a drawn number reaches the model. A draw depends only on
the seed and the optimiser step. So all ranks and micro-batches loop alike (under FSDP, ranks that did not would wait
for each other for ever), and a resumed run draws what an uninterrupted one would have drawn.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..data import check_passes
from ..objective.seeds import seeded_generator


class LoopSchedule:
    """
    A distribution of the number of loops S over 1..max_loops, which may change during training. To make another one,
    subclass it, implement `probabilities`, and pass an instance wherever a schedule is accepted:

    ```python
    >>> class LargeLoops(LoopSchedule):
    ...     def probabilities(self, progress):
    ...         weights = torch.arange(1, self.max_loops + 1, dtype=torch.float64)
    ...         return weights / weights.sum()
    ```

    Args:
        max_loops (`int`): S_max.
    """

    def __init__(self, max_loops: int):
        if isinstance(max_loops, bool) or not isinstance(max_loops, int) or max_loops < 1:
            raise ValueError(f"`max_loops` is {max_loops!r}; it must be an integer of at least 1.")
        self.max_loops = max_loops

    def probabilities(self, progress: float) -> torch.Tensor:
        """
        Probabilities of S = 1, ..., max_loops, `(max_loops,)` float64, when the share `progress` (0 to 1) of the
        training steps is done.
        """
        raise NotImplementedError

    def draw(self, seed: int, step: int, max_steps: int | None = None) -> int:
        """S of the optimiser step `step` (counted from 0) of `max_steps`."""
        progress = step / max_steps if max_steps else 0.0
        cumulative = self._checked(min(progress, 1.0)).cumsum(0)
        uniform = torch.rand((), generator=seeded_generator(seed, "loops", step), dtype=torch.float64)
        return min(int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)) + 1, self.max_loops)

    def _checked(self, progress: float) -> torch.Tensor:
        found = torch.as_tensor(self.probabilities(progress), dtype=torch.float64)
        if found.shape != (self.max_loops,) or not (found >= 0).all() or not 0 < found.sum() < math.inf:
            raise ValueError(
                f"{type(self).__name__}.probabilities({progress:.3g}) gave {found.tolist()}; it must give "
                f"{self.max_loops} numbers of at least 0, not all of them 0."
            )
        return found

    def mean(self, progress: float = 0.0) -> float:
        """Expected number of loops."""
        found = self._checked(progress)
        return float(found @ torch.arange(1, self.max_loops + 1, dtype=torch.float64) / found.sum())


class UniformLoops(LoopSchedule):
    """S ~ Uniform{1..max_loops}, as in the paper (arXiv 2605.26106)."""

    def probabilities(self, progress):
        return torch.full((self.max_loops,), 1 / self.max_loops, dtype=torch.float64)

    def draw(self, seed, step, max_steps=None):
        return int(torch.randint(1, self.max_loops + 1, (), generator=seeded_generator(seed, "loops", step)))


class FixedLoops(LoopSchedule):
    """S = max_loops always."""

    def probabilities(self, progress):
        return torch.eye(self.max_loops, dtype=torch.float64)[-1]


class GrowingLoops(LoopSchedule):
    """
    S ~ Uniform{1..M}, where M grows linearly from 1 to max_loops. arXiv 2511.07384 finds that such a curriculum saves
    computation when pretrained models are made recurrent.

    Args:
        max_loops (`int`): S_max.
        growth (`float`, defaults to 0.5): Share of the training steps after which M is max_loops, above 0, at most 1.
    """

    def __init__(self, max_loops: int, growth: float = 0.5):
        super().__init__(max_loops)
        if not 0 < growth <= 1:
            raise ValueError(f"`growth` is {growth}; it is a share of the training steps, above 0 and at most 1.")
        self.growth = growth

    def probabilities(self, progress):
        largest = min(self.max_loops, 1 + int(progress / self.growth * self.max_loops))
        return (torch.arange(1, self.max_loops + 1) <= largest).double() / largest


class LateLoops(LoopSchedule):
    """
    First S = 1; later S ~ Uniform{min_loops..max_loops}, with steps of S = 1 in between. Early on a model learns more
    from many cheap steps than from loops, and the later steps of S = 1 keep it good without loops.
    docs/results/claims.md compares this schedule with the paper's.

    Args:
        max_loops (`int`): S_max.
        start (`float`, defaults to 0.5): Share of the training steps before S grows, from 0 to below 1.
        min_loops (`int`, *optional*, defaults to half of `max_loops`, rounded up): Fewest loops drawn after `start`.
        plain (`float`, defaults to 0.25): Share of the steps after `start` with S = 1, from 0 to below 1.
    """

    def __init__(self, max_loops: int, start: float = 0.5, min_loops: int | None = None, plain: float = 0.25):
        super().__init__(max_loops)
        min_loops = -(-max_loops // 2) if min_loops is None else min_loops
        if not 0 <= start < 1:
            raise ValueError(f"`start` is {start}; it is a share of the training steps, from 0 to below 1.")
        if isinstance(min_loops, bool) or not isinstance(min_loops, int) or not 1 <= min_loops <= max_loops:
            raise ValueError(f"`min_loops` is {min_loops!r}; it must be an integer, 1 to `max_loops` ({max_loops}).")
        if not 0 <= plain < 1:
            raise ValueError(f"`plain` is {plain}; it is a share of the steps, from 0 to below 1.")
        self.start, self.min_loops, self.plain = start, min_loops, plain

    def probabilities(self, progress):
        loops = torch.arange(1, self.max_loops + 1)
        plain = 1.0 if progress < self.start else self.plain
        high = (loops >= self.min_loops).double() / (self.max_loops - self.min_loops + 1)
        return plain * (loops == 1).double() + (1 - plain) * high


def make_loop_schedule(
    schedule: str | LoopSchedule, config: Any, max_loops: int | None = None, **options
) -> LoopSchedule:
    """
    Makes a schedule by name (`"uniform"`, `"late"`, `"growing"`, `"fixed"`) for a model's config.

    Args:
        schedule: A name, or a schedule, which is returned as it is.
        config: A [`LoopMDMConfig`].
        max_loops (`int`, *optional*, defaults to `config.max_train_loops`): S_max.
        options: Arguments of the schedule.

    Raises:
        ValueError: An unknown name, or an option that the schedule does not take.
    """
    if isinstance(schedule, LoopSchedule):
        if options or max_loops not in (None, schedule.max_loops):
            raise ValueError(f"{type(schedule).__name__} has its own `max_loops` and options; leave out others.")
        return schedule
    if schedule not in LOOP_SCHEDULES:
        raise ValueError(f"The loop schedule is {schedule!r}; choose one of {', '.join(LOOP_SCHEDULES)}.")
    max_loops = config.max_train_loops if max_loops is None else max_loops
    try:
        return LOOP_SCHEDULES[schedule](max_loops, **options)
    except TypeError as error:
        raise ValueError(f"The loop schedule {schedule!r} does not take these options: {error}.") from error


LOOP_SCHEDULES: dict[str, type[LoopSchedule]] = {
    "uniform": UniformLoops,
    "late": LateLoops,
    "growing": GrowingLoops,
    "fixed": FixedLoops,
}


def draw_num_loops(max_loops: int, seed: int, step: int) -> int:
    """S ~ Uniform{1..max_loops} for optimiser step `step`: the same on every rank and after a resume."""
    return UniformLoops(max_loops).draw(seed, step)


def set_num_train_loops(model: nn.Module, num_loops: int | None) -> None:
    """
    Sets the number of loops of forward passes in training mode that do not name one; with None it is
    `config.num_loops` again. Works through the wrappers of PEFT, DDP, FSDP and `torch.compile`. In your own training
    loop, call it before every optimiser step:

    ```python
    >>> set_num_train_loops(model, draw_num_loops(model.config.max_train_loops, seed=0, step=step))
    ```
    """
    looped = [module for module in model.modules() if hasattr(module, "num_train_loops")]
    if not looped:
        raise ValueError(f"{type(model).__name__} holds no LoopMDMModel, so it has no loops to set.")
    for module in looped:
        module.num_train_loops = num_loops


class LoopSamplingCallback(TrainerCallback):
    """
    Lets a plain transformers `Trainer` train with loops: S is drawn once for each optimiser step. It also makes FSDP
    save the model's own code.

    Args:
        schedule (`int` or [`LoopSchedule`]): S_max of the uniform distribution (e.g. `model.config.max_train_loops`),
            or a schedule.
    """

    def __init__(self, schedule: int | LoopSchedule):
        self.schedule = schedule if isinstance(schedule, LoopSchedule) else UniformLoops(schedule)

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        check_passes(getattr(train_dataloader, "dataset", None), state.num_train_epochs)
        # FSDP replaces the model's class, and the code of FSDP's class would be saved with the weights.
        for cls in {type(module) for module in model.modules() if hasattr(module, "save_pretrained")}:
            if cls.__module__.startswith("torch."):
                own = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
                cls.__module__, cls.__name__ = own.__module__, own.__name__

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        set_num_train_loops(model, self.schedule.draw(args.seed, state.global_step, state.max_steps))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        set_num_train_loops(model, None)
