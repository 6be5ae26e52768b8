# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Which logits `forward` computes and what they cost, and the masked diffusion loss, against plain formulas."""

import itertools
import math

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, MASK, counted_rows, in_turn, random_ids, scores, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from training_runs import gradients

EXACT = {"rtol": 0, "atol": 1e-11}


# Logits


@torch.no_grad()
def test_the_mask_token_is_never_produced():
    model, ids = tiny_model(tie_word_embeddings=False), random_ids(2, 9)
    model.lm_head.weight[MASK] = 0
    model.lm_head.weight[:MASK] -= 1.0  # by its own score it would be the winner now
    states = model.model(ids).last_hidden_state
    logits = model(ids).logits
    assert torch.equal(logits, model.logits(states))
    assert torch.equal(scores(logits), model.lm_head(states)[..., :MASK])
    assert (logits.softmax(-1)[..., MASK] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize(("name", "block_size", "attention"), in_turn(ARCHITECTURES, [None, 4], ["sdpa", "eager"]))
def test_logits_to_keep(name, block_size, attention):
    options = {"attn_implementation": attention, "attention_block_size": block_size}
    model = tiny_model(**options, **ARCHITECTURES[name]).double()
    ids = random_ids(3, 12)
    inputs = {
        "plain": {},
        "padded": {"attention_mask": torch.tensor([[1] * 12, [0] * 5 + [1] * 7, [1, 1, 0, 0] + [1] * 6 + [0] * 2])},
        "packed": {"document_ids": torch.tensor([[0] * 12, [0] * 5 + [1] * 7, [0] * 3 + [2] * 1 + [4] * 8])},
    }
    for arguments in inputs.values():
        full = model(ids, **arguments).logits
        assert full.shape == (3, 12, 23)
        for count in (1, 5):
            found = model(ids, logits_to_keep=count, **arguments).logits
            torch.testing.assert_close(found, full[:, -count:], **EXACT)
        for columns in ([7, 0, 3, 3], []):
            positions = torch.tensor(columns, dtype=torch.long)
            found = model(ids, logits_to_keep=positions, **arguments).logits
            torch.testing.assert_close(found, full[:, positions], **EXACT)
        for width in (0, 1, 17):  # in any order, some of them twice
            keep = torch.randint(12, (3, width), generator=torch.Generator().manual_seed(width))
            found = model(ids, logits_to_keep=keep, **arguments).logits
            torch.testing.assert_close(found, full.take_along_dim(keep[..., None], 1), **EXACT)


# Cost


def counted(function) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("overrides", (ARCHITECTURES | {"long-tail": {"num_hidden_layers": 6}}).values())
def test_flops_are_those_that_torch_counts(overrides):
    model = tiny_model(attn_implementation="eager", **overrides)
    ids, keep = random_ids(2, 12), torch.tensor([[3, 3, 0], [11, 5, 7]])
    counts = [counted(lambda loops=loops: model(ids, num_loops=loops)) for loops in (1, 2, 3, 7)]
    assert [model.flops(2, 12, loops) for loops in (1, 2, 3, 7)] == counts
    mid = counts[1] - counts[0]
    assert counts == [counts[0] + (loops - 1) * mid for loops in (1, 2, 3, 7)]
    assert model.flops(2, 12) == counts[2]  # the configuration's three loops
    found = counted(lambda: model(ids, logits_to_keep=keep))
    assert found == 2 * model.config.pass_flops(12, 12, 3, 3, 12 * 3) < counts[2]
    assert counted(lambda: model(ids, logits_to_keep=1)) == model.flops(2, 12, num_logits=1)
    assert isinstance(model.flops(2, 12, num_logits=0.5), int)
    with counted_rows(model.lm_head) as rows:
        model(ids, logits_to_keep=keep)
    assert rows == [6]


@pytest.mark.parametrize("overrides", [{}, {"loop_end": 4}], ids=["tail", "no-tail"])
def test_flops_behind_a_cache(overrides):
    model = tiny_model(attn_implementation="eager", attention_block_size=4, **overrides)
    ids, keep = random_ids(2, 12), torch.tensor([[3], [11]])
    cache = model(random_ids(2, 16), use_cache=True).cache
    assert counted(lambda: model(ids, past_key_values=cache)) == 2 * model.config.pass_flops(12, 28, 12, 12, 12 * 3)
    found = counted(lambda: model(ids, past_key_values=cache, logits_to_keep=keep))
    assert found == 2 * model.config.pass_flops(12, 28, 1, 1, 12 * 3)


def test_flops_check_num_loops():
    with pytest.raises(ValueError, match="`num_loops` is 0"):
        tiny_model().flops(1, 8, num_loops=0)


# The loss


def training_batch(batch_size=4, length=9, seed=0):
    """Ids with masks, labels with gaps, and weights of which about half are zero."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, MASK, (batch_size, length), generator=generator)
    visible = torch.rand(labels.shape, generator=generator) < 0.5
    weights = (1 + 4 * torch.rand(labels.shape, generator=generator)).masked_fill(visible, 0)
    ids = torch.where(visible, labels, MASK)
    labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.2, -100)
    return ids, labels, weights


def plain_loss(logits, labels, weights, num_items=None):
    """One label after the other."""
    total, count = 0.0, 0
    flat = scores(logits).flatten(0, 1).tolist(), labels.flatten().tolist(), weights.flatten().tolist()
    for each, label, weight in zip(*flat, strict=True):
        if label != -100:
            total += weight * (math.log(sum(map(math.exp, each))) - each[label])
            count += 1
    return total / (num_items or count)


@torch.no_grad()
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(11)])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("overrides", [{}, {"shift_logits": True, "lm_head_bias": True}], ids=["plain", "shift"])
def test_loss_equals_the_plain_formula(overrides, weighted, num_items):
    model = tiny_model(**overrides).double()
    ids, labels, weights = training_batch()
    weights = weights if weighted else torch.ones_like(weights)
    expected = plain_loss(model(ids).logits, labels, weights, num_items if num_items is None else int(num_items))
    arguments = {"labels": labels, "num_items_in_batch": num_items, "loss_weights": weights if weighted else None}
    with counted_rows(model.lm_head) as rows:
        trained, scored = model.train()(ids, **arguments), model.eval()(ids, **arguments)
    for outputs in (trained, scored):
        assert outputs.loss.shape == ()
        assert outputs.loss.item() == pytest.approx(expected, rel=1e-12)
    # Training computes the logits of weighted labels alone, and returns none.
    needed = int(((labels != -100) & (weights != 0)).sum())
    assert 0 < needed < ids.numel() and rows == [needed, needed, ids.numel()]
    assert trained.logits is None and torch.equal(scored.logits, model(ids).logits)


def test_a_causal_models_labels_are_refused():
    """They are the input, so a model only has to copy; of a few, BERT's collator may mask none by chance."""
    model, ids = tiny_model(), torch.arange(1, 11).view(2, 5)
    for mode in (model.train(), model.eval()):
        with pytest.raises(ValueError, match="`labels` are the tokens of `input_ids`, which a model only has to copy"):
            mode(ids, labels=ids)
    few = ids.masked_fill(ids % 2 == 0, -100)
    masked = ids.masked_fill(ids == 3, MASK)
    for inputs in ({"labels": few}, {"labels": ids, "loss_weights": torch.ones(2, 5)}):
        assert model(ids, **inputs).loss.isfinite()
    assert model(masked, labels=ids).loss.isfinite()


def test_the_mask_token_gets_no_gradient_from_the_head():
    model = tiny_model(tie_word_embeddings=False)
    ids, labels, weights = training_batch()
    model(ids, labels=labels, loss_weights=weights).loss.backward()
    assert (model.lm_head.weight.grad[MASK] == 0).all()
    assert (model.lm_head.weight.grad[:MASK] != 0).any(-1).all()


ONES = torch.ones(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ONES[:, :4]}, r"`labels` has shape \(2, 4\); the input needs \(2, 5\)"),
        ({"labels": ONES[0]}, r"`labels` has shape \(5,\); the input needs \(2, 5\)"),
        ({"labels": ONES, "loss_weights": torch.ones(2)}, r"`loss_weights` has shape \(2,\); the input needs"),
        ({"loss_weights": torch.ones(2, 5)}, "`loss_weights` weigh the loss of `labels`, which are missing"),
        ({"labels": ONES * -100}, "`labels` holds -100 only"),
        ({"labels": ONES * MASK}, "`labels` holds 22, which is the mask token or outside the vocabulary of 23"),
        ({"labels": ONES * 23}, "`labels` holds 23, which is the mask token or outside the vocabulary of 23"),
        ({"labels": [[1] * 5] * 2}, "`labels` is a list; give a tensor"),
        ({"labels": ONES.float()}, r"`labels` is torch.float32; it must be int64 or int32"),
        ({"labels": ONES * -1}, "`labels` holds -1, which is the mask token or outside the vocabulary of 23"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_labels_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(random_ids(2, 5), **arguments)


# Inputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1, 2]]}, "The input is a list; give a tensor"),
        ({"input_ids": torch.tensor([1, 2])}, r"shape \(2,\); it must be int64 or int32 of shape \(batch_size"),
        ({"input_ids": torch.tensor(1)}, r"shape \(\); it must be"),
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, r"shape \(1, 0\).* with at least one row and position"),
        ({"input_ids": torch.empty(0, 3, dtype=torch.long)}, r"shape \(0, 3\)"),
        ({"input_ids": torch.tensor([[1.0, 2.0]])}, "is torch.float32"),
        ({"input_ids": torch.tensor([[True, False]])}, "is torch.bool"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 2, 31)}, r"shape \(1, 2, 31\); it must be .*, 32\)"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 2, 32, dtype=torch.long)}, "must be floating point"),
        ({"position_ids": torch.tensor([[0, 1, 2]])}, r"`position_ids` has shape \(1, 3\)"),
        ({"document_ids": torch.tensor([[0, 0, 1]])}, r"`document_ids` has shape \(1, 3\)"),
        ({"position_ids": torch.tensor([[0.0, 1.0]])}, "`position_ids` is torch.float32"),
        ({"attention_mask": [[1, 1]]}, "`attention_mask` is a list; give a tensor"),
        ({"attention_mask": np.ones((1, 1, 2, 2))}, "`attention_mask` is a ndarray; give a tensor"),
        ({"attention_mask": torch.ones(1, 1)}, r"`attention_mask` has shape \(1, 1\); the input needs \(1, 2\)\."),
        ({"attention_mask": torch.ones(1, 1), "document_ids": ONES[:1, :2]}, r"`attention_mask` has shape \(1, 1\)"),
        ({"attention_mask": torch.ones(2, 2)}, r"`attention_mask` has shape \(2, 2\)"),
        ({"position_ids": np.array([[0, 1]])}, "`position_ids` is a ndarray; give a tensor"),
        ({"document_ids": [[0, 0]]}, "`document_ids` is a list; give a tensor"),
        ({"position_ids": [[0, 1]]}, "`position_ids` is a list; give a tensor"),
        ({"logits_to_keep": -1}, "`logits_to_keep` is -1"),
        ({"logits_to_keep": [1]}, r"`logits_to_keep` is \[1\]; it must be a number of last positions"),
        ({"logits_to_keep": torch.tensor([2])}, r"torch.int64 of shape \(1,\); .* integer positions within the input"),
        ({"logits_to_keep": torch.tensor([[-1]])}, r"torch.int64 of shape \(1, 1\)"),
        ({"logits_to_keep": torch.tensor([[1], [1]])}, r"torch.int64 of shape \(2, 1\)"),
        ({"logits_to_keep": torch.tensor([0.0, 1.0])}, r"torch.float32 of shape \(2,\)"),
        ({"logits_to_keep": torch.tensor([[True, False]])}, r"torch.bool of shape \(1, 2\)"),
    ],
    ids=str,
)
def test_bad_inputs_are_named(arguments, message):
    inputs = {"input_ids": torch.tensor([[1, 2]])} | arguments
    asked = [{}] if "input_ids" in arguments else [{}, {"logits_to_keep": torch.tensor([[1]])}]
    for shifts, keep in itertools.product((False, True), asked):
        with pytest.raises(ValueError, match=message):
            tiny_model(shift_logits=shifts)(**keep | inputs)


# Gradient checkpointing


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("how", ["layers", "layers-reentrant", "loops", "loops-of-layers"])
def test_checkpointing_changes_no_bit(how):
    """Each layer, or each loop, is computed again in the backward pass."""
    plain, checkpointed = tiny_model().train(), tiny_model().train()
    if "layers" in how:
        checkpointed.gradient_checkpointing_enable({"use_reentrant": how == "layers-reentrant"})
    checkpointed.model.checkpoint_loops = "loops" in how
    ids, labels, weights = training_batch()
    losses, calls = [], []
    for model in (plain, checkpointed):
        with counted_rows(model.model.layers[1].mlp) as rows:
            losses.append(model(ids, labels=labels, loss_weights=weights, num_loops=3).loss)
            losses[-1].backward()
        calls.append(len(rows))
    assert calls == [3, 9 if how == "loops-of-layers" else 6]
    assert torch.equal(*losses)
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(checkpointed)[name], gradient), name


def test_a_config_that_asks_for_tuples():
    model, ids = tiny_model(), random_ids(2, 6)
    expected, tokens = model(ids), model.generate(ids, max_new_tokens=3)
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], expected.logits)
    assert torch.equal(model.generate(ids, max_new_tokens=3), tokens)
