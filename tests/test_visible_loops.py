# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Fewer loops for visible tokens, against a reference without caches, and loop schedules over the steps."""

from itertools import pairwise

import pytest
import torch
from tiny import random_ids, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import CompileConfig

MASK, PAD = 22, 0
PROMPTS = torch.tensor(
    [[PAD, PAD, 5, 9, 3, 7], [1, 2, 3, 4, 5, 6], [PAD, PAD, PAD, PAD, PAD, 8], [4, MASK, 6, MASK, 2, 1]]
)
exact = {"rtol": 1e-10, "atol": 1e-10}
architectures = pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_key_value_heads": 2, "use_qk_norm": True},
        {"position_embedding_type": "learned"},
        {"shift_logits": True},
        {"loop_start": 0, "loop_end": 4},
        {"attention_block_size": 4},
        {"attention_block_size": 4, "shift_logits": True},
    ],
    ids=["rope", "gqa-qk-norm", "learned", "shift", "whole", "block-causal", "block-causal-shift"],
)


def reference(model, ids, mask, num_loops, visible_loops):
    """
    Logits when visible positions stop after `visible_loops`: mid's layers run on all positions, those that stopped
    with the inputs of their last update, and what they put out is thrown away.
    """
    inner, config = model.model, model.config
    looping = (ids == MASK) & mask.bool()
    if config.shift_logits:
        # The real position before a [MASK] predicts it.
        for row in range(len(ids)):
            real = mask[row].nonzero().flatten().tolist()
            for before, position in pairwise(real):
                if ids[row, position] == MASK:
                    looping[row, before] = True
    states, context = inner.prelude(ids, mask)
    inputs = {}
    for loop in range(num_loops):
        active = torch.ones_like(looping) if loop < visible_loops else looping
        current = states
        for index in range(config.loop_start, config.loop_end):
            inputs[index] = torch.where(active[..., None], current, inputs.get(index, current))
            current = inner.layers[index](inputs[index], **context)
        states = torch.where(active[..., None], current, states)
    return model.lm_head(model.align(inner.readout(states, context), mask))


@torch.no_grad()
@architectures
@pytest.mark.parametrize(("num_loops", "visible_loops"), [(1, 1), (4, 1), (4, 2), (3, 3), (2, 5)])
def test_visible_positions_stop_and_are_attended_to_as_they_are(overrides, num_loops, visible_loops):
    model = tiny_model(**overrides).double()
    ids, mask = random_ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, :4], mask[2, 9:] = 0, 0
    found = model(ids, mask, num_loops=num_loops, visible_loops=visible_loops)
    expected = reference(model, ids, mask, num_loops, visible_loops)
    torch.testing.assert_close(found.logits[mask.bool()], expected[mask.bool()], **exact)


@torch.no_grad()
def test_as_many_loops_as_the_masks_change_nothing():
    model, ids = tiny_model().double(), random_ids(2, 9)
    plain = model(ids, num_loops=3).logits
    for visible_loops in (3, 7):
        assert torch.equal(model(ids, num_loops=3, visible_loops=visible_loops).logits, plain)
    assert not torch.allclose(model(ids, num_loops=3, visible_loops=1).logits, plain)


@torch.no_grad()
def test_loops_of_positions_are_counted():
    model, ids = tiny_model(), random_ids(2, 9)
    masked = (ids == MASK).sum(-1)
    outputs = model(ids, num_loops=5, visible_loops=2)
    assert outputs.loops.tolist() == [5, 5]
    assert outputs.token_loops.tolist() == (9 * 2 + masked * 3).tolist()
    without = model(torch.full((1, 4), 3), num_loops=5, visible_loops=2)
    assert (without.loops.item(), without.token_loops.item()) == (2, 8)


@torch.no_grad()
@architectures
def test_generated_rows_depend_neither_on_the_batch_nor_on_the_cache(overrides):
    model = tiny_model(**overrides).double()
    how = {"max_new_tokens": 10, "num_loops": 4, "visible_loops": 2, "max_denoising_steps": 3}
    how["block_length"] = overrides.get("attention_block_size", 5)
    together = model.generate(PROMPTS, **how)
    if "attention_block_size" in overrides:
        assert torch.equal(model.generate(PROMPTS, use_cache=False, **how), together)
    else:
        for implementation in ("prefix", "dual"):
            cached = {"cache_implementation": implementation, "cache_refresh_interval": 1, **how}
            assert torch.equal(model.generate(PROMPTS, **cached), together)
    for row, tokens in zip(PROMPTS, together, strict=True):
        alone = model.generate(row[row != PAD][None], **how)[0]
        assert torch.equal(alone, tokens[-len(alone) :])


@torch.no_grad()
def test_generate_is_the_reference_step_by_step():
    model, length = tiny_model().double(), 9
    canvas = torch.tensor([[5, MASK, 9, 4] + [MASK] * 5])
    output = model.generate(canvas[:, :4], max_new_tokens=5, num_loops=4, visible_loops=1)
    while bool((canvas == MASK).any()):
        logits = reference(model, canvas, torch.ones(1, length, dtype=torch.long), 4, 1)[0]
        logits[:, MASK] = -torch.inf
        confidence, tokens = logits.softmax(-1).max(-1)
        place = int(confidence.masked_fill(canvas[0] != MASK, -1).argmax())
        canvas[0, place] = tokens[place]
    assert torch.equal(output, canvas)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "dual"}], ids=str)
def test_flops_are_those_that_run(options):
    model = tiny_model()
    model.set_attn_implementation("eager")
    arguments = {"max_new_tokens": 8, "block_length": 4, "num_loops": 4, "visible_loops": 1, **options}
    with FlopCounterMode(display=False) as counter:
        output = model.generate(torch.tensor([[5, 3, 8]]), return_dict_in_generate=True, **arguments)
    assert output.flops.item() == counter.get_total_flops()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"visible_loops": 0}, "`visible_loops` is 0; it must be an integer of at least 1"),
        ({"visible_loops": 1.5}, "`visible_loops` is 1.5; it must be an integer of at least 1"),
        ({"visible_loops": 1, "loop_tolerance": 0.1}, '`loop_tolerance` of single positions; add `loop_exit="token"`'),
        (
            {"visible_loops": 1, "compile_config": CompileConfig(mode="reduce-overhead")},
            "`visible_loops` changes shapes from loop to loop",
        ),
        ({"loop_schedule": "sometimes"}, "`loop_schedule` is 'sometimes'; choose one of"),
        ({"loop_schedule": "early", "num_loops": [1, 2]}, "`num_loops` is a list, which is a schedule itself"),
        (
            {"loop_schedule": "late", "cache_implementation": "dual", "cache_loops": "each"},
            "`loop_schedule` is 'late'; use \"last\"",
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_named_before_anything_runs(monkeypatch, arguments, message):
    model = tiny_model()
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("ran all the same"))
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[5, MASK]]), max_new_tokens=2, **arguments)


def test_what_forward_refuses():
    model, ids = tiny_model(), random_ids(1, 5)
    with pytest.raises(ValueError, match="give `input_ids`"):
        model(inputs_embeds=model.model.embed_tokens(ids), visible_loops=1)
    with pytest.raises(ValueError, match='needs `loop_update="replace"`'):
        tiny_model(loop_update="damped")(ids, visible_loops=1)
    with pytest.raises(ValueError, match="passes no gradients on"):
        tiny_model().train()(ids, visible_loops=1)


@torch.no_grad()
def test_a_cache_serves_the_visible_loops_that_filled_it():
    model = tiny_model(attention_block_size=4).double()
    how = {"max_new_tokens": 8, "num_loops": 4, "return_dict_in_generate": True}
    first = model.generate(PROMPTS[1:2], visible_loops=1, **how)
    cache, ids = first.past_key_values, first.sequences
    for visible_loops in (None, 2):
        with pytest.raises(ValueError, match="filled with visible_loops=1 and is used with"):
            model.generate(ids, past_key_values=cache, visible_loops=visible_loops, **how)
    with pytest.raises(ValueError, match="filled with visible_loops=1 and is used with None"):
        model(ids[:, cache.length :], past_key_values=cache, num_loops=4)
    again = model.generate(ids, past_key_values=cache, visible_loops=1, **how)
    assert torch.equal(again.sequences, model.generate(ids, visible_loops=1, **how).sequences)


# Schedules


@torch.no_grad()
@pytest.mark.parametrize(
    ("schedule", "loops"),  # of five steps of at most 5 loops, at shares 0.1, 0.3, 0.5, 0.7, 0.9
    [
        ("constant", [5, 5, 5, 5, 5]),
        ("early", [5, 4, 3, 2, 1]),
        ("late", [1, 2, 3, 4, 5]),
        ("middle", [2, 4, 5, 4, 2]),
    ],
)
def test_schedules_shape_the_loops_of_the_steps(schedule, loops):
    model = tiny_model()
    arguments = {"max_new_tokens": 5, "num_loops": 5, "return_dict_in_generate": True, "output_trace": True}
    output = model.generate(torch.tensor([[5, 9]]), loop_schedule=schedule, **arguments)
    assert [step.loops.item() for step in output.trace] == loops
    listed = model.generate(torch.tensor([[5, 9]]), **{**arguments, "num_loops": loops})
    assert torch.equal(output.sequences, listed.sequences)
