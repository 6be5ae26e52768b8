# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What one denoising step decides, on hand-made tables: commit rules, quotas, remasking, and how chance is drawn."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from generation_reference import seeded

from loopmdm import LoopMDMGenerationConfig
from loopmdm.commit_rules import (
    COMMIT_RULES,
    CommitRule,
    DenoisingStep,
    EntropyBoundRule,
    LeftToRightRule,
    draw_noise,
    draw_tokens,
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
every_order = pytest.mark.parametrize("unmasking", ORDERS)


def make_step(table=TABLE, masked=None, tokens=None, num_steps=1, noise=NOISE, **overrides) -> DenoisingStep:
    """One row with the probabilities `table`; greedy tokens and everything masked unless said otherwise."""
    logits = torch.tensor([table], dtype=torch.float32).log()
    size = logits.shape[1]
    masked = torch.tensor([[True] * size if masked is None else masked])
    values = {
        "index": 0,
        "row_list": [0],
        "rows": torch.tensor([0]),
        "columns": torch.arange(size)[None],
        "masked": masked,
        "counted": masked,
        "size": torch.tensor([size]),
        "num_steps": torch.tensor([num_steps]),
        "remask_probability": 0.0,
        "noise": lambda: torch.tensor([noise[:size]]),
        "logits": logits,
        "tokens": logits.argmax(-1) if tokens is None else torch.tensor([tokens]),
    }
    return DenoisingStep(**values | overrides)


def picked(rule: CommitRule, step: DenoisingStep) -> list[int]:
    return rule(step)[0].nonzero().flatten().tolist()


def rule_for(unmasking="confidence", **arguments) -> CommitRule:
    return LoopMDMGenerationConfig(unmasking=unmasking, **arguments).commit_rule()


# Orders


def test_every_rule_has_a_test():
    assert COMMIT_RULES.keys() == ORDERS.keys() | {"ancestral"}


@every_order
def test_order_of_commitment(unmasking):
    masked, order = [True] * 4, []
    for index in range(4):
        (position,) = picked(rule_for(unmasking), make_step(masked=masked, index=index, num_steps=4))
        masked[position] = False
        order.append(position)
    assert order == ORDERS[unmasking]


@every_order
def test_a_step_commits_its_share_of_the_best_and_nothing_that_is_open(unmasking):
    best, *others = ORDERS[unmasking]
    assert picked(rule_for(unmasking), make_step(num_steps=2)) == sorted([best, others[0]])
    # Of four positions one is open; step 1 of 3 is to commit two more.
    step = make_step(masked=[position != best for position in range(4)], index=1, num_steps=3)
    assert picked(rule_for(unmasking), step) == sorted(others[:2])


@pytest.mark.parametrize("unmasking", ["confidence", "margin", "entropy", "random"])
def test_ties_go_to_the_leftmost(unmasking):
    masked = [False, True, True, False, True, True, True]
    step = make_step([[0.6, 0.4]] * 7, masked, num_steps=2, noise=[0.5] * 7, size=torch.tensor([5]))
    assert picked(rule_for(unmasking), step) == [1, 2, 4]


def test_confidence_is_that_of_the_chosen_token():
    # Position 3 has drawn an unlikely token, so it falls behind; the margin belongs to the position.
    step = make_step(tokens=[0, 0, 0, 4], num_steps=4)
    torch.testing.assert_close(step.confidence, torch.tensor([[0.45, 0.40, 0.50, 0.13]]))
    torch.testing.assert_close(step.margin, torch.tensor([[0.17, 0.0, 0.01, 0.35]]))
    assert picked(rule_for(), step) == [2]


def test_impossible_tokens_leave_scores_finite():
    step = make_step([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(step.entropy, torch.tensor([[0.0, 0.6931472]]))
    torch.testing.assert_close(step.confidence, torch.tensor([[1.0, 0.5]]))
    torch.testing.assert_close(step.margin, torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("unmasking", ["confidence", "margin", "entropy"])
def test_a_penalty_puts_a_position_last(unmasking):
    best, second, *_ = ORDERS[unmasking]
    penalty = torch.nn.functional.one_hot(torch.tensor([best]), 4) * 2.0
    assert picked(rule_for(unmasking), make_step(num_steps=4, penalty=penalty)) == [second]


# Rules that commit several positions


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.45, [0, 2, 3]), (0.46, [2, 3]), (0.50, [2]), (0.95, [2]), (0.1, [0, 1, 2, 3])]
)
def test_confidence_threshold(threshold, expected):
    # The confidences are set outright: rounded probabilities would not tell "at least" from "more than".
    step = make_step(num_steps=4)
    step.confidence = torch.tensor([[0.45, 0.40, 0.50, 0.48]], dtype=torch.float64)
    assert picked(rule_for(confidence_threshold=threshold), step) == expected


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
    assert picked(rule_for(entropy_bound=bound), make_step(num_steps=4)) == expected


def test_entropy_bound_counts_masked_positions_only():
    # Position 2 is open: the sums are 0, 1.05, 2.12.
    for bound, expected in ((1.0, [1]), (1.1, [0, 1]), (2.1, [0, 1]), (2.2, [0, 1, 3])):
        step = make_step(masked=[True, True, False, True], index=1, num_steps=4)
        assert picked(EntropyBoundRule(bound, rule_for("entropy")), step) == expected


def test_parallel_rules_commit_at_least_the_quota_of_their_order():
    # Nothing qualifies but the lowest entropy; with two steps for four positions the schedule asks for two.
    for parallel, extra in (({"confidence_threshold": 0.99}, []), ({"entropy_bound": 0.0}, [2])):
        for unmasking in ("left_to_right", "margin"):
            expected = sorted({*ORDERS[unmasking][:2], *extra})
            assert picked(rule_for(unmasking, **parallel), make_step(num_steps=2)) == expected


def test_a_rule_may_ask_for_more_than_there_is():
    masked = [False, True, False, True]
    step = make_step(masked=masked, counted=torch.ones(1, 4, dtype=torch.bool))
    for count in (0, 1, 2, 3, 4):
        expected = torch.tensor([masked]) if count > 1 else torch.tensor([[False, False, False, count == 1]])
        assert torch.equal(step.best(torch.arange(4.0)[None], count=torch.tensor([count])), expected)
    # NaN comes last, and is committed in time.
    scores = torch.tensor([[0.0, math.nan, 0.0, -math.inf]])
    assert torch.equal(step.best(scores, count=torch.tensor([2])), torch.tensor([masked]))


def test_ties_do_not_add_up():
    rising = torch.linspace(0.990, 0.999, 512)
    table = torch.stack((rising, 1 - rising), -1).tolist()
    # The last two tie: they are less than 1e-5 of score and probability apart.
    assert picked(rule_for("confidence"), make_step(table, num_steps=512, noise=[0.5] * 512)) == [510]


@pytest.mark.parametrize("last", [3.0, 1e30, float("inf")])
def test_scores_may_be_of_any_size_and_type(last):
    class Given(CommitRule):
        def __init__(self, *scores, dtype):
            self.scores = torch.tensor([scores], dtype=dtype)

        def score(self, step):
            return self.scores

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert picked(Given(0.0, 1.0, 2.0, last, dtype=dtype), make_step(num_steps=4)) == [3]
    assert picked(Given(0, 2, 1, -5, dtype=torch.int64), make_step(num_steps=2)) == [1, 2]


def test_a_rule_must_say_what_it_commits():
    with pytest.raises(NotImplementedError):
        CommitRule()(make_step())


# Quotas and remasking


def test_quota_commits_everything_in_time_for_any_size_and_number_of_steps():
    sizes, steps = torch.tensor(list(itertools.product(range(1, 13), range(1, 16)))).unbind(-1)
    masked, counts = torch.arange(12) < sizes[:, None], []
    step = replace(make_step(), logits=torch.zeros(*masked.shape, 3))
    for index in range(15):
        commit = LeftToRightRule()(replace(step, masked=masked, size=sizes, index=index, num_steps=steps))
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
        return make_step(masked=masked, index=index, num_steps=4).quota.item()

    assert quota([True, True, True, True], index=2) == 3  # two that were due have gone back to [MASK]
    assert quota([True, False, False, False], index=0) == 1  # a threshold has committed three at once
    assert quota([False] * 4, index=1) == 0


def test_remasking_and_ancestral_opening_follow_the_reverse_process():
    for num_steps, eta in itertools.product((1, 2, 5, 8), (0.0, 0.1, 0.5, 1.0)):
        for index in range(num_steps):
            alpha_t, alpha_s = index / num_steps, (index + 1) / num_steps
            sigma = min(eta, (1 - alpha_s) / alpha_t) if index > 0 else 0.0
            opens = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
            assert 0 <= opens <= 1 + 1e-9
            step = make_step(
                masked=[True, True, True, False],
                noise=[opens - 1e-4, opens + 1e-4, 0.0, 0.0],
                index=index,
                num_steps=num_steps,
                remask_probability=eta,
            )
            assert picked(rule_for("ancestral"), step) == [0, 2]
            if index > 0:
                assert step.remask_rate.item() == pytest.approx(sigma)
                below = max(sigma - 1e-4, 0.0)
                noise = [below, sigma + 1e-4, below, below]
                step = replace(step, masked=torch.tensor([[False, False, True, False]]), size=torch.tensor([3]))
                step.noise = lambda noise=noise: torch.tensor([noise])
                # Position 2 is [MASK] and 3 is not of this row's block.
                assert step.remask[0].tolist() == [sigma > 0, False, False, False]


# Chance


def test_drawing_tokens_inverts_the_distribution_function():
    probabilities = torch.tensor([0.0, 0.3, 0.0, 0.5, 0.2, 0.0])
    noise = (torch.arange(1000) + 0.5) / 1000  # one draw per thousandth: counts are exact
    tokens = draw_tokens(probabilities.log().expand(1, 1000, 6), noise[None])
    assert tokens[0].bincount(minlength=6).tolist() == [0, 300, 0, 500, 200, 0]


def test_impossible_tokens_are_never_drawn():
    highest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    noise = torch.stack((torch.tensor(0.0), highest, torch.tensor(0.5)))
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, -torch.inf]).expand(1, 3, 4)
    assert draw_tokens(logits, noise[None]).tolist() == [[1, 1, 1]]


def test_drawing_reaches_the_tail():
    # Behind a token that is nearly certain, a sum in float32 swallows the others.
    probabilities = torch.tensor([1 - 2e-6] + [1e-8] * 200, dtype=torch.float64)
    noise = 1 - torch.arange(1, 33) * 2.0**-24  # the 32 highest numbers that `torch.rand` returns
    tokens = draw_tokens(probabilities.log().float().expand(1, 32, 201), noise[None])[0]
    from_the_end = (1 - noise.double()) / 1e-8
    torch.testing.assert_close(201 - tokens, from_the_end.ceil().long(), atol=1, rtol=0)


def test_noise_does_not_depend_on_the_default_dtype():
    drawn = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            sources = ([seeded(1)], seeded(1))
            drawn.append([draw_noise(source, [5000], [0], torch.device("cpu")) for source in sources])
        finally:
            torch.set_default_dtype(torch.float32)
    for other in drawn[1:]:
        assert all(map(torch.equal, drawn[0], other))


def test_noise_of_a_row_comes_from_its_own_generator_or_from_one_that_draws_for_all_rows():
    device = torch.device("cpu")
    together = draw_noise([seeded(5), seeded(6), seeded(7)], [2, 4, 3], [0, 2], device)
    assert together.shape == (2, 4)
    assert torch.equal(together[1:, :3], draw_noise([seeded(7)], [3], [0], device))
    every, some = (draw_noise(seeded(5), [2, 4, 3], rows, device) for rows in ([0, 1, 2], [1, 2]))
    assert every.shape == (3, 4) and torch.equal(some, every[1:])
