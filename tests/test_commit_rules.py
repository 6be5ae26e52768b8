# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tests of what one denoising step decides, on hand-made tables: commit rules, schedules, remasking, sampling."""

import itertools
from dataclasses import replace

import pytest
import torch

from loopmdm import LoopMDMGenerationConfig
from loopmdm.generation_utils import (
    COMMIT_RULES,
    CommitRule,
    DenoisingStep,
    EntropyBoundRule,
    _Noise,
    _sample,
    commit_rule,
)

# Four positions, five tokens. Every rule orders them differently.
TABLE = [
    [0.45, 0.28, 0.27, 0.00, 0.00],  # entropy 1.07
    [0.40, 0.40, 0.20, 0.00, 0.00],  # entropy 1.05
    [0.50, 0.49, 0.01, 0.00, 0.00],  # entropy 0.74
    [0.48, 0.13, 0.13, 0.13, 0.13],  # entropy 1.41
]
NOISE = [0.3, 0.9, 0.1, 0.6]
ORDERS = {
    "confidence": [2, 3, 0, 1],
    "margin": [3, 0, 2, 1],
    "entropy": [2, 1, 0, 3],
    "left_to_right": [0, 1, 2, 3],
    "random": [1, 3, 0, 2],
}


def make_step(table, masked=None, tokens=None, num_steps=1, noise=None, **overrides) -> DenoisingStep:
    """One row with the probabilities `table`; greedy tokens and everything masked unless said otherwise."""
    logits = torch.tensor([table], dtype=torch.float32).log()
    size = logits.shape[1]
    masked = torch.ones(1, size, dtype=torch.bool) if masked is None else torch.tensor([masked], dtype=torch.bool)
    values = {
        "logits": logits,
        "tokens": logits.argmax(-1) if tokens is None else torch.tensor([tokens]),
        "masked": masked,
        "size": torch.tensor([size]),
        "index": 0,
        "num_steps": torch.tensor([num_steps]),
        "penalty": torch.zeros(1, size),
        "remask_probability": 0.0,
        "noise": lambda: torch.tensor([NOISE[:size] if noise is None else noise]),
    }
    return DenoisingStep(**values | overrides)


def picked(commit: torch.Tensor) -> list[int]:
    return commit[0].nonzero().flatten().tolist()


def rule_for(unmasking="confidence", **arguments) -> CommitRule:
    return commit_rule(LoopMDMGenerationConfig(unmasking=unmasking, **arguments))


def test_every_rule_has_a_test():
    assert COMMIT_RULES.keys() == ORDERS.keys() | {"ancestral"}


@pytest.mark.parametrize("unmasking", ORDERS)
def test_order_of_commitment(unmasking):
    masked, order = [True] * 4, []
    for index in range(4):
        (position,) = picked(rule_for(unmasking)(make_step(TABLE, masked, index=index, num_steps=4)))
        masked[position] = False
        order.append(position)
    assert order == ORDERS[unmasking]


@pytest.mark.parametrize("unmasking", ORDERS)
def test_a_step_commits_its_share_of_the_best(unmasking):
    commit = rule_for(unmasking)(make_step(TABLE, num_steps=2))
    assert picked(commit) == sorted(ORDERS[unmasking][:2])


@pytest.mark.parametrize("unmasking", ORDERS)
def test_open_positions_are_never_committed(unmasking):
    best, *others = ORDERS[unmasking]
    masked = [position != best for position in range(4)]
    # size 4 with one open, 3 steps: the quota of step 1 is two more
    commit = rule_for(unmasking)(make_step(TABLE, masked, index=1, num_steps=3))
    assert picked(commit) == sorted(others[:2])


@pytest.mark.parametrize("unmasking", ["confidence", "margin", "entropy", "random"])
def test_ties_go_to_the_leftmost(unmasking):
    step = make_step([[0.6, 0.4]] * 7, masked=[False, True, True, False, True, True, True], noise=[0.5] * 7)
    step.size.fill_(5)
    step.num_steps.fill_(2)
    assert picked(rule_for(unmasking)(step)) == [1, 2, 4]


def test_confidence_is_that_of_the_chosen_token():
    # Position 3 has drawn an unlikely token, so it falls behind; the margin belongs to the position.
    step = make_step(TABLE, tokens=[0, 0, 0, 4], num_steps=4)
    torch.testing.assert_close(step.confidence, torch.tensor([[0.45, 0.40, 0.50, 0.13]]))
    torch.testing.assert_close(step.margin, torch.tensor([[0.17, 0.0, 0.01, 0.35]]))
    assert picked(rule_for("confidence")(step)) == [2]


def test_impossible_tokens_leave_scores_finite():
    step = make_step([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(step.entropy, torch.tensor([[0.0, 0.6931472]]))
    torch.testing.assert_close(step.confidence, torch.tensor([[1.0, 0.5]]))
    torch.testing.assert_close(step.margin, torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("unmasking", ["confidence", "margin", "entropy"])
def test_penalty_puts_a_position_last(unmasking):
    best, *others = ORDERS[unmasking]
    penalty = torch.zeros(1, 4)
    penalty[0, best] = 2.0
    commit = rule_for(unmasking)(make_step(TABLE, num_steps=4, penalty=penalty))
    assert picked(commit) == others[:1]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.45, [0, 2, 3]), (0.46, [2, 3]), (0.50, [2]), (0.95, [2]), (0.1, [0, 1, 2, 3])],
)
def test_confidence_threshold(threshold, expected):
    # The confidences are set outright: rounded probabilities would not tell "at least" from "more than".
    step = make_step(TABLE, num_steps=4)
    step.confidence = torch.tensor([[0.45, 0.40, 0.50, 0.48]], dtype=torch.float64)
    assert picked(rule_for(confidence_threshold=threshold)(step)) == expected


@pytest.mark.parametrize(
    ("bound", "expected"),
    # In ascending order the entropies are 0.74, 1.05, 1.07, 1.41; all but the largest sum to 0, 0.74, 1.80, 2.86.
    [
        (0.0, [2]),
        (0.73, [2]),
        (0.75, [1, 2]),
        (1.79, [1, 2]),
        (1.81, [0, 1, 2]),
        (2.85, [0, 1, 2]),
        (2.9, [0, 1, 2, 3]),
    ],
)
def test_entropy_bound(bound, expected):
    assert picked(rule_for(entropy_bound=bound)(make_step(TABLE, num_steps=4))) == expected


def test_entropy_bound_counts_masked_positions_only():
    # Position 2 is open: the sums are 0, 1.05, 2.12.
    masked = [True, True, False, True]
    for bound, expected in ((1.0, [1]), (1.1, [0, 1]), (2.1, [0, 1]), (2.2, [0, 1, 3])):
        step = make_step(TABLE, masked, index=1, num_steps=4)
        assert picked(EntropyBoundRule(bound, rule_for("entropy"))(step)) == expected


def test_parallel_rules_commit_at_least_the_quota_of_their_order():
    # Nothing qualifies; with two steps for four positions the schedule asks for two.
    for parallel in ({"confidence_threshold": 0.99}, {"entropy_bound": 0.0}):
        for unmasking in ("left_to_right", "margin"):
            commit = rule_for(unmasking, **parallel)(make_step(TABLE, num_steps=2))
            extra = [2] if "entropy_bound" in parallel else []  # the lowest entropy is always within the bound
            assert picked(commit) == sorted({*ORDERS[unmasking][:2], *extra})


def test_quota_commits_everything_in_time_for_any_size_and_number_of_steps():
    sizes, steps = torch.tensor(list(itertools.product(range(1, 13), range(1, 16)))).unbind(-1)
    masked = torch.arange(12) < sizes[:, None]
    counts = []
    for index in range(15):
        step = replace(make_step(TABLE), masked=masked, size=sizes, index=index, num_steps=steps)
        commit = rule_for("left_to_right")(step)
        assert not (commit & ~masked).any()
        counts.append(commit.sum(-1) * (index < steps))
        masked = masked & ~commit
    for size, num_steps, row in zip(sizes.tolist(), steps.tolist(), torch.stack(counts, 1).tolist(), strict=True):
        used = row[: min(size, num_steps)]
        assert sum(used) == size, f"{size} positions in {num_steps} steps: {row}"
        assert min(used) >= 1 and max(used) - min(used) <= 1, f"not equal shares: {row}"
        assert used == sorted(used, reverse=True), f"the first steps take the remainder: {row}"


def test_quota_catches_up_after_remasking_and_never_stalls_ahead_of_schedule():
    def quota(masked, index):
        return make_step(TABLE, masked, index=index, num_steps=4).quota.item()

    assert quota([True, True, True, True], index=2) == 3  # two that were due have gone back to [MASK]
    assert quota([True, False, False, False], index=0) == 1  # a threshold has committed three at once
    assert quota([False] * 4, index=1) == 0


def test_remask_rate_is_the_capped_schedule():
    for num_steps, eta in itertools.product((1, 2, 5, 8), (0.0, 0.1, 0.5, 1.0)):
        for index in range(1, num_steps):
            alpha_t, alpha_s = index / num_steps, (index + 1) / num_steps
            step = make_step(TABLE, index=index, num_steps=num_steps, remask_probability=eta)
            assert step.remask_rate.item() == pytest.approx(min(eta, (1 - alpha_s) / alpha_t))


def test_ancestral_opens_with_the_probability_of_the_reverse_process():
    for num_steps, eta in itertools.product((1, 2, 5, 8), (0.0, 0.1, 0.5, 1.0)):
        for index in range(num_steps):
            alpha_t, alpha_s = index / num_steps, (index + 1) / num_steps
            sigma = min(eta, (1 - alpha_s) / alpha_t) if index > 0 else 0.0
            probability = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
            assert 0 <= probability <= 1 + 1e-9
            step = make_step(
                TABLE,
                masked=[True, True, True, False],
                noise=[probability - 1e-4, probability + 1e-4, 0.0, 0.0],
                index=index,
                num_steps=num_steps,
                remask_probability=eta,
            )
            assert picked(rule_for("ancestral")(step)) == [0, 2]


def test_a_rule_of_ones_own(monkeypatch):
    class RightToLeft(CommitRule):
        def score(self, step):
            return torch.arange(step.masked.shape[1]).expand(step.masked.shape).float()

    monkeypatch.setitem(COMMIT_RULES, "right_to_left", RightToLeft)
    assert picked(rule_for("right_to_left")(make_step(TABLE, num_steps=4))) == [3]


def test_sample_inverts_the_distribution_function():
    probabilities = torch.tensor([0.0, 0.3, 0.0, 0.5, 0.2, 0.0])
    noise = (torch.arange(1000) + 0.5) / 1000  # one draw per thousandth: counts are exact
    tokens = _sample(probabilities.log().expand(1, 1000, 6), noise[None])
    assert tokens[0].bincount(minlength=6).tolist() == [0, 300, 0, 500, 200, 0]


def test_sample_never_draws_impossible_tokens():
    highest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    noise = torch.stack((torch.tensor(0.0), highest, torch.tensor(0.5)))
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, -torch.inf]).expand(1, 3, 4)
    assert _sample(logits, noise[None]).tolist() == [[1, 1, 1]]


def test_sample_reaches_the_tail():
    # Behind a token that is nearly certain, a sum in float32 swallows the others.
    probabilities = torch.tensor([1 - 2e-6] + [1e-8] * 200, dtype=torch.float64)
    noise = 1 - torch.arange(1, 33) * 2.0**-24  # the 32 highest numbers that `torch.rand` returns
    tokens = _sample(probabilities.log().float().expand(1, 32, 201), noise[None])[0]
    from_the_end = (1 - noise.double()) / 1e-8
    torch.testing.assert_close(201 - tokens, from_the_end.ceil().long(), atol=1, rtol=0)


def test_noise_of_a_row_depends_on_its_own_generator_only():
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = _Noise(generators(5, 6, 7), torch.device("cpu"))([2, 4, 3], rows=[0, 2])
    alone = _Noise(generators(7), torch.device("cpu"))([3], rows=[0])
    assert together.shape == (2, 4)
    assert torch.equal(together[1, :3], alone[0])


def test_noise_of_one_generator_is_drawn_for_all_rows():
    def noise(*rows):
        return _Noise(torch.Generator().manual_seed(5), torch.device("cpu"))([2, 4, 3], list(rows))

    assert noise(0, 1, 2).shape == (3, 4)
    assert torch.equal(noise(1, 2), noise(0, 1, 2)[1:])
