# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""How often mid is applied: the number of loops, and exit rules against a reference that runs everything."""

import math

import pytest
import torch
from references import masks_and_their_sources, run_layers, run_while_moving
from tiny import ARCHITECTURES, MASK, counted_rows, random_ids, scores, tiny_model

from loopmdm.loop_policies import LoopPolicy, RowTolerance, VisibleLoops

EXACT = {"rtol": 0, "atol": 1e-11}
MORE = {"blocks": {"attention_block_size": 4}, "shifted-blocks": {"attention_block_size": 4, "shift_logits": True}}
architectures = pytest.mark.parametrize("overrides", (ARCHITECTURES | MORE).values(), ids=ARCHITECTURES | MORE)
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def padded_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with padding on both sides, in between (with [MASK]s behind it), everywhere but once, and nowhere."""
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[0, [0, 9]] = mask[1, [2, 3, 5, 8]] = mask[2, [0, 1, 2, 3, 5, 6, 7, 8, 9]] = 0
    ids = random_ids(4, 10, seed)
    ids[1, [4, 9]], ids[1, [1, 7]] = MASK, 3
    return ids, mask


# The number of loops


@torch.no_grad()
def test_one_loop_is_the_plain_model_and_every_loop_matters():
    model, ids = tiny_model(), random_ids(2, 9)
    logits = [scores(model(ids, num_loops=num_loops).logits) for num_loops in (1, 2, 3, 4)]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(logits) for b in logits[:i])
    states, context = model.model.prelude(ids)
    states = model.model.norm(run_layers(model, [1, 2, 3], states, context))
    assert torch.equal(model(ids, num_loops=1).logits, model.logits(states))
    assert torch.equal(tiny_model(loop_update="damped")(ids, num_loops=1).logits, model.logits(states))


def test_loops_add_no_parameters():
    few, many = tiny_model(num_loops=1), tiny_model(num_loops=50)
    layer = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert few.num_parameters() == many.num_parameters() == 4 * layer + 32 + 23 * 32  # a tied head counts once
    assert few.state_dict().keys() == many.state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("update", ["replace", "damped"])
@architectures
def test_prelude_iterate_and_readout_make_up_forward(overrides, update):
    model = tiny_model(loop_update=update, **overrides)
    ids, mask = padded_batch()
    states, context = model.model.prelude(ids, mask)
    by_hand, seen = states, []
    for looped, moving in model.model.iterate(states, context, num_loops=4):
        by_hand = model.model.loop(by_hand, context, step_size=1.0 if update == "replace" else 0.25)
        assert moving is None and torch.equal(looped, by_hand)
        seen.append(model.model.readout(looped, context))
    assert len(seen) == 4
    outputs = model.model(ids, mask, num_loops=4)
    assert outputs.loops.tolist() == [4] * 4 and outputs.token_loops is None
    assert torch.equal(outputs.last_hidden_state, seen[-1])
    assert torch.equal(model(ids, mask, num_loops=4).logits, model.logits(model.align(seen[-1], mask)))
    if update == "replace":
        for num_loops, states in enumerate(seen, 1):
            assert torch.equal(model.model(ids, mask, num_loops=num_loops).last_hidden_state, states)


def test_which_number_of_loops_runs():
    model, ids = tiny_model(num_loops=3), random_ids(2, 5)

    def loops(**kwargs):
        return model(ids, **kwargs).loops.tolist()

    model.model.num_train_loops = 2
    assert loops() == [3, 3]  # evaluation uses the configuration's
    assert loops(num_loops=5) == [5, 5]
    model.train()
    assert loops() == [2, 2]
    assert loops(num_loops=5) == [5, 5]
    model.model.num_train_loops = None
    assert loops() == [3, 3]


@pytest.mark.parametrize("num_loops", [0, -1, True, 2.0, [2], "3"])
def test_bad_num_loops_run_nothing(num_loops):
    model = tiny_model()
    with counted_rows(model.model.layers[0]) as rows:
        with pytest.raises(ValueError, match=r"`num_loops` is .*; it must be an integer of at least 1"):
            model(random_ids(2, 5), num_loops=num_loops)
        model.model.num_train_loops = num_loops
        with pytest.raises(ValueError, match=r"`num_loops` is .* at least 1"):
            model.train()(random_ids(2, 5))
    assert rows == []


# Exit rules


class Signs(LoopPolicy):
    """An arbitrary rule that depends on the states alone: what goes on is what has a positive feature."""

    def __init__(self, per_position: bool):
        self.per_position = per_position

    def goes_on(self, index, before, after, part):
        real = torch.ones(after.shape[:2]) if part.real is None else part.real
        assert real.shape == part.masked.shape == before.shape[:2] == after.shape[:2]
        return self.decide(index, before, after, real)

    def decide(self, index, before, after, real):
        signs = after[..., index] + before[..., -1] > -0.1
        return signs if self.per_position else ((signs * 2.0 - 0.6) * real).sum(-1) > 0


def assert_policy_equals_reference(model, ids, num_loops, goes_on, mask=None, documents=None, **arguments):
    found = model(ids, mask, num_loops=num_loops, document_ids=documents, **arguments)
    expected, counts = run_while_moving(model, ids, num_loops, goes_on, mask, documents)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert found.loops.tolist() == counts.amax(-1).tolist()
    assert found.token_loops.tolist() == counts.sum(-1).tolist()
    torch.testing.assert_close(found.logits[real], expected[real], **EXACT)
    keep = torch.tensor([[8, 4], [4, 4], [4, 4], [0, 2]])[: len(ids)]  # the last layer computes no others
    kept = model(ids, mask, num_loops=num_loops, document_ids=documents, logits_to_keep=keep, **arguments).logits
    torch.testing.assert_close(kept, found.logits.take_along_dim(keep[..., None], 1), **EXACT)
    return counts


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@architectures
def test_a_policy_of_rows_or_positions_equals_the_reference(overrides, attention):
    model = tiny_model(attn_implementation=attention, **overrides).double()
    ids, mask = padded_batch()
    for policy in (Signs(per_position=False), Signs(per_position=True)):

        def goes_on(index, before, after, policy=policy):
            decided = policy.decide(index, before, after, mask)
            return decided if policy.per_position else decided[:, None]

        counts = assert_policy_equals_reference(model, ids, 5, goes_on, mask, loop_policy=policy)
        assert 0 < counts[mask.bool()].min() < 5, "and it does stop some"


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_row_tolerance_equals_the_reference(seed):
    model, (ids, mask) = tiny_model(seed=seed).double(), padded_batch(seed)
    for tolerance in (0.1, 0.3, 0.6, 1.0):

        def goes_on(index, before, after, tolerance=tolerance):
            change = torch.stack([(a - b)[real].norm() for a, b, real in zip(after, before, mask.bool(), strict=True)])
            size = torch.stack([b[real].norm() for b, real in zip(before, mask.bool(), strict=True)])
            return (change / size >= tolerance)[:, None]

        assert_policy_equals_reference(model, ids, 6, goes_on, mask, loop_tolerance=tolerance)


@torch.no_grad()
def test_rows_stop_one_by_one_and_cost_nothing_then():
    model, ids = tiny_model().double(), random_ids(6, 9)
    with counted_rows(model.model.layers[1]) as rows:
        outputs = model(ids, num_loops=8, loop_tolerance=0.4)
    loops = outputs.loops.tolist()
    assert len(set(loops)) > 1
    assert rows == [9 * sum(count > index for count in loops) for index in range(max(loops))]
    for row, count in enumerate(loops):
        alone = model(ids[row : row + 1], num_loops=count)
        torch.testing.assert_close(outputs.logits[row], alone.logits[0], **EXACT)
    never, once = (model(ids, num_loops=7, loop_tolerance=tolerance) for tolerance in (0.0, 1e9))
    assert (never.loops.tolist(), once.loops.tolist()) == ([7] * 6, [1] * 6)
    assert torch.equal(never.logits, model(ids, num_loops=7).logits)
    assert torch.equal(once.logits, model(ids, num_loops=1).logits)


def test_gradients_of_rows_that_stop_are_those_of_their_loops():
    model, ids = tiny_model().double().train(), random_ids(4, 9)
    labels = ids.masked_fill(ids == MASK, 3)
    outputs = model(ids, labels=labels, num_loops=6, loop_tolerance=0.4)
    outputs.loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row, count in enumerate(outputs.loops.tolist()):
        part = slice(row, row + 1)
        model(ids[part], labels=labels[part], num_loops=count, num_items_in_batch=labels.numel()).loss.backward()
    assert outputs.loops.unique().numel() > 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, **EXACT)


@torch.no_grad()
@architectures
def test_visible_loops_equal_the_reference(overrides):
    model = tiny_model(**overrides).double()
    ids, mask = padded_batch()
    documents = torch.tensor([[0] * 4 + [3] * 6, [0] * 3 + [5] * 7, [1] * 10, [7] * 5 + [6] * 5])
    for packed in (None, documents):
        loops_on = masks_and_their_sources(model, ids, mask, packed)
        for num_loops, visible_loops in ((4, 1), (4, 2), (3, 3), (2, 5)):

            def goes_on(index, before, after, visible_loops=visible_loops, loops_on=loops_on):
                return loops_on | (index + 1 < visible_loops)

            arguments = {"mask": mask, "documents": packed, "visible_loops": visible_loops}
            assert_policy_equals_reference(model, ids, num_loops, goes_on, **arguments)


@torch.no_grad()
def test_visible_loops_cost_what_they_move():
    model, ids = tiny_model(), random_ids(2, 9)
    masked = (ids == MASK).sum(-1)
    assert masked.tolist() == [2, 7]
    with counted_rows(model.model.layers[1]) as rows:
        outputs = model(ids, num_loops=5, visible_loops=2)
    assert outputs.loops.tolist() == [5, 5]
    assert outputs.token_loops.tolist() == (9 * 2 + masked * 3).tolist()
    assert rows == [18, 18, 14, 14, 14], "the shorter row is filled up"
    without = model(torch.full((1, 4), 3), num_loops=5, visible_loops=2)
    assert (without.loops.item(), without.token_loops.item()) == (2, 8)
    for visible_loops in (5, 7):
        assert torch.equal(model(ids, num_loops=5, visible_loops=visible_loops).logits, model(ids, num_loops=5).logits)


@pytest.mark.parametrize("loop_tolerance", [-0.1, math.nan, True, "0.1", [0.1]])
def test_bad_loop_tolerance(loop_tolerance):
    with pytest.raises(ValueError, match=r"`loop_tolerance` is .*; it must be a number of at least 0"):
        tiny_model()(random_ids(1, 5), loop_tolerance=loop_tolerance)


@pytest.mark.parametrize("visible_loops", [0, 1.5, True])
def test_bad_visible_loops(visible_loops):
    with pytest.raises(ValueError, match=r"`visible_loops` is .*; it must be an integer of at least 1"):
        tiny_model()(random_ids(1, 5), visible_loops=visible_loops)


RULES = {
    "loop_tolerance": {"loop_tolerance": 0.1},
    "visible_loops": {"visible_loops": 1},
    "loop_policy": {"loop_policy": Signs(per_position=True)},
}


@pytest.mark.parametrize("name", RULES)
def test_what_cannot_have_exit_rules(name):
    ids = random_ids(1, 5)
    others = [rule for other, rule in RULES.items() if other != name]
    for other in others:
        with pytest.raises(ValueError, match=r"is given too; choose one exit rule"):
            tiny_model()(ids, **RULES[name], **other)
    with pytest.raises(ValueError, match=f'`{name}` cannot be used: .*`loop_update="replace"`'):
        tiny_model(loop_update="damped")(ids, **RULES[name])
    if name != "loop_tolerance":
        with pytest.raises(ValueError, match=f"`{name}` cannot be used: .*gradients.*eval"):
            tiny_model().train()(ids, **RULES[name])
        flex = tiny_model(attn_implementation="flex_attention")
        with pytest.raises(ValueError, match=f'`{name}` cannot be used: .*attn_implementation."sdpa"'):
            flex(ids, **RULES[name])
    if name == "visible_loops":
        model = tiny_model()
        with pytest.raises(ValueError, match=r"which tokens are \[MASK\]; give `input_ids`"):
            model(inputs_embeds=model.model.embed_tokens(ids), visible_loops=1)


def test_policies_are_classes_that_say_what_they_are():
    with pytest.raises(NotImplementedError):
        tiny_model()(random_ids(1, 5), loop_policy=LoopPolicy())
    assert (LoopPolicy.per_position, RowTolerance(0.1).per_position, VisibleLoops(2).per_position) == (0, 0, 1)
    model, ids = tiny_model(), random_ids(3, 9)
    for policy, arguments in ((RowTolerance(0.4), {"loop_tolerance": 0.4}), (VisibleLoops(1), {"visible_loops": 1})):
        assert torch.equal(model(ids, loop_policy=policy).logits, model(ids, **arguments).logits)
