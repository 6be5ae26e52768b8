# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tests of the NELBO: against enumeration of every mask, and for what must not change it."""

import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model

from loopmdm.evaluation import nelbo
from loopmdm.objective import nelbo as _  # noqa: F401

VOCAB = {"vocab_size": 6, "mask_token_id": 5, "pad_token_id": 0, "hidden_size": 16, "intermediate_size": 24}


def small_model(**overrides):
    return tiny_model(**VOCAB | overrides)


def clean_ids(batch_size: int, length: int, seed: int = 0) -> torch.LongTensor:
    return torch.randint(1, 5, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def exact_nelbo(model, row: torch.Tensor, num_loops: int, maskable: list[int] | None = None) -> float:
    """Every non-empty mask of every block, each number of masked tokens equally likely; one forward pass each."""
    positions = list(range(len(row))) if maskable is None else maskable
    size = model.config.attention_block_size or len(row)
    total = 0.0
    for block in range(0, len(row), size):
        members = [position for position in positions if block <= position < block + size]
        for count in range(1, len(members) + 1):
            subsets = list(itertools.combinations(members, count))
            for subset in subsets:
                noised = row.clone()
                noised[list(subset)] = model.config.mask_token_id
                # What comes after a block must not matter; make sure that it would show.
                if model.config.attention_block_size is not None:
                    noised[block + size :] = 1
                logits = model(noised[None], num_loops=num_loops).logits[0].double()
                logits[:, model.config.mask_token_id] = -math.inf
                log_probs = logits.log_softmax(-1)[list(subset), row[list(subset)]]
                # (1 / L) sum over k of (L / k), averaged over the subsets of size k
                total -= log_probs.sum().item() / count / len(subsets)
    return total


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


def test_one_token_is_scored_exactly():
    # There is one mask only, so sampling adds nothing.
    model, ids = small_model(), clean_ids(3, 1)
    estimate = nelbo(model, ids, num_loops=2, num_samples=2)
    assert estimate.standard_error.tolist() == [[0, 0, 0]]
    exact = [exact_nelbo(model, row, 2) for row in ids]
    torch.testing.assert_close(estimate.nats[0], torch.tensor(exact, dtype=torch.float64))


def test_standard_error_is_the_spread_over_seeds():
    model, ids = small_model(), clean_ids(1, 5)
    estimates = [nelbo(model, ids, num_loops=1, num_samples=16, seed=seed) for seed in range(150)]
    spread = torch.stack([estimate.nats[0, 0] for estimate in estimates]).std()
    reported = torch.stack([estimate.standard_error[0, 0] for estimate in estimates]).square().mean().sqrt()
    assert 0.8 < (reported / spread).item() < 1.25


@pytest.mark.parametrize("loop_update", ["replace", "damped"])
def test_several_loops_together_equal_each_alone(loop_update):
    model, ids = small_model(loop_update=loop_update), clean_ids(2, 7)
    together = nelbo(model, ids, num_loops=[4, 1, 2], num_samples=8)
    assert together.num_loops == [4, 1, 2]
    for i, loops in enumerate([4, 1, 2]):
        alone = nelbo(model, ids, num_loops=loops, num_samples=8)
        torch.testing.assert_close(together.nats[i], alone.nats[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(together.standard_error[i], alone.standard_error[0], rtol=1e-5, atol=1e-8)


def test_replaced_loops_share_the_passes_of_mid():
    model, ids = small_model(), clean_ids(1, 4)
    calls = []
    handles = [
        layer.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, layer in enumerate(model.model.layers)
    ]
    nelbo(model, ids, num_loops=[1, 2, 5], num_samples=2)
    for handle in handles:
        handle.remove()
    # head once, mid (layers 1 and 2) as often as the most loops, tail once for each number of loops
    assert [calls.count(index) for index in range(4)] == [1, 5, 5, 3]


@pytest.mark.parametrize("overrides", [{}, {"shift_logits": True}, {"attention_block_size": 3}], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, overrides):
    model, ids = small_model(**overrides), clean_ids(2, 6)
    plain = nelbo(model, ids, num_loops=2, num_samples=8)
    filling, ones = torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)
    order = 1 if side == "right" else -1
    padded = torch.cat([ids, filling][::order], dim=1)
    mask = torch.cat([ones, filling][::order], dim=1)
    estimate = nelbo(model, padded, attention_mask=mask, num_loops=2, num_samples=8)
    torch.testing.assert_close(estimate.nats, plain.nats, rtol=1e-5, atol=1e-6)
    assert estimate.num_tokens.tolist() == [6, 6]


def test_a_sequence_does_not_depend_on_batching():
    model, ids = small_model(), clean_ids(3, 6)
    reference = nelbo(model, ids, num_loops=2, num_samples=6, batch_size=18)
    for batch_size in (1, 4, 100):
        estimate = nelbo(model, ids, num_loops=2, num_samples=6, batch_size=batch_size)
        torch.testing.assert_close(estimate.nats, reference.nats, rtol=1e-6, atol=0)
    alone = nelbo(model, ids[:1], num_loops=2, num_samples=6)
    torch.testing.assert_close(alone.nats[:, 0], reference.nats[:, 0], rtol=1e-6, atol=0)


def test_logits_in_chunks_give_the_same(monkeypatch):
    model, ids = small_model(), clean_ids(2, 6)
    reference = nelbo(model, ids, num_samples=4)
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 2 * model.config.vocab_size)
    torch.testing.assert_close(nelbo(model, ids, num_samples=4).nats, reference.nats, rtol=1e-6, atol=0)


def test_seed_decides():
    model, ids = small_model(), clean_ids(1, 6)
    torch.manual_seed(1)
    first = nelbo(model, ids, num_samples=4, seed=3)
    torch.manual_seed(2)
    assert torch.equal(nelbo(model, ids, num_samples=4, seed=3).nats, first.nats)
    assert not torch.equal(nelbo(model, ids, num_samples=4, seed=4).nats, first.nats)


def test_per_token_sums_over_sequences():
    model, ids = small_model(), clean_ids(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    estimate = nelbo(model, ids, attention_mask=mask, num_loops=[1, 2], num_samples=4)
    mean, error = estimate.per_token()
    torch.testing.assert_close(mean, estimate.nats.sum(1) / 10)
    torch.testing.assert_close(error, (estimate.standard_error**2).sum(1).sqrt() / 10)


def test_defaults_and_mode():
    model, ids = small_model(num_loops=2).train(), clean_ids(1, 5)
    model.model.num_train_loops = 5  # what training drew has no say here
    estimate = nelbo(model, ids, num_samples=4)
    assert estimate.num_loops == [2] and model.training
    torch.testing.assert_close(estimate.nats, nelbo(model.eval(), ids, num_loops=2, num_samples=4).nats)
    assert not model.training


def test_peft_models_are_scored_with_their_adapter():
    model, ids = small_model(), clean_ids(1, 5)
    plain = nelbo(model, ids, num_samples=4).nats
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    torch.testing.assert_close(nelbo(adapted, ids, num_samples=4).nats, plain)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    assert not torch.allclose(nelbo(adapted, ids, num_samples=4).nats, plain)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_samples": 3}, "`num_samples` is 3; it must be even"),
        ({"num_samples": 0}, "`num_samples` is 0"),
        ({"num_loops": 0}, "`num_loops` is 0"),
        ({"num_loops": []}, "`num_loops` is an empty list"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"input_ids": torch.tensor([1, 2])}, "needs (num_sequences, length)"),
        ({"input_ids": torch.tensor([[1, 5]])}, "holds the mask token (5)"),
        ({"attention_mask": torch.ones(1, 3)}, "`attention_mask` has shape (1, 3)"),
        ({"maskable": torch.zeros(1, 4, dtype=torch.bool)}, "Sequences [0] have no maskable token"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError) as error:
        nelbo(small_model(), **{"input_ids": clean_ids(1, 4), **arguments})
    assert message in str(error.value)


def test_models_without_a_nelbo_are_refused():
    with pytest.raises(ValueError, match="holds no LoopMDMForMaskedLM"):
        nelbo(torch.nn.Linear(2, 2), clean_ids(1, 4))
