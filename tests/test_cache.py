# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tests of `LoopMDMCache` in `forward`. The reference is one plain forward pass over the whole of every row without
padding or cache, in float64."""

import copy

import pytest
import torch
from references import run_while_moving
from tiny import ARCHITECTURES, MASK, PAD, in_turn, random_ids, scores, tiny_config, tiny_model
from transformers import DynamicCache

from loopmdm.cache_utils import LoopMDMCache

BLOCK = 4
EXACT = {"rtol": 0, "atol": 1e-10}
VARIANTS = ARCHITECTURES | {"damped": {"loop_update": "damped"}}
architectures = pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return block_model()


def block_model(attention: str = "sdpa", **overrides):
    return tiny_model(attention_block_size=BLOCK, attn_implementation=attention, **overrides).double()


def plain(model, row, num_loops=None) -> torch.Tensor:
    """Logits of one row without padding, `(length, vocab_size)`, from one forward pass without a cache."""
    return model(torch.as_tensor(row)[None], num_loops=num_loops).logits[0]


def tokens(length: int, seed: int = 0) -> list[int]:
    return random_ids(1, length, seed)[0].tolist()


def filled(model, ids, num_loops=None) -> LoopMDMCache:
    return model(ids, use_cache=True, num_loops=num_loops).cache


def lay_out(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one batch, padded on a side or inside, and its mask."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        half = len(row) // 2
        places = {
            "left": [*range(width - len(row), width)],
            "right": [*range(len(row))],
            "inside": [*range(len(row) - half), *range(width - half, width)],
        }[side]
        ids[index, places] = torch.tensor(row, dtype=torch.long)
        mask[index, places] = 1
    return ids, mask


def assert_chunks_equal_plain(model, counts, sides, num_loops=None, cache=None, tolerance=1e-10):
    """
    Feeds chunks of `counts[chunk][row]` tokens, padded on the side that `sides[chunk]` names. A model whose state
    before a token predicts it begins each chunk one position earlier, with positions given.
    """
    rows = [tokens(sum(column), seed) for seed, column in enumerate(zip(*counts, strict=True))]
    logits, done = [[] for _ in rows], [0] * len(rows)
    for chunk, side in zip(counts, sides, strict=True):
        starts = [max(start - 1, 0) if model.config.shift_logits else start for start in done]
        parts = [row[start : end + n] for row, start, end, n in zip(rows, starts, done, chunk, strict=True)]
        ids, mask = lay_out(parts, side)
        positions = (mask.cumsum(-1) - 1).clamp(min=0) + torch.tensor(starts)[:, None]
        outputs = model(
            ids,
            attention_mask=None if mask.all() else mask,
            position_ids=positions if model.config.shift_logits else None,
            past_key_values=cache,
            use_cache=True,
            num_loops=num_loops,
        )
        cache = outputs.cache
        for row, (start, end) in enumerate(zip(starts, done, strict=True)):
            logits[row].append(outputs.logits[row, mask[row].bool()][end - start :])
        done = [end + n for end, n in zip(done, chunk, strict=True)]
    for row, found in zip(rows, logits, strict=True):
        torch.testing.assert_close(torch.cat(found), plain(model, row, num_loops), rtol=0, atol=tolerance)
    assert cache.lengths.tolist() == [len(row) for row in rows]
    assert cache.length == max(map(len, rows))
    return cache


# Block-causal chunks


CHUNKS = {
    "even": ([[8, 8], [4, 4], [4, 4], [12, 12]], ["left"] * 4),
    "left": ([[8, 4, 4], [4, 8, 4], [8, 4, 4]], ["left"] * 3),
    "any side": ([[4, 8, 4], [8, 4, 8], [4, 8, 8]], ["right", "inside", "left"]),
    "nothing in one": ([[8, 4], [4, 0], [4, 8]], ["right", "left", "inside"]),
    "short last block": ([[8, 8], [3, 2]], ["left", "right"]),
}


@pytest.mark.parametrize(("name", "chunks", "num_loops"), in_turn(VARIANTS, CHUNKS, [1, 3]))
def test_chunks_equal_one_pass(name, chunks, num_loops):
    attention = "sdpa" if num_loops == 3 else "eager"
    assert_chunks_equal_plain(block_model(attention, **VARIANTS[name]), *CHUNKS[chunks], num_loops)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in torch and transformers
def test_flex_attention_reads_a_cache():
    model = tiny_model(attention_block_size=BLOCK, attn_implementation="flex_attention")
    with torch.compiler.set_stance("force_eager"):  # compiling the kernel takes most of a minute
        assert_chunks_equal_plain(model, [[8, 4], [4, 4]], ["left", "left"], num_loops=1, tolerance=1e-5)


def test_a_pass_without_use_cache_stores_nothing(model):
    """As denoising does: the block is computed again and again, then stored."""
    row = tokens(12)
    cache = filled(model, torch.tensor([row[:8]]))
    for seed in (5, 6):
        block = tokens(4, seed)
        logits = model(torch.tensor([block]), past_key_values=cache).logits[0]
        torch.testing.assert_close(logits, plain(model, row[:8] + block)[8:], **EXACT)
        assert cache.length == 8
    logits = model(torch.tensor([row[8:]]), past_key_values=cache, use_cache=True).logits[0]
    torch.testing.assert_close(logits, plain(model, row)[8:], **EXACT)
    assert cache.length == 12


def test_a_chunk_of_nothing_but_padding(model):
    row, mask = torch.tensor([tokens(12)]), torch.tensor([[0] * 4 + [1] * 8])
    cache = model(row[:, :4], mask[:, :4], use_cache=True).cache
    assert cache.length == 0
    logits = model(row[:, 4:], mask[:, 4:], past_key_values=cache, use_cache=True).logits[0]
    torch.testing.assert_close(logits, plain(model, row[0, 4:]), **EXACT)


def test_32_bit_tokens_and_positions(model):
    row, places = torch.tensor([tokens(8)]).int(), torch.arange(8, dtype=torch.int32)[None]
    for inputs in ({"input_ids": row}, {"inputs_embeds": model.get_input_embeddings()(row)}):
        logits = model(**inputs, position_ids=places, use_cache=True).logits[0]
        torch.testing.assert_close(logits, plain(model, row[0]), **EXACT)


def test_positions_leave_no_gap_behind_a_cache(model):
    row = torch.tensor([tokens(8)])
    with pytest.raises(ValueError, match=r"leaves out positions of row 0 from 0 to 8, which"):
        model(row, position_ids=torch.arange(1, 9)[None], use_cache=True)
    with pytest.raises(ValueError, match=r"leaves out positions of row 0 from 0 to 6, which"):
        model(row, position_ids=torch.tensor([[0, 1, 3, 3, 4, 4, 5, 6]]), use_cache=True)
    cache = filled(model, row[:, :4])
    with pytest.raises(ValueError, match=r"leaves out positions of row 0 from 4 to 11, which .* give all"):
        model(row[:, 4:], position_ids=torch.arange(8, 12)[None], past_key_values=cache)


def test_negative_positions_are_not_written_to_another_place(model):
    row, positions = torch.tensor([tokens(8)]), torch.arange(8)[None] - 1
    for mask in (None, torch.ones_like(row)):
        with pytest.raises(ValueError, match="`position_ids` holds -1; positions are counted from 0"):
            model(row, mask, position_ids=positions, use_cache=True)
    padded = model(row, positions >= 0, position_ids=positions, use_cache=True).logits[0, 1:]
    torch.testing.assert_close(padded, plain(model, row[0, 1:]), **EXACT)


def test_embeddings_and_chosen_positions_behind_a_cache(model):
    ids, keep = random_ids(2, 20), torch.tensor([[7, 0, 3], [2, 2, 5]])
    embeddings = model.get_input_embeddings()(ids)
    cache = model(inputs_embeds=embeddings[:, :12], use_cache=True).cache
    found = model(inputs_embeds=embeddings[:, 12:], past_key_values=cache, logits_to_keep=keep).logits
    for row in range(2):
        torch.testing.assert_close(found[row], plain(model, ids[row])[12:][keep[row]], **EXACT)
    # Storing while only some logits are wanted stores everything.
    model(ids[:, 12:16], past_key_values=cache, use_cache=True, logits_to_keep=keep[:, 1:2] * 0)
    logits = model(ids[:, 16:], past_key_values=cache).logits
    torch.testing.assert_close(logits, torch.stack([plain(model, row)[16:] for row in ids]), **EXACT)


@architectures
def test_selected_rows_see_their_own_keys(overrides):
    model, ids = block_model(**overrides), random_ids(4, 16)
    cache = filled(model, ids[:, :12])
    stored = copy.deepcopy(cache)
    shift = int(model.config.shift_logits)
    for rows in ([2], [3, 0], [0, 1, 3]):
        view = cache.select(torch.tensor(rows), torch.full((len(rows),), 16))
        positions = torch.arange(12 - shift, 16)[None]
        logits = model(ids[rows, 12 - shift :], position_ids=positions, past_key_values=view).logits
        for row, found in zip(rows, logits, strict=True):
            torch.testing.assert_close(found[shift:], plain(model, ids[row])[12:], **EXACT)
    assert cache.length == 12 and cache.rows is None
    for pair, before in zip(cache.slots, stored.slots, strict=True):
        assert all(torch.equal(a[:, :, :12], b[:, :, :12]) for a, b in zip(pair, before, strict=True))
    # The selection made the cache grow, and it goes on as before.
    if not shift:
        logits = model(ids[:, 12:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits[1], plain(model, ids[1])[12:], **EXACT)


CROPS = [(8, 8), (9, 8), (-4, 8), (-1, 8), (3, 0), (0, 0), (-99, 0), (12, 12), (99, 12)]


@pytest.mark.parametrize(("crop", "kept"), CROPS)
def test_a_cropped_cache_is_filled_anew(model, crop, kept):
    row, other = tokens(12), tokens(16, seed=1)
    cache = filled(model, torch.tensor([row]))
    cache.crop(crop)
    assert cache.length == kept and cache.lengths.tolist() == [kept]
    changed = row[:kept] + other[kept:]
    logits = model(torch.tensor([changed[kept:]]), past_key_values=cache, use_cache=True).logits[0]
    torch.testing.assert_close(logits, plain(model, changed)[kept:], **EXACT)


def test_cropping_rows_of_different_lengths(model):
    rows = [tokens(12, 0), tokens(20, 1)]
    ids, mask = lay_out(rows, "left")
    cache = model(ids, mask, use_cache=True).cache
    cache.crop(16)
    assert cache.lengths.tolist() == [12, 16]
    new = random_ids(2, 4, seed=7)
    logits = model(new, past_key_values=cache).logits
    torch.testing.assert_close(logits[0], plain(model, rows[0] + new[0].tolist())[12:], **EXACT)
    torch.testing.assert_close(logits[1], plain(model, rows[1][:16] + new[1].tolist())[16:], **EXACT)


def test_a_cache_that_ends_within_a_block_is_not_continued(model):
    rows = [tokens(6, 0), tokens(11, 1)]
    assert model.config.attention_block_size == BLOCK == 4
    for row, kept in zip(rows, (4, 8), strict=True):
        cache = filled(model, torch.tensor([row]))
        full = row + tokens(5, 2)
        begin = {"past_key_values": cache, "use_cache": True}
        message = rf"of row 0 from {kept} to .* within a block, at {len(row)}; begin .*\.crop\({len(row)}\)`"
        with pytest.raises(ValueError, match=message):
            model(torch.tensor([full[len(row) :]]), **begin)
        gap = torch.tensor([kept, *range(kept + 2, len(full))])
        with pytest.raises(ValueError, match=message):
            model(torch.tensor([full])[:, gap], position_ids=gap[None], **begin)
        positions = torch.arange(kept, len(full))[None]  # the whole block again
        logits = model(torch.tensor([full[kept:]]), position_ids=positions, past_key_values=cache).logits[0]
        torch.testing.assert_close(logits, plain(model, full)[kept:], **EXACT)
        cache.crop(len(row))
        assert cache.lengths.tolist() == [kept]
        logits = model(torch.tensor([full[kept:]]), **begin).logits[0]
        torch.testing.assert_close(logits, plain(model, full)[kept:], **EXACT)
    # Rows of a batch are cut at blocks of their own.
    cache = model(*lay_out(rows, "left"), use_cache=True).cache
    with pytest.raises(ValueError, match=r"of row 0 from 4 to 8, .* within a block, at 6"):
        model(random_ids(2, 3), past_key_values=cache)
    cache.crop(10)
    assert cache.lengths.tolist() == [4, 8]


def test_copies_go_their_own_ways(model):
    ids = random_ids(2, 16)
    cache = filled(model, ids[:, :8])
    copied = copy.deepcopy(cache)
    filled_on = model(random_ids(2, 8, seed=3), past_key_values=cache, use_cache=True).cache
    assert (filled_on.length, copied.length) == (16, 8)
    logits = model(ids[:, 8:], past_key_values=copied).logits
    torch.testing.assert_close(logits, torch.stack([plain(model, row)[8:] for row in ids]), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_loops", [1, 4])
@pytest.mark.parametrize("share_loops", [False, True])
def test_memory_is_what_the_formula_says(dtype, num_loops, share_loops):
    model = block_model(num_key_value_heads=2, head_dim=12).to(dtype)
    cache = LoopMDMCache(model.config, num_loops, batch_size=3, max_length=20, share_loops=share_loops)
    for new, length in ((8, 20), (24, 32)):  # it grows to 8 + 24
        model(random_ids(3, new), past_key_values=cache, use_cache=True, num_loops=num_loops)
        held = sum(tensor.untyped_storage().nbytes() for pair in cache.slots for tensor in pair)
        assert held == LoopMDMCache.num_bytes(model.config, num_loops, 3, length, dtype, share_loops)
        executed = 4 if share_loops else 2 + 2 * num_loops
        assert held == executed * 2 * 3 * (length + 1) * 2 * 12 * dtype.itemsize


def test_keys_and_values_have_the_dtype_that_attention_has():
    model, ids = tiny_model(attention_block_size=BLOCK), random_ids(1, 16)
    expected = scores(model(ids).logits)
    for run in (model, copy.deepcopy(model).bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=run is model):
            cache = filled(run, ids[:, :8])
            logits = run(ids[:, 8:], past_key_values=cache).logits
        assert cache.slots[0][0].dtype == torch.bfloat16
        assert (scores(logits) - expected[:, 8:]).abs().max() < 0.05 * expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = filled(model, ids[:, :8])
    logits = model(ids[:, 8:], past_key_values=cache).logits  # in float32, of keys in bfloat16
    assert (scores(logits) - expected[:, 8:]).abs().max() < 0.05 * expected.abs().max()


# Exit rules


def test_rows_that_stop_read_all_loops_of_what_is_stored(model):
    ids = random_ids(3, 16)
    cache = filled(model, ids[:, :12], num_loops=8)
    outputs = model(ids[:, 12:], past_key_values=cache, num_loops=8, loop_tolerance=0.4)
    assert outputs.loops.unique().numel() > 1, outputs.loops

    def goes_on(index, before, after):
        change, size = (after - before)[:, 12:].flatten(1).norm(dim=1), before[:, 12:].flatten(1).norm(dim=1)
        return (change >= 0.4 * size)[:, None] | (torch.arange(16) < 12)

    expected, counts = run_while_moving(model, ids, 8, goes_on)
    assert outputs.loops.tolist() == counts[:, 12:].amax(-1).tolist()
    torch.testing.assert_close(outputs.logits, expected[:, 12:], **EXACT)


@pytest.mark.parametrize("visible_loops", [1, 2, 4])
def test_visible_loops_equal_one_pass(visible_loops):
    """Also for what reads the cache afterwards: a position that stopped has its last keys in the later loops."""
    model, ids = block_model(num_key_value_heads=2), random_ids(2, 20)
    expected = model(ids, num_loops=4, visible_loops=visible_loops).logits
    cache, found = None, []
    for start, stop in ((0, 8), (8, 12), (12, 20)):
        arguments = {"past_key_values": cache, "use_cache": True, "num_loops": 4, "visible_loops": visible_loops}
        outputs = model(ids[:, start:stop], **arguments)
        cache = outputs.cache
        found.append(outputs.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, **EXACT)
    with pytest.raises(ValueError, match=f"made for visible_loops={visible_loops} and is used with None"):
        model(ids[:, :4], past_key_values=cache, num_loops=4)


@pytest.mark.parametrize("arguments", [{"use_cache": True}, {"visible_loops": 1, "num_loops": 1}])
def test_partial_passes_give_no_gradients_instead_of_wrong_ones(model, arguments):
    ids = random_ids(1, 8)
    with torch.enable_grad():
        output = model(ids, labels=ids.masked_fill(ids == MASK, 5), **arguments)
        assert output.loss.isfinite(), "without a backward pass there is nothing to refuse"
        with pytest.raises(ValueError, match="has no gradients; leave these out"):
            output.loss.backward()
        hidden = model(ids, output_hidden_states=True, **arguments).hidden_states
        for states in hidden[2:]:
            with pytest.raises(ValueError, match="has no gradients"):
                states.sum().backward()
        # The output head does get its own.
        for parameter in model.model.parameters():
            parameter.requires_grad_(False)
        try:
            head = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            states = model.model(ids, **arguments).last_hidden_state
            (states @ head.T).sum().backward()
            assert head.grad.abs().sum() > 0
        finally:
            model.requires_grad_(True)
    model.zero_grad()


@pytest.mark.parametrize("share_loops", [False, True])
def test_stale_keys_are_those_of_the_pass_that_wrote_them(share_loops):
    """With attention over the whole sequence a cache is an approximation, and exact where nothing has changed."""
    model, ids = tiny_model().double(), random_ids(2, 12)
    cache = LoopMDMCache(model.config, 3, 2, 12, share_loops=share_loops)
    reach = torch.tensor([12, 12])
    expected = model(ids).logits
    torch.testing.assert_close(model(ids, past_key_values=cache.select(None, reach)).logits, expected, **EXACT)
    part = {"position_ids": torch.arange(4, 8)[None], "past_key_values": cache.select(None, reach)}
    found = model(ids[:, 4:8], **part).logits
    if not share_loops:  # where they are shared, the first loop reads keys of the last
        torch.testing.assert_close(found, expected[:, 4:8], **EXACT)
    changed = ids.clone()
    changed[:, :4] = 3
    cache = LoopMDMCache(model.config, 3, 2, 12, share_loops=share_loops)
    model(changed, past_key_values=cache.select(None, reach))
    stale = model(ids[:, 4:8], **part | {"past_key_values": cache.select(None, reach)}).logits
    assert (scores(stale) - scores(found)).abs().max() > 1e-3


# Refusals


def test_caches_of_others_are_refused(model):
    ids = random_ids(2, 8)
    cache = filled(model, ids)
    for message, arguments in {
        "made for rows=2 and is used with 3": {"input_ids": random_ids(3, 4)},
        "made for num_loops=3 and is used with 2": {"num_loops": 2},
        "is a DynamicCache; a looped model needs a `LoopMDMCache`": {"past_key_values": DynamicCache()},
        "`document_ids` and `past_key_values` do not go together": {"document_ids": torch.zeros_like(ids)},
        r"needs \(2, 8\), its own positions without those of a cache": {"attention_mask": torch.ones(2, 16)},
        "`use_cache=True` stores every loop": {"use_cache": True, "loop_tolerance": 0.1},
        "a selection of rows stores nothing": {
            "past_key_values": cache.select(torch.tensor([0, 1]), torch.tensor([12, 12])),
            "use_cache": True,
        },
        "was made for another model": {
            "past_key_values": LoopMDMCache(tiny_config(attention_block_size=2), 3, 2),
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            model(**{"input_ids": ids, "past_key_values": cache, **arguments})
    assert cache.length == 8
    # and none of that has changed it
    new = random_ids(2, 4, seed=4)
    logits = model(new, past_key_values=cache).logits
    torch.testing.assert_close(logits[1], plain(model, torch.cat((ids[1], new[1])))[8:], **EXACT)


def test_what_makes_no_cache():
    ids = random_ids(1, 8)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"model\.eval\(\)"):
        block_model().train()(ids, use_cache=True)
    with torch.no_grad():  # callbacks generate while a model trains
        assert block_model().train()(ids, use_cache=True).cache.length == 8
    with pytest.raises(ValueError, match="needs block-causal attention"):
        tiny_model()(ids, use_cache=True)
    for model in (block_model(), tiny_model()):
        model.config.use_cache = True  # a default of transformers, which training scripts set back
        assert model(ids).cache is None
    with pytest.raises(ValueError, match="is a DynamicCache; a looped model needs"):
        block_model(shift_logits=True)(ids, past_key_values=DynamicCache())


def test_shifted_logits_begin_one_position_earlier():
    model, ids = block_model(shift_logits=True), random_ids(1, 12)
    cache = filled(model, ids[:, :8])
    with pytest.raises(ValueError, match=r"Begin the input one position earlier and give `position_ids`"):
        model(ids[:, 8:], past_key_values=cache)
    found = model(ids[:, 7:], position_ids=torch.arange(7, 12)[None], past_key_values=cache).logits
    torch.testing.assert_close(found[0, 1:], plain(model, ids[0])[8:], **EXACT)


def test_learned_positions_end_with_a_cache_too():
    model = block_model(position_embedding_type="learned", max_position_embeddings=16)
    cache = filled(model, random_ids(1, 16))
    with pytest.raises(ValueError, match="has 20 positions, more than `max_position_embeddings`"):
        model(random_ids(1, 4), past_key_values=cache)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_reads_no_uneven_rows(attention):
    model = tiny_model()
    cache = LoopMDMCache(model.config, 3, 2, 12).select(None, torch.tensor([12, 8]))
    model.config._attn_implementation = attention
    with pytest.raises(ValueError, match="or read a cache of uneven rows"):
        model(random_ids(2, 4), past_key_values=cache, position_ids=torch.arange(4)[None])


def test_tokens_are_remembered(model):
    """`generate` compares them with an input that continues them; of embeddings nothing is known."""
    ids = random_ids(2, 12)
    cache = filled(model, ids[:, :8])
    model(ids[:, 8:], past_key_values=cache, use_cache=True)
    assert torch.equal(cache.tokens[:, :12], ids) and (ids == MASK).any()
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=True).cache
    assert (embedded.tokens == -1).all()
