# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What converted models need of the architecture: block-causal attention, shifted logits, and the layers of GPT-2
(LayerNorm, a plain MLP, biases, learned positions).
"""

import pytest
import torch
from conversion import logits_of
from tiny import random_ids, tiny_model
from torch.nn.functional import pad
from torch.utils.flop_counter import FlopCounterMode

from loopmdm import LoopMDMForMaskedLM

exact = {"rtol": 1e-12, "atol": 1e-12}
PROMPT = random_ids(2, 6).clamp(max=21)

# Block-causal attention


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_token_has_no_effect_on_earlier_blocks(attn_implementation, padding):
    model = tiny_model(attention_block_size=4, attn_implementation=attn_implementation)
    ids, mask = random_ids(2, 13), torch.ones(2, 13, dtype=torch.long)
    if padding != "none":
        mask[1, slice(3) if padding == "left" else slice(-3, None)] = 0
    # Positions are counted over real tokens.
    block = torch.where(mask.bool(), mask.cumsum(-1) - 1, -1).div(4, rounding_mode="floor")
    before = logits_of(model, ids, mask, num_loops=2)
    for column in range(13):
        changed = ids.clone()
        changed[:, column] = (changed[:, column] + 1) % 22
        is_changed = (logits_of(model, changed, mask, num_loops=2) != before).any(-1)
        for row in range(2):
            real = mask[row] == 1
            sees = real & (block[row] >= block[row, column]) & bool(mask[row, column])
            assert torch.equal(is_changed[row] & real, sees), (row, column)


def test_block_causal_rows_do_not_depend_on_padding():
    model, ids = tiny_model(attention_block_size=4).double(), random_ids(1, 9)
    for left in (1, 3, 4):
        logits = logits_of(model, pad(ids, (left, 2)), pad(torch.ones_like(ids), (left, 2)))
        torch.testing.assert_close(logits[:, left : left + 9], logits_of(model, ids), **exact)


@pytest.mark.parametrize(
    ("attention_block_size", "block_length", "expected"),
    [
        (4, None, [[6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17]]),
        (4, 4, [[6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17]]),
        (4, 8, [[6, 7], [*range(8, 16)], [16, 17]]),
        (4, 12, [[*range(6, 12)], [*range(12, 18)]]),
        # Without block-causal attention blocks begin where the prompt ends.
        (None, 4, [[6, 7, 8, 9], [10, 11, 12, 13], [14, 15, 16, 17]]),
    ],
)
def test_generation_blocks_are_those_of_the_attention(attention_block_size, block_length, expected):
    arguments = {"block_length": block_length, "return_dict_in_generate": True, "output_trace": True}
    output = tiny_model(attention_block_size=attention_block_size).generate(PROMPT[:1], max_new_tokens=12, **arguments)
    blocks = {}
    for step in output.trace:
        blocks.setdefault(step.block, set()).update(step.committed[0].nonzero().flatten().tolist())
    assert [sorted(blocks[block]) for block in sorted(blocks)] == expected


def test_block_causal_text_does_not_depend_on_what_comes_behind():
    """With blocks that were not the attention's, tokens would see [MASK]s that later ones replace."""
    model = tiny_model(attention_block_size=4)
    whole = model.generate(PROMPT, max_new_tokens=14)
    for length in (2, 6, 10):
        assert torch.equal(model.generate(PROMPT, max_new_tokens=length), whole[:, : 6 + length])
    padded = model.generate(pad(PROMPT, (3, 0)), pad(torch.ones_like(PROMPT), (3, 0)), max_new_tokens=14)
    assert torch.equal(padded[:, 3:], whole)


@pytest.mark.parametrize("block_length", [1, 3, 6, 10])
def test_generation_blocks_that_cut_the_attentions_raise(block_length):
    with pytest.raises(ValueError, match=rf"`block_length` is {block_length}; .*multiples of 4"):
        tiny_model(attention_block_size=4).generate(PROMPT, max_new_tokens=12, block_length=block_length)


@pytest.mark.parametrize(
    "attn_implementation", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"]
)
def test_flash_attention_cannot_be_block_causal(attn_implementation):
    model = tiny_model(attention_block_size=4)
    model.config._attn_implementation = attn_implementation  # none of them is installed here
    with pytest.raises(ValueError, match=r"cannot be block-causal.*sdpa"):
        model(random_ids(1, 8))


def test_a_4d_mask_takes_the_place_of_the_blocks():
    ids, model = random_ids(2, 8), tiny_model(attention_block_size=4)
    logits = logits_of(model, ids, torch.zeros(2, 1, 8, 8))
    torch.testing.assert_close(logits, logits_of(tiny_model(), ids), rtol=0, atol=1e-5)
    assert (logits - logits_of(model, ids))[..., :22].abs().max() > 0.1


# Shifted logits

MASKS = {
    "right": [[1] * 9, [1] * 6 + [0] * 3],
    "left": [[1] * 9, [0] * 3 + [1] * 6],
    "inside": [[1, 0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 1, 1, 1, 0]],
}
IDS = random_ids(2, 9, seed=1)  # the first token of a row and its first real one differ, whatever the mask


def by_hand(model, ids, mask):
    """A shifted model's logits, each row without its padding, through the layers and the head; NaN on padding."""
    logits = torch.full((*ids.shape, model.config.vocab_size), torch.nan, dtype=model.dtype)
    for row in range(len(ids)):
        real = mask[row].nonzero().flatten()
        states = model.model(ids[row : row + 1, real]).last_hidden_state[0]
        states = torch.stack([states[max(index - 1, 0)] for index in range(len(real))])
        logits[row, real] = model.lm_head(states)
    logits[..., model.config.mask_token_id] = -torch.inf
    return logits


@pytest.mark.parametrize("mask", [torch.tensor(mask) for mask in MASKS.values()], ids=MASKS)
def test_shifted_rows_predict_their_own_token_under_padding(mask):
    """In logits, in those that are kept, and in the loss."""
    model, ids = tiny_model(shift_logits=True).double(), IDS
    expected, logits = by_hand(model, ids, mask).detach(), logits_of(model, ids, mask)
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], **exact)
    assert (logits - logits_of(tiny_model().double(), ids, mask))[mask == 1][:, :22].abs().max() > 0.1
    everything = torch.ones_like(mask)
    torch.testing.assert_close(logits_of(model, ids), by_hand(model, ids, everything).detach(), **exact)

    torch.testing.assert_close(logits_of(model, ids, mask, logits_to_keep=3), logits[:, -3:], **exact)
    for columns in (torch.tensor([[0, 4, 7]] * 2), torch.tensor([[0, 1], [8, 3]])):
        kept = torch.stack([logits[row, columns[row]] for row in range(2)])
        torch.testing.assert_close(logits_of(model, ids, mask, logits_to_keep=columns), kept, **exact)

    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(1, 22, ids.shape, generator=generator).masked_fill(mask == 0, -100)
    labels[0, 0], weights = -100, torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    log_probs, where = expected.log_softmax(-1), labels != -100
    losses = -weights[where] * log_probs[where].gather(-1, labels[where][:, None])[:, 0]
    for mode in (model.train(), model.eval()):
        loss = mode(ids, mask, labels=labels, loss_weights=weights, num_loops=3).loss
        torch.testing.assert_close(loss.detach(), losses.mean(), **exact)


def test_shifted_models_generate_the_same_in_a_padded_batch():
    model = tiny_model(shift_logits=True)
    prompts = [random_ids(1, length, seed=length).clamp(max=21) for length in (3, 7)]
    batch = torch.cat([pad(prompt, (7 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.tensor([[0] * 4 + [1] * 3, [1] * 7])
    together = model.generate(batch, mask, max_new_tokens=6)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row, -6:], model.generate(prompt, max_new_tokens=6)[0, -6:])
    assert not torch.equal(together, tiny_model().generate(batch, mask, max_new_tokens=6))


# LayerNorm, plain MLP and a head with a bias

GPT_LIKE = {
    "norm_type": "layernorm",
    "use_gated_mlp": False,
    "hidden_act": "gelu_new",
    "mlp_bias": True,
    "lm_head_bias": True,
    "tie_word_embeddings": False,
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"position_embedding_type": "learned", "attention_bias": True},
        {"tie_word_embeddings": True},
        {"attention_block_size": 4, "shift_logits": True},
    ],
    ids=str,
)
def test_layer_norm_models_count_checkpoint_save_and_load(overrides, tmp_path):
    overrides = GPT_LIKE | overrides
    model, ids = tiny_model(attn_implementation="eager", **overrides), random_ids(3, 10)
    for num_loops in (1, 2, 5):
        for arguments, num_logits in (({}, None), ({"logits_to_keep": 1}, 1)):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(ids, num_loops=num_loops, **arguments)
            assert model.flops(3, 10, num_loops, num_logits) == counter.get_total_flops()
    gradients = []
    for checkpointing in (False, True):
        trained = tiny_model(**overrides).train()
        if checkpointing:
            trained.gradient_checkpointing_enable({"use_reentrant": False})
        trained(ids, labels=ids.clamp(max=21), num_loops=3).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradients[1][name], gradient), name
    assert {"model.norm.bias", "model.layers.0.input_layernorm.bias", "model.layers.0.mlp.up_proj.bias"} <= set(
        gradients[0]
    )
    assert not any("gate_proj" in name for name in gradients[0])
    model.save_pretrained(tmp_path)
    loaded = LoopMDMForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert {name: getattr(loaded.config, name) for name in overrides} == overrides
    assert torch.equal(logits_of(loaded, ids, num_loops=3), logits_of(model, ids, num_loops=3))
    assert torch.equal(loaded.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))
