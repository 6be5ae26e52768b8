# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The NELBO against enumeration of every mask: values, errors, timesteps, tokens, and what must not change them."""

import math
import sys

import pytest
import torch
from objective_reference import clean_ids, exact_nelbo, mask_losses, small_model

from loopmdm.evaluation import nelbo


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"loop_update": "damped"},
        {"shift_logits": True},
        {"attention_block_size": 2},
        {"attention_block_size": 3, "shift_logits": True},
    ],
    ids=str,
)
def test_estimate_agrees_with_enumeration(overrides):
    model, ids = small_model(**overrides), clean_ids(2, 5)
    estimate = nelbo(model, ids, num_loops=[1, 3], num_samples=2000, batch_size=500)
    for i, loops in enumerate([1, 3]):
        for row in range(2):
            exact = exact_nelbo(model, ids[row], loops)
            error = estimate.standard_error[i, row].item()
            assert 0 < error < 0.02 * exact
            assert abs(estimate.nats[i, row].item() - exact) < 4 * error


def test_tokens_after_a_prompt_are_scored_given_the_prompt():
    model, ids = small_model(), clean_ids(1, 6)
    maskable = torch.tensor([[False, False, True, True, False, True]])
    estimate = nelbo(model, ids, maskable=maskable, num_loops=2, num_samples=2000, batch_size=500)
    exact = exact_nelbo(model, ids[0], 2, maskable=[2, 3, 5])
    assert estimate.num_tokens.tolist() == [3]
    assert abs(estimate.nats.item() - exact) < 4 * estimate.standard_error.item()


@pytest.mark.parametrize("overrides", [{}, {"attention_block_size": 2}, {"shift_logits": True}], ids=str)
def test_packed_documents_are_scored_apart(overrides):
    model, ids = small_model(**overrides), clean_ids(1, 5)
    documents = torch.tensor([[7, 7, 7, 2, 2]])
    estimate = nelbo(model, ids, document_ids=documents, num_loops=2, num_samples=2000, batch_size=500)
    blocks = model.config.attention_block_size is not None
    if blocks:  # one block of the row at a time: what each adds is its NELBO
        exact = exact_nelbo(model, ids[0, :3]) + exact_nelbo(model, ids[0, 3:])
    else:  # masked together, seen apart: averaged over how many of each are masked
        exact = two_documents(model, ids[0, :3], ids[0, 3:])
    assert abs(estimate.nats.item() - exact) < 4 * estimate.standard_error.item()


@pytest.mark.parametrize("place", range(6))
def test_padding_between_packed_documents_changes_nothing(place):
    """Wherever it stands, and whichever document it counts to."""
    model, ids, documents = small_model(attention_block_size=2), clean_ids(1, 5), torch.tensor([[7, 7, 2, 2, 2]])
    expected = nelbo(model, ids, document_ids=documents, num_loops=2, num_samples=12).nats
    for document in documents[0, [max(place - 1, 0), min(place, 4)]]:
        padded, packed, mask = (
            torch.cat((tensor[:, :place], torch.full((1, 1), value), tensor[:, place:]), -1)
            for tensor, value in ((ids, 1), (documents, int(document)), (torch.ones_like(ids), 0))
        )
        found = nelbo(model, padded, mask, document_ids=packed, num_loops=2, num_samples=12).nats
        torch.testing.assert_close(found, expected)


def two_documents(model, first, second) -> float:
    """Masks over both documents' tokens, each document run alone."""
    length, total = len(first) + len(second), 0.0
    parts = [{(): torch.zeros(1)} | mask_losses(model, part) for part in (first, second)]
    for a, left in parts[0].items():
        for b, right in parts[1].items():
            if count := len(a) + len(b):
                total += (left.sum() + right.sum()).item() / count / math.comb(length, count)
    return total


def test_one_token_is_scored_exactly():
    # There is one mask only, so sampling adds nothing.
    model, ids = small_model(), clean_ids(3, 1)
    estimate = nelbo(model, ids, num_loops=2, num_samples=2)
    assert estimate.standard_error.tolist() == [[0, 0, 0]]
    exact = [exact_nelbo(model, row, 2) for row in ids]
    # The model computes in float32, and batches round differently on some processors.
    torch.testing.assert_close(estimate.nats[0], torch.tensor(exact, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_standard_error_is_the_spread_over_seeds():
    model, ids = small_model(), clean_ids(1, 5)
    estimates = [nelbo(model, ids, num_samples=16, seed=seed) for seed in range(150)]
    values = torch.stack([estimate.nats[0, 0] for estimate in estimates])
    reported = torch.stack([estimate.standard_error[0, 0] for estimate in estimates]).square().mean().sqrt()
    assert 0.8 < (reported / values.std()).item() < 1.25
    assert abs(values.mean() - exact_nelbo(model, ids[0], 3)) < 4 * values.std() / 150**0.5


def test_two_standard_errors_hold_the_exact_value_about_as_often_as_they_should():
    model, rows = small_model(), clean_ids(8, 5)
    exact = sum(exact_nelbo(model, row, 2) for row in rows) / rows.numel()
    held, count = 0, 150
    for seed in range(count):
        mean, error = nelbo(model, rows, num_loops=2, num_samples=16, batch_size=128, seed=seed).per_token()
        held += abs(mean.item() - exact) <= 2 * error.item()
    # 95 % of a normal variable, somewhat fewer as the error is itself estimated. Three deviations of 150 trials: 5 %.
    assert 0.89 <= held / count <= 0.99


def test_values_by_timestep_are_those_of_each_number_of_masks():
    model, row = small_model(), clean_ids(1, 5)
    losses = mask_losses(model, row[0], 3)
    mean, error, counts = nelbo(model, row, num_loops=[1, 3], num_samples=2000, batch_size=500).by_timestep(5)
    assert mean.shape == error.shape == (2, 5) and counts.tolist() == [400] * 5
    for k in range(1, 6):
        exact = torch.stack([loss.mean() for subset, loss in losses.items() if len(subset) == k]).mean().item()
        assert abs(mean[1, k - 1].item() - exact) <= 4 * error[1, k - 1].item() + 1e-6
    assert error[1, 4] < 1e-6 < error[1, 0]  # one mask only holds all tokens


def test_the_curve_over_timesteps_averages_to_the_nelbo():
    # With a bin for each number of masks the curve's mean is the value per token.
    estimate = nelbo(small_model(), clean_ids(2, 4), num_loops=2, num_samples=64)
    mean, _, counts = estimate.by_timestep(4)
    torch.testing.assert_close((mean[0] * counts).sum() / counts.sum(), estimate.per_token()[0][0])
    empty = estimate.by_timestep(50)
    assert math.isnan(empty[0][0, 0]) and empty[2][0] == 0
    with pytest.raises(ValueError, match="`num_bins` is 0"):
        estimate.by_timestep(0)


@pytest.mark.parametrize("block_size", [None, 2])
def test_tokens_add_up_to_their_sequence(block_size):
    model, rows = small_model(attention_block_size=block_size), clean_ids(2, 6)
    estimate = nelbo(model, rows, num_loops=[1, 2], num_samples=16)
    assert estimate.token_nats.shape == (2, 2, 6)
    torch.testing.assert_close(estimate.token_nats.sum(-1), estimate.nats)


def test_a_tokens_share_is_its_mean_over_all_masks():
    model, row = small_model(), clean_ids(1, 4)
    exact = torch.zeros(4, dtype=torch.float64)
    for subset, loss in mask_losses(model, row[0], 1).items():
        exact[list(subset)] += loss / len(subset) / math.comb(4, len(subset))
    estimate = nelbo(model, row, num_loops=1, num_samples=4000, batch_size=500)
    torch.testing.assert_close(estimate.token_nats[0, 0], exact, rtol=0.1, atol=0.02)


def test_per_token_sums_over_sequences():
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    estimate = nelbo(small_model(), clean_ids(2, 6), attention_mask=mask, num_loops=[1, 2], num_samples=4)
    mean, error = estimate.per_token()
    torch.testing.assert_close(mean, estimate.nats.sum(1) / 10)
    torch.testing.assert_close(error, (estimate.standard_error**2).sum(1).sqrt() / 10)


def test_changes_between_loops_are_known_better_than_the_values():
    estimate = nelbo(small_model(), clean_ids(4, 8), num_loops=[2, 2, 3], num_samples=16)
    change, error = estimate.change()
    mean, separate = estimate.per_token()
    torch.testing.assert_close(change, mean - mean[0])
    assert change[1] == error[1] == 0
    assert 0 < error[2] < (separate[0] ** 2 + separate[2] ** 2) ** 0.5


# What must not change a value


@pytest.mark.parametrize("loop_update", ["replace", "damped"])
def test_several_loops_together_equal_each_alone(loop_update):
    model, ids = small_model(loop_update=loop_update), clean_ids(2, 7)
    together = nelbo(model, ids, num_loops=[4, 1, 2], num_samples=8)
    assert together.num_loops == [4, 1, 2]
    for i, loops in enumerate([4, 1, 2]):
        alone = nelbo(model, ids, num_loops=loops, num_samples=8)
        torch.testing.assert_close(together.nats[i], alone.nats[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(together.standard_error[i], alone.standard_error[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("loop_update", "mid", "tail"), [("replace", 5, 3), ("damped", 1 + 2 + 5, 3)])
def test_replaced_loops_share_the_passes_of_mid(loop_update, mid, tail):
    model, calls = small_model(loop_update=loop_update), []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    nelbo(model, clean_ids(1, 4), num_loops=[1, 2, 5], num_samples=2)
    assert [calls.count(index) for index in range(4)] == [1, mid, mid, tail]


@pytest.mark.parametrize("overrides", [{}, {"shift_logits": True}, {"attention_block_size": 3}], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, overrides):
    model, ids = small_model(**overrides), clean_ids(2, 6)
    plain = nelbo(model, ids, num_loops=2, num_samples=8)
    filling, ones = torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)
    order = 1 if side == "right" else -1
    padded, mask = (torch.cat([part, filling][::order], dim=1) for part in (ids, ones))
    estimate = nelbo(model, padded, attention_mask=mask, num_loops=2, num_samples=8)
    torch.testing.assert_close(estimate.nats, plain.nats, rtol=1e-5, atol=1e-6)
    assert estimate.num_tokens.tolist() == [6, 6]


def test_a_sequence_depends_on_seed_and_index_alone():
    model, ids = small_model(), clean_ids(3, 6)
    torch.manual_seed(1)
    reference = nelbo(model, ids, num_samples=6, batch_size=18, seed=3).nats
    torch.manual_seed(2)
    for batch_size in (1, 4, 100):
        found = nelbo(model, ids, num_samples=6, batch_size=batch_size, seed=3).nats
        torch.testing.assert_close(found, reference, rtol=1e-6, atol=0)
    for rows, indices in (([0], None), ([1], [1]), ([2, 1], [2, 1])):
        found = nelbo(model, ids[rows], num_samples=6, seed=3, indices=indices).nats
        torch.testing.assert_close(found, reference[:, rows], rtol=1e-6, atol=0)
    assert not torch.equal(nelbo(model, ids, num_samples=6, seed=4).nats, reference)


def test_logits_in_chunks_give_the_same(monkeypatch):
    model, ids = small_model(), clean_ids(2, 6)
    reference = nelbo(model, ids, num_samples=4)
    monkeypatch.setattr(sys.modules["loopmdm.objective.nelbo"], "MAX_LOGITS", 2 * model.config.vocab_size)
    torch.testing.assert_close(nelbo(model, ids, num_samples=4).nats, reference.nats, rtol=1e-6, atol=0)


# Models


def test_defaults_and_mode():
    model, ids = small_model(num_loops=2).train(), clean_ids(1, 5)
    model.model.layers[0].eval()
    model.model.num_train_loops = 5  # what training drew has no say here
    estimate = nelbo(model, ids, num_samples=4)
    assert estimate.num_loops == [2]
    assert model.training and not model.model.layers[0].training, "every module is in its mode again"
    torch.testing.assert_close(estimate.nats, nelbo(model.eval(), ids, num_loops=2, num_samples=4).nats)
    assert not model.training


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_samples": 3}, "`num_samples` is 3; it must be even"),
        ({"num_samples": 0}, "`num_samples` is 0"),
        ({"num_loops": 0}, "`num_loops` is 0"),
        ({"num_loops": []}, "`num_loops` is an empty list"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"input_ids": torch.tensor([1, 2])}, "needs (num_sequences > 0, length)"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, "num_sequences > 0"),
        ({"input_ids": torch.tensor([[1, 5]])}, "holds the mask token (5)"),
        ({"attention_mask": torch.ones(1, 3)}, "`attention_mask` has shape (1, 3)"),
        ({"maskable": torch.zeros(1, 4, dtype=torch.bool)}, "Sequences [0] have no maskable token"),
        ({"indices": [0, 1]}, "`indices` has 2 entries for 1 sequences"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear holds no LoopMDMForMaskedLM"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError) as error:
        nelbo(**{"model": small_model(), "input_ids": clean_ids(1, 4), **arguments})
    assert message in str(error.value)
