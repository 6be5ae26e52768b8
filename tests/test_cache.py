# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Tests of `LoopMDMCache` in `forward`, of logits for chosen positions, and of the FLOPs that they save. The reference is
one plain forward pass over the whole of every row without padding or cache, in float64.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_ids, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from loopmdm.cache_utils import LoopMDMCache

BLOCK, PAD = 4, 0
exact = {"rtol": 1e-10, "atol": 1e-10}
few_examples = settings(max_examples=3, deadline=None, derandomize=True, database=None)

ARCHITECTURES = {
    "rope": {},
    "learned": {"position_embedding_type": "learned"},
    "gqa-qk-norm": {"num_key_value_heads": 2, "use_qk_norm": True},
    "shift-logits": {"shift_logits": True},
    "no-tail": {"loop_end": 4},
    "no-head": {"loop_start": 0, "loop_end": 2},
    "damped-layernorm": {"loop_update": "damped", "norm_type": "layernorm"},
    "all-is-mid": {"loop_start": 0, "loop_end": 4, "shift_logits": True},
}
architectures = pytest.mark.parametrize("overrides", ARCHITECTURES.values(), ids=ARCHITECTURES)


@pytest.fixture(scope="module")
def model():
    return block_model()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def block_model(attention: str = "sdpa", **overrides):
    model = tiny_model(attention_block_size=BLOCK, **overrides).double()
    model.set_attn_implementation(attention)
    return model


def plain(model, row, num_loops=None) -> torch.Tensor:
    """Logits of one row without padding, `(length, vocab_size)`, from one forward pass without a cache."""
    return model(torch.as_tensor(row)[None], num_loops=num_loops).logits[0]


def tokens(length: int, seed: int = 0) -> list[int]:
    return random_ids(1, length, seed)[0].tolist()


def filled(model, ids, num_loops=None) -> LoopMDMCache:
    return model(ids, use_cache=True, num_loops=num_loops).past_key_values


def in_chunks(model, rows, counts, sides, num_loops=None, cache=None):
    """
    Feeds chunks of `counts[chunk][row]` tokens, padded on the side that `sides[chunk]` names, and returns the logits
    of every row's real positions, and the cache.
    """
    logits, done = [[] for _ in rows], [0] * len(rows)
    for chunk, side in zip(counts, sides, strict=True):
        width = max(chunk)
        ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
        for row, count in enumerate(chunk):
            places = {
                "left": list(range(width - count, width)),
                "right": list(range(count)),
                "inside": [*range(count - count // 2), *range(width - count // 2, width)],
            }[side]
            ids[row, places] = torch.tensor(rows[row][done[row] : done[row] + count], dtype=torch.long)
            mask[row, places] = 1
            done[row] += count
        outputs = model(
            ids,
            attention_mask=None if mask.all() else mask,
            past_key_values=cache,
            use_cache=True,
            num_loops=num_loops,
        )
        cache = outputs.past_key_values
        for row in range(len(rows)):
            logits[row].append(outputs.logits[row, mask[row].bool()])
    return [torch.cat(parts) for parts in logits], cache


def assert_chunks_equal_plain(model, counts, sides, num_loops=None, cache=None):
    rows = [tokens(sum(column), seed) for seed, column in enumerate(zip(*counts, strict=True))]
    logits, cache = in_chunks(model, rows, counts, sides, num_loops, cache)
    for row, found in zip(rows, logits, strict=True):
        torch.testing.assert_close(found, plain(model, row, num_loops), **exact)
    assert cache.lengths.tolist() == [len(row) for row in rows]
    assert cache.get_seq_length() == max(map(len, rows))
    return cache


# Block-causal chunks


@architectures
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("num_loops", [1, 3])
def test_chunks_of_whole_blocks_equal_one_pass(overrides, attention, num_loops):
    assert_chunks_equal_plain(
        block_model(attention, **overrides), [[8, 8], [4, 4], [4, 4], [12, 12]], ["left"] * 4, num_loops
    )


@architectures
@few_examples
@given(
    counts=st.lists(st.lists(st.sampled_from([4, 8]), min_size=3, max_size=3), min_size=1, max_size=4),
    sides=st.lists(st.sampled_from(["left", "right", "inside"]), min_size=4, max_size=4),
    num_loops=st.integers(1, 4),
)
def test_rows_of_different_lengths_and_any_padding_equal_one_pass(overrides, counts, sides, num_loops):
    assert_chunks_equal_plain(block_model(**overrides), counts, sides[: len(counts)], num_loops)


@pytest.mark.parametrize(
    "shift_logits",
    [False, True],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_may_have_nothing_in_a_chunk(shift_logits, side):
    model = block_model(shift_logits=shift_logits)
    assert_chunks_equal_plain(model, [[8, 4], [4, 0], [4, 8]], [side] * 3)


def test_a_last_block_may_be_short(model):
    assert_chunks_equal_plain(model, [[8, 8], [3, 2]], ["left", "right"])


def test_bfloat16_is_close():
    model = block_model().bfloat16()
    row = tokens(24)
    logits, cache = in_chunks(model, [row], [[16], [8]], ["left"] * 2)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    expected = plain(model, row)
    assert (logits[0] - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_pass_without_use_cache_stores_nothing(model):
    """As denoising does: the block is computed again and again, then stored."""
    row = tokens(12)
    cache = filled(model, torch.tensor([row[:8]]))
    for seed in range(2):
        block = tokens(4, seed=seed + 5)
        logits = model(torch.tensor([block]), past_key_values=cache).logits[0]
        torch.testing.assert_close(logits, plain(model, row[:8] + block)[8:], **exact)
        assert cache.get_seq_length() == 8
    logits = model(torch.tensor([row[8:]]), past_key_values=cache, use_cache=True).logits[0]
    torch.testing.assert_close(logits, plain(model, row)[8:], **exact)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("shift_logits", [False, True])
def test_embeddings_equal_tokens(shift_logits):
    model, row = block_model(shift_logits=shift_logits), torch.tensor([tokens(16)])
    embeddings = model.get_input_embeddings()(row)
    cache = model(inputs_embeds=embeddings[:, :8], use_cache=True).past_key_values
    logits = model(inputs_embeds=embeddings[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(logits[0], plain(model, row[0])[8:], **exact)


@architectures
def test_selected_rows_see_their_own_keys(overrides):
    model, ids = block_model(**overrides), random_ids(4, 16)
    cache = filled(model, ids[:, :12])
    stored = copy.deepcopy(cache)
    for rows in ([2], [3, 0], [0, 1, 3]):
        logits = model(ids[rows, 12:], past_key_values=cache.select(torch.tensor(rows))).logits
        for row, found in zip(rows, logits, strict=True):
            torch.testing.assert_close(found, plain(model, ids[row])[12:], **exact)
    assert cache.get_seq_length() == 12 and cache.rows is None
    for layer, before in zip(cache.layers, stored.layers, strict=True):
        assert torch.equal(layer.keys[:, :, :12], before.keys[:, :, :12])
        assert torch.equal(layer.values[:, :, :12], before.values[:, :, :12])


def test_selected_rows_of_different_lengths(model):
    rows = [tokens(8, 0), tokens(16, 1), tokens(12, 2)]
    _, cache = in_chunks(model, [row[:-4] for row in rows], [[4, 12, 8]], ["left"])
    ids = torch.tensor([row[-4:] for row in rows])
    logits = model(ids[[2, 0]], past_key_values=cache.select(torch.tensor([2, 0]))).logits
    for row, found in zip((2, 0), logits, strict=True):
        torch.testing.assert_close(found, plain(model, rows[row])[-4:], **exact)


def test_a_selection_that_makes_the_cache_grow_leaves_it_usable(model):
    ids = random_ids(2, 24)
    cache = filled(model, ids[:, :8])
    model(ids[1:, 8:], past_key_values=cache.select(torch.tensor([1])))  # needs 24 places
    for start in (8, 12, 16, 20):
        logits = model(ids[:, start : start + 4], past_key_values=cache, use_cache=True).logits
        for row in range(2):
            torch.testing.assert_close(logits[row], plain(model, ids[row])[start : start + 4], **exact)


@pytest.mark.parametrize(("crop", "kept"), [(8, 8), (9, 8), (11, 8), (-4, 8), (-1, 8), (3, 0), (0, 0), (-99, 0)])
def test_a_cropped_cache_is_filled_anew(model, crop, kept):
    row, other = tokens(12), tokens(16, seed=1)
    cache = filled(model, torch.tensor([row]))
    cache.crop(crop)
    assert cache.get_seq_length() == kept and cache.lengths.tolist() == [kept]
    changed = row[:kept] + other[kept:]
    logits = model(torch.tensor([changed[kept:]]), past_key_values=cache, use_cache=True).logits[0]
    torch.testing.assert_close(logits, plain(model, changed)[kept:], **exact)


def test_cropping_to_more_than_there_is_changes_nothing(model):
    row = tokens(16)
    cache = filled(model, torch.tensor([row[:12]]))
    cache.crop(12)
    cache.crop(99)
    logits = model(torch.tensor([row[12:]]), past_key_values=cache).logits[0]
    torch.testing.assert_close(logits, plain(model, row)[12:], **exact)


def test_cropping_rows_of_different_lengths(model):
    rows = [tokens(12, 0), tokens(20, 1)]
    _, cache = in_chunks(model, rows, [[12, 20]], ["left"])
    cache.crop(16)
    assert cache.lengths.tolist() == [12, 16]
    new = random_ids(2, 4, seed=7)
    logits = model(new, past_key_values=cache).logits
    torch.testing.assert_close(logits[0], plain(model, rows[0] + new[0].tolist())[12:], **exact)
    torch.testing.assert_close(logits[1], plain(model, rows[1][:16] + new[1].tolist())[16:], **exact)


@pytest.mark.parametrize("forget", ["crop", "generate"])
def test_shifted_logits_behind_a_cache_that_lost_its_last_state(forget):
    """The state before the first position is gone: right logits or a refusal, and no others."""
    model, row = block_model(shift_logits=True), tokens(12)
    if forget == "crop":
        cache = filled(model, torch.tensor([row]))
        cache.crop(8)
    else:
        row = [token if token != 22 else 3 for token in row[:8]]
        output = model.generate(torch.tensor([row]), max_new_tokens=8, return_dict_in_generate=True)
        row, cache = output.sequences[0].tolist(), output.past_key_values
    stored = cache.get_seq_length()
    try:
        logits = model(torch.tensor([row[stored:]]), past_key_values=cache).logits[0]
    except ValueError:
        return
    torch.testing.assert_close(logits, plain(model, row)[stored:], **exact)


def test_a_reset_cache_is_a_new_one(model):
    cache = filled(model, random_ids(2, 12))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_chunks_equal_plain(model, [[4, 8], [8, 4]], ["left", "right"], cache=cache)


@architectures
def test_rows_are_selected_repeated_and_copied(overrides):
    model, ids = block_model(**overrides), random_ids(3, 16)
    cache = filled(model, ids[:, :8])
    copied = copy.deepcopy(cache)

    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    order = [2, 2, 0, 0]
    # Each copy goes on in its own way.
    ends = random_ids(4, 8, seed=3)
    logits = model(ends, past_key_values=cache, use_cache=True).logits
    for row, end, found in zip(order, ends, logits, strict=True):
        torch.testing.assert_close(found, plain(model, torch.cat((ids[row, :8], end)))[8:], **exact)

    # The copy knows nothing of that.
    assert copied.batch_size == 3 and copied.get_seq_length() == 8
    logits = model(ids[:, 8:], past_key_values=copied).logits
    for row in range(3):
        torch.testing.assert_close(logits[row], plain(model, ids[row])[8:], **exact)


def test_a_cache_grows_beyond_its_length(model):
    cache = LoopMDMCache(model.config, 3, batch_size=2, max_length=5)
    assert_chunks_equal_plain(model, [[4, 4], [8, 8], [20, 16]], ["left", "left", "right"], cache=cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_loops", [1, 4])
@pytest.mark.parametrize("share_loops", [False, True])
def test_memory_is_what_the_formula_says(dtype, num_loops, share_loops):
    model = block_model(num_key_value_heads=2, head_dim=12).to(dtype)
    cache = LoopMDMCache(model.config, num_loops, batch_size=3, max_length=20, share_loops=share_loops)
    model(random_ids(3, 8), past_key_values=cache, use_cache=True, num_loops=num_loops)
    held = sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert held == LoopMDMCache.num_bytes(model.config, num_loops, 3, 20, dtype, share_loops)
    executed = 4 if share_loops else 2 + 2 * num_loops
    assert held == executed * 2 * 3 * 21 * 2 * 12 * dtype.itemsize
    model(random_ids(3, 24), past_key_values=cache, num_loops=num_loops)  # grows to 8 + 24
    held = sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert held == LoopMDMCache.num_bytes(model.config, num_loops, 3, 32, dtype, share_loops)


def test_adaptive_loops_read_a_cache(model):
    """A row that stops after k loops has the logits of k loops in its block, with all loops before it."""
    ids = random_ids(3, 16)
    cache = filled(model, ids[:, :12], num_loops=4)
    hidden = {k: two_part_logits(model, ids, 12, 4, k) for k in range(1, 5)}
    changes = {k: (hidden[k][1] - hidden[k - 1][1]).flatten(1).norm(dim=1) for k in range(2, 5)}
    ratios = torch.stack([changes[k] / hidden[k - 1][1].flatten(1).norm(dim=1) for k in range(2, 5)])
    tolerance = ratios.flatten().sort().values[4:6].mean().item()  # some rows stop, at different loops
    outputs = model(ids[:, 12:], past_key_values=cache, num_loops=4, loop_tolerance=tolerance)
    assert len(set(outputs.loops.tolist())) > 1, outputs.loops
    for row, loops in enumerate(outputs.loops.tolist()):
        torch.testing.assert_close(outputs.logits[row], hidden[loops][0][row], **exact)


def two_part_logits(model, ids, start, prefix_loops, loops):
    """
    Logits and state of mid from `start` on, when the positions before it run `prefix_loops` loops and the others
    `loops`. Hooks take every layer's input of the prefix from a plain pass over it.
    """
    inputs = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]), prepend=True)
        for layer in model.model.layers
    ]
    model(ids[:, :start], num_loops=prefix_loops)
    for handle in handles:
        handle.remove()
    # Each layer sees the prefix as it was on its way into the same layer, and throws away what it makes of it.
    hidden_states = model.model.embed_tokens(ids[:, start:])
    _, context = model.model.prelude(ids)
    order = [0, *[1, 2] * loops, 3]
    where = [0, *range(1, 1 + 2 * loops), 1 + 2 * prefix_loops]
    for layer, index in zip(order, where, strict=True):
        joined = torch.cat((inputs[index], hidden_states), dim=1)
        hidden_states = model.model.layers[layer](joined, **context)[:, start:]
        if layer == 2:
            mid = hidden_states
    return model.lm_head(model.model.norm(hidden_states)), mid


# Refusals of `forward`


def test_caches_of_others_are_refused(model):
    ids = random_ids(2, 8)
    cache = filled(model, ids)
    with pytest.raises(ValueError, match="holds 2 rows and the input has 3"):
        model(random_ids(3, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="num_loops=3 and is used with 2"):
        model(ids, past_key_values=cache, num_loops=2)
    with pytest.raises(ValueError, match="another model"):
        copy.deepcopy(model)(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="document_ids"):
        model(ids, past_key_values=cache, document_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="without those of the cache"):
        model(ids, past_key_values=cache, attention_mask=torch.ones(2, 16))
    with pytest.raises(ValueError, match="selection of rows stores nothing"):
        model(ids[:1], past_key_values=cache.select(torch.tensor([0])), use_cache=True)
    with pytest.raises(ValueError, match="loop_tolerance"):
        model(ids, use_cache=True, loop_tolerance=0.1)
    assert cache.get_seq_length() == 8
    # and none of that has changed it
    new = random_ids(2, 4, seed=4)
    logits = model(new, past_key_values=cache).logits
    torch.testing.assert_close(logits[1], plain(model, torch.cat((ids[1], new[1])))[8:], **exact)


def test_training_and_whole_sequence_attention_make_no_cache():
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        block_model().train()(random_ids(1, 8), use_cache=True)
    with pytest.raises(ValueError, match="block-causal"):
        tiny_model()(random_ids(1, 8), use_cache=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.layers[1].mlp.up_proj.weight.mul_(1.5),
        lambda model: model.load_state_dict(block_model(seed=3).state_dict()),
        lambda model: torch.nn.init.normal_(model.model.embed_tokens.weight),
    ],
    ids=["in-place", "load-state-dict", "init"],
)
def test_changed_weights_are_refused_until_the_cache_is_empty(change):
    model, ids = block_model(), random_ids(1, 8)
    cache = filled(model, ids)
    change(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="weights changed"):
            model(ids, past_key_values=cache)
    cache.reset()
    assert_chunks_equal_plain(model, [[8], [4]], ["left"] * 2, cache=cache)


def test_a_cache_does_not_keep_its_model_alive_and_survives_it():
    model = block_model()
    cache, config = filled(model, random_ids(1, 8)), model.config
    del model
    other = block_model()
    other.config = other.model.config = config
    with pytest.raises(ValueError, match="another model"):
        other(random_ids(1, 4), past_key_values=cache)


def test_learned_positions_end_with_a_cache_too():
    model = block_model(position_embedding_type="learned", max_position_embeddings=16)
    cache = filled(model, random_ids(1, 16))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(random_ids(1, 4), past_key_values=cache)


# Logits of chosen positions


def positions_of(batch_size: int, length: int, count: int, seed: int = 0) -> torch.Tensor:
    """Positions in any order, some of them twice."""
    return torch.randint(length, (batch_size, count), generator=torch.Generator().manual_seed(seed))


@architectures
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("block_size", [None, BLOCK])
@pytest.mark.parametrize("shape", ["plain", "padded", "packed"])
def test_chosen_positions_are_those_of_all_logits(overrides, attention, block_size, shape):
    model = tiny_model(attention_block_size=block_size, **overrides).double()
    model.set_attn_implementation(attention)
    ids, arguments = random_ids(3, 12), {}
    if shape == "padded":
        arguments["attention_mask"] = torch.tensor([[1] * 12, [0] * 5 + [1] * 7, [1, 1, 0, 0] + [1] * 6 + [0] * 2])
    if shape == "packed":
        arguments["document_ids"] = torch.tensor([[0] * 12, [0] * 5 + [1] * 7, [0] * 3 + [2] * 1 + [4] * 8])
    full = model(ids, **arguments).logits
    for count in (1, 4, 17):
        keep = positions_of(3, 12, count)
        found = model(ids, logits_to_keep=keep, **arguments).logits
        torch.testing.assert_close(found, full.take_along_dim(keep[..., None], 1), **exact)
    assert model(ids, logits_to_keep=keep[:, :0], **arguments).logits.shape == (3, 0, 23)
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([3, 1]), **arguments).logits, full[:, [3, 1]])
    torch.testing.assert_close(model(ids, logits_to_keep=5, **arguments).logits, full[:, -5:])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in torch and transformers
@pytest.mark.parametrize("block_size", [None, BLOCK])
@pytest.mark.parametrize("padded", [False, True])
def test_chosen_positions_with_flex_attention(block_size, padded):
    model = tiny_model(attention_block_size=block_size, num_key_value_heads=2)
    ids, keep = random_ids(2, 12), positions_of(2, 12, 4)
    arguments = {"attention_mask": torch.tensor([[1] * 12, [0] * 4 + [1] * 8])} if padded else {}
    real = arguments.get("attention_mask", torch.ones(2, 12)).take_along_dim(keep, 1).bool()
    expected = model(ids, **arguments).logits.take_along_dim(keep[..., None], 1)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # compiling the kernel takes most of a minute
        found = model(ids, logits_to_keep=keep, **arguments).logits
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_cache_with_flex_attention():
    model = tiny_model(attention_block_size=BLOCK)
    rows = [tokens(16, 0), tokens(12, 1)]
    expected = [plain(model, row) for row in rows]
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        logits, _ = in_chunks(model, rows, [[8, 4], [8, 8]], ["left", "left"])
    for found, row in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, row, rtol=0, atol=1e-5)


@architectures
def test_chosen_positions_behind_a_cache(overrides):
    model, ids = block_model(**overrides), random_ids(2, 20)
    cache, keep = filled(model, ids[:, :12]), positions_of(2, 8, 3)
    found = model(ids[:, 12:], past_key_values=cache, logits_to_keep=keep).logits
    for row in range(2):
        torch.testing.assert_close(found[row], plain(model, ids[row])[12:][keep[row]], **exact)
    # Storing while only some logits are wanted stores everything.
    found = model(ids[:, 12:16], past_key_values=cache, use_cache=True, logits_to_keep=keep[:, :1] * 0).logits
    logits = model(ids[:, 16:], past_key_values=cache).logits
    for row in range(2):
        torch.testing.assert_close(found[row, 0], plain(model, ids[row])[12], **exact)
        torch.testing.assert_close(logits[row], plain(model, ids[row])[16:], **exact)


@pytest.mark.parametrize("loop_exit", ["row", "token"])
def test_chosen_positions_with_adaptive_loops(loop_exit):
    model, ids, keep = tiny_model().double(), random_ids(3, 12), positions_of(3, 12, 4)
    arguments = {"loop_tolerance": 0.5, "loop_exit": loop_exit, "num_loops": 4}
    full = model(ids, **arguments).logits
    found = model(ids, logits_to_keep=keep, **arguments).logits
    torch.testing.assert_close(found, full.take_along_dim(keep[..., None], 1), **exact)


def test_chosen_positions_with_a_4d_mask():
    model, ids, keep = tiny_model().double(), random_ids(2, 8), positions_of(2, 8, 3)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    full = model(ids, attention_mask=mask).logits
    found = model(ids, attention_mask=mask, logits_to_keep=keep).logits
    torch.testing.assert_close(found, full.take_along_dim(keep[..., None], 1), **exact)


def test_recording_does_not_change_the_chosen_logits():
    model, ids, keep = tiny_model().double(), random_ids(2, 8), positions_of(2, 8, 3)
    outputs = model(ids, logits_to_keep=keep, output_hidden_states=True)
    torch.testing.assert_close(outputs.logits, model(ids, logits_to_keep=keep).logits, **exact)
    assert {state.shape for state in outputs.hidden_states} == {(2, 8, 32)}


# FLOPs


FLOP_MODELS = {
    "gated": {},
    "plain-mlp": {"use_gated_mlp": False},
    "gqa-wide": {"num_key_value_heads": 1, "head_dim": 12},
    "no-tail": {"loop_end": 4},
    "long-tail": {"num_hidden_layers": 6},
    "shift": {"shift_logits": True},
}


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("overrides", FLOP_MODELS.values(), ids=FLOP_MODELS)
@pytest.mark.parametrize("num_loops", [1, 3])
def test_flops_are_those_that_torch_counts(overrides, num_loops):
    model = block_model("eager", **overrides)
    ids, keep = random_ids(2, 12), positions_of(2, 12, 5)
    assert counted(lambda: model(ids, num_loops=num_loops)) == model.flops(2, 12, num_loops)
    narrowed = counted(lambda: model(ids, num_loops=num_loops, logits_to_keep=keep))
    assert narrowed == model.flops(2, 12, num_loops, num_logits=5, last_layer=5)

    cache = filled(model, random_ids(2, 16), num_loops)
    found = counted(lambda: model(ids, past_key_values=cache, num_loops=num_loops))
    assert found == model.flops(2, 12, num_loops, num_keys=28)
    if not model.config.shift_logits:  # a state that `use_cache` kept comes first, so that all others are needed
        found = counted(lambda: model(ids, past_key_values=cache, num_loops=num_loops, logits_to_keep=keep))
        assert found == model.flops(2, 12, num_loops, num_keys=28, num_logits=5, last_layer=5)
    assert narrowed < model.flops(2, 12, num_loops)
