# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The model is transformers' Llama, Qwen or GPT-2, made bidirectional, with mid's layers several times in the stack.
Compared in float64, where rounding hides no mistake."""

import pytest
import torch
from references import run_layers, transformers_logits, transformers_model
from tiny import ARCHITECTURES, BIASES, MASK, in_turn, random_ids, scores, tiny_model

from loopmdm import LoopMDMForMaskedLM
from loopmdm.modeling_loopmdm import apply_rotary_pos_emb

UNTIED = {"tie_word_embeddings": False}
FACTOR = {"rope_theta": 100.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 16, **FACTOR}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {
    "llama": {},
    "llama-untied": UNTIED,
    "llama-wide-heads": {"num_key_value_heads": 1, "head_dim": 12, "hidden_act": "gelu"},
    "llama-biases": BIASES,  # its `attention_bias` covers the output projection
    "llama3-rope": {"rope_parameters": LLAMA3},
    "yarn-rope": {"rope_parameters": YARN},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", **FACTOR}},
    "qwen2": {"attention_bias": True, "num_key_value_heads": 2, **UNTIED},
    "qwen3": {"use_qk_norm": True, "head_dim": 12, "num_key_value_heads": 2},
    "gpt2": {
        "position_embedding_type": "learned",
        "norm_type": "layernorm",
        "use_gated_mlp": False,
        "hidden_act": "gelu_new",
        **BIASES,
    },
    "dream": {"shift_logits": True, "attention_bias": True},
    "sdar": {"attention_block_size": 4, "use_qk_norm": True},
    "shifted-blocks": {"attention_block_size": 3, "shift_logits": True, **UNTIED},
    "damped": {"loop_update": "damped"},
    "no-head-no-tail": {"loop_start": 0, "loop_end": 4},
}


def random_batch(seed: int, length: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, a mask, and documents: a whole row, one padded on both sides, and two padded anywhere."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(4, length, generator=generator) < 0.7).long()
    mask[0], mask[1, 3:17], mask[1, :3], mask[1, 17:] = 1, 1, 0, 0
    mask[:, 5] = 1
    documents = (torch.rand(4, length, generator=generator) < 0.2).cumsum(-1) * 7 % 23  # ids need not rise
    return random_ids(4, length, seed), mask, documents


@pytest.mark.parametrize(("name", "attention", "num_loops"), in_turn(FAMILIES, ["sdpa", "eager"], [1, 3]))
def test_logits_and_gradients_equal_the_unrolled_stack_of_transformers(name, attention, num_loops):
    ours = tiny_model(attn_implementation=attention, **FAMILIES[name]).double()
    theirs = transformers_model(ours, num_loops)
    ids, mask, documents = random_batch(seed=num_loops)
    for packed in (None, documents):
        found = ours(ids, mask, document_ids=packed, num_loops=num_loops).logits
        expected = transformers_logits(ours, theirs, ids, mask, packed)
        real = mask.bool()
        found, expected = scores(found)[real], expected[real][:, :MASK]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)

    direction = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        if name in theirs:  # GPT-2 has other names
            expected = theirs[name].grad
            torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-11 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_float32_equals_transformers_too(family):
    ours, ids = tiny_model(**FAMILIES[family]), random_ids(2, 20)
    expected = transformers_logits(ours, transformers_model(ours, 2), ids, torch.ones_like(ids))
    torch.testing.assert_close(scores(ours(ids, num_loops=2).logits), expected[..., :MASK], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in torch and transformers
@pytest.mark.parametrize("overrides", [{"num_key_value_heads": 2}, FAMILIES["shifted-blocks"]], ids=str)
def test_flex_attention_equals_sdpa(overrides):
    model, (ids, mask, documents) = tiny_model(**overrides), random_batch(0)
    runs = [{"document_ids": documents}, {"num_loops": 8, "loop_tolerance": 0.4}]
    runs += [{"logits_to_keep": torch.tensor([[5], [3], [5], [5]])}]
    expected = [model(ids, mask, **run) for run in runs]
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # compiling the kernel takes most of a minute
        for run, there in zip(runs, expected, strict=True):
            found, real = model(ids, mask, **run), ... if "logits_to_keep" in run else mask.bool()
            assert torch.equal(found.loops, there.loops)
            torch.testing.assert_close(found.logits[real], there.logits[real], rtol=0, atol=2e-5)


# Positions


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_change_of_dtype_does_not_round_rotary_frequencies(dtype, tmp_path):
    model, ids = tiny_model(max_position_embeddings=2048), random_ids(1, 2048)
    model.save_pretrained(tmp_path)
    loaded = LoopMDMForMaskedLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(model.to(dtype)(ids).logits, loaded(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_position_ids(positions):
    model, ids = tiny_model(position_embedding_type=positions).double(), random_ids(2, 7)
    default = scores(model(ids).logits)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    # Without a causal mask a model knows the order of its tokens from the positions only.
    for position_ids in (order[None], order.repeat(2, 1)):
        found = scores(model(ids[:, order], position_ids=position_ids).logits)
        torch.testing.assert_close(found, default[:, order], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "factor": 4.0,
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 16,
        },
    ],
    ids=["dynamic", "longrope"],
)
def test_frequencies_that_depend_on_the_length_depend_on_that_of_the_row_alone(rope):
    model = tiny_model(max_position_embeddings=16, rope_parameters=rope).double()
    ids = random_ids(3, 40)
    mask = (torch.arange(40) < torch.tensor([[40], [8], [25]])).long()
    expected = {}
    for row, length in ((1, 8), (2, 25), (0, 40)):
        alone = ids[row : row + 1, :length]
        # Theirs remembers the longest sequence, so that every length needs a new model.
        theirs = transformers_logits(model, transformers_model(model, 3), alone, torch.ones_like(alone))
        expected[row] = theirs[0, :, :MASK]
    together = scores(model(ids, mask).logits)
    for row, logits in expected.items():
        again = scores(model(ids[row : row + 1, : len(logits)]).logits)[0]  # behind longer and shorter calls
        torch.testing.assert_close(together[row, : len(logits)], again, rtol=0, atol=1e-11)
        torch.testing.assert_close(again, logits, rtol=0, atol=1e-5)  # their float32 frequencies round otherwise


@torch.no_grad()
def test_neither_padding_nor_other_documents_lengthen_a_row():
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    model, ids = tiny_model(max_position_embeddings=5, rope_parameters=rope).double(), random_ids(1, 12)
    places = torch.arange(12)[None]
    found = model(ids, attention_mask=places < 4, position_ids=places).logits[:, :4]
    torch.testing.assert_close(scores(found), scores(model(ids[:, :4]).logits), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"`rope_type` is .dynamic.; packed rows need .* no length changes"):
        model(ids, document_ids=(places >= 4).long())


@torch.no_grad()
def test_every_run_of_equal_ids_is_a_document():
    model, ids = tiny_model().double(), random_ids(1, 9)
    parted, again = torch.tensor([[[4, 4, 4, 2, 2, 4, 4, 4, 4]], [[1, 1, 1, 2, 2, 3, 3, 3, 3]]])
    assert torch.equal(model(ids, document_ids=parted).logits, model(ids, document_ids=again).logits)


def test_rotary_tables_are_exact_and_rounded_as_told():
    """Angles keep float32 whatever the model's dtype: in bfloat16 position 257 would equal position 256."""
    positions = torch.tensor([[0, 1, 256, 257, 4095]])
    frequencies = torch.tensor([10000 ** (-2 * (i % 4) / 8) for i in range(8)], dtype=torch.float64)
    angles = positions[..., None].double() * frequencies
    for precision, dtype, table_dtype, tolerance in [
        ("model", torch.float32, torch.float32, 1e-3),
        ("model", torch.bfloat16, torch.bfloat16, 2**-8),
        ("float32", torch.bfloat16, torch.float32, 1e-3),
        ("float32", torch.float64, torch.float64, 1e-3),
        ("bfloat16", torch.float32, torch.float32, 2**-8),
    ]:
        rotary = tiny_model(rope_precision=precision).model.rotary_emb
        for table, expected in zip(
            rotary(torch.zeros(1, dtype=dtype), positions), (angles.cos(), angles.sin()), strict=True
        ):
            assert table.dtype == table_dtype
            torch.testing.assert_close(table.double(), expected, rtol=0, atol=tolerance)
            assert torch.equal(table.bfloat16().to(table_dtype), table) == (tolerance == 2**-8)


@torch.no_grad()
def test_rope_precision():
    ids = random_ids(2, 40)
    found, model = {}, tiny_model()
    for dtype in (torch.float32, torch.bfloat16):
        for precision in ("model", "float32", "bfloat16"):
            model.config.rope_precision = precision
            found[dtype, precision] = model.to(dtype)(ids).logits
    model.float()
    assert torch.equal(found[torch.float32, "float32"], found[torch.float32, "model"])
    assert not torch.equal(found[torch.float32, "bfloat16"], found[torch.float32, "model"])
    assert torch.equal(found[torch.bfloat16, "bfloat16"], found[torch.bfloat16, "model"])
    assert not torch.equal(found[torch.bfloat16, "float32"], found[torch.bfloat16, "model"])
    # Queries are rotated in the dtype of the tables, and rounded once.
    states = torch.randn(1, 2, 5, 8, dtype=torch.float64).bfloat16()
    cos, sin = torch.randn(2, 1, 5, 8)
    exact = apply_rotary_pos_emb(states.double(), cos.double(), sin.double())
    assert (apply_rotary_pos_emb(states, cos, sin) == exact.bfloat16()).float().mean() > 0.95


# What the model returns


@pytest.mark.parametrize("overrides", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_bfloat16_is_close(overrides):
    model, ids = tiny_model(**overrides), random_ids(2, 16)
    expected = scores(model(ids).logits)
    logits = model.to(torch.bfloat16)(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (scores(logits).float() - expected).norm() / expected.norm() < 0.05
    loss = model(ids, labels=ids.masked_fill(ids == MASK, 1)).loss
    assert loss.dtype == torch.float32  # a sum over thousands of tokens needs it
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("overrides", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_hidden_states_come_in_executed_order(overrides):
    model, ids = tiny_model(**overrides), random_ids(2, 9)
    inner, config = model.model, model.config
    outputs = model(ids, num_loops=3, output_hidden_states=True, logits_to_keep=torch.zeros(2, 1, dtype=torch.long))
    expected = [inner.embed_tokens(ids)]
    if config.position_embedding_type == "learned":
        expected = [expected[0] + inner.embed_positions.weight[:9]]
    _, context = inner.prelude(ids)
    order = [*range(config.loop_start), *[*range(config.loop_start, config.loop_end)] * 3, *range(config.loop_end, 4)]
    for index in order:
        expected.append(run_layers(model, [index], expected[-1], context))
    expected[-1] = inner.norm(expected[-1])
    assert len(outputs.hidden_states) == 1 + config.num_executed_layers(3)
    assert all(torch.equal(a, b) for a, b in zip(outputs.hidden_states, expected, strict=True))
    assert model(ids).hidden_states is None
    with pytest.raises(ValueError, match=r"`output_hidden_states` is \[3\]; it must be True or False"):
        model(ids, output_hidden_states=[3])


@torch.no_grad()
def test_attentions_come_in_executed_order():
    model = tiny_model(attn_implementation="sdpa", num_key_value_heads=2).double()
    ids, mask = random_ids(2, 9), torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    with pytest.raises(ValueError, match=r"needs eager attention, and the model runs 'sdpa'; call .*set_attn"):
        model(ids, output_attentions=True)
    model.set_attn_implementation("eager")
    outputs = model(ids, mask, num_loops=3, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 8
    _, context = model.model.prelude(ids, mask)
    for index, attention, states in zip(
        [0, 1, 2, 1, 2, 1, 2, 3], outputs.attentions, outputs.hidden_states, strict=False
    ):
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))
        assert (attention[0, :, :, :3] == 0).all()
        layer = model.model.layers[index]
        arguments = {name: getattr(context, name) for name in ("attention_mask", "position_embeddings")}
        assert torch.equal(attention, layer.self_attn(layer.input_layernorm(states), **arguments)[1])


# Inputs


@torch.no_grad()
def test_inputs_embeds_stand_for_input_ids():
    model, ids = tiny_model(), random_ids(2, 7)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    for both_or_none in ({"input_ids": ids, "inputs_embeds": embeds}, {}):
        with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
            model(**both_or_none)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_document_of_padding_is_no_danger_in_half_precision(dtype):
    # Its queries see nothing, and their scores, far below 0, and the lowest number of float16 add up to -inf.
    model = tiny_model(attn_implementation="eager").to(dtype)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data = -30 * layer.self_attn.k_proj.weight
    ids, mask = torch.full((1, 8), 7), torch.tensor([[1] * 5 + [0] * 3])
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2]])
    found = scores(model(ids, mask, document_ids=documents).logits[:, :5])
    torch.testing.assert_close(
        found, scores(model(ids[:, :5], document_ids=documents[:, :5]).logits), rtol=0, atol=0.5
    )


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_four_dimensional_masks_pass_through(attention):
    blocks = tiny_model(attn_implementation=attention, attention_block_size=3).double()
    plain = tiny_model(attn_implementation=attention).double()
    block, ids, keep = torch.arange(9) // 3, random_ids(2, 9), torch.tensor([[8, 0], [1, 1]])
    mask = (block[None, :] <= block[:, None])[None, None]
    if attention == "eager":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    expected = blocks(ids).logits
    for found in (plain(ids, mask).logits, blocks(ids, mask).logits, plain(ids, mask.expand(2, -1, -1, -1)).logits):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    whole = torch.zeros_like(mask) if attention == "eager" else torch.ones_like(mask)
    torch.testing.assert_close(blocks(ids, whole).logits, plain(ids).logits, rtol=0, atol=1e-12)
    found = plain(ids, mask, logits_to_keep=keep).logits
    torch.testing.assert_close(found, expected.take_along_dim(keep[..., None], 1), rtol=0, atol=1e-12)
    assert (scores(plain(ids).logits) - scores(expected)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("attention", "dtype"), [("eager", torch.bool), ("eager", torch.long), ("sdpa", torch.long)], ids=str
)
def test_four_dimensional_masks_that_cannot_be_added(attention, dtype):
    mask = torch.ones(1, 1, 5, 5, dtype=dtype)
    with pytest.raises(
        ValueError, match=rf"`attention_mask` is 4-D and {dtype}; '{attention}' attention needs floating"
    ):
        tiny_model(attn_implementation=attention)(random_ids(2, 5), mask)


@torch.no_grad()
def test_any_value_but_zero_marks_a_real_token():
    ids, mask, documents = random_batch(3)
    for overrides in ({}, {"shift_logits": True}, {"attention_block_size": 4}):
        model = tiny_model(**overrides)
        expected = model(ids, mask, document_ids=documents).logits
        for other in (mask * 2, mask * -1, mask.bool(), mask * 0.5):
            assert torch.equal(model(ids, other, document_ids=documents).logits, expected)


@torch.no_grad()
def test_a_document_may_begin_with_padding():
    model, ids = tiny_model(shift_logits=True).double(), torch.tensor([[3, 7, 0, 9, 5]])
    mask, documents = torch.tensor([[1, 1, 0, 1, 1]]), torch.tensor([[0, 0, 1, 1, 1]])
    found = scores(model(ids, attention_mask=mask, document_ids=documents).logits[0, 3:])
    torch.testing.assert_close(found, scores(model(ids[:, 3:]).logits[0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(2, 4)}, r"`attention_mask` has shape \(2, 4\); the input needs \(2, 5\)"),
        ({"attention_mask": torch.ones(5, 2)}, r"`attention_mask` has shape \(5, 2\); the input needs \(2, 5\)"),
        ({"document_ids": torch.ones(1, 5)}, r"`document_ids` has shape \(1, 5\); the input needs \(2, 5\)"),
        ({"num_loop": 3}, "takes no argument `num_loop`"),
        ({"max_new_tokens": 3, "token_type_ids": 1}, "takes no argument `max_new_tokens`, `token_type_ids`"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(random_ids(2, 5), **arguments)
    tiny_model()(random_ids(2, 5), **dict.fromkeys(arguments))  # None is as if it had not been given


@pytest.mark.parametrize("token", [23, -1, 50256])
def test_tokens_outside_the_vocabulary(token):
    ids = random_ids(2, 5)
    ids[1, 3] = token
    with pytest.raises(ValueError, match=f"`input_ids` holds {token}, outside the vocabulary of 23 tokens"):
        tiny_model()(ids)


@torch.no_grad()
def test_learned_positions_are_limited_and_rotary_ones_are_not():
    assert tiny_model()(random_ids(1, 65)).logits.shape == (1, 65, 23)
    model = tiny_model(position_embedding_type="learned")
    assert model(random_ids(1, 64)).logits.shape == (1, 64, 23)
    with pytest.raises(ValueError, match=r"has 65 positions, more than `max_position_embeddings` \(64\)"):
        model(random_ids(1, 65))
    with pytest.raises(ValueError, match="has 65 positions"):
        model(random_ids(1, 2), position_ids=torch.tensor([[0, 64]]))
    with pytest.raises(ValueError, match="`position_ids` holds -1"):
        model(random_ids(1, 2), position_ids=torch.tensor([[0, -1]]))


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn"])
@pytest.mark.parametrize("overrides", [{"attention_block_size": 2}, {}], ids=str)
def test_flash_attention_sees_all_or_nothing(overrides, attention):
    model = tiny_model(**overrides)
    model.config._attn_implementation = attention  # none of them is installed here
    documents = None if overrides else torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"cannot be block-causal, see packed documents apart.*set_attn_impl"):
        model(random_ids(1, 4), document_ids=documents)
