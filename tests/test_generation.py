# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What `generate` writes: tokens of every row equal to a slow, plain sampler's; distributions, processors, infilling and
padding; where a row ends. Caches and loops are in test_generation_caches.py, a single step in test_commit_rules.py.
"""

import math

import pytest
import torch
from generation_reference import (
    BLOCK,
    TableModel,
    assert_equals_reference,
    batch_of,
    commit_steps,
    double_model,
    plain,
    real_tokens,
    run,
    sample_row,
    seeded,
    word_tokenizer,
)
from tiny import MASK, PAD, in_turn, tiny_model
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from loopmdm.commit_rules import CommitRule

RULES = ["confidence", "margin", "entropy", "random", "left_to_right", "ancestral"]
MODELS = {
    "whole": {},
    "shift": {"shift_logits": True},
    "block": {"attention_block_size": BLOCK},
    "block-shift": {"attention_block_size": BLOCK, "shift_logits": True},
}


@pytest.fixture(scope="module")
def model():
    return double_model()


@pytest.fixture(scope="module")
def by_name():
    return {name: double_model(**overrides) for name, overrides in MODELS.items()}


# Tokens, forward passes and loops of every row equal the reference's


EVERY_RULE = {
    "one at a time": {},
    "few steps": {"max_denoising_steps": 3},
    "blocks": {"block_length": 8, "max_denoising_steps": 3},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "remasking": {"remask_probability": 0.4, "max_denoising_steps": 11},
}
OTHERS = {
    "more steps than positions": {"max_denoising_steps": 99, "block_length": 4},
    "ancestral, long": {"unmasking": "ancestral", "max_denoising_steps": 20},
    "threshold": {"confidence_threshold": 0.3, "max_denoising_steps": 5},
    "threshold, random": {"confidence_threshold": 0.5, "unmasking": "random"},
    "entropy bound": {"entropy_bound": 1.5},
    "entropy bound, remasking": {"entropy_bound": 2.0, "remask_probability": 0.4, "max_denoising_steps": 6},
    "certain remasking": {"remask_probability": 1.0, "max_denoising_steps": 6, "block_length": 4},
    "warpers": {"do_sample": True, "temperature": 1.7, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    "top_k": {"do_sample": True, "top_k": 2},
    "top_p": {"do_sample": True, "top_p": 0.6},
    "ancestral, warpers": {"unmasking": "ancestral", "do_sample": True, "temperature": 0.5, "max_denoising_steps": 5},
    "guidance": {"guidance_scale": 1.7},
    "guidance towards no prompt": {"guidance_scale": 0.3},
    "guidance, off": {"guidance_scale": 1.0},
    "guidance, ancestral": {"guidance_scale": 1.7, "unmasking": "ancestral", "max_denoising_steps": 15},
    "loops": {"num_loops": 3, "block_length": 4},
    "loops of steps": {"num_loops": [1, 3], "block_length": 4},
    "loops, ancestral": {"num_loops": [1, 3, 2], "unmasking": "ancestral", "max_denoising_steps": 12},
    "ends": {"eos_token_id": (1, 2, 3, 4, 6, 7, 8), "do_sample": True, "block_length": 4},
    "ends, penalty": {"eos_token_id": tuple(range(1, 12)), "eos_penalty": 0.2},
    "ends, remasking": {"eos_token_id": tuple(range(1, 12)), "remask_probability": 0.3, "max_denoising_steps": 9},
}


@pytest.mark.parametrize(("arguments", "unmasking", "name"), in_turn(EVERY_RULE, RULES, ["whole", "block-shift"]))
def test_every_rule_equals_the_reference(by_name, name, unmasking, arguments):
    assert_equals_reference(by_name[name], unmasking=unmasking, max_new_tokens=5, **EVERY_RULE[arguments])


@pytest.mark.parametrize("name", ["shift", "block"])
@pytest.mark.parametrize("arguments", OTHERS.values(), ids=OTHERS)
def test_other_arguments_equal_the_reference(by_name, name, arguments):
    options = {"pad_token_id": PAD} if "eos_token_id" in arguments else {}
    assert_equals_reference(by_name[name], max_new_tokens=5, options=options, **arguments)


@pytest.mark.parametrize(
    "block_length", [1, 3, 5]
)  # whole-sequence attention: any length, counted from the first [MASK]
def test_blocks_of_any_length(model, block_length):
    assert_equals_reference(model, sides=["left", "right"], max_new_tokens=7, block_length=block_length)


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
    model = tiny_model(attention_block_size=attention_block_size)
    output = run(model, torch.tensor([[5, 9, 3, 8, 1, 2]]), max_new_tokens=12, block_length=block_length)
    blocks = {}
    for step in output.trace:
        blocks.setdefault(step.block, set()).update(step.committed[0].nonzero().flatten().tolist())
    assert [sorted(blocks[block]) for block in sorted(blocks)] == expected


@pytest.mark.parametrize("block_length", [1, 3, 6, 10])
def test_generation_blocks_that_cut_the_attentions_raise(by_name, block_length):
    with pytest.raises(ValueError, match=rf"`block_length` is {block_length}; .*multiples of 4"):
        by_name["block"].generate(torch.tensor([[5]]), max_new_tokens=12, block_length=block_length)


def test_a_rule_of_ones_own(model):
    class RightToLeft(CommitRule):
        def score(self, step):
            return step.columns.double()

    output = run(model, torch.tensor([[5, MASK, 9]]), max_new_tokens=3, unmasking=RightToLeft())
    assert commit_steps(output.trace).tolist() == [[-1, 3, -1, 2, 1, 0]]
    steps = commit_steps(run(model, torch.tensor([[5]]), max_new_tokens=3, unmasking=RightToLeft(), num_loops=1).trace)
    assert steps.tolist() == [[-1, 2, 1, 0]]


def test_seeds(model):
    def sample(generator):
        arguments = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3}
        return model.generate(torch.tensor([[5, 9]]), generator=generator, **arguments)

    assert torch.equal(sample(seeded(0)), sample(seeded(0)))
    assert not torch.equal(sample(seeded(0)), sample(seeded(1)))
    assert len(sample(seeded(0)).unique(dim=0)) == 3
    with torch.random.fork_rng():  # without a generator: torch's own
        torch.manual_seed(0)
        first = sample(None)
        torch.manual_seed(0)
        assert torch.equal(first, sample(None))


@pytest.mark.parametrize("chance", [{"do_sample": True}, {"unmasking": "random"}, {"unmasking": "ancestral"}], ids=str)
def test_several_answers_to_each_row(model, chance):
    rows = [[5], [4, 8, 2]]
    ids, mask = batch_of(rows)
    generators = [seeded(number) for number in range(6)]
    answers = model.generate(ids, mask, max_new_tokens=6, num_return_sequences=3, generator=generators, **chance)
    for number, answer in enumerate(real_tokens(answers, mask.repeat_interleave(3, 0))):
        row = rows[number // 3]
        sample = sample_row(plain(model, len(row) + 6), row, model, seeded(number), max_new_tokens=6, **chance)
        assert answer == sample.tokens


# Distributions


def assert_fits(counts: torch.Tensor, probabilities):
    """Pearson's chi-square stays within five standard deviations; what is impossible never happened."""
    expected = counts.sum() * torch.as_tensor(probabilities, dtype=torch.float64)
    possible = expected > 0
    assert counts[~possible].sum() == 0, counts
    degrees = int(possible.sum()) - 1
    statistic = ((counts - expected).square() / expected)[possible].sum().item()
    assert statistic <= degrees + 5 * math.sqrt(2 * degrees), (counts, expected)


@pytest.mark.parametrize("num_steps", [4, 9])  # fewer and more than positions
def test_ancestral_opens_uniformly_in_time_and_samples_the_distribution(num_steps):
    probabilities, p = [0.5, 0.3, 0.2, 0.0], 1 / num_steps
    table = TableModel([probabilities] * 6)
    trace = run(
        table, table.masks(500), unmasking="ancestral", max_denoising_steps=num_steps, generator=seeded(0)
    ).trace
    opened, tokens = commit_steps(trace), trace[-1].tokens
    assert_fits(opened.flatten().bincount(minlength=num_steps), [p] * num_steps)
    # Positions open independently of each other: the openings of a row in the first step are binomial.
    first = (opened == 0).sum(-1).bincount(minlength=7)
    assert_fits(first, [math.comb(6, k) * p**k * (1 - p) ** (6 - k) for k in range(7)])
    # ... and tokens are independent of when they open.
    for step in range(num_steps):
        assert_fits(tokens[opened == step].bincount(minlength=4), probabilities)


def test_random_order_is_uniform():
    table = TableModel([[0.6, 0.4]] * 3)
    trace = run(table, table.masks(600), unmasking="random", generator=seeded(0)).trace
    counts = (commit_steps(trace) @ torch.tensor([9, 3, 1])).unique(return_counts=True)[1]
    assert len(counts) == 6
    assert_fits(counts, [1 / 6] * 6)


@pytest.mark.parametrize("unmasking", ["confidence", "ancestral", "left_to_right"])
def test_remasking_keeps_to_the_schedule(unmasking):
    """The share of open tokens follows the steps done, as ReMDM's alpha does, with more steps than tokens too."""
    table = TableModel([[0.5, 0.5]] * 8)
    arguments = {"max_denoising_steps": 32, "remask_probability": 0.1, "generator": seeded(0)}
    trace = run(table, table.masks(100), unmasking=unmasking, **arguments).trace
    assert len(trace) == 32 and sum(int(step.remasked.sum()) for step in trace) > 100
    for step in trace:
        share_open = (step.tokens != table.config.mask_token_id).double().mean().item()
        assert share_open == pytest.approx((step.step + 1) / 32, abs=0.13)  # 1/8 is one token


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_temperature_does_not_reach_the_confidence(temperature):
    # At temperature 0.1 all of these round to certainty, and a sampler that reads them commits the leftmost first.
    confidence = [0.990, 0.996, 0.986, 0.998, 0.992]
    table = TableModel([[p, 1 - p] for p in confidence])
    trace = run(table, table.masks(), do_sample=True, temperature=temperature, generator=seeded(1)).trace
    assert trace[-1].tokens.tolist() == [[0, 0, 0, 0, 0]]
    assert commit_steps(trace).tolist() == [[3, 1, 4, 0, 2]]
    torch.testing.assert_close(trace[0].confidence, torch.tensor([confidence]))


# Logits processors


class Processor(LogitsProcessor):
    """A processor from a function of the row's tokens and the scores, which it may write into."""

    def __init__(self, function):
        self.function = function

    def __call__(self, input_ids, scores):
        return self.function(input_ids, scores)


@pytest.mark.parametrize("wrap", [list, LogitsProcessorList])
def test_processors_do_not_reach_the_confidence(wrap):
    def second_best(input_ids, scores):
        second = scores.topk(2).indices[:, 1:]
        return scores.fill_(-math.inf).scatter_(1, second, 0.0)

    table = TableModel([[0.45, 0.28, 0.27], [0.40, 0.39, 0.21], [0.50, 0.49, 0.01], [0.52, 0.13, 0.35]])
    trace = run(table, table.masks(), logits_processor=wrap([Processor(second_best)])).trace
    assert trace[-1].tokens.tolist() == [[1, 1, 1, 2]]
    torch.testing.assert_close(trace[0].confidence, torch.tensor([[0.28, 0.39, 0.49, 0.35]]))
    assert commit_steps(trace).tolist() == [[3, 1, 0, 2]]


def test_processors_see_the_rows_of_their_positions(model):
    def no_repetition(input_ids, scores):
        left = int((input_ids[0] == MASK).sum())
        assert (input_ids.shape, scores.shape) == ((left, 12), (left, 23))
        return scores.scatter(1, input_ids, -math.inf)

    prompts = torch.tensor([[5, 9, 3], [6, 1, 2]])
    for row in model.generate(prompts, max_new_tokens=9, logits_processor=[Processor(no_repetition)]).tolist():
        assert len(set(row)) == 12

    remasks = {"remask_probability": 0.5, "max_denoising_steps": 12, "generator": seeded(0)}
    model.generate(prompts, max_new_tokens=9, logits_processor=[Processor(no_repetition)], **remasks)

    penalty = RepetitionPenaltyLogitsProcessor(3.0)
    tokens = model.generate(prompts, max_new_tokens=9, max_denoising_steps=1, logits_processor=[penalty])
    canvas = torch.cat((prompts, torch.full((2, 9), MASK)), dim=1)
    logits = model(canvas).logits.detach().float()
    for row, scores, output in zip(canvas, logits, tokens, strict=True):
        assert torch.equal(penalty(row.expand(12, -1), scores).argmax(-1)[3:], output[3:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_processors_see_neither_padding_nor_other_rows(model, side):
    def no_repetition(input_ids, scores):
        assert (input_ids != PAD).all()
        return scores.scatter(1, input_ids, -math.inf)

    ids, mask = batch_of([[5, 9, 3, 8], [6, 1]], side)
    arguments = {"max_new_tokens": 6, "block_length": 3, "logits_processor": [Processor(no_repetition)]}
    output = model.generate(ids, mask, **arguments)
    for i, row in enumerate(([5, 9, 3, 8], [6, 1])):
        assert torch.equal(model.generate(torch.tensor([row]), **arguments)[0, len(row) :], output[i, 4:])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", ["confidence", "margin", "entropy"])
def test_positions_that_predict_alike_are_committed_from_the_left(name, rule):
    """All positions of a canvas of nothing but [MASK]s tie, but for rounding, which depends on the batch."""
    model = tiny_model(**MODELS[name]).float()
    arguments = {"max_denoising_steps": 4, "unmasking": rule}
    canvas = torch.full((7, 16), MASK)
    alone = model.generate(canvas[:1], **arguments)
    assert torch.equal(model.generate(canvas, **arguments), alone.expand(7, -1))
    if name == "whole":
        trace = model.generate(canvas, **arguments, return_dict_in_generate=True, output_trace=True).trace
        assert trace[0].committed[:, :4].all()


@pytest.mark.parametrize("seed", [0, 4, 19, 30])
@pytest.mark.parametrize("scale", [1, 8])
@pytest.mark.parametrize("rule", ["confidence", "margin", "entropy"])
def test_small_scores_of_what_predicts_alike_tie_too(seed, scale, rule):
    """A margin and an entropy may be far smaller than the probabilities whose rounding they have."""
    sizes = {"vocab_size": 300, "mask_token_id": 299, "tie_word_embeddings": False, "num_loops": 2}
    model, canvas = tiny_model(seed=seed, **sizes), torch.full((7, 16), 299)
    model.lm_head.weight.data *= scale
    assert run(model, canvas, max_denoising_steps=4, unmasking=rule).trace[0].committed[:, :4].all()


def test_rotary_frequencies_of_a_row_are_those_of_its_own_length():
    """A shorter row of a batch is filled up, and what fills it has no position of its own."""
    parameters = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    model = double_model(rope_parameters=parameters | {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4})
    rows = [[5, 9, 3], [4, 8, 7, 6, 2, 1, 9, 3] * 3]
    arguments = {"max_new_tokens": 8, "output_scores": True}
    ids, mask = batch_of(rows)
    batch = run(model, ids, mask, **arguments)
    for number, row in enumerate(rows):
        alone = run(model, torch.tensor([row]), **arguments)
        for found, expected in zip(batch.scores, alone.scores, strict=True):
            torch.testing.assert_close(found[number], expected[0], atol=1e-6, rtol=1e-6)


def test_padding_of_whole_rows_is_not_text(model):
    with pytest.raises(ValueError, match="attention_mask"):
        model.generate(torch.tensor([[6, 6, 6], [3, 4, 5]]), pad_token_id=6, eos_token_id=6, max_new_tokens=3)


def test_prompts_as_long_as_the_model_are_named(model):
    for length in (64, 70):
        with pytest.raises(ValueError, match="exceed `max_position_embeddings`"):
            model.generate(torch.ones(1, length, dtype=torch.long))


def test_fill_behind_an_end_is_never_a_mask():
    """Not even of a model whose mask token is 0, and which has no padding."""
    model = tiny_model(mask_token_id=0, pad_token_id=None)
    criteria = [MaxLengthCriteria(3)]
    output = model.generate(torch.tensor([[5, 0]]), max_new_tokens=4, stopping_criteria=criteria)
    assert (output != 0).all()


@pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria"])
def test_lists_of_other_things_are_named(model, name):
    for value in (1, [1], "all"):
        with pytest.raises(ValueError, match=f"`{name}` is"):
            model.generate(torch.tensor([[5, MASK]]), **{name: value})


def test_twenty_tokens_are_appended_unless_told_otherwise(model, caplog):
    prompt = torch.tensor([[5, 9, 3]])
    assert torch.equal(model.generate(prompt), model.generate(prompt, max_new_tokens=20))
    assert "max_new_tokens" in caplog.text
    assert model.generate(torch.randint(1, MASK, (1, 60))).shape == (1, 64)  # no further than the model goes
    assert model.generate(torch.tensor([[5, MASK]])).shape == (1, 2)  # [MASK]s to fill in are what is to be done


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True}, {"unmasking": "ancestral"}], ids=str)
def test_the_mask_token_is_never_produced(model, arguments):
    flatten = Processor(lambda input_ids, scores: torch.zeros_like(scores))
    prompt = torch.full((30, 1), 5)
    tokens = model.generate(prompt, max_new_tokens=9, logits_processor=[flatten], generator=seeded(0), **arguments)
    assert (tokens != MASK).all()


@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_without_a_possible_token_are_refused(model, value, do_sample):
    destroy = Processor(lambda input_ids, scores: torch.full_like(scores, value))
    with pytest.raises(ValueError, match="No token can be chosen"):
        model.generate(torch.tensor([[3, MASK]]), logits_processor=[destroy], do_sample=do_sample)


def test_overflowing_models_are_refused():
    model = tiny_model()
    model.lm_head.weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match="No token can be chosen"):
        model.generate(torch.tensor([[3, MASK, MASK]]))


# Infilling and padding


def test_infilling_changes_masks_only(model):
    prompt = torch.tensor([[MASK, 5, MASK, MASK, 9, 3, MASK], [4, 4, MASK, 4, 4, 4, 4]])
    whole = {"max_new_tokens": 0, "block_length": 2}
    for arguments in ({}, whole, {"max_length": 7, "max_denoising_steps": 2}, {"max_new_tokens": 3}):
        output = model.generate(prompt, **arguments)
        assert output.shape == (2, 7 + arguments.get("max_new_tokens", 0)) and (output != MASK).all()
        assert torch.equal(output[:, :7][prompt != MASK], prompt[prompt != MASK])


def test_a_row_without_masks_comes_back_as_it_was_and_costs_nothing(model):
    output = run(model, torch.tensor([[5, 9, 3, 4], [4, MASK, MASK, 8]]))
    assert output.sequences[0].tolist() == [5, 9, 3, 4]
    assert output.forward_passes.tolist() == [0, 2] and output.loops[0] == output.flops[0] == 0
    assert output.tokens_per_forward.tolist() == [0, 1]


def test_an_empty_prompt_is_one_of_masks(model):
    empty, masks = torch.zeros(2, 0, dtype=torch.long), torch.full((2, 6), MASK)
    assert torch.equal(model.generate(empty, max_new_tokens=6), model.generate(masks.int()))
    assert torch.equal(model.generate(max_new_tokens=6), model.generate(masks[:1]))
    begun = torch.cat((torch.tensor([[4]]), masks[:1]), 1)
    tokens = {"bos_token_id": 4, "pad_token_id": 4, "eos_token_id": 4}  # as GPT-2 has them
    for others in ({}, tokens):
        found = model.generate(max_new_tokens=6, **{"bos_token_id": 4} | others)
        assert torch.equal(found, model.generate(begun, torch.ones_like(begun), **others))
    bare = tiny_model(pad_token_id=None)
    assert torch.equal(bare.generate(empty, max_new_tokens=6), bare.generate(masks))


def test_padding_is_found_by_its_token_or_given_as_a_mask(model):
    batch = torch.tensor([[PAD, PAD, 5, 9], [4, 8, 2, 1]])
    arguments = {"max_new_tokens": 7, "max_denoising_steps": 4}
    found = model.generate(batch, **arguments)
    assert torch.equal(found, model.generate(batch, (batch != PAD).long(), **arguments))
    # A mask may say that token 0 is text, or that [MASK] is padding.
    assert not torch.equal(found, model.generate(batch, torch.ones_like(batch), **arguments))
    hidden = batch.masked_fill(batch == PAD, MASK)
    output = model.generate(hidden, batch != PAD, **arguments)
    assert torch.equal(output, torch.cat((hidden, found[:, 4:]), dim=1))


# Ends


END = 1


def end_model(*ends: float) -> TableModel:
    """Position j ends the sequence with probability `ends[j]`, else token 0; token 2 pads."""
    return TableModel([[1 - p - 0.01, p, 0.01] for p in ends])


def run_to_end(model, input_ids=None, **arguments):
    arguments = {"unmasking": "left_to_right", "eos_token_id": END, "pad_token_id": 2} | arguments
    return run(model, model.masks() if input_ids is None else torch.tensor(input_ids), **arguments)


@pytest.mark.parametrize(
    ("ends", "prompt", "arguments", "expected", "passes"),
    [
        ((0.1, 0.9, 0.1, 0.1), None, {}, [0, END, 2, 2], 2),
        # The end token is committed first; only when the tokens before it are known is the row over.
        ((0.40, 0.30, 0.95, 0.10), None, {"unmasking": "confidence"}, [0, 0, END, 2], 4),
        # Before given tokens it is text, and end tokens of the prompt end nothing.
        ((0.9, 0.1, 0.9, 0.1, 0.1), [[3, 0, 3, 3, 3]], {}, [END, 0, END, 2, 2], 2),
        ((0.9, 0.1, 0.9, 0.1, 0.1), [[0, END, 3, 3, 3]], {}, [0, END, END, 2, 2], 1),
        # Blocks behind the end, and blocks of given tokens, cost nothing.
        ((0.9, *[0.1] * 9), None, {"block_length": 2}, [END, *[2] * 9], 1),
        ((0.9, *[0.1] * 9), [[3, *[0] * 8, 3]], {"block_length": 2}, [END, *[0] * 9], 2),
        # Padding falls back on the first end token, and no end token means no end.
        ((0.9, 0.1, 0.1), None, {"pad_token_id": None}, [END] * 3, 1),
        ((0.1, 0.9, 0.1), None, {"eos_token_id": None}, [0, END, 0], 3),
        ((0.1, 0.9, 0.1), None, {"eos_token_id": [2, END]}, [0, END, 2], 2),
    ],
    ids=["end", "mask before", "infilling", "prompt", "skipped", "given", "padding", "none", "several"],
)
def test_where_a_row_ends(ends, prompt, arguments, expected, passes):
    model = end_model(*ends)
    output = run_to_end(model, prompt, **arguments)
    assert output.sequences.tolist() == [expected]
    assert len(model.inputs) == output.forward_passes.item() == passes
    denoised = sum(token != 2 for token in expected) - sum(token != 3 for token in (prompt or [[3]])[0])
    if "pad_token_id" not in arguments:
        assert output.tokens_per_forward.item() * passes == pytest.approx(denoised)


def test_finished_rows_are_not_run():
    model = end_model(0.9, 0.1, 0.1, 0.9, 0.1, 0.1)
    # Row 0 ends in its first step, row 1 in its third.
    output = run_to_end(model, [[3, 3, 3, 3, 3, 3], [0, 3, 3, 3, 3, 3]], block_length=2)
    assert output.sequences.tolist() == [[END, 2, 2, 2, 2, 2], [0, 0, 0, END, 2, 2]]
    assert output.forward_passes.tolist() == [1, 3]
    assert [len(rows) for rows in model.inputs] == [2, 1, 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_end_tokens_used_as_padding_end_nothing(model, side):
    arguments = {"max_new_tokens": 5, "eos_token_id": 20, "pad_token_id": 20}
    ids, mask = batch_of([[5, 9], [4, 8, 3, 1]], side)
    batch = ids.masked_fill(mask == 0, 20)
    output = model.generate(batch, mask, **arguments)
    assert torch.equal(output[0, 4:], model.generate(torch.tensor([[5, 9]]), **arguments)[0, 2:])
    # Without a mask they cannot be told from text; where all rows have as many of them they are text.
    with pytest.raises(ValueError, match="attention_mask"):
        model.generate(batch, **arguments)
    text = batch[:1]
    assert torch.equal(model.generate(text, **arguments), model.generate(text, torch.ones_like(text), **arguments))


def test_end_penalty_delays_the_commitment_and_leaves_the_distribution():
    model = end_model(0.10, 0.95, 0.20, 0.90)
    first, delayed = (run_to_end(model, unmasking="confidence", eos_penalty=p).trace[0] for p in (0.0, 0.5))
    assert first.committed.tolist() == [[False, True, False, False]]
    assert delayed.committed.tolist() == [[True, False, False, False]]
    for name in ("confidence", "log_probs"):
        torch.testing.assert_close(getattr(first, name), getattr(delayed, name))


# Stopping criteria


class Recorder(StoppingCriteria):
    """Stops a row at texts that hold `token` behind the first `skip` tokens; keeps the texts that it was shown."""

    def __init__(self, token=None, skip=0):
        self.token, self.skip, self.seen = token, skip, []

    def __call__(self, input_ids, scores, **kwargs):
        assert len(input_ids) == 1
        self.seen.append(input_ids[0].tolist())
        return torch.tensor([self.token in self.seen[-1][self.skip :]])


@pytest.mark.parametrize("wrap", [list, StoppingCriteriaList])
def test_criteria_are_asked_behind_every_token_of_a_finished_block(model, wrap):
    rows = [[5, MASK, 9], [4]]
    ids, mask = batch_of(rows, "right")
    free = real_tokens(model.generate(ids, mask, max_new_tokens=5, block_length=3), mask)
    recorder = Recorder()
    model.generate(ids, mask, max_new_tokens=5, block_length=3, stopping_criteria=wrap([recorder]))
    lengths = [[2, 4], [2, 3, 4], [5, 6, 7], [5, 6], [8]]  # block 0 of row 0, of row 1, block 1 of row 0, ...
    assert recorder.seen == [free[number % 2][:n] for number, block in enumerate(lengths) for n in block]


def test_a_stopped_row_ends_at_the_token_and_is_not_run_on(model):
    ids, mask = batch_of([[5, 9], [4, 8, 3]])
    free = run(model, ids, mask, max_new_tokens=8, block_length=4)
    texts = real_tokens(free.sequences, mask)
    token = texts[0][3]
    assert token not in texts[1][3:], "choose another prompt"
    recorder = Recorder(token, skip=2)
    output = run(model, ids, mask, max_new_tokens=8, block_length=4, stopping_criteria=[recorder])
    assert real_tokens(output.sequences, mask) == [texts[0][:4] + [PAD] * 6, texts[1]]
    assert output.forward_passes.tolist() == [4, 8]
    assert max(len(text) for text in recorder.seen if text[0] == 5) == 6, "asked on after the end"


def test_stopping_leaves_given_tokens(model):
    prompt = torch.tensor([[MASK, 5, MASK, 9, MASK]])
    free = model.generate(prompt, block_length=2)[0].tolist()
    for length, expected in ((1, [free[0], 5, PAD, 9, PAD]), (3, [*free[:4], PAD])):
        stopped = model.generate(prompt, block_length=2, stopping_criteria=[MaxLengthCriteria(length)])
        assert stopped.tolist() == [expected]


@pytest.mark.parametrize("prompt", [[5, 9], []], ids=["prompt", "no prompt"])
def test_what_stops_whatever_the_text_is_ends_the_row_behind_the_block(model, prompt):
    arguments = {"max_new_tokens": 8, "block_length": 3}
    prompt = torch.tensor([prompt], dtype=torch.long)
    free = model.generate(prompt, **arguments)[0].tolist()
    stopped = model.generate(prompt, stopping_criteria=[MaxTimeCriteria(0.0)], **arguments)[0].tolist()
    end = prompt.shape[1] + 3
    assert stopped == free[:end] + [PAD] * 5


@pytest.mark.parametrize("block_length", [1, 3])
def test_a_text_without_a_prompt_may_stop_at_its_first_token(block_length):
    table, tokenizer = end_model(0.9, 0.1, 0.1), word_tokenizer()
    for criterion in (EosTokenCriteria(END), StopStringCriteria(tokenizer, tokenizer.decode(END))):
        arguments = {"eos_token_id": None, "block_length": block_length, "stopping_criteria": [criterion]}
        assert run_to_end(table, **arguments).sequences.tolist() == [[END, 2, 2]]


def test_criteria_leave_rows_independent():
    model = tiny_model(attention_block_size=4)
    criteria = StoppingCriteriaList([EosTokenCriteria(4)])
    batch = torch.tensor([[0, 0, 3, 7, 9, 5], [1, 2, 4, 8, 6, 5]])
    together, alone = (
        model.generate(ids, max_new_tokens=12, stopping_criteria=criteria) for ids in (batch, batch[1:])
    )
    assert torch.equal(together[1], alone[0])


@pytest.mark.parametrize("block_length", [1, 2, 4])
@pytest.mark.parametrize("last", [1, 3])
def test_a_row_ends_at_its_first_stop_string_also_behind_a_prompt_that_ends_in_it(block_length, last):
    model, arguments = TableModel([[0.1, 0.8, 0.05, 0.05]] * 7).eval(), {"max_new_tokens": 4, "pad_token_id": 0}
    criteria = StoppingCriteriaList([EosTokenCriteria(1)])
    prompt = torch.tensor([[2, 3, last]])
    found = model.generate(prompt, stopping_criteria=criteria, block_length=block_length, **arguments)
    assert found.tolist() == [[2, 3, last, 1, 0, 0, 0]]


def test_stop_strings_are_looked_for_by_one_criterion(model, monkeypatch):
    # Making one reads the whole vocabulary.
    made = []

    class Counted(StopStringCriteria):
        def __init__(self, tokenizer, strings):
            made.append(strings)
            super().__init__(tokenizer, strings)

    monkeypatch.setattr("loopmdm.generation_utils.StopStringCriteria", Counted)
    tokenizer, prompt = word_tokenizer(), torch.tensor([[5, 9, 3]])
    for strings in ("a b", ["a b"], "c", "a b"):
        model.generate(prompt, max_new_tokens=2, stop_strings=strings, tokenizer=tokenizer)
    assert made == [["a b"], ["c"]]


@pytest.mark.parametrize("block_length", [1, 3, 8])
@pytest.mark.parametrize("words", [1, 2])
def test_stop_strings(model, block_length, words):
    tokenizer, prompt = word_tokenizer(), torch.tensor([[5, 9, 3]])
    arguments = {"max_new_tokens": 8, "block_length": block_length}
    free = model.generate(prompt, **arguments)[0].tolist()
    end = next(i for i in range(4, 10) if free[i] not in free[:i])  # the first token that is new
    stop, expected = tokenizer.decode(free[end + 1 - words : end + 1]), [free[: end + 1] + [PAD] * (10 - end)]
    for strings in (stop, [stop, "words that do not come"]):
        assert model.generate(prompt, stop_strings=strings, tokenizer=tokenizer, **arguments).tolist() == expected
    criteria = [StopStringCriteria(tokenizer, stop)]
    assert model.generate(prompt, stopping_criteria=criteria, **arguments).tolist() == expected
    with pytest.raises(ValueError, match="`stop_strings` needs the `tokenizer`"):
        model.generate(prompt, stop_strings=stop, **arguments)
    for bad in ("", [""], [3]):
        with pytest.raises(ValueError, match=r"`stop_strings` is .*; give a text that is not empty"):
            model.generate(prompt, stop_strings=bad, tokenizer=tokenizer, **arguments)
