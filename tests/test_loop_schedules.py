# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The number of loops of every training step: distributions, draws, and how they reach the model."""

import math
from collections import Counter

import pytest
import torch
from tiny import tiny_config, tiny_model
from training_runs import examples, make_trainer
from transformers import Trainer

from loopmdm.training import (
    LOOP_SCHEDULES,
    LoopSamplingCallback,
    LoopSchedule,
    draw_num_loops,
    make_loop_schedule,
    set_num_train_loops,
)


class EvenLoops(LoopSchedule):
    """A schedule of a user."""

    def probabilities(self, progress):
        loops = torch.arange(1, self.max_loops + 1)
        return (loops % 2 == 0).double() / (self.max_loops // 2)


def assert_frequencies(draws: list[int], probabilities: torch.Tensor):
    """Chi-square at most four deviations above its mean; nothing outside what may be drawn."""
    counts = Counter(draws)
    assert all(probabilities[loops - 1] > 0 for loops in counts), "nothing that has probability 0"
    expected = {s: p * len(draws) for s, p in enumerate(probabilities.tolist(), start=1) if p > 0}
    statistic = sum((counts[s] - count) ** 2 / count for s, count in expected.items())
    freedom = len(expected) - 1
    assert statistic <= freedom + 4 * math.sqrt(2 * freedom) + 1e-9


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("uniform", {}),
        ("fixed", {}),
        ("growing", {}),
        ("growing", {"growth": 1.0}),
        ("late", {}),
        ("late", {"start": 0.2, "min_loops": 5, "plain": 0.0}),
        (EvenLoops(7), {}),
    ],
    ids=lambda value: str(value) if isinstance(value, str | dict) else type(value).__name__,
)
def test_draws_follow_the_probabilities(schedule, options):
    made = make_loop_schedule(schedule, tiny_config(), 7, **options)
    for progress, step in ((0.3, 3), (1.0, 10)):
        probabilities = made.probabilities(progress)
        assert probabilities.shape == (7,) and probabilities.dtype == torch.float64
        assert bool((probabilities >= 0).all()) and probabilities.sum().item() == pytest.approx(1, abs=1e-12)
        expected = sum(loops * p for loops, p in enumerate(probabilities.tolist(), start=1))
        assert made.mean(progress) == pytest.approx(expected, rel=1e-12)
        assert_frequencies([made.draw(seed, step, 10) for seed in range(3000)], probabilities)
    if schedule in ("uniform", "fixed"):  # and over the steps of one run
        assert_frequencies([made.draw(11, step, 3000) for step in range(3000)], made.probabilities(0.0))


def test_a_draw_depends_on_seed_and_step_alone():
    for name in LOOP_SCHEDULES:
        schedule, again = (make_loop_schedule(name, tiny_config(), 6) for _ in range(2))
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = [schedule.draw(3, step, 50) for step in range(50)]
        assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
        torch.manual_seed(1)
        assert [again.draw(3, step, 50) for step in reversed(range(50))] == first[::-1]
        if name != "fixed":
            assert [schedule.draw(4, step, 50) for step in range(50)] != first
    uniform = make_loop_schedule("uniform", tiny_config(), 6)
    assert [uniform.draw(2, step) for step in range(50)] == [draw_num_loops(6, 2, step) for step in range(50)]


def test_probabilities_are_those_of_the_definitions():
    config = tiny_config(max_train_loops=5)
    assert make_loop_schedule("uniform", config).probabilities(0).tolist() == pytest.approx([0.2] * 5)
    assert make_loop_schedule("fixed", config).probabilities(0).tolist() == [0, 0, 0, 0, 1]
    late = make_loop_schedule("late", config, 4, start=0.25, min_loops=2, plain=0.4)
    assert late.probabilities(0.2).tolist() == [1, 0, 0, 0]
    assert late.probabilities(0.3).tolist() == pytest.approx([0.4, 0.2, 0.2, 0.2])
    assert late.mean(0.3) == pytest.approx(0.4 + 0.2 * 9)
    # one loop is among those that may be drawn: both count
    assert make_loop_schedule("late", config, 2, start=0, min_loops=1, plain=0.5).mean() == pytest.approx(1.25)
    assert EvenLoops(6).mean() == 4


def test_late_loops_start_late():
    schedule = make_loop_schedule("late", tiny_config(), 6)
    drawn = [schedule.draw(0, step, 1000) for step in range(1000)]
    assert set(drawn[:500]) == {1} and set(drawn[500:]) == {1, 3, 4, 5, 6}
    assert schedule.draw(0, 0) == 1  # of a run of unknown length: not begun
    assert schedule.probabilities(0.5).tolist() == pytest.approx([0.25, 0, *[0.75 / 4] * 4])
    assert make_loop_schedule("late", tiny_config(), 7).min_loops == 4


@pytest.mark.parametrize("growth", [0.25, 1.0])
def test_growing_loops_keep_to_their_limit(growth):
    schedule = make_loop_schedule("growing", tiny_config(), 8, growth=growth)
    limits = []
    for step in range(1000):
        limits.append(int((schedule.probabilities(step / 1000) > 0).nonzero().max()) + 1)
        assert 1 <= schedule.draw(0, step, 1000) <= limits[-1] <= 1 + 8 * step / 1000 / growth + 1e-9
    assert limits == sorted(limits) and limits[0] == 1 and set(limits[int(1000 * growth) :]) <= {8}
    steps_at = Counter(limits[: int(1000 * growth)])
    assert max(steps_at.values()) - min(steps_at.values()) <= 2, "it grows evenly"


def test_max_loops_is_the_models_by_default():
    config = tiny_config(max_train_loops=9)
    for name in LOOP_SCHEDULES:
        assert make_loop_schedule(name, config).max_loops == 9
        assert make_loop_schedule(name, config, 4).max_loops == 4
        assert make_loop_schedule(name, config, 1).draw(0, 0, 1) == 1
    own = EvenLoops(6)
    assert make_loop_schedule(own, config) is own
    with pytest.raises(ValueError, match="EvenLoops has its own `max_loops` and options"):
        make_loop_schedule(own, config, 8)
    with pytest.raises(NotImplementedError):
        LoopSchedule(3).draw(0, 0)


@pytest.mark.parametrize(
    ("name", "max_loops", "options", "message"),
    [
        ("unifrom", 4, {}, "The loop schedule is 'unifrom'; choose one of uniform, late, growing, fixed"),
        (None, 4, {}, "The loop schedule is None"),
        ("uniform", 4, {"power": 2}, "'uniform' does not take these options.*power"),
        *((name, 0, {}, "`max_loops` is 0; it must be an integer of at least 1") for name in LOOP_SCHEDULES),
        ("uniform", True, {}, "`max_loops` is True"),
        ("uniform", 2.5, {}, "`max_loops` is 2.5"),
        ("growing", 4, {"growth": 0}, "`growth` is 0"),
        ("growing", 4, {"growth": 1.5}, "`growth` is 1.5"),
        ("late", 4, {"start": 1.0}, "`start` is 1.0; .* from 0 to below 1"),
        ("late", 4, {"start": -0.1}, "`start` is -0.1"),
        ("late", 4, {"min_loops": 5}, r"`min_loops` is 5; .* 1 to `max_loops` \(4\)"),
        ("late", 4, {"min_loops": 0}, "`min_loops` is 0"),
        ("late", 4, {"min_loops": 1.5}, "`min_loops` is 1.5"),
        ("late", 4, {"plain": 1}, "`plain` is 1"),
        ("late", 4, {"plain": math.nan}, "`plain` is nan"),
    ],
    ids=str,
)
def test_bad_schedules(name, max_loops, options, message):
    with pytest.raises(ValueError, match=message):
        make_loop_schedule(name, tiny_config(), max_loops, **options)


@pytest.mark.parametrize(
    "values", [[0.0] * 4, [math.nan] * 4, [0.5, 0.5], [0.2] * 5, [-1.0, 1, 1, 1], [math.inf, 1, 1, 1]], ids=str
)
def test_probabilities_of_ones_own_are_checked(values):
    class Own(LoopSchedule):
        def probabilities(self, progress):
            return values

    for wrong in (lambda schedule: schedule.draw(0, 1, 4), lambda schedule: schedule.mean(0.25)):
        with pytest.raises(ValueError, match=r"Own.probabilities\(0.25\) gave .*; it must give 4 numbers"):
            wrong(Own(4))
    values = [0, 3, 0, 1]  # need not add up to 1
    assert {Own(4).draw(0, step, 20) for step in range(20)} == {2, 4} and Own(4).mean() == 2.5


@pytest.mark.parametrize("plain_trainer", [True, False], ids=["Trainer", "LoopMDMTrainer"])
@pytest.mark.parametrize("name", ["uniform", "growing"])
def test_a_trainer_draws_once_for_every_optimiser_step(tmp_path, plain_trainer, name):
    model, ran = tiny_model(max_train_loops=5), []
    schedule, loop = make_loop_schedule(name, model.config), model.model.loop
    model.model.loop = lambda *args: ran.append(1) or loop(*args)
    options = {"callbacks": [LoopSamplingCallback(schedule)], "cls": Trainer}
    options = options if plain_trainer else {"loop_schedule": name}
    args = {"max_steps": 8, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer, counts = make_trainer(tmp_path, model, examples(8), args, **options), []
    step = trainer.training_step

    def counted(*args, **kwargs):
        ran.clear()
        loss = step(*args, **kwargs)
        counts.append(len(ran))
        return loss

    trainer.training_step = counted
    trainer.train()
    drawn = [schedule.draw(5, step, 8) for step in range(8)]
    assert counts == [loops for loops in drawn for _ in range(2)], "both micro-batches share the step's loops"
    assert len(set(drawn)) > 1 and model.model.num_train_loops is None, "and nothing stays behind"


def test_loops_are_set_through_wrappers_alone():
    wrapped = torch.nn.Sequential(tiny_model())
    set_num_train_loops(wrapped, 2)
    assert wrapped[0].model.num_train_loops == 2
    with pytest.raises(ValueError, match="`max_loops` is 0"):
        LoopSamplingCallback(0)
    with pytest.raises(ValueError, match="Linear holds no LoopMDMModel"):
        set_num_train_loops(torch.nn.Linear(1, 1), 2)
