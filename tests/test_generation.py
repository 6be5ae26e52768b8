# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Tests of `generate`: an independent reference, statistics, rows that do not see each other, ends, cost, streaming,
traces, configs and bad input. What a single step decides is tested in test_commit_rules.py.
"""

import copy
import math
import re
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextDiffusionStreamer,
    TextIteratorStreamer,
    TextStreamer,
)

from loopmdm import LoopMDMForMaskedLM, LoopMDMGenerationConfig
from loopmdm.generation_utils import LoopMDMTraceStep
from loopmdm.modeling_loopmdm import LoopMDMMaskedLMOutput

MASK, PAD = 22, 0  # of tiny_config
ROWS = [[5], [7, MASK, 6], [4, MASK, MASK, 11, 8, MASK, 2]]


@pytest.fixture(scope="module")
def model() -> LoopMDMForMaskedLM:
    return tiny_model(num_loops=2)


class TableModel(LoopMDMForMaskedLM):
    """Predicts the probabilities `table`, `(length, vocab_size - 1)`, whatever it is shown, and records its input."""

    def __init__(self, table):
        logits = torch.tensor(table, dtype=torch.float32).log()
        vocab_size = logits.shape[1] + 1
        super().__init__(tiny_config(vocab_size=vocab_size, mask_token_id=vocab_size - 1, pad_token_id=None))
        # The mask token looks likely, so that nothing works by luck.
        self.table = torch.cat((logits, torch.full((len(logits), 1), 9.0)), dim=1)
        self.inputs: list[torch.Tensor] = []

    def forward(self, input_ids, num_loops=None, logits_to_keep=None, **other):
        self.inputs.append(input_ids.clone())
        return LoopMDMMaskedLMOutput(logits=self.table[logits_to_keep], loops=torch.full((len(input_ids),), num_loops))

    def masks(self, num_rows: int = 1) -> torch.Tensor:
        """Input of [MASK]s alone, one per row of the table."""
        return torch.full((num_rows, len(self.table)), self.config.mask_token_id)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trace_of(model, input_ids, **arguments) -> list[LoopMDMTraceStep]:
    return model.generate(input_ids, return_dict_in_generate=True, output_trace=True, **arguments).trace


def commit_steps(trace: list[LoopMDMTraceStep]) -> torch.Tensor:
    """The step that (last) committed each position, `(num_rows, length)`; -1 where none did."""
    steps = torch.full(trace[0].committed.shape, -1)
    for number, step in enumerate(trace):
        steps[step.committed] = number
    return steps


def assert_fits(counts: torch.Tensor, probabilities: list[float] | torch.Tensor):
    """Pearson's chi-square stays within five standard deviations; what is impossible never happened."""
    expected = counts.sum() * torch.as_tensor(probabilities, dtype=torch.float64)
    possible = expected > 0
    assert counts[~possible].sum() == 0, counts
    degrees = int(possible.sum()) - 1
    statistic = ((counts - expected).square() / expected)[possible].sum().item()
    assert statistic <= degrees + 5 * math.sqrt(2 * degrees), (counts, expected)


# Commit rules on a fixed table


# As in test_commit_rules.py: four positions that every rule orders differently.
TABLE = [
    [0.45, 0.28, 0.27, 0.00, 0.00],
    [0.40, 0.39, 0.21, 0.00, 0.00],
    [0.50, 0.49, 0.01, 0.00, 0.00],
    [0.48, 0.13, 0.13, 0.13, 0.13],
]


@pytest.mark.parametrize(
    ("arguments", "steps"),  # the step that commits each position
    [
        ({}, [2, 3, 0, 1]),
        ({"unmasking": "margin"}, [1, 2, 3, 0]),
        ({"unmasking": "entropy"}, [2, 1, 0, 3]),
        ({"unmasking": "left_to_right"}, [0, 1, 2, 3]),
        ({"block_length": 2}, [0, 1, 2, 3]),
        ({"block_length": 3}, [1, 2, 0, 3]),
        ({"max_denoising_steps": 3}, [1, 2, 0, 0]),
        ({"max_denoising_steps": 1}, [0, 0, 0, 0]),
        ({"max_denoising_steps": 99}, [2, 3, 0, 1]),
        ({"confidence_threshold": 0.47}, [1, 2, 0, 0]),
        ({"confidence_threshold": 0.47, "unmasking": "left_to_right"}, [0, 1, 0, 0]),
        ({"entropy_bound": 1.0}, [1, 0, 0, 1]),
    ],
    ids=str,
)
def test_order_of_commitment(arguments, steps):
    model = TableModel(TABLE)
    trace = trace_of(model, model.masks(), **arguments)
    assert commit_steps(trace).tolist() == [steps]
    assert trace[-1].tokens.tolist() == [[0, 0, 0, 0]]


def test_random_order_is_uniform():
    model = TableModel([[0.6, 0.4]] * 3)
    trace = trace_of(model, model.masks(1200), unmasking="random", generator=seeded(0))
    orders = commit_steps(trace) @ torch.tensor([9, 3, 1])
    counts = orders.unique(return_counts=True)[1]
    assert len(counts) == 6
    assert_fits(counts, [1 / 6] * 6)


# The whole greedy sampler against an independent one


def reference_generate(model, prompt, max_new_tokens, block_length, max_denoising_steps, unmasking, num_loops):
    """One row, in plain Python on lists, from the documentation alone."""
    tokens = [*prompt, *[MASK] * max_new_tokens]
    masks = [position for position, token in enumerate(tokens) if token == MASK]
    block_of = {position: (position - masks[0]) // (block_length or len(tokens)) for position in masks}
    for block in sorted(set(block_of.values())):
        positions = [position for position in masks if block_of[position] == block]
        num_steps = min(max_denoising_steps or len(positions), len(positions))
        for step in range(num_steps):
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), num_loops=num_loops).logits[0].tolist()
            choice, score = {}, {}
            for position in (position for position in positions if tokens[position] == MASK):
                weights = {token: math.exp(x) for token, x in enumerate(logits[position]) if token != MASK}
                probs = {token: weight / sum(weights.values()) for token, weight in weights.items()}
                first, second, *_ = sorted(probs.values(), reverse=True)
                choice[position] = max(probs, key=probs.get)
                score[position] = {
                    "confidence": first,
                    "margin": first - second,
                    "entropy": sum(p * math.log(p) for p in probs.values()),
                    "left_to_right": -position,
                }[unmasking]
            share = len(positions) // num_steps + (step < len(positions) % num_steps)
            for position in sorted(score, key=score.get, reverse=True)[:share]:
                tokens[position] = choice[position]
    return tokens


def assert_equals_reference(model, prompts, max_new_tokens, **arguments):
    width = max(map(len, prompts))
    batch = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    output = model.generate(batch, max_new_tokens=max_new_tokens, num_loops=1, **arguments).tolist()
    for prompt, row in zip(prompts, output, strict=True):
        expected = reference_generate(model, prompt, max_new_tokens, num_loops=1, **arguments)
        assert row == [PAD] * (width - len(prompt)) + expected


@pytest.mark.parametrize("unmasking", ["confidence", "margin", "entropy", "left_to_right"])
@pytest.mark.parametrize(("block_length", "max_denoising_steps"), [(None, None), (None, 3), (4, 3), (3, 99), (1, 1)])
def test_greedy_equals_the_reference(model, block_length, max_denoising_steps, unmasking):
    arguments = {"block_length": block_length, "max_denoising_steps": max_denoising_steps, "unmasking": unmasking}
    assert_equals_reference(model, ROWS, max_new_tokens=7, **arguments)


@settings(derandomize=True, max_examples=10, deadline=None)
@given(
    # One known token at least: positions that see nothing but [MASK] are ties, which rounding breaks.
    prompts=st.lists(
        st.lists(st.sampled_from([3, 5, MASK]), max_size=5).map(lambda row: [8, *row]), min_size=1, max_size=3
    ),
    max_new_tokens=st.integers(1, 8),
    block_length=st.none() | st.integers(1, 9),
    max_denoising_steps=st.none() | st.integers(1, 9),
    unmasking=st.sampled_from(["confidence", "margin", "entropy", "left_to_right"]),
)
def test_any_batch_equals_the_reference(model, **arguments):
    assert_equals_reference(model, **arguments)


# Ancestral sampling and remasking


@pytest.mark.parametrize("unmasking", ["confidence", "ancestral", "left_to_right"])
def test_remasking_runs_all_steps_and_stays_on_schedule(model, unmasking):
    """The share of open tokens follows the steps done, as ReMDM's alpha does, however many steps there are."""
    output = model.generate(
        torch.full((40, 8), MASK),
        unmasking=unmasking,
        remask_probability=0.1,
        max_denoising_steps=32,
        num_loops=1,
        generator=seeded(0),
        return_dict_in_generate=True,
        output_trace=True,
    )
    # A step is predicted anew only where the one before it changed the row.
    changed = torch.stack([(step.committed | step.remasked).any(-1) for step in output.trace])
    assert len(output.trace) == 32
    assert output.forward_passes.tolist() == (1 + changed[:-1].sum(0)).tolist()
    assert (output.sequences != MASK).all()
    for step in output.trace:
        share_open = (step.tokens != MASK).float().mean().item()
        assert share_open == pytest.approx((step.step + 1) / 32, abs=0.13)  # 1/8 is one token
    assert sum(int(step.remasked.sum()) for step in output.trace) > 40


@pytest.mark.parametrize("value", [-math.inf, math.nan])
@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_without_a_possible_token_are_refused(model, value, do_sample):
    class Destroy(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, value)

    with pytest.raises(ValueError, match="No token can be chosen"):
        model.generate(
            torch.tensor([[3, MASK]]), logits_processor=LogitsProcessorList([Destroy()]), do_sample=do_sample
        )


def test_overflowing_models_are_refused():
    model = tiny_model()
    model.lm_head.weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match="No token can be chosen"):
        model.generate(torch.tensor([[3, MASK]]))


def test_greedy_on_request_where_the_config_samples():
    model, prompt = tiny_model(), torch.tensor([[3, 5]])
    greedy = model.generate(prompt, max_new_tokens=8)
    model.generation_config = LoopMDMGenerationConfig(do_sample=True, temperature=0.7, top_k=5)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), greedy)
    with pytest.raises(ValueError, match=r"`top_p` is 0.5 without effect"):
        model.generate(prompt, max_new_tokens=8, do_sample=False, top_p=0.5)


def test_random_orders_give_several_answers_without_sampling(model):
    answers = model.generate(
        torch.full((1, 12), MASK), unmasking="random", num_return_sequences=8, generator=seeded(0), num_loops=1
    )
    assert len({tuple(row) for row in answers.tolist()}) > 1


@pytest.mark.parametrize("num_steps", [4, 9])  # fewer and more than positions
def test_ancestral_opens_uniformly_in_time_and_samples_the_distribution(num_steps):
    probabilities, num_rows = [0.5, 0.3, 0.2, 0.0], 1000
    model = TableModel([probabilities] * 6)
    trace = trace_of(
        model,
        model.masks(num_rows),
        unmasking="ancestral",
        max_denoising_steps=num_steps,
        generator=seeded(0),
    )
    opened = commit_steps(trace)
    assert_fits(opened.flatten().bincount(minlength=num_steps), [1 / num_steps] * num_steps)
    assert_fits(trace[-1].tokens.flatten().bincount(minlength=4), probabilities)
    # Positions open independently of each other: the openings of a row in the first step are binomial.
    first = (opened == 0).sum(-1).bincount(minlength=7)
    p = 1 / num_steps
    assert_fits(first, [math.comb(6, k) * p**k * (1 - p) ** (6 - k) for k in range(7)])
    # ... and tokens are independent of when they open.
    for step in range(num_steps):
        assert_fits(trace[-1].tokens[opened == step].bincount(minlength=4), probabilities)


def test_remasking_keeps_the_share_of_open_tokens():
    num_steps = 8
    model = TableModel([[0.5, 0.5]] * 16)
    trace = trace_of(
        model,
        model.masks(400),
        unmasking="ancestral",
        max_denoising_steps=num_steps,
        remask_probability=0.3,
        generator=seeded(0),
    )
    mask = model.config.mask_token_id
    for index, step in enumerate(trace[:-2]):
        expected = (index + 1) / num_steps
        error = math.sqrt(expected * (1 - expected) / step.tokens.numel())
        assert (step.tokens != mask).float().mean().item() == pytest.approx(expected, abs=5 * error)
        # committed before this step, and sent back in it
        before = trace[index - 1].tokens != mask if index else torch.zeros_like(step.remasked)
        rate = min(0.3, (1 - expected) / (index / num_steps)) if index else 0.0
        assert step.remasked.sum().item() == pytest.approx(
            rate * before.sum().item(), abs=5 * math.sqrt(before.sum().item()) + 1e-6
        )
    assert (trace[-1].tokens != mask).all()


@pytest.mark.parametrize("unmasking", ["confidence", "random", "ancestral"])
def test_remasked_tokens_may_change_and_none_stays_masked(model, unmasking):
    prompt = torch.tensor([[5, MASK, 9, 3]]).repeat(4, 1)
    output = model.generate(
        prompt,
        max_new_tokens=12,
        max_denoising_steps=24,
        block_length=8,
        unmasking=unmasking,
        remask_probability=0.4,
        do_sample=True,
        return_dict_in_generate=True,
        output_trace=True,
        generator=seeded(0),
    )
    final = output.sequences
    assert max(step.step for step in output.trace) >= 8, "more steps than positions in a block"
    remasked = torch.zeros_like(final, dtype=torch.bool)
    first_choice = torch.cat((prompt, torch.full((4, 12), MASK)), dim=1)
    for step in output.trace:
        assert (step.tokens[step.remasked] == MASK).all()
        remasked |= step.remasked
        first_choice = torch.where((first_choice == MASK) & step.committed, step.tokens, first_choice)
    assert (final != first_choice)[remasked].any() and (final == first_choice)[~remasked].all()
    assert not remasked[:, [0, 2, 3]].any() and (final != MASK).all()


# Sampling


def test_temperature_does_not_reach_the_confidence():
    # At temperature 0.1 all of these round to certainty, and a sampler that reads them commits the leftmost first.
    model = TableModel([[p, 1 - p] for p in (0.990, 0.996, 0.986, 0.998, 0.992)])
    for temperature in (0.1, 1.0):
        trace = trace_of(model, model.masks(), do_sample=True, temperature=temperature, generator=seeded(1))
        assert trace[-1].tokens.tolist() == [[0, 0, 0, 0, 0]]
        assert commit_steps(trace).tolist() == [[3, 1, 4, 0, 2]]
        torch.testing.assert_close(trace[0].confidence, torch.tensor([[0.990, 0.996, 0.986, 0.998, 0.992]]))


class Saturate(LogitsProcessor):
    """Leaves the second most likely token only, writing into its argument as users' processors do."""

    def __call__(self, input_ids, scores):
        second = scores.topk(2).indices[:, 1:]
        scores.fill_(-math.inf)
        return scores.scatter_(1, second, 0.0)


def test_processors_do_not_reach_the_confidence():
    model = TableModel(TABLE)
    trace = trace_of(model, model.masks(), logits_processor=LogitsProcessorList([Saturate()]))
    assert trace[-1].tokens.tolist() == [[1, 1, 1, 1]]
    torch.testing.assert_close(trace[0].confidence, torch.tensor([[0.28, 0.39, 0.49, 0.13]]))
    assert commit_steps(trace).tolist() == [[2, 1, 0, 3]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.50, 0.25, 0.15, 0.10, 0.0]),
        ({"temperature": 0.5}, [0.25, 0.0625, 0.0225, 0.01, 0.0]),
        ({"temperature": 2.0}, [0.50**0.5, 0.25**0.5, 0.15**0.5, 0.10**0.5, 0.0]),
        ({"top_k": 2}, [0.50, 0.25, 0.0, 0.0, 0.0]),
        ({"top_p": 0.8}, [0.50, 0.25, 0.15, 0.0, 0.0]),
        ({"min_p": 0.25}, [0.50, 0.25, 0.15, 0.0, 0.0]),
        ({"temperature": 0.5, "top_p": 0.8}, [0.25, 0.0625, 0.0, 0.0, 0.0]),
        ({"temperature": 2.0, "top_k": 3, "min_p": 0.6}, [0.50**0.5, 0.25**0.5, 0.0, 0.0, 0.0]),
    ],
    ids=str,
)
def test_sampled_distribution(arguments, expected):
    model = TableModel([[0.50, 0.25, 0.15, 0.10, 0.0]] * 4)
    tokens = model.generate(
        model.masks(),
        do_sample=True,
        num_return_sequences=1000,
        max_denoising_steps=1,
        generator=seeded(0),
        **arguments,
    )
    assert_fits(tokens.flatten().bincount(minlength=6), torch.tensor([*expected, 0.0]) / sum(expected))


class Forbid(LogitsProcessor):
    def __init__(self, *tokens):
        self.tokens = list(tokens)

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.tokens] = -math.inf
        return scores


@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_processors_are_obeyed(model, do_sample):
    prompt = torch.tensor([[5, 9, 3]])
    free = model.generate(prompt, max_new_tokens=8, do_sample=do_sample, generator=seeded(0))
    forbidden = free[0, 3:].unique().tolist()
    for processors in ([Forbid(*forbidden)], LogitsProcessorList([Forbid(*forbidden)])):
        tokens = model.generate(
            prompt, max_new_tokens=8, do_sample=do_sample, generator=seeded(0), logits_processor=processors
        )
        assert not torch.isin(tokens[0, 3:], torch.tensor(forbidden)).any()


def test_processors_see_the_rows_of_their_positions(model):
    class NoRepetition(LogitsProcessor):
        def __call__(self, input_ids, scores):
            left = int((input_ids[0] == MASK).sum())
            assert (input_ids.shape, scores.shape) == ((2 * left, 12), (2 * left, 23))
            return scores.scatter(1, input_ids, -math.inf)

    prompts = torch.tensor([[5, 9, 3], [6, 1, 2]])
    for row in model.generate(prompts, max_new_tokens=9, logits_processor=[NoRepetition()]).tolist():
        assert len(set(row)) == 12

    penalty = RepetitionPenaltyLogitsProcessor(3.0)
    tokens = model.generate(prompts, max_new_tokens=9, max_denoising_steps=1, logits_processor=[penalty])
    canvas = torch.cat((prompts, torch.full((2, 9), MASK)), dim=1)
    logits = model(canvas).logits.detach().index_fill(-1, torch.tensor([MASK]), -math.inf)
    for row, scores, output in zip(canvas, logits, tokens, strict=True):
        assert torch.equal(penalty(row.expand(12, -1), scores).argmax(-1)[3:], output[3:])


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True}, {"unmasking": "ancestral"}], ids=str)
def test_the_mask_token_is_never_produced(model, arguments):
    class Flatten(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.zeros_like(scores)

    prompt = torch.full((50, 1), 5)
    tokens = model.generate(
        prompt,
        max_new_tokens=10,
        logits_processor=[Flatten()],
        generator=seeded(0),
        **arguments,
    )
    assert (tokens != MASK).all()


def test_seeds(model):
    def sample(seed):
        arguments = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3}
        return model.generate(torch.tensor([[5, 9]]), generator=seeded(seed), **arguments)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert len(sample(0).unique(dim=0)) == 3


# Infilling


def test_infilling_changes_masks_only(model):
    prompt = torch.tensor([[MASK, 5, MASK, MASK, 9, 3, MASK], [4, 4, MASK, 4, 4, 4, 4]])
    for arguments in ({}, {"max_new_tokens": 0, "block_length": 2}, {"max_length": 7, "max_denoising_steps": 2}):
        output = model.generate(prompt, **arguments)
        assert output.shape == prompt.shape
        assert (output != MASK).all()
        assert torch.equal(output[prompt != MASK], prompt[prompt != MASK])
    longer = model.generate(prompt, max_new_tokens=3)
    assert longer.shape == (2, 10)
    assert (longer != MASK).all()
    assert torch.equal(longer[:, :7][prompt != MASK], prompt[prompt != MASK])


def test_a_row_without_masks_comes_back_as_it_was(model):
    prompt = torch.tensor([[5, 9, 3, 4], [4, MASK, MASK, 8]])
    output = model.generate(prompt, return_dict_in_generate=True)
    assert output.sequences[0].tolist() == [5, 9, 3, 4]
    assert output.forward_passes.tolist() == [0, 2]
    assert output.tokens_per_forward.tolist() == [0, 1]


def test_unconditional(model):
    empty = torch.zeros(2, 0, dtype=torch.long)
    masks = torch.full((2, 6), MASK)
    assert torch.equal(model.generate(empty, max_new_tokens=6), model.generate(masks))


# Rows do not see each other


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_loops": 1},
        {"num_loops": 3, "block_length": 4},
        {"num_loops": [1, 3], "max_denoising_steps": 3},
        {"num_loops": 5, "loop_tolerance": 0.3},
        {"guidance_scale": 2.0},
        {"unmasking": "random"},
        {"unmasking": "ancestral", "max_denoising_steps": 5},
        {"confidence_threshold": 0.5, "block_length": 6, "do_sample": True},
        {"entropy_bound": 2.0, "max_denoising_steps": 5},
        {"do_sample": True, "temperature": 0.8, "top_k": 9, "num_loops": [1, 2, 3]},
        {"remask_probability": 0.4, "do_sample": True, "max_denoising_steps": 12, "block_length": 5},
        {"unmasking": "ancestral", "remask_probability": 0.4, "max_denoising_steps": 6},
        {"do_sample": True, "eos_token_id": [1, 2, 3, 4, 6], "eos_penalty": 0.1, "block_length": 4},
    ],
    ids=str,
)
def test_rows_do_not_depend_on_batch_or_padding(model, arguments):
    arguments = {"max_new_tokens": 9, "return_dict_in_generate": True} | arguments
    width = max(map(len, ROWS))
    new_tokens = torch.ones(len(ROWS), 9, dtype=torch.bool)
    alone = [model.generate(torch.tensor([row]), generator=[seeded(i)], **arguments) for i, row in enumerate(ROWS)]
    for side in ("left", "right"):
        padding = [[PAD] * (width - len(row)) for row in ROWS]
        pairs = list(zip(ROWS, padding, strict=True))
        batch = torch.tensor([pad + row if side == "left" else row + pad for row, pad in pairs])
        output = model.generate(batch, generator=[seeded(i) for i in range(3)], **arguments)
        real = torch.cat((batch != PAD, new_tokens), dim=1)
        assert output.sequences.shape == (3, width + 9)
        assert (output.sequences[~real] == PAD).all()
        for i, single in enumerate(alone):
            assert output.sequences[i][real[i]].tolist() == single.sequences[0].tolist(), f"row {i}, padded {side}"
            for cost in ("forward_passes", "loops", "layer_passes", "tokens_per_forward"):
                assert output[cost][i] == single[cost][0], cost


def test_several_answers_per_row(model):
    arguments = {"max_new_tokens": 6, "do_sample": True}
    batch = torch.tensor([[PAD, PAD, 5], [4, 8, 2]])
    answers = model.generate(batch, num_return_sequences=3, generator=[seeded(i) for i in range(6)], **arguments)
    for i, answer in enumerate(answers):
        assert torch.equal(answer[None], model.generate(batch[i // 3][None], generator=[seeded(i)], **arguments))


def test_padding_is_found_by_its_token_or_given_as_a_mask(model):
    batch = torch.tensor([[PAD, PAD, 5, 9], [4, 8, 2, 1]])
    arguments = {"max_new_tokens": 7, "max_denoising_steps": 4}
    found = model.generate(batch, **arguments)
    assert torch.equal(found, model.generate(batch, (batch != PAD).long(), **arguments))
    # A mask may say that token 0 is text, or that [MASK] is padding.
    assert not torch.equal(found, model.generate(batch, torch.ones_like(batch), **arguments))
    hidden = batch.masked_fill(batch == PAD, MASK)
    output = model.generate(hidden, (batch != PAD).long(), **arguments)
    assert torch.equal(output, torch.cat((hidden, found[:, 4:]), dim=1))


# Ends


END = 1


def end_model(*ends: float) -> TableModel:
    """Position j ends the sequence with probability `ends[j]`, else token 0; token 2 pads."""
    return TableModel([[1 - p - 0.01, p, 0.01] for p in ends])


def end_tokens(model, input_ids=None, **arguments):
    return model.generate(
        model.masks() if input_ids is None else input_ids,
        eos_token_id=END,
        pad_token_id=2,
        return_dict_in_generate=True,
        **arguments,
    )


def test_a_row_ends_at_an_end_token_with_no_mask_before_it():
    model = end_model(0.1, 0.9, 0.1, 0.1)
    output = end_tokens(model, unmasking="left_to_right")
    assert output.sequences.tolist() == [[0, END, 2, 2]]
    assert len(model.inputs) == output.forward_passes.item() == 2
    assert output.tokens_per_forward.item() == 1


def test_a_mask_before_the_end_token_keeps_the_row_going():
    # The end token is committed first, the tokens before it later; only then is the row over.
    model = end_model(0.40, 0.30, 0.95, 0.10)
    output = end_tokens(model, output_trace=True)
    assert output.sequences.tolist() == [[0, 0, END, 2]]
    assert commit_steps(output.trace).tolist() == [[3, 2, 0, 1]]
    # Position 3 was denoised in vain and does not count.
    assert output.forward_passes.item() == 4
    assert output.tokens_per_forward.item() == 0.75


def test_an_end_token_before_given_tokens_is_text():
    model = end_model(0.9, 0.1, 0.9, 0.1, 0.1)
    mask = model.config.mask_token_id
    output = end_tokens(model, torch.tensor([[mask, 0, mask, mask, mask]]), unmasking="left_to_right")
    assert output.sequences.tolist() == [[END, 0, END, 2, 2]]
    # Nor do the end tokens of the prompt end anything.
    output = end_tokens(model, torch.tensor([[0, END, mask, mask, mask]]), unmasking="left_to_right")
    assert output.sequences.tolist() == [[0, END, END, 2, 2]]


@pytest.mark.parametrize("batch", [[20, 20, 5, 9], [5, 9, 20, 20]])
def test_end_tokens_used_as_padding_end_nothing(model, batch):
    arguments = {"max_new_tokens": 5, "eos_token_id": 20, "pad_token_id": 20}
    batch = torch.tensor([batch])
    output = model.generate(batch, (batch != 20).long(), **arguments)
    assert (output[:, 4:] != 20).all()
    assert torch.equal(output[:, 4:], model.generate(torch.tensor([[5, 9]]), **arguments)[:, 2:])
    # Without a mask they are text: this padding token cannot be told from an end.
    assert torch.equal(model.generate(batch, **arguments), model.generate(batch, torch.ones_like(batch), **arguments))


def test_several_end_tokens():
    model = TableModel([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.8, 0.1], [0.8, 0.1, 0.1]])
    for ends, expected in (([1, 2], [0, 2, 0, 0]), ([1], [0, 2, 1, 0]), (2, [0, 2, 0, 0]), (None, [0, 2, 1, 0])):
        tokens = model.generate(model.masks(), unmasking="left_to_right", eos_token_id=ends, pad_token_id=0)
        assert tokens.tolist() == [expected]


def test_padding_token_falls_back_on_the_first_end_token():
    model = end_model(0.9, 0.1, 0.1)
    assert model.generate(model.masks(), unmasking="left_to_right", eos_token_id=END).tolist() == [[END] * 3]


def test_finished_rows_cost_nothing_more():
    model = end_model(0.9, 0.1, 0.1, 0.9, 0.1, 0.1)
    mask = model.config.mask_token_id
    # Row 0 ends in its first step, row 1 in its third.
    batch = torch.tensor([[mask, mask, mask, mask, mask, mask], [0, mask, mask, mask, mask, mask]])
    output = end_tokens(model, batch, unmasking="left_to_right", block_length=2)
    assert output.sequences.tolist() == [[END, 2, 2, 2, 2, 2], [0, 0, 0, END, 2, 2]]
    assert output.forward_passes.tolist() == [1, 3]
    assert [len(rows) for rows in model.inputs] == [2, 1, 1]


def test_end_penalty_delays_the_commitment_and_leaves_the_distribution():
    model = end_model(0.10, 0.95, 0.20, 0.90)
    plain, penalised = (end_tokens(model, eos_penalty=penalty, output_trace=True).trace for penalty in (0.0, 0.5))
    assert plain[0].committed.tolist() == [[False, True, False, False]]
    assert penalised[0].committed.tolist() == [[True, False, False, False]]
    for name in ("confidence", "log_probs"):
        torch.testing.assert_close(getattr(plain[0], name), getattr(penalised[0], name))

    # In a single step there is no order, and the tokens are the same draws.
    draws = [
        end_tokens(
            model,
            eos_penalty=penalty,
            do_sample=True,
            max_denoising_steps=1,
            num_return_sequences=200,
            generator=seeded(0),
        ).sequences
        for penalty in (0.0, 0.5)
    ]
    assert torch.equal(*draws)


# Stopping criteria


class StopRows(StoppingCriteria):
    """Stops the rows that `stop_at` lists for each call; records the tokens that it was shown."""

    def __init__(self, *stop_at: list[bool]):
        self.stop_at, self.seen = list(stop_at), []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return torch.tensor(self.stop_at[len(self.seen) - 1])


def test_stopping_criteria_are_asked_after_every_block(model):
    prompt = torch.tensor([[5, 9], [4, 8]])
    free = model.generate(prompt, max_new_tokens=7, block_length=3)
    criterion = StopRows([False, True], [True, False], [False, False])
    output = model.generate(
        prompt,
        max_new_tokens=7,
        block_length=3,
        stopping_criteria=StoppingCriteriaList([criterion]),
        return_dict_in_generate=True,
    )
    assert [seen.shape for seen in criterion.seen] == [(2, 5), (2, 8)]
    assert torch.equal(criterion.seen[0], free[:, :5])
    assert output.sequences[0].tolist() == [*free[0, :8].tolist(), PAD]
    assert output.sequences[1].tolist() == [*free[1, :5].tolist(), *[PAD] * 4]
    assert output.forward_passes.tolist() == [6, 3]


@pytest.mark.parametrize("wrap", [StoppingCriteriaList, list])
def test_max_length_criteria(model, wrap):
    prompt = torch.tensor([[5, 9]])
    free = model.generate(prompt, max_new_tokens=8, block_length=2)
    stopped = model.generate(prompt, max_new_tokens=8, block_length=2, stopping_criteria=wrap([MaxLengthCriteria(5)]))
    assert stopped.tolist() == [[*free[0, :6].tolist(), *[PAD] * 4]]


def test_stopping_leaves_given_tokens(model):
    prompt = torch.tensor([[MASK, 5, MASK, 9, MASK]])
    criterion = StopRows([False], [True])
    stopped = model.generate(prompt, block_length=2, stopping_criteria=[criterion])
    free = model.generate(prompt, block_length=2)
    assert stopped.tolist() == [[*free[0, :4].tolist(), PAD]]
    stopped = model.generate(prompt, block_length=2, stopping_criteria=[StopRows([True])])
    assert stopped.tolist() == [[*free[0, :2].tolist(), PAD, 9, PAD]]


# Cost


def count_passes(model) -> tuple[list[int], list]:
    """Counts the rows that pass every layer; returns the counts and the hooks to remove."""
    counts = [0] * len(model.model.layers)

    def count(index):
        def hook(module, args, output):
            counts[index] += len(output)

        return hook

    return counts, [layer.register_forward_hook(count(index)) for index, layer in enumerate(model.model.layers)]


@pytest.mark.parametrize(
    ("arguments", "num_loops"),  # loops of each of the six steps
    [
        ({}, [2] * 6),
        ({"num_loops": 1}, [1] * 6),
        ({"num_loops": [1, 2, 4]}, [1, 1, 2, 2, 4, 4]),
        ({"num_loops": [5, 1], "max_denoising_steps": 3}, [5, 5, 1]),
        ({"num_loops": [1, 2, 4], "block_length": 3}, [1, 2, 4, 1, 2, 4]),
        ({"num_loops": [1, 4], "max_denoising_steps": 2}, [1, 4]),
        ({"num_loops": [1, 2, 4], "max_denoising_steps": 99}, [1, 1, 2, 2, 4, 4]),
        ({"num_loops": 2, "guidance_scale": 1.5}, [4] * 6),
        ({"num_loops": 2, "guidance_scale": 1.0}, [2] * 6),
        ({"num_loops": 9, "loop_tolerance": 1e9}, [1] * 6),
    ],
    ids=str,
)
def test_reported_cost_is_what_the_layers_ran(model, arguments, num_loops):
    counts, hooks = count_passes(model)
    output = model.generate(
        torch.tensor([[5, 9]]),
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_trace=True,
        **arguments,
    )
    for hook in hooks:
        hook.remove()
    guided = arguments.get("guidance_scale", 1.0) != 1.0
    assert [step.loops.item() for step in output.trace] == num_loops
    assert output.loops.item() == sum(num_loops) == counts[1] == counts[2]
    assert output.forward_passes.item() == len(num_loops) * (2 if guided else 1) == counts[0] == counts[3]
    assert output.layer_passes.item() == sum(counts)
    assert output.tokens_per_forward.item() == pytest.approx(6 / output.forward_passes.item())


def test_reported_cost_of_a_batch_adds_up(model):
    counts, hooks = count_passes(model)
    batch = torch.tensor([[PAD, 5, 9], [4, MASK, MASK], [1, 2, 3]])
    output = model.generate(
        batch,
        max_new_tokens=8,
        num_loops=[1, 2],
        block_length=3,
        eos_token_id=list(range(6, 12)),
        return_dict_in_generate=True,
    )
    for hook in hooks:
        hook.remove()
    assert len(output.forward_passes.unique()) > 1
    assert output.forward_passes.sum() == counts[0]
    assert output.loops.sum() == counts[1]
    assert output.layer_passes.sum() == sum(counts)


def test_blocks_behind_every_end_are_skipped():
    model = end_model(0.9, *[0.1] * 9)
    output = end_tokens(model, block_length=2, unmasking="left_to_right")
    assert len(model.inputs) == output.forward_passes.item() == 1
    # Blocks of given tokens cost nothing either.
    mask = model.config.mask_token_id
    output = end_tokens(model, torch.tensor([[mask, 0, 0, 0, 0, 0, 0, 0, 0, mask]]), block_length=2)
    assert output.forward_passes.item() == 2


# Streaming


class Recorder:
    """A streamer without drafts."""

    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        assert value.ndim == 1 and value.device.type == "cpu"
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


class DraftRecorder(Recorder):
    def __init__(self):
        super().__init__()
        self.drafts = []

    def put_draft(self, value):
        self.drafts.append((len(self.puts), value.tolist()))


@pytest.mark.parametrize(
    ("prompt", "arguments"),
    [
        ([5, 9, 3], {}),
        ([5, 9, 3], {"block_length": 3}),
        ([PAD, PAD, 5], {"block_length": 3}),
        ([5, 9, PAD, PAD], {"block_length": 3}),
        ([MASK, 5, MASK, 9, 9, 9, 9, MASK, 3], {"block_length": 2}),
        ([MASK, MASK], {"block_length": 3}),
        ([5, 9, 3], {"block_length": 3, "eos_token_id": list(range(6, 15))}),
        ([5, 9, 3], {"block_length": 3, "stopping_criteria": [MaxLengthCriteria(5)]}),
    ],
    ids=["one block", "blocks", "left padding", "right padding", "infilling", "no prompt", "end token", "stopped"],
)
def test_streamed_tokens_are_the_sequence(model, prompt, arguments):
    streamer = DraftRecorder()
    sequence = model.generate(torch.tensor([prompt]), max_new_tokens=8, streamer=streamer, **arguments)[0].tolist()
    streamed = [token for put in streamer.puts for token in put]
    text = [token for token in sequence if token != PAD]
    assert PAD not in streamed and MASK not in streamed
    assert streamed == text
    assert streamer.ended
    # The prompt up to the first [MASK] comes first, empty or not, as `skip_prompt` expects.
    first = prompt.index(MASK) if MASK in prompt else len(prompt)
    assert streamer.puts[0] == [token for token in prompt[:first] if token != PAD]


def test_drafts_show_the_block_as_it_stands(model):
    streamer = DraftRecorder()
    model.generate(torch.tensor([[5, 9]]), max_new_tokens=6, block_length=3, streamer=streamer)
    assert [len(put) for put in streamer.puts] == [2, 3, 3]
    for block in (1, 2):
        drafts = [draft for number, draft in streamer.drafts if number == block]
        assert [draft.count(MASK) for draft in drafts] == [2, 1, 0]
        assert drafts[-1] == streamer.puts[block]


def test_one_row_is_streamed(model):
    for batch, arguments in ((2, {}), (1, {"num_return_sequences": 2, "do_sample": True})):
        with pytest.raises(ValueError, match="`streamer` shows one row, and there are 2"):
            model.generate(torch.full((batch, 2), 5), max_new_tokens=2, streamer=Recorder(), **arguments)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"[PAD]": PAD, "[MASK]": MASK} | {f"w{i}": i for i in range(1, 22)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", mask_token="[MASK]")


@pytest.mark.parametrize("streamer_class", [TextStreamer, TextDiffusionStreamer])
@pytest.mark.parametrize("skip_prompt", [False, True])
@pytest.mark.parametrize("prompt", ["w5 w9", "[MASK]"])
def test_text_streamers(model, tokenizer, capsys, streamer_class, skip_prompt, prompt):
    inputs = tokenizer(prompt, return_tensors="pt").input_ids
    streamer = streamer_class(tokenizer, skip_prompt=skip_prompt)
    sequence = model.generate(inputs, max_new_tokens=6, block_length=2, streamer=streamer)
    printed = capsys.readouterr().out
    if streamer_class is TextDiffusionStreamer:
        assert "[MASK]" in printed  # in drafts, which are erased again
        printed = re.sub("\0337.*?\0338\033\\[J", "", printed, flags=re.DOTALL)
    start = inputs.shape[1] if skip_prompt and prompt != "[MASK]" else 0
    assert printed.split() == tokenizer.decode(sequence[0, start:]).split()


def test_text_iterator_streamer(model, tokenizer):
    inputs = tokenizer("w5 w9", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    arguments = {"input_ids": inputs, "max_new_tokens": 6, "block_length": 2, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = model.generate(inputs, max_new_tokens=6, block_length=2)
    assert text.split() == tokenizer.decode(expected[0, 2:]).split()


# Trace


@pytest.mark.parametrize(
    "arguments",
    [
        {"block_length": 3},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_denoising_steps": 4},
        {"unmasking": "ancestral", "remask_probability": 0.3, "max_denoising_steps": 12},
        {"num_loops": [1, 4], "guidance_scale": 1.5},
    ],
    ids=str,
)
def test_trace_replays_to_the_result(model, arguments):
    prompt = torch.tensor([[5, MASK, 9], [PAD, 4, 8]])
    output = model.generate(
        prompt,
        max_new_tokens=7,
        return_dict_in_generate=True,
        output_trace=True,
        generator=seeded(3),
        **arguments,
    )
    tokens = torch.cat((prompt, torch.full((2, 7), MASK)), dim=1)
    real = torch.cat((prompt != PAD, torch.ones(2, 7, dtype=torch.bool)), dim=1)
    for step in output.trace:
        changed = step.committed | step.remasked
        assert (tokens[step.committed] == MASK).all() and (step.tokens[step.committed] != MASK).all()
        assert (tokens[step.remasked] != MASK).all() and (step.tokens[step.remasked] == MASK).all()
        assert torch.equal(step.tokens[~changed], tokens[~changed])
        scored = ~step.confidence.isnan()
        assert torch.equal(scored, ~step.log_probs.isnan())
        assert (tokens[scored] == MASK).all() and scored[step.committed].all()

        # Scores of the committed tokens, recomputed from the sequences before the step
        for row in step.committed.any(-1).nonzero().flatten().tolist():
            # Loops are 0 where the scores are those of the step before.
            guidance, loops = arguments.get("guidance_scale", 1.0), step.loops[row].item() or model.config.num_loops
            inputs = tokens[row : row + 1]
            num_loops = loops if guidance == 1 else loops // 2
            with torch.no_grad():
                logits = model(inputs, real[row : row + 1].long(), num_loops=num_loops).logits[0]
                if guidance != 1:
                    given = torch.cat((prompt[row] != MASK, torch.zeros(7, dtype=torch.bool)))
                    blank = inputs.masked_fill(given & real[row], MASK)
                    blank = model(blank, real[row : row + 1].long(), num_loops=num_loops).logits[0]
                    logits = blank + guidance * (logits - blank)
            logits[:, MASK] = -math.inf
            chosen = step.tokens[row][step.committed[row]][:, None]
            logits = logits[step.committed[row]]
            confidence = logits.softmax(-1).gather(1, chosen)[:, 0]
            torch.testing.assert_close(step.confidence[row][step.committed[row]], confidence, atol=1e-4, rtol=1e-4)
            if "top_k" in arguments:
                logits = logits / 0.7
                logits = logits.masked_fill(logits < logits.topk(5).values[:, -1:], -math.inf)
            log_probs = logits.log_softmax(-1).gather(1, chosen)[:, 0]
            torch.testing.assert_close(step.log_probs[row][step.committed[row]], log_probs, atol=1e-4, rtol=1e-4)
        tokens = step.tokens
    assert torch.equal(tokens, output.sequences)
    blocks = [(step.block, step.step) for step in output.trace]
    assert blocks == sorted(blocks) and len(set(blocks)) == len(blocks)
    loops = torch.stack([step.loops for step in output.trace])
    assert torch.equal(loops.sum(0), output.loops)


# Generation config


def test_generation_config_json_round_trip(tmp_path):
    values = {
        "max_new_tokens": 0,
        "num_loops": [1, 2, 4],
        "loop_tolerance": 0.05,
        "block_length": 8,
        "max_denoising_steps": 5,
        "unmasking": "margin",
        "entropy_bound": 0.5,
        "remask_probability": 0.1,
        "eos_penalty": 0.2,
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.1,
        "num_return_sequences": 2,
        "guidance_scale": 1.5,
        "pad_token_id": 0,
        "eos_token_id": [1, 2],
    }
    for expected in (LoopMDMGenerationConfig(), LoopMDMGenerationConfig(**values)):
        expected.save_pretrained(tmp_path)
        loaded = LoopMDMGenerationConfig.from_pretrained(tmp_path)
        for name in LoopMDMGenerationConfig.DEFAULTS:
            assert getattr(loaded, name) == getattr(expected, name), name
    assert LoopMDMGenerationConfig.from_pretrained(tmp_path, temperature=0.5).temperature == 0.5
    (tmp_path / "generation_config.json").write_text('{"steps": 3}')
    with pytest.raises(ValueError, match="`generate` takes no argument `steps`: use `max_denoising_steps`"):
        LoopMDMGenerationConfig.from_pretrained(tmp_path)


def test_generation_config_goes_with_the_model(tmp_path):
    model = tiny_model(eos_token_id=[3, 4], bos_token_id=2)
    assert isinstance(model.generation_config, LoopMDMGenerationConfig)
    for name, value in (("eos_token_id", [3, 4]), ("bos_token_id", 2), ("pad_token_id", PAD)):
        assert getattr(model.generation_config, name) == value
    model.generation_config.block_length = 5
    model.save_pretrained(tmp_path)
    loaded = LoopMDMForMaskedLM.from_pretrained(tmp_path).generation_config
    assert isinstance(loaded, LoopMDMGenerationConfig)
    assert (loaded.block_length, loaded.eos_token_id) == (5, [3, 4])


def test_arguments_override_the_config_and_leave_it(model):
    prompt = torch.tensor([[5, 9]])
    config = LoopMDMGenerationConfig(max_new_tokens=3, unmasking="entropy")
    own, given = (copy.deepcopy(one.to_dict()) for one in (model.generation_config, config))
    assert model.generate(prompt, generation_config=config).shape == (1, 5)
    assert model.generate(prompt, generation_config=config, max_new_tokens=4).shape == (1, 6)
    assert torch.equal(
        model.generate(prompt, generation_config=config, unmasking="left_to_right"),
        model.generate(prompt, max_new_tokens=3, unmasking="left_to_right"),
    )
    assert config.to_dict() == given
    assert model.generation_config.to_dict() == own


def test_config_of_transformers_is_taken_over(model):
    prompt = torch.tensor([[5, 9]])
    plain = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=0.5, top_k=4, eos_token_id=3)
    arguments = {"max_new_tokens": 5, "do_sample": True, "temperature": 0.5, "top_k": 4, "eos_token_id": 3}
    assert torch.equal(
        model.generate(prompt, generation_config=plain, generator=seeded(0)),
        model.generate(prompt, **arguments, generator=seeded(0)),
    )
    with pytest.raises(ValueError, match="`num_beams`: masked diffusion has no beams"):
        model.generate(prompt, generation_config=GenerationConfig(num_beams=4, max_new_tokens=5))


def test_config_of_transformers_on_the_model():
    model = tiny_model()
    prompt = torch.tensor([[5, 9]])
    expected = model.generate(prompt, max_new_tokens=4)
    model.generation_config = GenerationConfig(max_new_tokens=4)
    assert torch.equal(model.generate(prompt), expected)
    assert type(model.generation_config) is GenerationConfig


def test_special_tokens_of_the_model_fill_those_of_a_config():
    model = end_model(0.1, 0.9, 0.1)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, 2
    for config in (LoopMDMGenerationConfig(unmasking="left_to_right"), GenerationConfig()):
        arguments = {"generation_config": config, "unmasking": "left_to_right"}
        assert model.generate(model.masks(), **arguments).tolist() == [[0, END, 2]]
        assert model.generate(model.masks(), eos_token_id=None, **arguments).tolist() == [[0, END, 0]]


# Bad input


PROMPT = torch.tensor([[5, 9, 3]])
BAD_ARGUMENTS = [
    ({"steps": 8}, "no argument `steps`: use `max_denoising_steps`"),
    ({"gen_length": 8}, "no argument `gen_length`: use `max_new_tokens`"),
    ({"num_beams": 2}, "no argument `num_beams`: masked diffusion has no beams"),
    ({"max_new_tokenz": 8}, "no argument `max_new_tokenz`: did you mean `max_new_tokens`?"),
    ({"remask_prob": 0.1}, "no argument `remask_prob`: did you mean `remask_probability`?"),
    ({"xyz": 1}, "no argument `xyz`: see LoopMDMGenerationConfig"),
    ({"use_cache": True}, "`use_cache=True` needs block-causal attention"),
    ({"num_loops": [1, 2, 4], "max_denoising_steps": 2}, "`num_loops` lists the loops of 3 steps"),
    ({"max_new_tokens": -1}, "`max_new_tokens` is -1; it must be an integer of at least 0"),
    ({"max_new_tokens": 2.0}, "`max_new_tokens` is 2.0; it must be an integer"),
    ({"max_new_tokens": 0}, "nothing to generate: `max_new_tokens` is 0 and the input holds no mask token (22)"),
    ({"max_new_tokens": None}, "nothing to generate: `max_new_tokens` is None"),
    ({"max_new_tokens": None, "max_length": 2}, "The input has 3 tokens, more than `max_length` (2)"),
    ({"max_new_tokens": 62}, "3 tokens of input and 62 new ones exceed `max_position_embeddings` (64)"),
    ({"eos_token_id": "a"}, "`eos_token_id` is 'a'; a token id is an integer"),
    ({"pad_token_id": -1}, "`pad_token_id` is -1; a token id is an integer of at least 0"),
    ({"num_return_sequences": 2}, "`num_return_sequences` is 2, but all answers would be the same"),
    ({"num_return_sequences": 0, "do_sample": True}, "`num_return_sequences` is 0; it must be"),
    ({"block_length": 0}, "`block_length` is 0; it must be an integer of at least 1"),
    ({"max_denoising_steps": 0}, "`max_denoising_steps` is 0; it must be an integer of at least 1"),
    ({"max_denoising_steps": True}, "`max_denoising_steps` is True; it must be an integer"),
    ({"unmasking": "low_confidence"}, "`unmasking` is 'low_confidence'; choose one of ancestral, confidence"),
    ({"unmasking": None}, "`unmasking` is None; choose one of"),
    ({"temperature": 0.5}, "`temperature` is 0.5 without effect; add `do_sample=True`"),
    ({"top_k": 5}, "`top_k` is 5 without effect; add `do_sample=True`"),
    ({"top_p": 0.5, "unmasking": "ancestral"}, "`top_p` is 0.5 without effect; add `do_sample=True`"),
    ({"temperature": math.nan, "do_sample": True}, "`temperature` is nan; it must be a number"),
    ({"temperature": math.inf, "do_sample": True}, "`temperature` is inf; it must be a number"),
    ({"temperature": -1.0, "do_sample": True}, "`temperature` is -1.0; it must be a number"),
    ({"temperature": None, "do_sample": True}, "`temperature` is None; it must be a number"),
    ({"temperature": 0.0, "do_sample": True}, "`temperature` is 0; it must be positive (use `do_sample=False`"),
    ({"temperature": "hot", "do_sample": True}, "`temperature` is 'hot'; it must be a number"),
    ({"top_p": 1.5, "do_sample": True}, "`top_p` is 1.5; it must be a number from 0 to 1"),
    ({"top_p": 0.0, "do_sample": True}, "`top_p` is 0; it must be positive (leave it out)"),
    ({"min_p": -0.5, "do_sample": True}, "`min_p` is -0.5; it must be a number from 0 to 1"),
    ({"top_k": 0, "do_sample": True}, "`top_k` is 0; it must be an integer of at least 1"),
    ({"confidence_threshold": 1.5}, "`confidence_threshold` is 1.5; it must be a number from 0 to 1"),
    ({"confidence_threshold": 0.0}, "`confidence_threshold` is 0; it must be positive"),
    ({"confidence_threshold": math.nan}, "`confidence_threshold` is nan; it must be a number"),
    ({"entropy_bound": -1.0}, "`entropy_bound` is -1.0; it must be a number"),
    ({"entropy_bound": 1.0, "confidence_threshold": 0.5}, "`confidence_threshold` and `entropy_bound` exclude"),
    ({"entropy_bound": 1.0, "unmasking": "ancestral"}, '`entropy_bound` does not go with `unmasking="ancestral"`'),
    ({"remask_probability": 1.1}, "`remask_probability` is 1.1; it must be a number from 0 to 1"),
    ({"remask_probability": None}, "`remask_probability` is None; it must be a number"),
    ({"eos_penalty": -0.1}, "`eos_penalty` is -0.1; it must be a number"),
    ({"guidance_scale": -1.0}, "`guidance_scale` is -1.0; it must be a number"),
    ({"loop_tolerance": -0.1}, "`loop_tolerance` is -0.1; it must be a number"),
    ({"loop_tolerance": math.nan}, "`loop_tolerance` is nan; it must be a number"),
    ({"num_loops": 0}, "`num_loops` is 0; it must be an integer of at least 1"),
    ({"num_loops": -1}, "`num_loops` is -1; it must be"),
    ({"num_loops": 1.5}, "`num_loops` is 1.5; it must be"),
    ({"num_loops": True}, "`num_loops` is True; it must be"),
    ({"num_loops": []}, "`num_loops` is an empty list"),
    ({"num_loops": [2, 0]}, "`num_loops` is 0; it must be"),
    ({"num_loops": ["a"]}, "`num_loops` is 'a'; it must be"),
    ({"output_trace": True}, "`output_trace` needs `return_dict_in_generate=True`"),
    ({"generator": [seeded(0), seeded(1)]}, "`generator` holds 2 generators for 1 rows"),
    ({"generator": [7]}, "`generator` is 7; it must be a torch.Generator"),
    ({"generator": 7}, "`generator` is 7; it must be a torch.Generator"),
    ({"pad_token_id": MASK}, "`pad_token_id` is the mask token (22)"),
    ({"eos_token_id": [1, MASK]}, "`eos_token_id` is the mask token (22)"),
    ({"input_ids": None}, "`input_ids` is missing"),
    ({"input_ids": PROMPT.float()}, "`input_ids` is torch.float32; token ids are int64 or int32"),
    ({"input_ids": PROMPT[0]}, "`input_ids` has shape (3,); it needs (batch_size, length)"),
    ({"input_ids": PROMPT[:0]}, "`input_ids` has shape (0, 3); it needs (batch_size, length), at least one row"),
    ({"input_ids": torch.tensor([[5, 23]])}, "`input_ids` holds 23, outside the vocabulary of 23 tokens"),
    ({"input_ids": torch.tensor([[5, -1]])}, "`input_ids` holds -1, outside the vocabulary of 23 tokens"),
    ({"input_ids": torch.tensor([[5, 9], [0, 0]])}, "Rows [1] of the input are all padding; leave them out"),
    ({"attention_mask": torch.ones(1, 4)}, "`attention_mask` has shape (1, 4); `input_ids` has (1, 3)"),
    ({"attention_mask": torch.zeros(1, 3)}, "Rows [0] of the input are all padding"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=[message for _, message in BAD_ARGUMENTS])
def test_bad_arguments_are_named_before_anything_runs(model, monkeypatch, arguments, message):
    def forward(*args, **kwargs):
        raise AssertionError("the model was called")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(**{"input_ids": PROMPT, "max_new_tokens": 4} | arguments)


def test_damped_loops_have_no_tolerance():
    with pytest.raises(ValueError, match='`loop_tolerance` needs `loop_update="replace"`'):
        tiny_model(loop_update="damped").generate(PROMPT, max_new_tokens=2, loop_tolerance=0.1)
