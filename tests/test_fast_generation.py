# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Tests of what makes `generate` fast: exact and approximate caches, adaptive loops, steps and rows that are not run, and
what the output says it cost. Two references stand against it: a sampler in plain Python that runs a whole forward pass
for every step of every row, and a transformer of its own that stores keys and values by hand ([`Reference`]).
"""

import copy
import math
import re
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CompileConfig, DynamicCache

from loopmdm import LoopMDMGenerationConfig
from loopmdm.cache_utils import LoopMDMCache, StepPredictor

MASK, PAD, BLOCK = 22, 0, 4
PROMPT = [[5, 3, 8, 1, 9, 2], [7, MASK, 6], [4, MASK, 11, 8, MASK, 2, 9, 1, 3]]


def block_model(**overrides):
    return tiny_model(attention_block_size=BLOCK, **overrides).double()


@pytest.fixture(scope="module")
def causal():
    return block_model()


@pytest.fixture(scope="module")
def model():
    return tiny_model().double()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def examples(number: int):
    return settings(max_examples=number, deadline=None, derandomize=True, database=None)


# References


class Reference:
    """
    One row of the model, from its weights: attention and loops are written out, and the keys and values of every
    position stay in `memory` as they were when it was last computed.
    """

    def __init__(self, model, length: int, share_loops: bool = False):
        self.model, self.config, self.length, self.share = model.model, model.config, length, share_loops
        self.head = model.lm_head
        self.memory = {}

    def slot(self, index, loop):
        mid = self.config.loop_start <= index < self.config.loop_end
        shape = (2, self.config.num_key_value_heads, self.length, self.config.head_dim)
        return self.memory.setdefault((index, loop if mid and not self.share else 0), torch.zeros(shape).double())

    def layer(self, index, loop, hidden, positions, reach):
        config, layer = self.config, self.model.layers[index]
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).view(len(positions), -1, config.head_dim).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if config.use_qk_norm:
            query, key = attention.q_norm(query), attention.k_norm(key)
        if config.position_embedding_type == "rope":
            half = config.head_dim // 2
            angles = positions[:, None].double() / 10000.0 ** (torch.arange(half).double() / half)
            turn = torch.polar(torch.ones_like(angles), angles)

            def rotate(x):
                turned = torch.complex(x[..., :half], x[..., half:]) * turn
                return torch.cat((turned.real, turned.imag), dim=-1)

            query, key = rotate(query), rotate(key)
        stored = self.slot(index, loop)
        stored[0, :, positions], stored[1, :, positions] = key, value
        keys, values = stored[:, :, :reach].repeat_interleave(
            config.num_attention_heads // config.num_key_value_heads, dim=1
        )
        scores = query @ keys.transpose(1, 2) / math.sqrt(config.head_dim)
        if config.attention_block_size is not None:
            blocks = torch.arange(reach) // config.attention_block_size
            scores = scores.masked_fill(positions[:, None] // config.attention_block_size < blocks, -math.inf)
        attended = (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)
        hidden = hidden + attention.o_proj(attended)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def run(self, tokens, start, stop, num_loops, tolerance=None, loop_exit="row"):
        """Computes the positions from `start` to `stop`; returns float32 logits by position, loops, token loops."""
        config, positions = self.config, torch.arange(start, stop)
        hidden = self.model.embed_tokens(torch.tensor(tokens[start:stop]))
        if config.position_embedding_type == "learned":
            hidden = hidden + self.model.embed_positions(positions)
        reach = self.length if config.attention_block_size is None else stop

        def mid(states, loop, where):
            for index in range(config.loop_start, config.loop_end):
                states = self.layer(index, loop, states, where, reach)
            return states

        for index in range(config.loop_start):
            hidden = self.layer(index, 0, hidden, positions, reach)
        loops = token_loops = 0
        active = torch.ones(len(positions), dtype=torch.bool)
        for loop in range(num_loops):
            if not active.any():
                break
            loops, token_loops = loops + 1, token_loops + int(active.sum())
            if loop > 0:
                for index in range(config.loop_start, config.loop_end):
                    self.slot(index, loop)[:, :, positions] = self.slot(index, loop - 1)[:, :, positions]
            before = hidden[active]
            after = mid(before, loop, positions[active])
            if config.loop_update == "damped":
                after = before + (after - before) / num_loops
            hidden = hidden.clone()
            hidden[active] = after
            if tolerance is not None and loop_exit == "token":
                active[active.clone()] = (after - before).norm(dim=-1) >= tolerance * before.norm(dim=-1)
            elif tolerance is not None and (after - before).norm() < tolerance * before.norm():
                break
        for index in range(config.loop_end, config.num_hidden_layers):
            hidden = self.layer(index, 0, hidden, positions, reach)
        states = self.model.norm(hidden)
        if config.shift_logits:
            states = torch.cat((states[:1], states[:-1]))
        logits = self.head(states).float()
        return {start + i: row for i, row in enumerate(logits)}, loops, token_loops


def plain_predict(model, guidance=None):
    """Every step is a forward pass of the model over all that the block may see, without any cache."""

    def predict(tokens, given, start, stop, step, num_loops):
        ids = torch.tensor([tokens[:stop] if model.config.attention_block_size else tokens])
        logits = model(ids, num_loops=num_loops).logits[0].float()
        if guidance is not None:
            hidden = ids.masked_fill(torch.tensor([given[: ids.shape[1]]]), MASK)
            unconditional = model(hidden, num_loops=num_loops).logits[0].float()
            logits = unconditional + guidance * (logits - unconditional)
        return dict(enumerate(logits))

    return predict


def stored_predict(model, length, implementation, cache_loops="last", interval=None, **adaptive):
    """Fast-dLLM's caches: a pass over everything now and then, otherwise over the block (and what is behind it)."""
    reference = Reference(model, length, share_loops=cache_loops == "last")

    def predict(tokens, given, start, stop, step, num_loops):
        if step == 0 if interval is None else step % interval == 0:
            return reference.run(tokens, 0, length, num_loops, **adaptive)[0]
        source = max(start - 1, 0) if model.config.shift_logits else start
        return reference.run(tokens, source, stop if implementation == "dual" else length, num_loops, **adaptive)[0]

    return predict


def adaptive_predict(model, tolerance, loop_exit, spent=None):
    """Without a cache. A block-causal model runs all loops of finished blocks and may stop earlier in the current."""

    def predict(tokens, given, start, stop, step, num_loops):
        causal = model.config.attention_block_size is not None
        reference = Reference(model, len(tokens), share_loops=not causal and loop_exit == "token")
        first, last = 0, len(tokens)
        if causal:
            if start > 0:
                reference.run(tokens, 0, start, num_loops)
            first, last = max(start - 1, 0) if model.config.shift_logits else start, stop
        logits, loops, token_loops = reference.run(tokens, first, last, num_loops, tolerance, loop_exit)
        if spent is not None:
            spent.append((loops, token_loops))
        return logits

    return predict


def sample_row(
    predict,
    prompt,
    max_new_tokens,
    from_start,
    block_length=None,
    max_denoising_steps=None,
    num_loops=3,
    confidence_threshold=None,
    eos=(),
    temperature=None,
    generator=None,
):
    """One row, in plain Python, from the documentation alone."""
    tokens = [*prompt, *[MASK] * max_new_tokens]
    given = [token != MASK for token in tokens]
    masks = [place for place, token in enumerate(tokens) if token == MASK]
    if not masks:
        return tokens
    block_length = block_length or (BLOCK if from_start else len(tokens))
    origin = masks[0] // block_length * block_length if from_start else masks[0]
    open_end = max((place for place in range(len(tokens)) if given[place]), default=-1)
    for start in range(origin, len(tokens), block_length):
        stop = min(start + block_length, len(tokens))
        members = [place for place in masks if start <= place < stop]
        steps = min(max_denoising_steps or len(members), len(members))
        for step in range(steps):
            left = [place for place in members if tokens[place] == MASK]
            if not left:
                break
            loops = num_loops[step * len(num_loops) // steps] if isinstance(num_loops, list) else num_loops
            logits = predict(tokens, given, start, stop, step, loops)
            noise = None if generator is None else torch.rand(len(members), generator=generator)
            choice, score = {}, {}
            for place in left:
                scores = logits[place].index_fill(0, torch.tensor([MASK]), -math.inf)
                if noise is None:
                    choice[place] = int(scores.argmax())
                else:
                    cumulative = (scores / temperature).double().softmax(0).cumsum(0)
                    target = noise[members.index(place)].double() * cumulative[-1]
                    choice[place] = int((cumulative <= target).sum())
                score[place] = float(scores.log_softmax(0)[choice[place]].exp())
            due = len(members) // steps * (step + 1) + min(len(members) % steps, step + 1)
            quota = min(max(due - (len(members) - len(left)), 1), len(left))
            commits = sorted(left, key=score.get, reverse=True)[:quota]
            if confidence_threshold is not None:
                commits = {*commits, *(place for place in left if score[place] >= confidence_threshold)}
            for place in commits:
                tokens[place] = choice[place]
            first_mask = tokens.index(MASK) if MASK in tokens else len(tokens)
            ends = [p for p in masks if open_end < p < first_mask and tokens[p] in eos]
            if ends:
                return [PAD if p > ends[0] and not given[p] else token for p, token in enumerate(tokens)]
    return tokens


def padded(prompts, seed=None):
    """A batch of the prompts, padded on the left, or with a seed anywhere; and its mask."""
    width = max(map(len, prompts)) + (0 if seed is None else 2)
    ids, mask = torch.full((len(prompts), width), PAD), torch.zeros(len(prompts), width, dtype=torch.long)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for row, prompt in enumerate(prompts):
        places = torch.arange(width - len(prompt), width)
        if generator is not None:
            places = torch.randperm(width, generator=generator)[: len(prompt)].sort().values
        ids[row, places], mask[row, places] = torch.tensor(prompt), 1
    return ids, mask


def real_tokens(sequences, mask, max_new_tokens):
    full = torch.cat((mask, mask.new_ones(len(mask), max_new_tokens)), dim=1).bool()
    return [row[where].tolist() for row, where in zip(sequences, full, strict=True)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(model, ids, mask=None, **arguments):
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **arguments)


prompts_strategy = st.lists(
    # One known token at least: positions that see nothing but [MASK] are ties, which rounding breaks.
    st.lists(st.sampled_from([3, 5, 11, MASK]), max_size=9).map(lambda row: [8, *row]),
    min_size=1,
    max_size=3,
)

# Exact caching


CAUSAL_MODELS = {
    "rope": {},
    "gqa-qk-norm": {"num_key_value_heads": 2, "use_qk_norm": True},
    "learned-shift": {"position_embedding_type": "learned", "shift_logits": True},
    "shift": {"shift_logits": True},
    "no-tail": {"loop_end": 4},
    "damped": {"loop_update": "damped"},
}


def assert_cached_equals_plain(
    model, prompts, seed, max_new_tokens, guidance_scale=None, eos=(), sampling=False, **how
):
    ids, mask = padded(prompts, seed)
    if max_new_tokens == 0 and not (ids == MASK).any():
        max_new_tokens = 1
    arguments = {"max_new_tokens": max_new_tokens, "guidance_scale": guidance_scale, "eos_token_id": list(eos), **how}
    if sampling:
        arguments |= {"do_sample": True, "temperature": 0.7}
    draws = [{"generator": [seeded(row) for row in range(len(prompts))]} if sampling else {} for _ in range(2)]
    cached = model.generate(ids, mask, **arguments, **draws[0])
    plain = model.generate(ids, mask, use_cache=False, **arguments, **draws[1])
    assert torch.equal(cached, plain)
    for row, (prompt, found) in enumerate(zip(prompts, real_tokens(cached, mask, max_new_tokens), strict=True)):
        expected = sample_row(
            plain_predict(model, guidance_scale),
            prompt,
            max_new_tokens,
            from_start=True,
            eos=eos,
            **({"temperature": 0.7, "generator": seeded(row)} if sampling else {}),
            **how,
        )
        assert found == expected, row


@pytest.mark.parametrize("overrides", CAUSAL_MODELS.values(), ids=CAUSAL_MODELS)
@examples(3)
@given(
    prompts=prompts_strategy,
    seed=st.none() | st.integers(0, 99),
    max_new_tokens=st.integers(0, 11),
    block_length=st.sampled_from([None, 4, 8, 16]),
    max_denoising_steps=st.sampled_from([None, 1, 2, 3, 99]),
    num_loops=st.integers(1, 3),
    confidence_threshold=st.sampled_from([None, 0.2, 0.5]),
)
def test_exact_caching_equals_brute_force(overrides, **arguments):
    assert_cached_equals_plain(block_model(**overrides), **arguments)


@examples(8)
@given(
    prompts=prompts_strategy,
    seed=st.none() | st.integers(0, 99),
    max_new_tokens=st.integers(1, 11),
    num_loops=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    guidance_scale=st.sampled_from([None, 0.0, 1.7]),
    eos=st.sampled_from([(), (3,), (1, 5, 7, 9, 12, 15, 18, 20)]),
    sampling=st.booleans(),
    shift_logits=st.booleans(),
    max_denoising_steps=st.sampled_from([None, 2, 3]),
)
def test_exact_caching_with_schedules_guidance_ends_and_chance(shift_logits, **arguments):
    assert_cached_equals_plain(block_model(shift_logits=shift_logits), **arguments)


@pytest.mark.parametrize("unmasking", ["margin", "entropy", "left_to_right", "random", "ancestral"])
@pytest.mark.parametrize("more", [{}, {"entropy_bound": 0.7}, {"remask_probability": 0.3}], ids=str)
def test_exact_caching_with_other_rules(causal, unmasking, more):
    if unmasking == "ancestral" and "entropy_bound" in more:
        pytest.skip("excluded")
    ids, mask = padded(PROMPT)
    results = [
        causal.generate(
            ids,
            mask,
            max_new_tokens=11,
            max_denoising_steps=6,
            unmasking=unmasking,
            use_cache=use_cache,
            generator=[seeded(row) for row in range(3)],
            **more,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_caching_in_other_dtypes_runs_and_mostly_agrees(attention, dtype):
    model = tiny_model(attention_block_size=BLOCK).to(dtype)
    model.set_attn_implementation(attention)
    ids, mask = padded(PROMPT)
    cached, plain = (model.generate(ids, mask, max_new_tokens=16, use_cache=use_cache) for use_cache in (True, False))
    if dtype == torch.float32:
        assert torch.equal(cached, plain)
    else:
        assert (cached == plain).double().mean() > 0.5 and (cached != MASK).all()


CACHES = {
    "whole": ({}, {}),
    "exact": ({"attention_block_size": BLOCK}, {}),
    "exact-shift": ({"attention_block_size": BLOCK, "shift_logits": True}, {}),
    "exact-adaptive": ({"attention_block_size": BLOCK}, {"loop_tolerance": 0.4}),
    "exact-token": ({"attention_block_size": BLOCK}, {"loop_tolerance": 0.5, "loop_exit": "token"}),
    "row": ({}, {"loop_tolerance": 0.4}),
    "token": ({}, {"loop_tolerance": 0.5, "loop_exit": "token"}),
    "dual": ({}, {"cache_implementation": "dual", "block_length": 5}),
    "dual-shift": ({"shift_logits": True}, {"cache_implementation": "dual", "block_length": 5}),
    "dual-each": ({}, {"cache_implementation": "dual", "cache_loops": "each", "block_length": 5}),
    "dual-refresh": ({}, {"cache_implementation": "dual", "cache_refresh_interval": 2, "block_length": 5}),
    "dual-token": (
        {},
        {"cache_implementation": "dual", "block_length": 5, "loop_tolerance": 0.5, "loop_exit": "token"},
    ),
    "prefix": ({}, {"cache_implementation": "prefix", "block_length": 5}),
    "prefix-row": ({}, {"cache_implementation": "prefix", "block_length": 5, "loop_tolerance": 0.4}),
    "guided-dual": ({}, {"cache_implementation": "dual", "block_length": 5, "guidance_scale": 1.5}),
    "guided-exact": ({"attention_block_size": BLOCK}, {"guidance_scale": 1.5}),
}
caches = pytest.mark.parametrize(("overrides", "arguments"), CACHES.values(), ids=CACHES)


@caches
@pytest.mark.parametrize(
    "rule", [{}, {"confidence_threshold": 0.3}, {"unmasking": "ancestral", "max_denoising_steps": 9}], ids=str
)
def test_rows_do_not_depend_on_the_batch(overrides, arguments, rule):
    model = tiny_model(**overrides).double()
    ids, mask = padded(PROMPT, seed=1)
    arguments = {"max_new_tokens": 11, "eos_token_id": [3, 14], **arguments, **rule}
    together = run(model, ids, mask, generator=[seeded(row) for row in range(3)], **arguments)
    for row, prompt in enumerate(PROMPT):
        alone = run(model, torch.tensor([prompt]), generator=[seeded(row)], **arguments)
        assert real_tokens(together.sequences, mask, 11)[row] == alone.sequences[0].tolist()
        for name in ("forward_passes", "loops", "layer_passes", "token_layer_passes", "flops"):
            assert getattr(together, name)[row] == getattr(alone, name)[0], name


# Caches over several turns


@pytest.mark.parametrize("overrides", CAUSAL_MODELS.values(), ids=CAUSAL_MODELS)
@pytest.mark.parametrize("more", [{}, {"loop_tolerance": 0.4}, {"eos_token_id": [3, 14, 6]}], ids=str)
def test_turns_go_on_from_a_cache(overrides, more):
    if "loop_tolerance" in more and overrides.get("loop_update") == "damped":
        pytest.skip("refused")
    model = block_model(**overrides)
    rows, cache = [[5, 3, 8, 1, 9, 2], [7, 6, 1]], None
    for turn in range(3):
        ids, mask = padded(rows)
        arguments = {"max_new_tokens": 9, **more}
        plain = run(model, ids, mask, **arguments)
        cached = run(model, ids, mask, past_key_values=cache, **arguments)
        assert torch.equal(cached.sequences, plain.sequences)
        if turn > 0:
            assert (cached.flops < plain.flops).all()
            assert (cached.token_layer_passes < plain.token_layer_passes).all()
        cache = cached.past_key_values
        rows = [[*row, 4 + turn, 9] for row in real_tokens(cached.sequences, mask, 9)]
        assert all(length % BLOCK == 0 for length in cache.lengths.tolist())
        assert 0 < cache.get_seq_length() <= max(map(len, rows))


def test_a_cropped_cache_serves_another_continuation(causal):
    prompt = torch.tensor([[5, 3, 8, 1, 9, 2]])
    first = run(causal, prompt, max_new_tokens=14)
    other = first.sequences.clone()
    other[:, 10:] = 1 + (other[:, 10:] + 5) % 20
    cache = first.past_key_values
    with pytest.raises(ValueError, match=r"from position 10 of row 0 on; `past_key_values.crop\(10\)`"):
        causal.generate(other, max_new_tokens=5, past_key_values=cache)
    cache.crop(10)
    assert cache.get_seq_length() == 8
    again = run(causal, other, max_new_tokens=5, past_key_values=cache)
    plain = run(causal, other, max_new_tokens=5)
    assert torch.equal(again.sequences, plain.sequences)
    assert (again.flops < plain.flops).all()


def test_a_shorter_input_than_the_cache_is_refused(causal):
    cache = run(causal, torch.tensor([[5, 3, 8, 1, 9, 2]]), max_new_tokens=14).past_key_values
    with pytest.raises(ValueError, match="other tokens than the input"):
        causal.generate(torch.tensor([[5, 3]]), max_new_tokens=2, past_key_values=cache)


def test_forward_goes_on_from_a_generated_cache(causal):
    output = run(causal, torch.tensor([[5, 3, 8, 1, 9, 2], [6, 4, 2, 2, 7, 1]]), max_new_tokens=12)
    stored = output.past_key_values.get_seq_length()
    assert stored == 16
    logits = causal(output.sequences[:, stored:], past_key_values=output.past_key_values).logits
    torch.testing.assert_close(logits, causal(output.sequences).logits[:, stored:], rtol=1e-10, atol=1e-10)


def test_generate_goes_on_from_a_cache_of_forward(causal):
    ids = torch.tensor([[5, 3, 8, 1, 9, 2, 4, 4, 12]])
    cache = causal(ids[:, :8], use_cache=True).past_key_values
    cached, plain = run(causal, ids, max_new_tokens=9, past_key_values=cache), run(causal, ids, max_new_tokens=9)
    assert torch.equal(cached.sequences, plain.sequences)
    assert (cached.flops < plain.flops).all()


def test_a_failed_call_leaves_the_cache_usable(causal):
    output = run(causal, torch.tensor([[5, 3, 8, 1, 9, 2]]), max_new_tokens=6)
    cache, ids = output.past_key_values, output.sequences

    def fail(input_ids, scores):
        return torch.full_like(scores, -math.inf)

    with pytest.raises(ValueError, match="No token can be chosen"):
        causal.generate(ids, max_new_tokens=4, past_key_values=cache, logits_processor=[fail])
    stored = cache.get_seq_length()
    longer = torch.cat((ids, torch.tensor([[4, 7, 9, 3, 2, 6, 1, 8]])), dim=1)
    logits = causal(longer[:, stored:], past_key_values=cache).logits
    torch.testing.assert_close(logits, causal(longer).logits[:, stored:], rtol=1e-10, atol=1e-10)


def other_weights(model, cache):
    model.model.layers[0].mlp.up_proj.weight.mul_(2)
    return model, cache


REFUSALS = {
    "another-model": (lambda model, cache: (copy.deepcopy(model), cache), {}, "another model"),
    "weights": (other_weights, {}, "weights changed"),
    "batch-size": (
        lambda model, cache: (model, (cache.batch_repeat_interleave(2), cache)[1]),
        {},
        "holds 2 rows and the input has 1",
    ),
    "num-loops": (lambda model, cache: (model, cache), {"num_loops": 2}, "num_loops=3 and is used with 2"),
    "dynamic": (lambda model, cache: (model, DynamicCache()), {}, "not a LoopMDMCache"),
    "shared": (
        lambda model, cache: (model, LoopMDMCache(model.config, 3, 1, 8, share_loops=True)),
        {},
        "with a place for every loop",
    ),
    "guidance": (lambda model, cache: (model, cache), {"guidance_scale": 2.0}, "no guidance"),
    "loops-list": (lambda model, cache: (model, cache), {"num_loops": [3, 3]}, "num_loops"),
    "no-cache": (lambda model, cache: (model, cache), {"use_cache": False}, "`use_cache` not False"),
}


@pytest.mark.parametrize(("change", "arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_foreign_caches_are_refused_before_anything_runs(monkeypatch, change, arguments, message):
    model = block_model()
    output = run(model, torch.tensor([[5, 3, 8, 1, 9, 2]]), max_new_tokens=6)
    model, cache = change(model, output.past_key_values)

    def fail(*args, **kwargs):
        raise AssertionError("ran all the same")

    monkeypatch.setattr(type(model.model), "forward", fail)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(output.sequences, max_new_tokens=6, past_key_values=cache, **arguments)


def test_models_of_whole_sequence_attention_take_no_cache(model):
    cache = LoopMDMCache(model.config, 3, 1, 8)
    with pytest.raises(ValueError, match="block-causal"):
        model.generate(torch.tensor([[5, 3]]), max_new_tokens=2, past_key_values=cache)


def test_weights_that_changed_between_turns_are_noticed_for_rows_without_masks():
    """The first turn runs one row of the two only, through a selection of the cache."""
    model = block_model()
    ids = torch.tensor([[5, 3, 8, 1, 9, 2], [5, 3, 8, 1, 9, MASK]])
    output = run(model, ids)
    assert output.past_key_values.lengths.tolist() == [0, 4]
    plain, cached = (
        model.generate(output.sequences, max_new_tokens=4, past_key_values=cache)
        for cache in (None, output.past_key_values)
    )
    assert torch.equal(plain, cached)


# Approximate caching


APPROXIMATE_MODELS = {
    "rope": {},
    "gqa-qk-norm": {"num_key_value_heads": 2, "use_qk_norm": True},
    "learned-shift": {"position_embedding_type": "learned", "shift_logits": True},
    "no-head": {"loop_start": 0, "loop_end": 2},
    "damped": {"loop_update": "damped"},
}


@pytest.mark.parametrize("overrides", APPROXIMATE_MODELS.values(), ids=APPROXIMATE_MODELS)
@examples(3)
@given(
    prompts=prompts_strategy,
    seed=st.none() | st.integers(0, 99),
    max_new_tokens=st.integers(1, 11),
    implementation=st.sampled_from(["prefix", "dual"]),
    cache_loops=st.sampled_from(["each", "last"]),
    interval=st.sampled_from([None, 1, 2, 3]),
    block_length=st.sampled_from([None, 3, 5, 8]),
    num_loops=st.sampled_from([1, 3]),
    max_denoising_steps=st.sampled_from([None, 2]),
)
def test_approximate_caches_equal_keys_stored_by_hand(
    overrides, prompts, seed, max_new_tokens, implementation, cache_loops, interval, **how
):
    model = tiny_model(**overrides).double()
    ids, mask = padded(prompts, seed)
    found = model.generate(
        ids,
        mask,
        max_new_tokens=max_new_tokens,
        cache_implementation=implementation,
        cache_loops=cache_loops,
        cache_refresh_interval=interval,
        **how,
    )
    for prompt, row in zip(prompts, real_tokens(found, mask, max_new_tokens), strict=True):
        length = len(prompt) + max_new_tokens
        predict = stored_predict(model, length, implementation, cache_loops, interval)
        assert row == sample_row(predict, prompt, max_new_tokens, from_start=False, **how)


@pytest.mark.parametrize("implementation", ["prefix", "dual"])
@pytest.mark.parametrize("cache_loops", ["each", "last"])
def test_approximations_that_leave_nothing_out_equal_no_cache(model, implementation, cache_loops):
    ids, mask = padded(PROMPT)
    how = {"cache_implementation": implementation, "cache_loops": cache_loops}
    for arguments in ({"cache_refresh_interval": 1, "block_length": 5}, {"max_denoising_steps": 1, "block_length": 5}):
        found = run(model, ids, mask, max_new_tokens=12, **arguments, **how)
        arguments.pop("cache_refresh_interval", None)
        plain = run(model, ids, mask, max_new_tokens=12, **arguments)
        assert torch.equal(found.sequences, plain.sequences)
        assert torch.equal(found.flops, plain.flops)


def test_approximations_do_approximate(model):
    """Or the tests above would show nothing."""
    ids = torch.tensor([[5, 3, 8, 1, 9, 2]])
    results = {
        tuple(model.generate(ids, max_new_tokens=24, block_length=8, **how)[0].tolist())
        for how in (
            {},
            {"cache_implementation": "dual"},
            {"cache_implementation": "prefix"},
            {"cache_implementation": "dual", "cache_loops": "each"},
            {"cache_implementation": "dual", "cache_refresh_interval": 3},
        )
    }
    assert len(results) >= 4


@pytest.mark.parametrize("loop_exit", ["row", "token"])
@pytest.mark.parametrize("implementation", ["prefix", "dual"])
def test_adaptive_loops_with_approximate_caches(model, implementation, loop_exit):
    adaptive = {"tolerance": 0.45, "loop_exit": loop_exit}
    ids, mask = padded(PROMPT)
    found = model.generate(
        ids,
        mask,
        max_new_tokens=10,
        block_length=5,
        num_loops=4,
        cache_implementation=implementation,
        loop_tolerance=0.45,
        loop_exit=loop_exit,
    )
    for prompt, row in zip(PROMPT, real_tokens(found, mask, 10), strict=True):
        predict = stored_predict(model, len(prompt) + 10, implementation, **adaptive)
        assert row == sample_row(predict, prompt, 10, from_start=False, block_length=5, num_loops=4)


def test_the_greatest_of_several_loops_has_a_place(model):
    """With lists of loops one place per layer is shared, whatever the step runs."""
    ids, mask = padded(PROMPT)
    how = {"num_loops": [1, 4, 2], "block_length": 6, "max_denoising_steps": 3}
    found = model.generate(ids, mask, max_new_tokens=10, cache_implementation="dual", **how)
    for prompt, row in zip(PROMPT, real_tokens(found, mask, 10), strict=True):
        predict = stored_predict(model, len(prompt) + 10, "dual")
        assert row == sample_row(predict, prompt, 10, from_start=False, **how)


# Adaptive loops


@pytest.mark.parametrize("overrides", [{}, {"attention_block_size": BLOCK}], ids=["whole", "causal"])
@pytest.mark.parametrize("shift_logits", [False, True])
@pytest.mark.parametrize("loop_exit", ["row", "token"])
@pytest.mark.parametrize("tolerance", [0.0, 0.3, 0.6, 1e9])
def test_adaptive_loops_equal_the_written_out_ones(overrides, shift_logits, loop_exit, tolerance):
    model = tiny_model(shift_logits=shift_logits, **overrides).double()
    ids, mask = padded(PROMPT, seed=3)
    how = {"loop_tolerance": tolerance, "loop_exit": loop_exit, "num_loops": 4, "max_new_tokens": 7}
    outputs = [run(model, ids, mask, **how)]
    if overrides:
        outputs.append(run(model, ids, mask, use_cache=False, **how))
    for output in outputs:
        for row, prompt in enumerate(PROMPT):
            spent = []
            predict = adaptive_predict(model, tolerance, loop_exit, spent)
            expected = sample_row(predict, prompt, 7, from_start=bool(overrides), num_loops=4)
            assert real_tokens(output.sequences, mask, 7)[row] == expected
            if not overrides:
                assert output.loops[row] == sum(loops for loops, _ in spent)


@pytest.mark.parametrize("loop_exit", ["row", "token"])
def test_extreme_tolerances_equal_plain_loops(model, loop_exit):
    ids, mask = padded(PROMPT)
    how = {"max_new_tokens": 8, "loop_exit": loop_exit}
    none = run(model, ids, mask, num_loops=4, loop_tolerance=0.0, **how)
    plain = run(model, ids, mask, num_loops=4, max_new_tokens=8)
    huge = run(model, ids, mask, num_loops=4, loop_tolerance=1e9, **how)
    once = run(model, ids, mask, num_loops=1, max_new_tokens=8)
    for found, expected in ((none, plain), (huge, once)):
        for name in ("sequences", "loops", "layer_passes", "token_layer_passes", "flops"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("overrides", APPROXIMATE_MODELS.values(), ids=APPROXIMATE_MODELS)
@pytest.mark.parametrize("loop_exit", ["row", "token"])
def test_adaptive_forward_equals_the_written_out_loops(overrides, loop_exit):
    if overrides.get("loop_update") == "damped":
        pytest.skip("refused")
    model = tiny_model(**overrides).double()
    rows = [[5, 3, 8, MASK, 9, 2, MASK], [7, MASK, 6], [4, MASK, 11, 8, MASK]]
    ids, mask = padded(rows, seed=2)
    for tolerance in (0.1, 0.3, 0.5, 0.8):
        outputs = model(ids, attention_mask=mask, num_loops=5, loop_tolerance=tolerance, loop_exit=loop_exit)
        for row, tokens in enumerate(rows):
            reference = Reference(model, len(tokens), share_loops=loop_exit == "token")
            logits, loops, token_loops = reference.run(tokens, 0, len(tokens), 5, tolerance, loop_exit)
            expected = torch.stack(list(logits.values()))
            torch.testing.assert_close(outputs.logits[row, mask[row].bool()].float(), expected, rtol=1e-5, atol=1e-5)
            assert outputs.loops[row] == loops
            if loop_exit == "token":
                assert outputs.token_loops[row] == token_loops


def test_settled_rows_and_tokens_are_not_run(model):
    """Counted at mid's first layer: (rows, positions) of every call."""
    ids = torch.tensor([PROMPT[0], [3] * 6, [5, MASK, 5, MASK, 5, MASK]])
    for loop_exit, tolerance in (("row", 0.4), ("token", 0.45)):
        with calls_of(model.model.layers[1]) as calls:
            outputs = model(ids, num_loops=6, loop_tolerance=tolerance, loop_exit=loop_exit)
        assert outputs.loops.min() < outputs.loops.max(), "choose another tolerance"
        running = [int((outputs.loops > loop).sum()) for loop in range(int(outputs.loops.max()))]
        assert [shape[0] for shape in calls] == running
        if loop_exit == "token":
            total = sum(shape[0] * shape[1] for shape in calls)
            assert int(outputs.token_loops.sum()) <= total < 3 * 6 * len(calls)


# What is run, and what the output says


@contextmanager
def calls_of(module):
    """Collects the shapes of the first argument of every call of `module`."""
    shapes = []

    def note(_, args, kwargs):
        shapes.append(tuple(args[0].shape if args else kwargs["input_ids"].shape))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


@caches
def test_costs_are_those_counted_from_outside(overrides, arguments):
    model = tiny_model(**overrides).double()
    model.set_attn_implementation("eager")
    ids = torch.tensor([[5, 3, 8, MASK, 9, 2]])
    executed, passes = [], []
    handles = [layer.register_forward_hook(lambda *_: executed.append(1)) for layer in model.model.layers]
    handles.append(model.model.register_forward_hook(lambda *_: passes.append(1)))
    with FlopCounterMode(display=False) as counter:
        output = run(model, ids, max_new_tokens=7, **arguments)
    for handle in handles:
        handle.remove()
    guided = 2 if "guidance_scale" in arguments else 1
    if not ("loop_tolerance" in arguments and overrides):  # see below
        assert output.flops.tolist() == [counter.get_total_flops()]
    assert output.forward_passes.tolist() == [guided * len(passes)]
    assert output.layer_passes.tolist() == [guided * len(executed)]


def test_flops_count_all_positions_that_remasking_computes(model):
    """With remasking a step computes the logits of the whole block, also of what is committed."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        output = run(
            eager,
            torch.tensor([[5, 3, 8]]),
            max_new_tokens=8,
            remask_probability=0.3,
            max_denoising_steps=12,
            generator=seeded(0),
        )
    assert output.flops.item() == counter.get_total_flops()


def test_flops_count_the_passes_that_only_fill_the_cache():
    model = block_model()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        output = run(model, torch.tensor([[5, 3, 8]]), max_new_tokens=12, loop_tolerance=0.4)
    assert output.flops.item() == counter.get_total_flops()


@pytest.mark.parametrize("overrides", [{}, {"attention_block_size": BLOCK}, {"loop_end": 4}], ids=str)
def test_token_layer_passes_are_what_the_layers_compute(overrides):
    """Positions that reach every layer's MLP, one row, no filler."""
    model = tiny_model(**overrides).double()
    ids = torch.tensor([[5, 3, 8, MASK, 9, 2]])
    mlps = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args: mlps.append(args[0].shape[:-1].numel()))
        for layer in model.model.layers
    ]
    for arguments in ({}, {"loop_tolerance": 0.5, "loop_exit": "token"}, {"guidance_scale": 2.0}):
        if arguments.get("loop_exit") and overrides.get("attention_block_size"):
            continue
        mlps.clear()
        output = run(model, ids, max_new_tokens=10, block_length=4, **arguments)
        assert output.token_layer_passes.tolist() == [sum(mlps)]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("overrides", [{}, {"attention_block_size": BLOCK}, {"shift_logits": True}], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"cache": "dual"}, {"guidance_scale": 1.5}], ids=str)
def test_only_masked_positions_reach_the_head(overrides, arguments):
    if "cache" in arguments:
        if "attention_block_size" in overrides:
            pytest.skip("refused")
        arguments = {"cache_implementation": "dual"}
    model = tiny_model(**overrides).double()
    with calls_of(model.lm_head) as heads, calls_of(model.model.layers[-1].mlp) as last:
        model.generate(torch.tensor([[5, 3, 8, 1]]), max_new_tokens=8, block_length=4, **arguments)
    factor = 2 if "guidance_scale" in arguments else 1
    expected = [factor * left for left in [4, 3, 2, 1] * 2]
    assert [shape[0] * shape[1] for shape in heads] == expected
    assert [shape[0] * shape[1] for shape in last] == expected


def test_finished_rows_are_not_run(causal, model):
    for one in (causal, model):
        ids, mask = padded(PROMPT)
        plain = one.generate(ids, mask, max_new_tokens=20, block_length=4)
        new = plain[:, ids.shape[1] :]
        ends = Counter(new.flatten().tolist())
        eos = next(token for token in ends if (new == token).any(-1).sum() == 1)
        with calls_of(one.model) as calls:
            output = run(one, ids, mask, max_new_tokens=20, block_length=4, eos_token_id=eos)
        assert sum(shape[0] for shape in calls) == int(output.forward_passes.sum())
        assert output.forward_passes.min() < output.forward_passes.max()


def without_reuse(monkeypatch):
    """Computes every step, whether or not the one before it changed anything."""
    monkeypatch.setattr(StepPredictor, "note", lambda self, prediction, changed: None)


@pytest.mark.parametrize(
    "name", ["whole", "exact-shift", "exact-adaptive", "token", "dual", "dual-each", "guided-exact"]
)
def test_unchanged_steps_are_not_computed_again(monkeypatch, name):
    overrides, arguments = CACHES[name]
    model = tiny_model(**overrides).double()
    how = {"max_new_tokens": 6, "unmasking": "ancestral", "max_denoising_steps": 24, "output_trace": True, **arguments}
    ids, mask = padded(PROMPT)
    output = run(model, ids, mask, generator=[seeded(row) for row in range(3)], **how)
    blocks = len({step.block for step in output.trace})
    guided = 2 if "guidance_scale" in arguments else 1
    for row in range(3):
        changes = sum(bool(step.committed[row].any()) for step in output.trace)
        # Every block begins with a pass, and an adaptive one with two.
        begins = blocks * (2 if "loop_tolerance" in arguments and overrides else 1)
        assert output.forward_passes[row] <= guided * (changes + begins)
        assert output.forward_passes[row] < 0.75 * guided * len(output.trace)
    without_reuse(monkeypatch)
    again = run(model, ids, mask, generator=[seeded(row) for row in range(3)], **how)
    assert (again.flops > output.flops).all()
    if name != "dual":  # whose steps differ from the refreshing one: it shares one place between loops
        assert torch.equal(again.sequences, output.sequences)


def test_remasking_computes_unchanged_steps_once(monkeypatch, model):
    ids, mask = padded(PROMPT)
    how = {"max_new_tokens": 8, "unmasking": "ancestral", "max_denoising_steps": 24, "remask_probability": 0.2}
    output = run(model, ids, mask, generator=[seeded(row) for row in range(3)], output_trace=True, **how)
    for row in range(3):
        changes = sum(bool((step.committed | step.remasked)[row].any()) for step in output.trace)
        assert output.forward_passes[row] <= changes + 1
    without_reuse(monkeypatch)
    again = run(model, ids, mask, generator=[seeded(row) for row in range(3)], **how)
    assert torch.equal(again.sequences, output.sequences)
    assert (again.forward_passes == 24).all()


def test_unchanged_steps_do_not_skip_a_refresh(monkeypatch, model):
    ids, mask = padded(PROMPT)
    how = {"max_new_tokens": 8, "unmasking": "ancestral", "max_denoising_steps": 24, "block_length": 6}
    how |= {"cache_implementation": "dual", "cache_refresh_interval": 2, "cache_loops": "each"}
    output = run(model, ids, mask, generator=[seeded(row) for row in range(3)], **how)
    without_reuse(monkeypatch)
    again = run(model, ids, mask, generator=[seeded(row) for row in range(3)], **how)
    assert torch.equal(again.sequences, output.sequences)


@pytest.mark.parametrize("rule", [{"confidence_threshold": 0.3}, {"entropy_bound": 0.5}], ids=str)
def test_parallel_commitment_stops_when_nothing_is_left(model, rule):
    ids, mask = padded(PROMPT)
    with calls_of(model.model) as calls:
        output = run(model, ids, mask, max_new_tokens=12, **rule)
    assert output.forward_passes.tolist() != [12] * 3
    assert sum(shape[0] for shape in calls) == int(output.forward_passes.sum())


# Waiting for the device


class HostReads(TorchDispatchMode):
    """Counts operators whose result goes to the host."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in self.NAMES:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def host_reads(model, max_new_tokens, batch_size, **arguments):
    ids = torch.tensor([[5, 3, 8, 1]] * batch_size)
    with HostReads() as reads:
        model.generate(ids, max_new_tokens=max_new_tokens, block_length=max_new_tokens, **arguments)
    return sum(reads.counts.values())


@pytest.mark.parametrize(
    ("arguments", "reads"),
    [({}, 7), ({"cache_implementation": "dual"}, 8), ({"eos_token_id": 3}, 7), ({"guidance_scale": 2.0}, 7)],
    ids=str,
)
def test_host_reads_per_step_do_not_grow(arguments, reads):
    """On the CPU, which looks at values where an accelerator would not."""
    few, many = (host_reads(tiny_model(), count, 1, **arguments) for count in (8, 24))
    assert (many - few) / 16 <= reads


def test_host_reads_do_not_depend_on_the_rows():
    few, many = (host_reads(tiny_model(), 12, batch_size) for batch_size in (2, 6))
    assert few == many


# Bad arguments


BAD = [
    ({"cache_implementation": "dul"}, "`cache_implementation` is 'dul'; choose one of 'prefix', 'dual'"),
    ({"cache_implementation": "static"}, "`cache_implementation` is 'static'; choose one of"),
    ({"cache_implementation": True}, "`cache_implementation` is True"),
    ({"cache_loops": "first"}, "`cache_loops` is 'first'; choose one of 'each', 'last'"),
    ({"cache_loops": "each"}, "`cache_loops` is 'each' without effect; give `cache_implementation`"),
    ({"cache_refresh_interval": 2}, "`cache_refresh_interval` is 2 without effect; give `cache_implementation`"),
    ({"cache_implementation": "dual", "cache_refresh_interval": 0}, "`cache_refresh_interval` is 0; it must be"),
    ({"cache_implementation": "dual", "cache_refresh_interval": 1.5}, "`cache_refresh_interval` is 1.5; it must be"),
    ({"cache_implementation": "dual", "cache_refresh_interval": True}, "`cache_refresh_interval` is True; it must be"),
    ({"cache_implementation": "dual", "use_cache": True}, "`use_cache` is about exact caching"),
    ({"use_cache": "yes"}, "`use_cache` is 'yes'; choose one of True, False"),
    ({"use_cache": 2}, "`use_cache` is 2; choose one of True, False"),
    ({"use_cache": True}, '`cache_implementation="dual"`'),
    ({"loop_exit": "tokens"}, "`loop_exit` is 'tokens'; choose one of 'row', 'token'"),
    ({"loop_exit": "token"}, "without effect; give a `loop_tolerance`"),
    ({"loop_exit": None}, "`loop_exit` is None; choose one of"),
    ({"loop_exit": ["row"]}, "`loop_exit` is ['row']; choose one of"),
    (
        {"cache_implementation": "dual", "cache_loops": "each", "num_loops": [1, 2]},
        '`num_loops` is [1, 2]; use "last"',
    ),
    (
        {"cache_implementation": "dual", "cache_loops": "each", "loop_tolerance": 0.1},
        '`loop_tolerance` is 0.1; use "last"',
    ),
    (
        {"cache_implementation": "dual", "cache_loops": "each", "loop_tolerance": 1},
        '`loop_tolerance` is 1; use "last"',
    ),
    ({"num_loops": [1, 2, 3], "max_denoising_steps": 2}, "`num_loops` lists the loops of 3 steps"),
    ({"num_loops": []}, "`num_loops` is an empty list"),
    ({"num_loops": [1, 0]}, "`num_loops` is 0; it must be"),
    ({"compile_config": "default"}, "`compile_config` is 'default'; give transformers' CompileConfig"),
    ({"compile_config": True}, "`compile_config` is True"),
    (
        {"compile_config": CompileConfig(mode="reduce-overhead"), "loop_exit": "token", "loop_tolerance": 0.1},
        'use `CompileConfig(mode="default")`',
    ),
    ({"use_block_cache": True}, "use `cache_implementation`"),
    ({"dual_cache": True}, '`cache_implementation="dual"`'),
    ({"cache": "dual"}, "`generate` takes no argument `cache`"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=str)
def test_bad_arguments_are_named_and_nothing_is_generated(monkeypatch, model, arguments, message):
    def fail(*args, **kwargs):
        raise AssertionError("ran all the same")

    monkeypatch.setattr(type(model.model), "forward", fail)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(torch.tensor([[5, 3]]), max_new_tokens=4, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_implementation": "dual"}, "caches exactly: leave it out"),
        ({"cache_implementation": "prefix"}, "caches exactly: leave it out"),
        ({"block_length": 6}, "`block_length` is 6; this model's attention sees blocks of 4"),
    ],
    ids=str,
)
def test_block_causal_models_refuse_approximations(causal, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        causal.generate(torch.tensor([[5, 3]]), max_new_tokens=4, **arguments)


def test_damped_models_refuse_tolerances():
    with pytest.raises(ValueError, match='loop_update="replace"'):
        tiny_model(loop_update="damped").generate(torch.tensor([[5, 3]]), max_new_tokens=4, loop_tolerance=0.1)


def test_configs_survive_a_file(tmp_path):
    values = {
        "num_loops": [1, 3],
        "loop_tolerance": 0.2,
        "loop_exit": "token",
        "cache_implementation": "dual",
        "cache_refresh_interval": 4,
    }
    config = LoopMDMGenerationConfig(**values)
    config.save_pretrained(tmp_path)
    loaded = LoopMDMGenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in values} == values
    LoopMDMGenerationConfig(use_cache=False, num_loops=2, loop_schedule="middle").save_pretrained(tmp_path)
    loaded = LoopMDMGenerationConfig.from_pretrained(tmp_path)
    assert (loaded.use_cache, loaded.num_loops, loaded.loop_schedule) == (False, 2, "middle")


def test_compile_configs_stay_out_of_files_and_survive_dictionaries(tmp_path):
    """transformers does not write them: they are about the machine."""
    config = LoopMDMGenerationConfig(num_loops=2, compile_config=CompileConfig(mode="default", fullgraph=False))
    config.save_pretrained(tmp_path)
    loaded = LoopMDMGenerationConfig.from_pretrained(tmp_path)
    assert (loaded.num_loops, loaded.compile_config) == (2, None)
    again = LoopMDMGenerationConfig(compile_config=config.compile_config.to_dict())
    assert again.compile_config.to_dict() == config.compile_config.to_dict()
    LoopMDMGenerationConfig.from_dict(config.to_dict()).validate()


# Compilation


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("block_size", [None, BLOCK])
def test_compiled_layers_give_the_same_tokens(compiled_run, block_size):
    for found, expected in compiled_run(block_size)[0]:
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("block_size", [None, BLOCK])
def test_layers_are_compiled_within_the_limit_and_then_no_more(compiled_run, block_size):
    graphs = compiled_run(block_size)[1]
    assert graphs[0] > 0, "nothing was compiled"
    assert len(set(graphs[1:])) == 1, graphs
    assert graphs[-1] <= 8, "dynamo's recompile_limit"


@pytest.fixture(scope="module")
def compiled_run():
    """Runs calls of several shapes once: tokens and those expected, and the number of graphs after each call."""
    import torch._dynamo

    results = {}

    def run_all(block_size):
        if block_size in results:
            return results[block_size]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        pairs, graphs = [], []
        plain, model = (tiny_model(attention_block_size=block_size) for _ in range(2))
        compile_config = CompileConfig(backend="eager")
        compile_config.mode = None  # this backend takes none
        for number, arguments in enumerate(
            [
                {"block_length": 8, "num_loops": 2},
                {"block_length": 12, "num_loops": 3},
                {"block_length": 4, "num_loops": 1},
            ]
        ):
            ids, mask = padded(PROMPT[:2])
            arguments |= {"max_new_tokens": 14 + number}
            with torch._dynamo.config.patch(recompile_limit=64):  # behind it layers would run eagerly
                found = model.generate(ids, mask, compile_config=compile_config, **arguments)
            pairs.append((found, plain.generate(ids, mask, **arguments)))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        results[block_size] = pairs, graphs
        return results[block_size]

    return run_all
