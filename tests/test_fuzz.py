# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The rules of the house over random configurations and arguments: rows do not influence one another, padding changes
nothing, given tokens stay, [MASK] is never produced, what is left out of a computation would not have mattered, and
what is reported is what hooks count. `make fuzz` tries as many as an hour allows; see fuzzing.py.
"""

import itertools
from functools import partial

import torch
from fuzzing import (
    RULES,
    batches,
    commitments,
    computations,
    configs,
    document_ids,
    double,
    examples,
    flag,
    pick,
    words,
)
from generation_reference import Recorder, Stored, block_exits, counted, plain, real_tokens, run, sample_row, seeded
from hypothesis import assume, given
from hypothesis import strategies as st
from references import masks_and_their_sources, run_while_moving
from torch.utils.flop_counter import FlopCounterMode
from transformers import EosTokenCriteria, RepetitionPenaltyLogitsProcessor

from loopmdm import LoopMDMGenerationConfig
from loopmdm.evaluation import nelbo

CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def assert_close(found: torch.Tensor, expected: torch.Tensor, **tolerance) -> None:
    """Also where both are -inf, as the mask token's logits are."""
    torch.testing.assert_close(found, expected, **CLOSE | tolerance)


# forward


@st.composite
def passes(draw, **limits):
    """A configuration, a batch, the ids of documents packed into its rows, loops, and an exit rule."""
    config = draw(configs(**limits))
    _, ids, mask = draw(batches(config))
    documents = document_ids(draw, config, ids)
    exits = {}
    if config["loop_update"] == "replace":
        exits = pick(draw, {}, {"visible_loops": pick(draw, 1, 2)}, {"loop_tolerance": draw(st.floats(0.01, 2))})
    position_limit = pick(draw, 64, 4) if "position_embedding_type" not in config else 64
    config["max_position_embeddings"] = position_limit  # rotary tables of some kinds differ beyond
    return config, ids, mask, documents, {"num_loops": draw(st.integers(1, 4)), **exits}


@examples(70)
@given(case=passes(), seed=st.integers(0, 9))
@torch.no_grad()
def test_a_row_of_a_batch_is_the_row_alone(case, seed):
    """With padding anywhere, documents packed, and any exit rule; and whatever is left out of the computation."""
    config, ids, mask, documents, arguments = case
    model = double(config)
    whole = model(ids, mask, document_ids=documents, **arguments)
    assert (whole.logits[..., config["mask_token_id"]] == -torch.inf).all()
    for row, real in enumerate(mask.bool()):
        packed = None if documents is None else documents[row, real][None]
        alone = model(ids[row, real][None], document_ids=packed, **arguments)
        assert_close(whole.logits[row, real], alone.logits[0])
        assert whole.loops[row] == alone.loops[0]
        assert whole.token_loops is None or whole.token_loops[row] == alone.token_loops[0]
        for document in () if packed is None or "loop_tolerance" in arguments else packed.unique():
            part = real & (documents[row] == document)
            assert_close(whole.logits[row, part], model(ids[row, part][None], **arguments).logits[0])
    keep = torch.randint(ids.shape[1], (len(ids), 1 + seed % 4), generator=seeded(seed))
    narrow = model(ids, mask, document_ids=documents, logits_to_keep=keep, **arguments)
    assert_close(narrow.logits, whole.logits.take_along_dim(keep[..., None], 1))
    for few in (1, min(3, ids.shape[1]), keep[0]):
        found = model(ids, mask, document_ids=documents, logits_to_keep=few, **arguments).logits
        assert_close(found, whole.logits[:, few] if isinstance(few, torch.Tensor) else whole.logits[:, -few:])
    if "visible_loops" not in arguments:
        embeddings = model.get_input_embeddings()(ids)
        found = model(inputs_embeds=embeddings, attention_mask=mask, document_ids=documents, **arguments)
        assert_close(found.logits, whole.logits)


@examples(40)
@given(case=passes(damped=False), visible_loops=st.integers(1, 3), tolerance=st.floats(0.01, 2))
@torch.no_grad()
def test_exit_rules_equal_mid_run_on_everything(case, visible_loops, tolerance):
    config, ids, mask, documents, arguments = case
    model, num_loops, real = double(config), arguments["num_loops"], mask.bool()
    loops_on = masks_and_their_sources(model, ids, mask, documents)

    def moves(index, before, after):
        change, size = ((part * mask[..., None]).flatten(1).norm(dim=1) for part in (after - before, before))
        return (change >= tolerance * size)[:, None]

    rules = (
        ({"visible_loops": visible_loops}, lambda index, before, after: loops_on | (index + 1 < visible_loops)),
        ({"loop_tolerance": tolerance}, moves),
    )
    for exits, goes_on in rules:
        expected, counts = run_while_moving(model, ids, num_loops, goes_on, mask, documents)
        found = model(ids, mask, document_ids=documents, num_loops=num_loops, **exits)
        assert found.loops.tolist() == counts.amax(-1).tolist()
        assert found.token_loops.tolist() == counts.sum(-1).tolist()
        assert_close(found.logits[real], expected[real])


@examples(40)
@given(case=passes(), seed=st.integers(0, 9))
def test_a_training_step_is_the_sum_of_its_rows(case, seed):
    """Loss and gradients, also where layers or loops are computed again in the backward pass."""
    config, ids, mask, documents, arguments = case
    arguments.pop("visible_loops", None)
    clean = torch.randint(config["vocab_size"], ids.shape, generator=seeded(seed))
    clean = clean.masked_fill(clean == config["mask_token_id"], (config["mask_token_id"] + 1) % config["vocab_size"])
    weights = torch.rand(ids.shape, generator=seeded(seed), dtype=torch.float64)
    labels = clean.masked_fill((mask == 0) | (weights < 0.2), -100)
    weights = weights.masked_fill(weights < 0.5, 0)
    assume((labels != -100).any())

    def gradients(parts, change=lambda model: None):
        """The loss and the gradients of a model that is trained on the parts one after the other."""
        model, count, total = double(config).train(), (labels != -100).sum(), torch.zeros(()).double()
        change(model)
        for rows, columns in parts:
            if (labels[rows, columns] != -100).any():
                names = {"labels": labels, "loss_weights": weights, "document_ids": documents}
                part = {name: None if value is None else value[rows, columns] for name, value in names.items()}
                inputs = ids[rows, columns], mask[rows, columns]
                loss = model(*inputs, **part, **arguments, num_items_in_batch=count).loss
                loss.backward()
                total += loss.detach()
        return [total, *(0.0 * p if p.grad is None else p.grad for p in model.parameters())]

    everything = [(slice(None), slice(None))]
    expected = gradients([(slice(row, row + 1), real) for row, real in enumerate(mask.bool())])
    assert all(value.isfinite().all() for value in expected)
    for change in (
        lambda model: None,
        lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
        lambda model: setattr(model.model, "checkpoint_loops", True),
    ):
        for found, value in zip(gradients(everything, change), expected, strict=True):
            assert_close(found, value, rtol=1e-6)


@examples(30)
@given(data=st.data(), config=configs(block_sizes=(1, 2, 3, 4)))
@torch.no_grad()
def test_chunks_behind_a_cache_equal_one_pass(data, config):
    """Rows of a batch go on by different numbers of blocks, with padding anywhere; none of them sees another's."""
    size, shift, draw = config["attention_block_size"], config.get("shift_logits", False), data.draw
    model, count = double(config), draw(st.integers(1, 3))
    exits = pick(draw, {}, {"visible_loops": 1}) if config["loop_update"] == "replace" and not shift else {}
    arguments = {"num_loops": draw(st.integers(1, 3)), **exits}
    chunks = draw(st.integers(1, 3))
    blocks = [draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)) for _ in range(chunks)]
    blocks[0] = [max(number, 1) for number in blocks[0]]
    total = [sum(column) * size for column in zip(*blocks, strict=True)]
    rows = [draw(st.lists(words(config), min_size=length, max_size=length)) for length in total]
    expected = [model(torch.tensor([row]), **arguments).logits[0] for row in rows]
    cache, done, found = None, [0] * count, [[] for _ in rows]
    for numbers in blocks:
        firsts = [max(start - 1, 0) if shift else start for start in done]
        stops = [start + number * size for start, number in zip(done, numbers, strict=True)]
        lengths = [stop - first for stop, first in zip(stops, firsts, strict=True)]
        width = max(lengths) + draw(st.integers(0, 2))
        if max(lengths) == 0:
            continue
        ids, mask, positions = (torch.zeros(count, width, dtype=torch.long) for _ in range(3))
        for row, (first, stop, length) in enumerate(zip(firsts, stops, lengths, strict=True)):
            places = sorted(draw(st.permutations(range(width)))[:length])
            ids[row, places], mask[row, places] = torch.tensor(rows[row][first:stop], dtype=torch.long), 1
            positions[row, places] = torch.arange(first, stop)
        where = positions if shift else None
        output = model(ids, mask, position_ids=where, past_key_values=cache, use_cache=True, **arguments)
        cache = output.cache
        for row, (first, start) in enumerate(zip(firsts, done, strict=True)):
            found[row].append(output.logits[row, mask[row].bool()][start - first :])
        done = stops
    assert cache.lengths.tolist() == total
    for row in range(count):
        assert_close(torch.cat(found[row]), expected[row])


@examples(30)
@given(config=configs(), seed=st.integers(0, 9), num_loops=st.integers(1, 4), length=st.integers(1, 9))
@torch.no_grad()
def test_flops_of_a_pass_are_those_that_torch_counts(config, seed, num_loops, length):
    model = double(config, attn_implementation="eager")
    ids = torch.randint(config["vocab_size"], (2, length), generator=seeded(seed))
    keep = torch.randint(length, (2, 1 + seed % 3), generator=seeded(seed))
    for arguments, kept in (({}, length), ({"logits_to_keep": keep}, keep.shape[1])):
        with FlopCounterMode(display=False) as counter:
            model(ids, num_loops=num_loops, **arguments)
        assert 2 * model.config.pass_flops(length, length, kept, kept, length * num_loops) == counter.get_total_flops()
    assert model.flops(2, length, num_loops) == 2 * model.config.pass_flops(*[length] * 4, length * num_loops)


# generate


def predictor_of(config: dict, arguments: dict):
    """What the slow sampler of generation_reference.py predicts with."""
    exits = {name: arguments[name] for name in ("loop_tolerance", "visible_loops") if name in arguments}
    kind, blocks = arguments.get("cache_implementation"), "attention_block_size" in config
    if kind is not None:
        names = {"tolerance": exits.get("loop_tolerance"), "visible_loops": exits.get("visible_loops")}
        return partial(Stored, kind=kind, interval=arguments.get("cache_refresh_interval"), **names)
    keeps = arguments.get("use_cache") is not False and not isinstance(arguments.get("num_loops"), list)
    if blocks and ("loop_tolerance" in exits or (exits and config.get("shift_logits"))):
        return partial(block_exits, keeps=keeps, **exits)
    return partial(plain, keeps=blocks and keeps, **exits)


COMPUTATIONS = ("loop_tolerance", "visible_loops", "cache_implementation", "cache_refresh_interval", "use_cache")


@st.composite
def generations(draw, **limits):
    """A configuration, rows and the batch of them, how many tokens to append, and all other arguments."""
    config = draw(configs(**limits))
    batch, new = draw(batches(config)), draw(st.integers(0, 6))
    assume(new > 0 or any(config["mask_token_id"] in row for row in batch[0]))
    chosen = draw(commitments(config))
    arguments = chosen | draw(computations(config, chosen.get("max_denoising_steps"))) | {"max_new_tokens": new}
    return config, *batch, arguments


@examples(110)
@given(case=generations())
def test_generate_equals_the_slow_sampler(case):
    """Tokens and costs of every row, wherever its padding stands, are those of one row in plain Python."""
    config, rows, ids, mask, arguments = case
    model, predictor = double(config), predictor_of(config, arguments)
    ends = arguments.get("eos_token_id", ())
    pad = next(token for token in (config["pad_token_id"], *ends, 0) if token is not None)
    told = {name: value for name, value in arguments.items() if name not in (*COMPUTATIONS, "pad_token_id")}
    samples = []
    for number, row in enumerate(rows):
        predict = predictor(model, len(row) + arguments["max_new_tokens"])
        with torch.no_grad():
            samples.append(sample_row(predict, row, model, seeded(number), pad_token_id=pad, **told))
    assume(not any(sample.is_close for sample in samples))
    given_ids, given_mask = ids.clone(), mask.clone()
    generators = [seeded(number) for number in range(len(rows))]
    output = run(model, ids, mask, generator=generators, **arguments)
    assert torch.equal(ids, given_ids) and torch.equal(mask, given_mask)
    assert real_tokens(output.sequences, mask) == [sample.tokens for sample in samples]
    assert torch.equal(output.sequences[:, : ids.shape[1]][mask == 0], ids[mask == 0])
    assert output.forward_passes.tolist() == [len(sample.passes) for sample in samples]
    assert output.loops.tolist() == [sum(sample.passes) for sample in samples]
    again = model.generate(ids, mask, generator=[seeded(number) for number in range(len(rows))], **arguments)
    assert torch.equal(again, output.sequences)


@examples(70)
@given(case=generations(), token=st.integers(0, 23), seed=st.integers(0, 9))
def test_generate_keeps_its_promises(case, token, seed):
    """Of a row in a batch and alone, with processors and criteria, by a seed, streamed, and counted by hooks."""
    config, rows, ids, mask, arguments = case
    mask_token, token = config["mask_token_id"], token % config["vocab_size"]
    model = double(config, attn_implementation="eager")
    arguments |= {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.3)]}
    if token != mask_token:
        arguments |= {"stopping_criteria": [EosTokenCriteria(token)]}
    if len(arguments.get("eos_token_id", ())) > 0:
        arguments["eos_token_id"] = list(arguments["eos_token_id"])
    generators = [seeded(seed + number) for number in range(len(rows))]
    state = torch.get_rng_state()
    with counted(model, flops=False) as counts:
        output = run(model, ids, mask, generator=generators, **arguments)
    assert torch.equal(torch.get_rng_state(), state), "drew from elsewhere"
    assert int(output.forward_passes.sum()) == sum(size for size, _ in counts.passes)
    start, stop = config["loop_start"], config["loop_end"]
    assert int(output.loops.sum()) == sum(size for size, _ in counts.layers[start])
    layers = output.forward_passes * (config["num_hidden_layers"] - (stop - start)) + output.loops * (stop - start)
    assert int(layers.sum()) == sum(size for shapes in counts.layers for size, _ in shapes)
    for number, tokens in enumerate(real_tokens(output.sequences, mask)):
        canvas = rows[number] + [mask_token] * arguments["max_new_tokens"]
        assert all(a == b for a, b in zip(canvas, tokens, strict=True) if a != mask_token), "a given token changed"
        assert mask_token not in tokens
        if mask_token not in canvas:
            assert output.forward_passes[number] == output.flops[number] == 0
            continue
        streamer, one = Recorder(), torch.tensor([rows[number]])
        with counted(model) as counts:
            mine = {"streamer": streamer, "generator": [seeded(seed + number)], **arguments}
            alone = run(model, one, torch.ones_like(one), **mine)
        streamed = list(itertools.chain(*streamer.puts))
        assert alone.sequences[0].tolist() == tokens
        if not ("visible_loops" in arguments and arguments.get("guidance_scale", 1) != 1):
            # Else the two passes of a step differ in what loops on, and torch counts what fills up the shorter one.
            assert alone.flops.tolist() == [counts.flops]
        for name in ("forward_passes", "loops", "flops", "tokens_per_forward"):
            assert getattr(output, name)[number] == getattr(alone, name)[0], name
        assert streamer.ended and tokens[: len(streamed)] == streamed
    together = [model.generate(ids, mask, generator=seeded(seed), **arguments) for _ in range(2)]
    assert torch.equal(*together)


@examples(25)
@given(case=generations(block_sizes=(1, 2, 3, 4)), data=st.data())
def test_a_cache_that_is_handed_on_changes_nothing(case, data):
    """A second turn behind the first one's answer, with and without the keys and values of the first."""
    config, _, ids, mask, arguments = case
    for name in ("guidance_scale", "eos_token_id", "eos_penalty", "use_cache"):
        arguments.pop(name, None)
    if isinstance(arguments.get("num_loops"), list):
        arguments["num_loops"] = arguments["num_loops"][0]
    model = double(config)

    def generators():
        return [seeded(number) for number in range(len(ids))]

    first = run(model, ids, mask, generator=generators(), **arguments)
    width = first.sequences.shape[1]
    more = data.draw(st.lists(words(config), min_size=0, max_size=4))
    longer = torch.cat((first.sequences, torch.tensor(more, dtype=torch.long).expand(len(ids), -1)), 1)
    real = torch.nn.functional.pad(mask, (0, longer.shape[1] - mask.shape[1]), value=1)
    assume(arguments["max_new_tokens"] > 0 or config["mask_token_id"] in more)
    assert first.cache is not None and width == ids.shape[1] + arguments["max_new_tokens"]
    found, expected = (
        run(model, longer, real, generator=generators(), past_key_values=cache, **arguments)
        for cache in (first.cache, None)
    )
    assert torch.equal(found.sequences, expected.sequences)
    assert (found.flops <= expected.flops).all()


ANYTHING = st.sampled_from([None, 0, 1, 2, 5, -1, 0.5, 1.0, -0.5, float("nan"), float("inf"), True, "x", [], [2], [0]])
OWN = sorted(LoopMDMGenerationConfig.FIELDS)
OTHERS = ["generator", "num_beams", "past_key_values", "tokenizer", "streamer", "attention_mask", "logits_processor"]


@examples(150)
@given(
    config=configs(max_vocab_size=6),
    arguments=st.dictionaries(st.sampled_from(OWN + OTHERS), ANYTHING, max_size=4),
    unmasking=st.sampled_from(RULES),
)
def test_whatever_generate_is_told_it_answers_or_names_the_value(config, arguments, unmasking):
    model = double(config)
    first, second = [token for token in range(4) if token not in (config["mask_token_id"], config["pad_token_id"])][:2]
    prompt = torch.tensor([[first, second], [second, first]])
    arguments = {"max_new_tokens": 3, "unmasking": unmasking} | arguments
    try:
        found = model.generate(prompt, **arguments)
    except ValueError as error:
        assert str(error).strip(), "an empty message"
        return
    sequences = found if isinstance(found, torch.Tensor) else found.sequences
    assert (sequences[:, 2:] != config["mask_token_id"]).all()
    assert torch.equal(sequences[:: len(sequences) // 2, :2], prompt)


# The NELBO


def every_mask(model, row, maskable, documents, num_loops: list[int]) -> dict[int, list[torch.Tensor]]:
    """
    For every mask of one block of a row, by its number of tokens k of the block's L: the number of blocks times L/k
    times the sum of -log p, for each number of loops. What comes behind the block is other text.
    """
    config, length = model.config, len(row)
    ids = [0] * length if documents is None else documents.tolist()
    positions = [sum(other == ids[place] for other in ids[:place]) for place in range(length)]
    size = config.attention_block_size or length
    key = [(0, 0) if config.attention_block_size is None else (ids[p], positions[p] // size) for p in range(length)]
    blocks = [[place for place in maskable if key[place] == name] for name in dict.fromkeys(key)]
    blocks = [block for block in blocks if block]
    values: dict[float, list[torch.Tensor]] = {}
    for block in blocks:
        seen = row.clone()
        later = [
            p for p in range(length) if ids[p] == ids[block[0]] and positions[p] // size > positions[block[0]] // size
        ]
        seen[later] = row.max()
        for count in range(1, len(block) + 1):
            for subset in map(list, itertools.combinations(block, count)):
                noised = seen.clone()
                noised[subset] = config.mask_token_id
                packed = None if documents is None else documents[None]
                sums = []
                for loops in num_loops:
                    log_probs = model(noised[None], document_ids=packed, num_loops=loops).logits[0].log_softmax(-1)
                    sums.append(-log_probs[subset, row[subset]].sum() * len(blocks) * len(block) / count)
                values.setdefault(count / len(block), []).append(torch.stack(sums))
    return values


@examples(40)
@given(data=st.data(), config=configs(), seed=st.integers(0, 9))
@torch.no_grad()
def test_every_sample_of_the_nelbo_is_one_of_its_enumeration(data, config, seed):
    draw = data.draw
    rows, ids, mask = draw(batches(config, masks=False, max_length=4))
    model, num_loops = double(config), pick(draw, [2], [1, 3], [3, 1])
    maskable = None
    if flag(draw):
        maskable = torch.rand(ids.shape, generator=seeded(seed)) < 0.6
        assume((maskable & mask.bool()).any(-1).all())
    documents = document_ids(draw, config, ids)
    ids = ids.masked_fill((ids == config["mask_token_id"]) & (mask == 0), rows[0][0])
    inputs = {"attention_mask": mask, "maskable": maskable, "document_ids": documents, "num_loops": num_loops}
    # 24 strata, so that each number of masked tokens comes equally often
    estimate = nelbo(model, ids, **inputs, num_samples=24, batch_size=draw(st.integers(1, 30)), seed=seed)
    torch.testing.assert_close(estimate.samples.mean(-1), estimate.nats)
    torch.testing.assert_close(estimate.token_nats.sum(-1), estimate.nats)
    for number, real in enumerate(mask.bool()):
        chosen = torch.ones_like(real) if maskable is None else maskable[number]
        members = chosen[real].nonzero().flatten().tolist()
        packed = None if documents is None else documents[number, real]
        values = every_mask(model, ids[number, real], members, packed, num_loops)
        assert estimate.num_tokens[number] == len(members)
        shares = estimate.masked_share[number].tolist()
        for sample, share in zip(estimate.samples[:, number].T, shares, strict=True):
            distances = [(sample - value).abs().max() for value in values[share]]
            assert min(distances) < 1e-8
        if config.get("attention_block_size") is None:
            expected = [count / len(members) for count in range(1, len(members) + 1)]
            assert sorted(shares) == sorted(expected * (24 // len(members)))
        assert (estimate.token_nats[:, number, ~real] == 0).all()
