# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What `generate` computes and what it reads from a cache: exact caching, Fast-dLLM's caches by definition, loops and
exit rules, and turns that go on from a cache. The references are in generation_reference.py.
"""

import re
from functools import partial

import pytest
import torch
from generation_reference import (
    BLOCK,
    ROWS,
    Stored,
    assert_equals_reference,
    batch_of,
    block_exits,
    double_model,
    plain,
    real_tokens,
    run,
    seeded,
)
from tiny import MASK, in_turn, tiny_model
from transformers import DynamicCache

from loopmdm.cache_utils import CachePlan, DualCache, ForwardPass, LoopMDMCache
from loopmdm.loop_policies import LoopPolicy

PROMPT = torch.tensor([ROWS[0]])


def block_model(**overrides):
    return double_model(attention_block_size=BLOCK, **overrides)


@pytest.fixture(scope="module")
def model():
    return double_model()


@pytest.fixture(scope="module")
def causal():
    return block_model()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# Exact caching (test_generation.py has it for every commit rule)


CAUSAL_MODELS = {
    "rope": {},
    "gqa-qk-norm": {"num_key_value_heads": 2, "use_qk_norm": True},
    "learned-shift": {"position_embedding_type": "learned", "shift_logits": True},
    "shift": {"shift_logits": True},
    "no-tail": {"loop_end": 4},
    "damped": {"loop_update": "damped"},
}


@pytest.mark.parametrize(
    ("name", "use_cache"), [*((name, True) for name in CAUSAL_MODELS), ("learned-shift", False), ("damped", False)]
)
def test_exact_caching_changes_nothing(name, use_cache):
    arguments = {"max_new_tokens": 11, "max_denoising_steps": 3, "num_loops": 3}
    assert_equals_reference(block_model(**CAUSAL_MODELS[name]), options={"use_cache": use_cache}, **arguments)


def test_exact_caching_saves_what_is_finished(causal):
    cached, plain = (run(causal, PROMPT, max_new_tokens=14, use_cache=use_cache) for use_cache in (None, False))
    assert torch.equal(cached.sequences, plain.sequences) and (cached.flops < plain.flops).all()
    assert plain.cache is None and cached.cache.length == 16


def test_training_does_not_switch_the_cache_off(causal, tmp_path):
    """Every Trainer sets `config.use_cache` to False, and training scripts load models with it."""
    causal.save_pretrained(tmp_path)
    loaded = type(causal).from_pretrained(tmp_path, use_cache=False)
    assert not loaded.config.use_cache
    plain, cached = (run(loaded, PROMPT, max_new_tokens=14, **options) for options in ({"use_cache": False}, {}))
    assert torch.equal(cached.sequences, plain.sequences) and (cached.flops < plain.flops).all()
    assert plain.cache is None and cached.cache.length == 16


def test_checkpointed_layers_use_caches():
    """Callbacks of a training generate in its mode."""
    calls = [{"cache_implementation": "prefix"}, {"cache_implementation": "dual"}, {"visible_loops": 1}]
    calls = [
        (block_model, {}),
        (block_model, {"loop_tolerance": 0.3}),
        *((double_model, options) for options in calls),
    ]
    for make, options in calls:
        model, options = make(), {"max_new_tokens": 14, "max_denoising_steps": 3, **options}
        expected = run(model, PROMPT, **options)
        model.train().gradient_checkpointing_enable()
        found = run(model, PROMPT, **options)
        assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.flops, expected.flops)


def test_guidance_and_lists_of_loops_with_use_cache(causal):
    """The first keeps two rows in the cache; the second cannot be cached, and is not."""
    options = {"use_cache": True}
    for arguments in ({"guidance_scale": 1.7}, {"num_loops": [1, 3]}):
        output = assert_equals_reference(causal, options=options, max_new_tokens=9, block_length=4, **arguments)
        assert output.cache is None


def test_use_cache_has_no_effect_on_models_of_whole_sequence_attention(model):
    outputs = [run(model, PROMPT, max_new_tokens=5, use_cache=use_cache) for use_cache in (None, True, False)]
    for output in outputs:
        assert torch.equal(output.sequences, outputs[0].sequences) and output.cache is None
        assert torch.equal(output.flops, outputs[0].flops)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_caching_in_other_dtypes(attention, dtype):
    model = tiny_model(attention_block_size=BLOCK).to(dtype)
    model.set_attn_implementation(attention)
    ids, mask = batch_of(ROWS)
    cached, plain = (model.generate(ids, mask, max_new_tokens=12, use_cache=use_cache) for use_cache in (True, False))
    assert (cached != MASK).all()
    if dtype == torch.float32:
        assert torch.equal(cached, plain)


# Approximate caching


APPROXIMATE_MODELS = {
    "rope": {},
    "gqa-qk-norm": {"num_key_value_heads": 2, "use_qk_norm": True},
    "learned-shift": {"position_embedding_type": "learned", "shift_logits": True},
    "no-head": {"loop_start": 0, "loop_end": 2},
    "damped": {"loop_update": "damped"},
}


def assert_equals_stored(model, kind="dual", interval=None, loop_tolerance=None, visible_loops=None, **arguments):
    options = {"cache_implementation": kind, "cache_refresh_interval": interval}
    options |= {"loop_tolerance": loop_tolerance, "visible_loops": visible_loops}
    predictor = partial(Stored, kind=kind, interval=interval, tolerance=loop_tolerance, visible_loops=visible_loops)
    arguments = {"rows": ROWS[1:], "max_new_tokens": 7, "block_length": 4, "num_loops": 3} | arguments
    return assert_equals_reference(model, predictor, options=options, **arguments)


@pytest.mark.parametrize(("name", "kind", "interval"), in_turn(APPROXIMATE_MODELS, ["dual", "prefix"], [None, 2]))
def test_approximate_caches_equal_keys_stored_by_hand(name, kind, interval):
    assert_equals_stored(double_model(**APPROXIMATE_MODELS[name]), kind, interval)


OTHERS = [
    {"max_denoising_steps": 2, "block_length": 3},
    {"block_length": None},
    {"num_loops": [1, 3, 2]},
    {"confidence_threshold": 0.3},
    {"guidance_scale": 1.5},
    {"unmasking": "ancestral", "max_denoising_steps": 12},
    {"unmasking": "ancestral", "max_denoising_steps": 12, "interval": 3},
    {"remask_probability": 0.4, "max_denoising_steps": 7, "do_sample": True},
    {"eos_token_id": tuple(range(1, 12))},
    {"num_loops": 4, "loop_tolerance": 0.45},
    {"num_loops": 4, "visible_loops": 1},
    {"num_loops": 4, "visible_loops": 2, "guidance_scale": 1.5},
]


@pytest.mark.parametrize(("arguments", "kind", "shift_logits"), in_turn(OTHERS, ["dual", "prefix"], [False, True]))
def test_approximate_caches_with_other_arguments(shift_logits, kind, arguments):
    assert_equals_stored(double_model(shift_logits=shift_logits), kind, **arguments)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_approximations_that_leave_nothing_out_equal_no_cache(model, kind):
    ids, mask = batch_of(ROWS)
    for more, refresh in (({}, {"cache_refresh_interval": 1}), ({"max_denoising_steps": 1}, {})):
        arguments = {"max_new_tokens": 9, "block_length": 5, **more}
        plain, found = (
            run(model, ids, mask, **arguments, **how) for how in ({}, {"cache_implementation": kind, **refresh})
        )
        assert torch.equal(found.sequences, plain.sequences) and torch.equal(found.flops, plain.flops)


def test_approximations_do_approximate(model):
    """Or the tests above would show nothing."""
    ways = ({}, {"cache_implementation": "dual"}, {"cache_implementation": "prefix"})
    results = [model.generate(PROMPT, max_new_tokens=24, block_length=8, **how)[0].tolist() for how in ways]
    assert results[0] != results[1] != results[2] != results[0]


def test_a_way_of_caching_of_ones_own(model):
    class Wider(DualCache):
        def passes(self, rows, starts, stops, step):
            return super().passes(rows, starts, self.lengths[rows], step)

    ids, mask = batch_of(ROWS)
    for own, named in ((Wider, "prefix"), (CachePlan, None)):
        own, named = (
            run(model, ids, mask, max_new_tokens=9, block_length=5, cache_implementation=how) for how in (own, named)
        )
        assert torch.equal(own.sequences, named.sequences) and torch.equal(own.flops, named.flops)


def test_a_pass_may_take_the_rows_in_any_order(model):
    class ShortestFirst(CachePlan):
        def make_cache(self, num_loops, visible_loops):
            return LoopMDMCache(self.config, num_loops, len(self.lengths))

        def passes(self, rows, starts, stops, step):
            order = rows[self.lengths[rows].argsort()]
            everything = torch.zeros_like(order), self.lengths[order], self.lengths[order]
            fill = ForwardPass(order, *everything, self.cache, predicts=False)
            return [fill, ForwardPass(rows, starts, stops, self.lengths[rows], self.cache)]

    ids, mask = batch_of(ROWS)
    sorted_rows, expected = (
        run(model, ids, mask, max_new_tokens=9, block_length=5, cache_implementation=how)
        for how in (ShortestFirst, None)
    )
    assert mask.sum(-1).diff().min() < 0, "the rows are in this order already"
    assert torch.equal(sorted_rows.sequences, expected.sequences)
    for found, right in zip(sorted_rows.trace, expected.trace, strict=True):
        torch.testing.assert_close(found.confidence, right.confidence, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("beyond", "has_cache"), [(-1, False), (-1, True), (1, False)])
def test_a_pass_reaches_what_it_computes(model, beyond, has_cache):
    class Reaching(CachePlan):
        def passes(self, rows, starts, stops, step):
            cache = LoopMDMCache(self.config, 3, len(self.lengths)) if has_cache else None
            return [ForwardPass(rows, torch.zeros_like(starts), stops, stops + beyond, cache)]

    with pytest.raises(ValueError, match="of Reaching returned a pass whose `reach` is less than `stops`, or more"):
        model.generate(PROMPT, max_new_tokens=8, block_length=4, cache_implementation=Reaching)


def test_chance_with_caches_is_that_of_the_row_alone(model, causal):
    ids, mask = batch_of(ROWS, "scattered")
    for one, how in ((model, {"cache_implementation": "dual", "block_length": 5}), (causal, {})):
        arguments = {"max_new_tokens": 9, "do_sample": True, "unmasking": "random", **how}
        together = run(one, ids, mask, generator=[seeded(number) for number in range(3)], **arguments)
        for number, tokens in enumerate(real_tokens(together.sequences, mask)):
            alone = run(one, torch.tensor([ROWS[number]]), generator=[seeded(number)], **arguments)
            assert tokens == alone.sequences[0].tolist()
            assert together.flops[number] == alone.flops[0]


# Exit rules


@pytest.mark.parametrize(
    ("exits", "arguments", "shift_logits"),
    in_turn(
        [{"loop_tolerance": 0.3}, {"loop_tolerance": 0.6}, {"visible_loops": 2}],
        [{}, {"guidance_scale": 1.5}, {"num_loops": [2, 4]}],
        [False, True],
    ),
    ids=str,
)
def test_exit_rules_equal_those_of_forward(exits, arguments, shift_logits):
    arguments = {"max_new_tokens": 5, "num_loops": 4} | arguments
    assert_equals_reference(
        double_model(shift_logits=shift_logits), partial(plain, **exits), options=exits, **arguments
    )


@pytest.mark.parametrize(
    ("overrides", "exits", "predictor"),
    [
        ({}, {"loop_tolerance": 0.5}, block_exits),
        ({"shift_logits": True}, {"loop_tolerance": 0.5}, block_exits),
        # Visible tokens loop alike before and after their block is finished, but for the one before a [MASK].
        ({}, {"visible_loops": 1}, plain),
        ({"shift_logits": True}, {"visible_loops": 1}, block_exits),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("arguments", [{}, {"unmasking": "ancestral", "max_denoising_steps": 9}], ids=str)
def test_exit_rules_of_block_causal_models_leave_finished_blocks_alone(overrides, exits, predictor, arguments):
    arguments = {"max_new_tokens": 5, "num_loops": 4} | arguments
    assert_equals_reference(block_model(**overrides), partial(predictor, **exits), options=exits, **arguments)


def test_exit_rules_of_block_causal_models_with_guidance(causal):
    exits = {"loop_tolerance": 0.5}
    arguments = {"max_new_tokens": 5, "num_loops": 4, "guidance_scale": 1.5, "rows": ROWS[:2]}
    assert_equals_reference(causal, partial(block_exits, **exits), options=exits, **arguments)


def test_extreme_exits_equal_plain_loops(model):
    ids, mask = batch_of(ROWS)
    four, once = (run(model, ids, mask, max_new_tokens=8, num_loops=loops) for loops in (4, 1))
    for exits, expected in (
        ({"loop_tolerance": 0.0}, four),
        ({"loop_tolerance": 1e9}, once),
        ({"visible_loops": 4}, four),
    ):
        found = run(model, ids, mask, max_new_tokens=8, num_loops=4, **exits)
        for name in ("sequences", "loops", "flops"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), (exits, name)


@pytest.mark.parametrize("per_position", [False, True])
def test_an_exit_rule_of_ones_own(model, per_position):
    class Twice(LoopPolicy):
        def goes_on(self, index, before, after, part):
            return torch.full(after.shape[: 2 if per_position else 1], index < 1)

    policy = Twice()
    policy.per_position = per_position
    ids, mask = batch_of(ROWS)
    found = run(model, ids, mask, max_new_tokens=6, num_loops=5, loop_policy=policy)
    expected = run(model, ids, mask, max_new_tokens=6, num_loops=2)
    for name in ("sequences", "loops", "flops"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("exits", [{"loop_tolerance": 0.4}, {"visible_loops": 1}], ids=str)
@pytest.mark.parametrize("name", [name for name in CAUSAL_MODELS if name != "damped"])  # which has no exits
def test_exits_of_block_causal_models_need_no_kept_cache(name, exits):
    model = block_model(**CAUSAL_MODELS[name])
    ids, mask = batch_of(ROWS)
    kept = run(model, ids, mask, max_new_tokens=8, num_loops=4, **exits)
    for arguments in ({"use_cache": False, "num_loops": 4}, {"num_loops": [4, 4]}):
        assert torch.equal(run(model, ids, mask, max_new_tokens=8, **exits, **arguments).sequences, kept.sequences)


# Turns that go on from a cache


OF_TURNS = ({"loop_tolerance": 0.4}, {"eos_token_id": [3, 14, 6]}, {"visible_loops": 1})


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, {}) for name in CAUSAL_MODELS),
        *(("rope", more) for more in OF_TURNS),
        *(("shift", m) for m in OF_TURNS),
    ],
    ids=str,
)
def test_turns_go_on_from_a_cache(name, more):
    overrides = CAUSAL_MODELS[name]
    model, rows, cache = block_model(**overrides), [[5, 3, 8, 1, 9, 2], [7, 6, 1]], None
    for turn in range(3):
        ids, mask = batch_of(rows)
        plain, cached = (
            run(model, ids, mask, max_new_tokens=4, past_key_values=past, **more) for past in (None, cache)
        )
        assert torch.equal(cached.sequences, plain.sequences)
        assert turn == 0 or (cached.flops < plain.flops).all()
        cache = cached.cache
        rows = [[*row, 4 + turn, 9] for row in real_tokens(cached.sequences, mask)]
        assert all(length % BLOCK == 0 for length in cache.lengths.tolist())
        assert 0 < cache.length <= max(map(len, rows))


def test_the_next_turn_leaves_out_what_follows_an_end(causal):
    """The mask of the output makes a prompt of it that has neither old nor new padding."""
    ids, mask = batch_of([[5, 3, 8, 1], [7, 6]])
    question = torch.tensor([[4, 9, 2]] * 2)
    written = run(causal, ids, mask, max_new_tokens=8).sequences[0, 4:].tolist()
    first = run(causal, ids, mask, max_new_tokens=8, eos_token_id=written[2])
    length = 4 + written.index(written[2]) + 1
    assert first.attention_mask[0].tolist() == [1] * length + [0] * (12 - length)
    arguments = {"max_new_tokens": 5, "eos_token_id": None}
    longer = torch.cat((first.sequences, question), 1), torch.cat((first.attention_mask, torch.ones_like(question)), 1)
    second = run(causal, *longer, past_key_values=first.cache, **arguments)
    for row in range(2):
        alone = torch.cat((first.sequences[row, first.attention_mask[row] == 1], question[row]))[None]
        assert torch.equal(second.sequences[row, -5:], causal.generate(alone, **arguments)[0, -5:])
        assert torch.equal(second.sequences[row, second.attention_mask[row] == 1][:-5], alone[0])


def test_a_cropped_cache_serves_another_continuation(causal):
    first = run(causal, PROMPT, max_new_tokens=14)
    other, cache = first.sequences.clone(), first.cache
    other[:, 10:] = 1 + (other[:, 10:] + 5) % 20
    with pytest.raises(ValueError, match=r"from position 10 of row 0 on; `past_key_values.crop\(10\)`"):
        causal.generate(other, max_new_tokens=5, past_key_values=cache)
    with pytest.raises(ValueError, match="other tokens than the input from position 2"):
        causal.generate(other[:, :2], max_new_tokens=1, past_key_values=cache)
    cache.crop(10)
    assert cache.length == 8
    again, plain = (run(causal, other, max_new_tokens=5, past_key_values=past) for past in (cache, None))
    assert torch.equal(again.sequences, plain.sequences) and (again.flops < plain.flops).all()


def test_caches_of_generate_and_of_forward_serve_each_other(causal):
    output = run(causal, torch.tensor([[5, 3, 8, 1, 9, 2], [6, 4, 2, 2, 7, 1]]), max_new_tokens=12)
    ids, cache = output.sequences, output.cache
    assert cache.length == 16
    logits = causal(ids[:, 16:], past_key_values=cache).logits
    torch.testing.assert_close(logits, causal(ids).logits[:, 16:], rtol=1e-10, atol=1e-10)

    cache = causal(ids[:, :8], use_cache=True).cache
    cached, plain = (run(causal, ids[:, :9], max_new_tokens=9, past_key_values=past) for past in (cache, None))
    assert torch.equal(cached.sequences, plain.sequences) and (cached.flops < plain.flops).all()


def test_a_failed_call_leaves_the_cache_usable(causal):
    output = run(causal, PROMPT, max_new_tokens=6)
    cache, ids = output.cache, output.sequences
    with pytest.raises(ValueError, match="No token can be chosen"):
        causal.generate(
            ids,
            max_new_tokens=4,
            past_key_values=cache,
            logits_processor=[lambda ids, scores: scores.fill_(-torch.inf)],
        )
    stored, longer = cache.length, torch.cat((ids, torch.tensor([[4, 7, 9, 3, 2, 6, 1, 8]])), dim=1)
    logits = causal(longer[:, stored:], past_key_values=cache).logits
    torch.testing.assert_close(logits, causal(longer).logits[:, stored:], rtol=1e-10, atol=1e-10)


def test_rows_that_had_nothing_to_do_are_stored_in_the_next_turn(causal):
    ids = torch.tensor([[5, 3, 8, 1, 9, 2], [5, 3, 8, 1, 9, MASK]])
    output = run(causal, ids)
    assert output.cache.lengths.tolist() == [0, 4]
    plain, cached = (
        causal.generate(output.sequences, max_new_tokens=4, past_key_values=past) for past in (None, output.cache)
    )
    assert torch.equal(plain, cached)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda config, cache: LoopMDMCache(config, 2, 3), {}, "made for rows=3 and is used with 1"),
        (lambda config, cache: cache, {"num_loops": 3}, "num_loops=2 and is used with 3"),
        (lambda config, cache: cache, {"visible_loops": 1}, "visible_loops=None and is used with 1"),
        (lambda config, cache: DynamicCache(), {}, "must be a LoopMDMCache"),
        (lambda config, cache: LoopMDMCache(config, 2, 1, share_loops=True), {}, "with a place for every loop"),
        (lambda config, cache: cache, {"guidance_scale": 2.0}, "no guidance"),
        (lambda config, cache: cache, {"num_loops": [2, 2]}, "one `num_loops` for all steps"),
        (lambda config, cache: cache, {"use_cache": False}, "`use_cache=True`"),
    ],
    ids=["rows", "loops", "visible", "dynamic", "shared", "guidance", "list", "no-cache"],
)
def test_foreign_caches_are_refused_before_anything_runs(monkeypatch, causal, change, arguments, message):
    output = run(causal, PROMPT, max_new_tokens=6)
    cache = change(causal.config, output.cache)
    monkeypatch.setattr(type(causal.model), "forward", lambda *args, **kwargs: pytest.fail("ran all the same"))
    with pytest.raises(ValueError, match=re.escape(message)):
        causal.generate(output.sequences, max_new_tokens=6, past_key_values=cache, **arguments)


def test_models_of_whole_sequence_attention_take_no_cache(model):
    with pytest.raises(ValueError, match="serves block-causal models"):
        model.generate(PROMPT, max_new_tokens=2, past_key_values=LoopMDMCache(model.config, 2, 1))
