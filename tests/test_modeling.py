# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tests of the model's behaviour against independent references: the unrolled stack, transformers' own Llama and Qwen,
hand-stepped loops, plain formulas. Everything that can be is compared in float64, where rounding hides no mistake."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_ids, randomize_vectors, tiny_config, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.utils.output_capturing import OutputRecorder

from loopmdm import LoopMDMForMaskedLM

few_examples = settings(max_examples=10, deadline=None, derandomize=True, database=None)
exact = {"rtol": 1e-12, "atol": 1e-12}

BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
ARCHITECTURES = {
    "rope": {},
    "learned": {"position_embedding_type": "learned"},
    "gqa": {"num_key_value_heads": 2},
    "mqa-wide-heads": {"num_key_value_heads": 1, "head_dim": 12},
    "qk-norm": {"use_qk_norm": True},
    "biases": BIASES,
    "untied-gelu": {"tie_word_embeddings": False, "hidden_act": "gelu"},
    "no-head-no-tail": {"loop_start": 0, "loop_end": 4},
}
architectures = pytest.mark.parametrize("overrides", ARCHITECTURES.values(), ids=ARCHITECTURES)


def unrolled(model, num_loops):
    """A non-looped model that holds mid `num_loops` times, and the layer of `model` that each of its layers copies."""
    config = model.config
    head, mid, tail = (
        list(range(*span))
        for span in (
            (0, config.loop_start),
            (config.loop_start, config.loop_end),
            (config.loop_end, config.num_hidden_layers),
        )
    )
    sources = head + mid * num_loops + tail
    stack = LoopMDMForMaskedLM(
        type(config).from_dict(
            config.to_dict() | {"num_hidden_layers": len(sources), "loop_start": 0, "loop_end": 1, "num_loops": 1}
        )
    )
    stack.to(model.dtype).eval()
    stack.model.layers = nn.ModuleList(copy.deepcopy(model.model.layers[source]) for source in sources)
    for part in ("embed_tokens", "embed_positions", "norm"):
        if hasattr(model.model, part):
            getattr(stack.model, part).load_state_dict(getattr(model.model, part).state_dict())
    stack.lm_head.load_state_dict(model.lm_head.state_dict())
    return stack, sources


def hand_stepped(model, input_ids, num_loops, attention_mask=None):
    """Hidden states after head and after each loop, and their relative changes over real positions, row by row."""
    states, changes = [], []
    hidden_states, context = model.model.prelude(input_ids, attention_mask)
    states.append(hidden_states)
    for _ in range(num_loops):
        hidden_states = model.model.loop(hidden_states, context)
        row_changes = []
        for row in range(len(input_ids)):
            real = slice(None) if attention_mask is None else attention_mask[row].bool()
            before, after = states[-1][row, real], hidden_states[row, real]
            row_changes.append(((after - before).square().sum().sqrt() / before.square().sum().sqrt()).item())
        states.append(hidden_states)
        changes.append(row_changes)
    return states, changes, context


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@contextmanager
def counted_rows(module):
    """Yields a list that collects the number of rows of every call of `module`."""
    rows = []
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    try:
        yield rows
    finally:
        handle.remove()


# The loop


@architectures
@pytest.mark.parametrize("num_loops", [1, 2, 3, 4])
def test_loops_equal_the_unrolled_stack(overrides, num_loops):
    model = tiny_model(**overrides).double()
    stack, sources = unrolled(model, num_loops)
    ids = random_ids(2, 9)
    direction = torch.randn(2, 9, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    outputs = model(ids, num_loops=num_loops)
    expected = stack(ids).logits
    assert outputs.loops.tolist() == [num_loops] * 2
    torch.testing.assert_close(outputs.logits, expected, **exact)

    (outputs.logits * direction).sum().backward()
    (expected * direction).sum().backward()
    summed = {}
    for name, gradient in gradients(stack).items():
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            name = f"model.layers.{sources[int(index)]}.{rest}"
        summed[name] = summed.get(name, 0) + gradient
    assert set(summed) == set(gradients(model))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, summed[name], rtol=1e-12, atol=1e-12 * summed[name].abs().max().item())


@pytest.mark.parametrize("num_loops", [1, 2, 3, 4])
def test_damped_loops_are_small_steps(num_loops):
    model = tiny_model(loop_update="damped").double()
    layers, ids = model.model.layers, random_ids(2, 9)
    hidden_states, context = model.model.prelude(ids)
    for _ in range(num_loops):
        target = layers[2](layers[1](hidden_states, **context), **context)
        hidden_states = hidden_states + (target - hidden_states) / num_loops
    expected = model.lm_head(model.model.norm(layers[3](hidden_states, **context)))
    torch.testing.assert_close(model(ids, num_loops=num_loops).logits, expected, **exact)


def test_one_damped_loop_is_the_plain_model_bit_for_bit():
    ids = random_ids(2, 9)
    assert torch.equal(
        tiny_model(loop_update="damped")(ids, num_loops=1).logits, tiny_model()(ids, num_loops=1).logits
    )


def test_every_loop_matters():
    model, ids = tiny_model(), random_ids(2, 9)
    logits = [model(ids, num_loops=num_loops).logits for num_loops in (1, 2, 3, 4)]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(logits) for b in logits[:i])


def test_loops_add_no_parameters():
    few, many = tiny_model(num_loops=1), tiny_model(num_loops=50)
    assert few.num_parameters() == many.num_parameters()
    assert few.state_dict().keys() == many.state_dict().keys()


@architectures
def test_prelude_loop_and_readout_make_up_forward(overrides):
    model = tiny_model(**overrides)
    ids, mask = random_ids(2, 9), torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    hidden_states, context = model.model.prelude(ids, mask)
    for _ in range(4):
        hidden_states = model.model.loop(hidden_states, context)
    last_hidden_state = model.model.readout(hidden_states, context)
    assert torch.equal(model.model(ids, mask, num_loops=4).last_hidden_state, last_hidden_state)
    assert torch.equal(model(ids, mask, num_loops=4).logits, model.lm_head(last_hidden_state))


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
@pytest.mark.parametrize("source", ["argument", "training"])
def test_bad_num_loops_run_nothing(num_loops, source):
    model = tiny_model()
    with counted_rows(model.model.layers[0]) as rows, pytest.raises(ValueError, match=r"`num_loops` is .* at least 1"):
        if source == "argument":
            model(random_ids(2, 5), num_loops=num_loops)
        else:
            model.model.num_train_loops = num_loops
            model.train()(random_ids(2, 5))
    assert rows == []


# The plain model is transformers' Llama, Qwen2 and Qwen3, made bidirectional

REFERENCES = {
    "llama": (LlamaForCausalLM, {}),
    "llama-tied": (LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-gqa": (LlamaForCausalLM, {"num_key_value_heads": 2}),
    "llama-biases": (LlamaForCausalLM, BIASES),  # its `attention_bias` covers the output projection
    "llama-llama3-rope": (LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn-rope": (LlamaForCausalLM, {"rope_parameters": YARN_ROPE}),
    "llama-linear-rope": (LlamaForCausalLM, {"rope_parameters": LINEAR_ROPE}),
    "qwen2": (Qwen2ForCausalLM, {"attention_bias": True, "num_key_value_heads": 2}),
    "qwen3": (
        Qwen3ForCausalLM,
        {"use_qk_norm": True, "head_dim": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
def test_one_loop_equals_transformers(reference, attention, dtype):
    model_class, overrides = reference
    config = tiny_config(**{"tie_word_embeddings": False, "num_loops": 1, **overrides})
    shared = type(config).__dataclass_fields__.keys() & model_class.config_class.__dataclass_fields__
    shared = {name: copy.deepcopy(getattr(config, name)) for name in shared}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = randomize_vectors(model_class(model_class.config_class(**shared))).eval()
    ours = LoopMDMForMaskedLM(config).eval()
    ours.set_attn_implementation(attention)
    ours.load_state_dict(theirs.state_dict())
    if dtype is torch.float64:
        # Their norms round to float32 at this precision; torch's own norm does not.
        for name, module in list(theirs.named_modules()):
            if name.endswith("norm"):
                norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
                norm.weight = module.weight
                theirs.set_submodule(name, norm)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype is torch.float32 else 1e-12}

    # Three times the length that the scaled rotary embeddings start from, and one row padded on both sides.
    ids, mask = random_ids(2, 48), torch.ones(2, 48, dtype=torch.long)
    mask[1, :3] = mask[1, 40:] = 0
    additive = torch.zeros(2, 1, 48, 48, dtype=dtype).masked_fill(mask[:, None, None] == 0, torch.finfo(dtype).min)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=additive, position_ids=positions).logits
    torch.testing.assert_close(ours(ids, mask).logits[mask == 1], expected[mask == 1], **tolerance)
    torch.testing.assert_close(ours(ids[:1]).logits, expected[:1], **tolerance)

    # The reference really looks ahead: its first logits depend on the last token.
    ids[0, -1] = ids[0, -1] % 21 + 1
    changed = theirs(ids, attention_mask=additive, position_ids=positions).logits
    assert (changed[0, 0] - expected[0, 0]).abs().max() > 1e-4


def test_rotary_angles_are_exact_in_bfloat16():
    rotary = tiny_model().model.rotary_emb
    positions = torch.tensor([[256, 257, 4095]])
    cos, sin = rotary(torch.zeros(1, dtype=torch.bfloat16), positions)
    frequencies = torch.tensor([10000 ** (-2 * (i % 4) / 8) for i in range(8)], dtype=torch.float64)
    angles = positions[..., None].double() * frequencies
    for table, expected in ((cos, angles.cos()), (sin, angles.sin())):
        assert table.dtype == torch.bfloat16
        torch.testing.assert_close(table.double(), expected, rtol=0, atol=2**-8)


# Attention is bidirectional, and padding changes nothing


@architectures
def test_every_token_sees_every_token(overrides):
    model, ids = tiny_model(**overrides), random_ids(1, 8)
    logits = model(ids, num_loops=1).logits
    for position in range(8):
        changed = ids.clone()
        changed[0, position] = changed[0, position] % 21 + 1
        difference = (model(changed, num_loops=1).logits - logits).abs().amax(-1)
        assert (difference > 1e-4).all()


@st.composite
def padded_rows(draw, max_rows=4, length=9):
    """Token ids and a mask with 1 to `length` real tokens per row, padding left, right, and in between."""
    kinds = draw(st.lists(st.sampled_from(["left", "right", "interior", "any"]), min_size=1, max_size=max_rows))
    mask = torch.zeros(len(kinds), length, dtype=torch.long)
    for row, kind in zip(mask, kinds, strict=True):
        count = draw(st.integers(1, length))
        order = {
            "left": range(length - 1, -1, -1),
            "right": range(length),
            "interior": [i for pair in zip(range(length), range(length - 1, -1, -1), strict=True) for i in pair],
            "any": draw(st.permutations(range(length))),
        }[kind]
        row[list(dict.fromkeys(order))[:count]] = 1
    # What stands under the padding must not matter either.
    return random_ids(len(kinds), length, draw(st.integers(0, 1000))), mask


def assert_rows_equal_single_runs(model, ids, mask, tolerance, **kwargs):
    batch = model(ids, mask, **kwargs)
    for row in range(len(ids)):
        real = mask[row] == 1
        single = model(ids[row : row + 1, real], **kwargs)
        assert batch.loops[row] == single.loops[0]
        torch.testing.assert_close(batch.logits[row, real], single.logits[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize(
    "loops", [{"num_loops": 1}, {"num_loops": 3}, {"num_loops": 8, "loop_tolerance": 0.4}], ids=str
)
def test_padding_changes_nothing(attention, positions, loops):
    model = tiny_model(attn_implementation=attention, position_embedding_type=positions).double()

    @few_examples
    @given(padded_rows())
    def check(batch):
        with torch.no_grad():
            assert_rows_equal_single_runs(model, *batch, tolerance=1e-11, **loops)

    check()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in torch and transformers
@pytest.mark.parametrize("loops", [{"num_loops": 1}, {"num_loops": 8, "loop_tolerance": 0.4}], ids=str)
def test_padding_changes_nothing_with_flex_attention(loops):
    model = tiny_model(attn_implementation="flex_attention", num_key_value_heads=2)
    sdpa = tiny_model(attn_implementation="sdpa", num_key_value_heads=2)
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 5 + [0] * 4, [1, 1, 0, 0, 1, 0, 1, 1, 0], [1] * 9])
    ids = random_ids(4, 9)
    # Compiling the kernel takes most of a minute and is not what is tested.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert_rows_equal_single_runs(model, ids, mask, tolerance=1e-5, **loops)
        flex, reference = model(ids, mask, **loops), sdpa(ids, mask, **loops)
    assert torch.equal(flex.loops, reference.loops)
    torch.testing.assert_close(flex.logits[mask == 1], reference.logits[mask == 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_four_dimensional_masks_pass_through(attention):
    model = tiny_model(attn_implementation=attention).double()
    # Block-causal attention: blocks of three that see themselves and the blocks before.
    block = torch.arange(9) // 3
    mask = (block[None, :] <= block[:, None])[None, None]
    if attention == "eager":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    ids = random_ids(1, 9)
    logits = model(ids, mask).logits
    for visible in (3, 6):
        torch.testing.assert_close(
            logits[:, visible - 3 : visible],
            model(ids[:, :visible], mask[..., :visible, :visible]).logits[:, -3:],
            **exact,
        )
    assert (logits[:, :6] - model(ids).logits[:, :6]).abs().max() > 0.01


def test_inputs_embeds_stand_for_input_ids():
    model, ids = tiny_model(), random_ids(2, 7)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    for both_or_none in ({"input_ids": ids, "inputs_embeds": embeds}, {}):
        with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
            model(**both_or_none)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_position_ids(positions):
    model, ids = tiny_model(position_embedding_type=positions).double(), random_ids(1, 7)
    default = model(ids).logits
    torch.testing.assert_close(model(ids, position_ids=torch.arange(7)[None]).logits, default, **exact)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    # Without a causal mask a model knows the order of its tokens from the positions only.
    torch.testing.assert_close(model(ids[:, order], position_ids=order[None]).logits, default[:, order], **exact)


# Adaptive loops


@few_examples
@given(batch=padded_rows(), tolerance=st.floats(0.1, 2.0), max_loops=st.integers(1, 8))
def test_loop_tolerance_equals_brute_force(batch, tolerance, max_loops):
    model = tiny_model().double()
    ids, mask = batch
    with torch.no_grad():
        outputs = model(ids, mask, num_loops=max_loops, loop_tolerance=tolerance)
        states, changes, context = hand_stepped(model, ids, max_loops, mask)
        for row in range(len(ids)):
            settled = [loop + 1 for loop in range(max_loops) if changes[loop][row] < tolerance]
            loops = settled[0] if settled else max_loops
            assert outputs.loops[row] == loops
            expected = model.lm_head(model.model.readout(states[loops], context))[row]
            torch.testing.assert_close(outputs.logits[row], expected, **exact)


def test_rows_stop_one_by_one():
    model, ids = tiny_model().double(), random_ids(6, 9)
    _, changes, _ = hand_stepped(model, ids, 8)
    outputs = model(ids, num_loops=8, loop_tolerance=sorted(changes[3])[3])
    assert outputs.loops.unique().numel() > 1
    for row in range(6):
        alone = model(ids[row : row + 1], num_loops=int(outputs.loops[row]))
        torch.testing.assert_close(outputs.logits[row], alone.logits[0], **exact)


def test_extreme_tolerances():
    model, ids = tiny_model(), random_ids(3, 9)
    never = model(ids, num_loops=7, loop_tolerance=0.0)
    assert never.loops.tolist() == [7] * 3
    assert torch.equal(never.logits, model(ids, num_loops=7).logits)
    with counted_rows(model.model.layers[1]) as rows:
        once = model(ids, num_loops=7, loop_tolerance=1e9)
    assert once.loops.tolist() == [1] * 3
    assert len(rows) == 1
    assert torch.equal(once.logits, model(ids, num_loops=1).logits)


def test_a_settled_row_stays_settled(monkeypatch):
    model = tiny_model().double()
    changes = torch.tensor([[0.5, 0.5, 0.5], [0.05, 0.5, 0.0], [0.9, 0.5, 0.5], [0.9, 0.05, 0.5]], dtype=torch.float64)

    def loop(states, context, index):
        # Rows that have settled may have left the batch.
        running = (changes[:index] >= 0.1).all(0)
        change = changes[index] if len(states) == 3 else changes[index][running]
        return states * (1 + change)[:, None, None]

    monkeypatch.setattr(model.model, "loop", loop)
    assert model(random_ids(3, 9), num_loops=4, loop_tolerance=0.1).loops.tolist() == [2, 4, 2]
    changes = torch.zeros(4, 3, dtype=torch.float64)
    assert model(random_ids(3, 9), num_loops=4, loop_tolerance=0.0).loops.tolist() == [4] * 3


@pytest.mark.parametrize("loop_tolerance", [-0.1, math.nan, True, "0.1", [0.1]])
def test_bad_loop_tolerance(loop_tolerance):
    with pytest.raises(ValueError, match=r"`loop_tolerance` is .*; it must be a number of at least 0"):
        tiny_model()(random_ids(1, 5), loop_tolerance=loop_tolerance)


def test_damped_loops_have_no_tolerance():
    with pytest.raises(ValueError, match='`loop_tolerance` needs `loop_update="replace"`'):
        tiny_model(loop_update="damped")(random_ids(1, 5), loop_tolerance=0.1)


# Hidden states and attentions


@architectures
def test_hidden_states_come_in_executed_order(overrides):
    model, ids = tiny_model(**overrides), random_ids(2, 9)
    inner, config = model.model, model.config
    outputs = model(ids, num_loops=3, output_hidden_states=True)

    embeddings = inner.embed_tokens(ids)
    if config.position_embedding_type == "learned":
        embeddings = embeddings + inner.embed_positions.weight[:9]
    _, context = inner.prelude(ids)
    expected = [embeddings]
    mid = [*range(config.loop_start, config.loop_end)]
    for index in [*range(config.loop_start), *mid * 3, *range(config.loop_end, 4)]:
        expected.append(inner.layers[index](expected[-1], **context))
    expected[-1] = inner.norm(expected[-1])

    assert len(outputs.hidden_states) == 1 + config.num_executed_layers(3) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(outputs.hidden_states, expected, strict=True))
    assert torch.equal(outputs.hidden_states[-1], inner(ids, num_loops=3).last_hidden_state)
    assert model(ids).hidden_states is None


@pytest.mark.skipif(
    "num_hidden_layers_key" not in OutputRecorder.__dataclass_fields__, reason="this transformers cannot pick layers"
)
def test_hidden_states_by_index():
    model, ids = tiny_model(), random_ids(2, 9)
    everything = model(ids, output_hidden_states=True).hidden_states
    for indices in ([3], [-1], [-2], [-8], [0, 5]):
        picked = model(ids, output_hidden_states=indices).hidden_states
        assert all(torch.equal(picked[index], everything[index]) for index in indices)
        assert sum(state is not None for state in picked) == len(indices)


def test_negative_indices_of_hidden_states_need_the_default_loops():
    model = tiny_model()
    for arguments in ({"num_loops": 2}, {"loop_tolerance": 0.1}):
        with pytest.raises(ValueError, match="negative indices"):
            model(random_ids(1, 5), output_hidden_states=[0, -2], **arguments)


def test_attentions_come_in_executed_order():
    model = tiny_model(attn_implementation="eager", num_key_value_heads=2).double()
    ids, mask = random_ids(2, 9), torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    outputs = model(ids, mask, num_loops=3, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == model.config.num_executed_layers(3) == 8
    _, context = model.model.prelude(ids, mask)
    for index, attention, hidden_states in zip(
        [0, 1, 2, 1, 2, 1, 2, 3], outputs.attentions, outputs.hidden_states, strict=False
    ):
        assert attention.shape == (2, 4, 9, 9)
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 9, dtype=torch.float64), **exact)
        assert (attention[0, :, :, :3] == 0).all()
        layer = model.model.layers[index]
        expected = layer.self_attn(layer.input_layernorm(hidden_states), **context)[1]
        torch.testing.assert_close(attention, expected, **exact)


def test_attentions_need_eager_attention():
    model = tiny_model(attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"needs eager attention, and the model runs 'sdpa'; call .*set_attn"):
        model(random_ids(1, 5), output_attentions=True)
    model.set_attn_implementation("eager")
    assert len(model(random_ids(1, 5), output_attentions=True).attentions) == 8


# The loss


def plain_loss(logits, labels, weights, num_items=None):
    """The diffusion loss in float64, one label after the other."""
    total, count = 0.0, 0
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1]):
            label = int(labels[row, position])
            if label != -100:
                scores = logits[row, position].double().tolist()
                normaliser = math.log(sum(math.exp(s) for token, s in enumerate(scores) if token != 22))
                total += float(weights[row, position]) * (normaliser - scores[label])
                count += 1
    return total / (count if num_items is None else num_items)


def training_batch(batch_size=4, length=9, seed=0):
    """Ids with masks, labels with gaps, and weights of which about half are zero."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, 22, (batch_size, length), generator=generator)
    visible = torch.rand(labels.shape, generator=generator) < 0.5
    weights = (1 + 4 * torch.rand(labels.shape, generator=generator)).masked_fill(visible, 0)
    ids = torch.where(visible, labels, 22)
    labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.2, -100)
    return ids, labels, weights


@few_examples
@given(seed=st.integers(0, 10**6), divisor=st.sampled_from([None, 7, torch.tensor(11)]), weighted=st.booleans())
def test_loss_equals_the_plain_formula(seed, divisor, weighted):
    model = tiny_model().double()
    ids, labels, weights = training_batch(2, 7, seed)
    loss_weights = weights if weighted else None
    with torch.no_grad():
        expected = plain_loss(
            model(ids).logits,
            labels,
            weights if weighted else torch.ones(2, 7),
            divisor if divisor is None else int(divisor),
        )
        for mode in (model.eval(), model.train()):
            loss = mode(ids, labels=labels, loss_weights=loss_weights, num_items_in_batch=divisor).loss
            assert loss.shape == ()
            assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_only_weighted_labels_cost_a_head():
    model = tiny_model()
    ids, labels, weights = training_batch()
    needed = int(((labels != -100) & (weights != 0)).sum())
    assert 0 < needed < int((labels != -100).sum()) < labels.numel()
    with counted_rows(model.lm_head) as rows:
        outputs = model.train()(ids, labels=labels, loss_weights=weights)
        assert outputs.logits is None
        assert rows == [needed]
        outputs = model.eval()(ids, labels=labels, loss_weights=weights)
        assert outputs.logits.shape == (4, 9, 23)
    assert torch.equal(outputs.logits, model(ids).logits)


def test_the_mask_token_gets_no_gradient_from_the_head():
    model = tiny_model(tie_word_embeddings=False)
    ids, labels, weights = training_batch()
    model(ids, labels=labels, loss_weights=weights).loss.backward()
    assert (model.lm_head.weight.grad[22] == 0).all()
    assert (model.lm_head.weight.grad[:22] != 0).any(-1).all()


def test_gradient_accumulation_equals_the_whole_batch():
    whole, halves = tiny_model().double().train(), tiny_model().double().train()
    ids, labels, weights = training_batch()
    num_items = (labels != -100).sum()
    assert (labels[:1] != -100).sum() * 4 != num_items  # unequal parts, or averaging them would do
    loss = whole(ids, labels=labels, loss_weights=weights).loss
    loss.backward()
    total = 0
    for part in (slice(0, 1), slice(1, 4)):
        part_loss = halves(
            ids[part], labels=labels[part], loss_weights=weights[part], num_items_in_batch=num_items
        ).loss
        part_loss.backward()
        total += part_loss.detach()
    torch.testing.assert_close(total, loss.detach(), **exact)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(halves)[name], gradient, **exact)


@pytest.mark.parametrize(
    ("labels", "loss_weights", "message"),
    [
        (torch.ones(2, 4, dtype=torch.long), None, r"`labels` has shape \(2, 4\); the input needs \(2, 5\)"),
        (torch.ones(5, dtype=torch.long), None, r"`labels` has shape \(5,\); the input needs \(2, 5\)"),
        (torch.ones(2, 5, dtype=torch.long), torch.ones(2), r"`loss_weights` has shape \(2,\); the input needs"),
        (torch.full((2, 5), -100), None, "`labels` holds -100 only"),
        (torch.full((2, 5), 22), None, r"`labels` holds the mask token \(22\), which is never produced"),
    ],
    ids=["short labels", "flat labels", "flat weights", "nothing to learn", "mask token"],
)
def test_bad_labels(labels, loss_weights, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(random_ids(2, 5), labels=labels, loss_weights=loss_weights)


def test_logits_to_keep():
    model, ids = tiny_model().double(), random_ids(2, 9)
    full = model(ids).logits
    assert full.shape == (2, 9, 23)
    for count in (1, 4, 9):
        torch.testing.assert_close(model(ids, logits_to_keep=count).logits, full[:, 9 - count :], **exact)
    positions = torch.tensor([7, 0, 3, 3])
    torch.testing.assert_close(model(ids, logits_to_keep=positions).logits, full[:, positions], **exact)
    by_row = torch.tensor([[8, 1, 1], [0, 5, 2]])
    expected = torch.stack([full[row, by_row[row]] for row in range(2)])
    torch.testing.assert_close(model(ids, logits_to_keep=by_row).logits, expected, **exact)
    with counted_rows(model.lm_head) as rows:
        model(ids, logits_to_keep=by_row)
    assert rows == [6]


# Cost


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_changes_no_bit(use_reentrant):
    plain, checkpointed = tiny_model().train(), tiny_model().train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ids, labels, weights = training_batch()
    losses = []
    for model, layer_runs in ((plain, 3), (checkpointed, 6)):
        with counted_rows(model.model.layers[1].mlp) as rows:
            loss = model(ids, labels=labels, loss_weights=weights, num_loops=3).loss
            loss.backward()
        assert len(rows) == layer_runs
        losses.append(loss)
    assert torch.equal(*losses)
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(checkpointed)[name], gradient), name


@pytest.mark.parametrize(("batch_size", "length"), [(1, 1), (1, 7), (3, 16)])
@architectures
def test_flops_equal_the_measured_ones(overrides, batch_size, length):
    model = tiny_model(attn_implementation="eager", **overrides)
    ids = random_ids(batch_size, length)

    def measured(**kwargs):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(ids, **kwargs)
        return counter.get_total_flops()

    counts = [measured(num_loops=num_loops) for num_loops in (1, 2, 3, 7)]
    assert [model.flops(batch_size, length, num_loops) for num_loops in (1, 2, 3, 7)] == counts
    mid = counts[1] - counts[0]
    assert counts == [counts[0] + (num_loops - 1) * mid for num_loops in (1, 2, 3, 7)]
    assert model.flops(batch_size, length) == counts[2]  # the configuration's three loops
    assert model.flops(batch_size, length, num_logits=1) == measured(logits_to_keep=1)
    assert isinstance(model.flops(batch_size, length, num_logits=0.5), int)


def test_flops_check_num_loops():
    with pytest.raises(ValueError, match="`num_loops` is 0"):
        tiny_model().flops(1, 8, num_loops=0)


def test_compiled_layers_serve_every_number_of_loops():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model, ids = tiny_model(), random_ids(2, 9)
    with torch.no_grad():
        expected = {num_loops: model(ids, num_loops=num_loops).logits for num_loops in (1, 2, 3, 12)}
        for layer in model.model.layers:
            layer.compile(backend=counter)
        model(ids, num_loops=1)
        compiled = counter.frame_count
        assert compiled > 0
        for num_loops, logits in expected.items():
            torch.testing.assert_close(model(ids, num_loops=num_loops).logits, logits)
    assert counter.frame_count == compiled
    torch._dynamo.reset()


@architectures
def test_bfloat16_is_close(overrides):
    model, ids = tiny_model(**overrides), random_ids(2, 16)
    expected = model(ids).logits
    logits = model.to(torch.bfloat16)(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() / expected.norm() < 0.05
    loss = model(ids, labels=ids.masked_fill(ids == 22, 1)).loss
    assert loss.dtype == torch.float32  # a sum over thousands of tokens needs it
    loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


# Bad inputs


@pytest.mark.parametrize("name", ["num_loop", "max_new_tokens", "past_key_value", "token_type_ids"])
def test_unknown_arguments(name):
    with pytest.raises(ValueError, match=f"takes no argument `{name}`"):
        tiny_model()(random_ids(1, 5), **{name: 3})
    tiny_model()(random_ids(1, 5), **{name: None})  # as if it had not been given


@pytest.mark.parametrize(("token", "culprit"), [(23, "23"), (-1, "-1"), (50256, "50256")])
def test_tokens_outside_the_vocabulary(token, culprit):
    ids = random_ids(2, 5)
    ids[1, 3] = token
    with pytest.raises(ValueError, match=f"`input_ids` holds {culprit}, outside the vocabulary of 23 tokens"):
        tiny_model()(ids)


def test_learned_positions_are_limited_and_rotary_ones_are_not():
    assert tiny_model()(random_ids(1, 65)).logits.shape == (1, 65, 23)
    model = tiny_model(position_embedding_type="learned")
    assert model(random_ids(1, 64)).logits.shape == (1, 64, 23)
    with pytest.raises(ValueError, match=r"has 65 positions, more than `max_position_embeddings` \(64\)"):
        model(random_ids(1, 65))


@pytest.mark.parametrize("shape", [(2, 4), (1, 5), (3, 5), (5, 2)])
def test_attention_mask_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"`attention_mask` has shape .*; the input needs \(2, 5\)"):
        tiny_model()(random_ids(2, 5), attention_mask=torch.ones(shape, dtype=torch.long))
