# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What training is made of: the collator against enumerated bounds, loop schedules, truncated and recomputed gradients,
packed documents, operations counted, and the readers of data.
"""

import itertools
import json
import math
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_config, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from loopmdm.training import (
    LOOP_SCHEDULES,
    LoopSamplingCallback,
    LoopSchedule,
    MaskedDiffusionCollator,
    StreamedExamples,
    draw_num_loops,
    encode_answer,
    make_loop_schedule,
    pack_documents,
    read_documents,
    read_jsonl,
    set_num_train_loops,
    training_flops,
)

MASK, PAD = 22, 0
SMALL = {"vocab_size": 6, "mask_token_id": 5, "pad_token_id": 0, "hidden_size": 16, "intermediate_size": 24}
SMALL_MASK = SMALL["mask_token_id"]
EXACT = {"rtol": 0, "atol": 1e-12}


def examples(count: int, length: int = 6, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(1, 22, (length,), generator=generator), "index": index} for index in range(count)
    ]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- collator ---


@torch.no_grad()
def exact_nelbo(model, row, maskable=None, num_loops=2, ratio_counts=None) -> float:
    """
    Nats of a row by every mask of every block, each number of masked tokens equally likely. `ratio_counts(size)`: the
    numbers of masked tokens that occur, by default all.
    """
    row = torch.as_tensor(row)
    positions = list(range(len(row))) if maskable is None else maskable
    size = model.config.attention_block_size or len(row)
    total = 0.0
    for start in range(0, len(row), size):
        members = [position for position in positions if start <= position < start + size]
        if not members:
            continue
        counts = range(1, len(members) + 1) if ratio_counts is None else ratio_counts(len(members))
        for count in counts:
            subsets = list(itertools.combinations(members, count))
            noised = row.repeat(len(subsets), 1)
            for i, subset in enumerate(subsets):
                noised[i, list(subset)] = SMALL_MASK
            if model.config.attention_block_size is not None:
                noised[:, start + size :] = 1  # out of sight
            logits = model(noised, num_loops=num_loops).logits.double()
            logits[..., SMALL_MASK] = -math.inf
            log_probs = logits.log_softmax(-1)
            for i, subset in enumerate(subsets):
                picked = log_probs[i, list(subset), row[list(subset)]].sum().item()
                total -= picked * len(members) / count / len(subsets) / len(counts)
    return total


@torch.no_grad()
def assert_loss_is(expected: float, model, collator, make_rows, batches: int = 20, tolerance: float = 0.05):
    """The mean loss over the collator's noise is `expected`, within four standard errors, themselves small."""
    losses = []
    for start in range(batches):
        batch = collator(make_rows(10_000 * start))
        losses.append(model(**batch, num_loops=2).loss.item())
    losses = torch.tensor(losses, dtype=torch.float64)
    error = losses.std().item() / math.sqrt(batches)
    assert error < tolerance * expected
    assert abs(losses.mean().item() - expected) < 4 * error + 1e-6


def repeated(row: dict, count: int = 24):
    return lambda start: [{**row, "index": start + i} for i in range(count)]


ROW = [3, 1, 4, 1, 2]


@pytest.mark.parametrize(("block_size", "complementary"), [(None, True), (2, False), (3, False), (2, True)])
def test_loss_estimates_the_enumerated_nelbo(block_size, complementary):
    model = tiny_model(**SMALL, attention_block_size=block_size)
    collator = MaskedDiffusionCollator(SMALL_MASK, 0, block_size=block_size, complementary=complementary)
    expected = exact_nelbo(model, ROW) / len(ROW)
    assert_loss_is(expected, model, collator, repeated({"input_ids": ROW}))


@pytest.mark.parametrize(("how", "block_size"), [("prompt_length", None), ("maskable", 2), ("both", 2)])
def test_loss_is_of_the_maskable_tokens_alone(how, block_size):
    model = tiny_model(**SMALL, attention_block_size=block_size)
    collator = MaskedDiffusionCollator(SMALL_MASK, 0, block_size=block_size)
    row, maskable = {
        "prompt_length": ({"prompt_length": 3}, [3, 4]),
        "maskable": ({"maskable": [True, False, True, True, False]}, [0, 2, 3]),
        "both": ({"prompt_length": 1, "maskable": [True, False, True, False, True]}, [2, 4]),
    }[how]
    row["input_ids"] = ROW
    expected = exact_nelbo(model, ROW, maskable) / len(maskable)
    assert_loss_is(expected, model, collator, repeated(row))
    batch = collator([{**row, "index": 0}])
    assert (batch["labels"][0] != -100).nonzero().flatten().tolist() == maskable


@pytest.mark.parametrize(
    ("block_size", "shift_logits", "complementary"),
    [(None, False, False), (2, False, False), (None, True, True), (2, True, True)],
)
def test_packed_documents_have_the_nelbo_of_each_alone(block_size, shift_logits, complementary):
    model = tiny_model(**SMALL, attention_block_size=block_size, shift_logits=shift_logits)
    collator = MaskedDiffusionCollator(SMALL_MASK, 0, block_size=block_size, complementary=complementary)
    documents = [[3, 1, 4], [2], [4, 4, 1, 3]]
    row = {"input_ids": [3, 1, 4, 2, 4, 4, 1, 3], "document_ids": [7, 7, 7, 1, 2, 2, 2, 2]}
    expected = sum(exact_nelbo(model, document) for document in documents) / 8
    assert_loss_is(expected, model, collator, repeated(row))


def test_learned_padding_counts_as_tokens():
    model = tiny_model(**SMALL)
    collator = MaskedDiffusionCollator(SMALL_MASK, 1, learn_padding=True)

    def rows(start):
        return [{"input_ids": ids, "index": start + i} for i, ids in enumerate([[3, 2], [4, 4, 2, 3, 2]] * 16)]

    batch = collator(rows(0))
    assert bool((batch["attention_mask"] == 1).all()) and batch["labels"][0].tolist() == [3, 2, 1, 1, 1]
    expected = (exact_nelbo(model, [3, 2, 1, 1, 1]) + exact_nelbo(model, [4, 4, 2, 3, 2])) / 10
    assert_loss_is(expected, model, collator, rows)
    # A prompt stays a prompt
    batch = collator([{"input_ids": [3, 2], "prompt_length": 1, "index": 0}, {"input_ids": ROW, "index": 1}])
    assert batch["labels"][0].tolist() == [-100, 2, 1, 1, 1]


def test_padding_is_not_learnt_otherwise():
    model = tiny_model(**SMALL)
    collator = MaskedDiffusionCollator(SMALL_MASK, 0)

    def rows(start):
        return [{"input_ids": ids, "index": start + i} for i, ids in enumerate([[3, 2], ROW] * 16)]

    expected = (exact_nelbo(model, [3, 2]) + exact_nelbo(model, ROW)) / 7
    assert_loss_is(expected, model, collator, rows)


@pytest.mark.parametrize("mask_ratio", [(0.0, 0.5), (0.5, 1.0), (0.25, 0.75), (0.3, 0.31)])
def test_mask_ratio_sets_the_range_of_counts(mask_ratio):
    """k = ceil(u L) with u uniform in the range: the counts are from floor(low L) + 1 to ceil(high L)."""
    length = 8
    collator = MaskedDiffusionCollator(MASK, PAD, mask_ratio=mask_ratio)
    low, high = math.floor(mask_ratio[0] * length) + 1, math.ceil(mask_ratio[1] * length)
    seen = Counter()
    for start in range(0, 3200, 64):
        batch = collator([{**row, "index": start + i} for i, row in enumerate(examples(64, length))])
        counts = (batch["input_ids"] == MASK).sum(-1)
        torch.testing.assert_close(batch["loss_weights"].sum(-1), torch.full((64,), 8.0))
        seen.update(counts.tolist())
    assert set(seen) == set(range(low, high + 1))
    expected = 3200 / (high - low + 1)
    assert all(abs(count - expected) < 65 for count in seen.values()), "evenly, as the rows of a batch are spread"


def test_narrow_mask_ratio_has_the_mean_over_its_range():
    model = tiny_model(**SMALL)
    collator = MaskedDiffusionCollator(SMALL_MASK, 0, mask_ratio=(0.25, 0.75))
    expected = exact_nelbo(model, [3, 1, 4, 2], ratio_counts=lambda size: [2, 3]) / 4
    assert_loss_is(expected, model, collator, repeated({"input_ids": [3, 1, 4, 2]}))


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt_length": 2},
        {"maskable": [False, True, True, False, True, True, True]},
        {"document_ids": [0, 0, 0, 1, 2, 2, 2]},
    ],
    ids=str,
)
@pytest.mark.parametrize("block_size", [None, 2])
def test_complementary_rows_mask_every_token_once(row, block_size):
    collator = MaskedDiffusionCollator(MASK, PAD, block_size=block_size, complementary=True)
    clean = torch.tensor([5, 6, 7, 8, 9, 10, 11])
    whole = 0
    for start in range(0, 120, 4):
        batch = collator([{"input_ids": clean, **row, "index": start + i} for i in range(4)])
        assert {tensor.shape for tensor in batch.values()} == {(8, 7)}
        masked, weights = batch["input_ids"] == MASK, batch["loss_weights"]
        assert torch.equal(weights > 0, masked)
        assert torch.equal(batch["input_ids"][~masked], clean.expand(8, 7)[~masked])
        for i in range(4):
            first, second = masked[i], masked[i + 4]
            learnt = batch["labels"][i] != -100
            assert torch.equal(batch["labels"][i], batch["labels"][i + 4])
            documents = batch["document_ids"][i] if "document_ids" in batch else torch.zeros(7, dtype=torch.long)
            for document in documents.unique() if block_size else [None]:
                own = learnt if document is None else learnt & (documents == document)
                if not own.any():
                    continue
                start_of = int((documents == document).nonzero()[0]) if block_size else 0
                block_of = (torch.arange(7) - start_of) // (block_size or 7)
                blocks = block_of[own].unique()
                # one and the same block in both rows, or all of the row
                drawn = block_of[(first | second) & own].unique()
                assert len(drawn) == 1
                members = own & (block_of == drawn)
                size = int(members.sum())
                if bool(first[members].all()):
                    whole += 1
                    assert bool(second[members].all())
                else:
                    assert torch.equal(first[members], ~second[members])
                for mask, weight in ((first, weights[i]), (second, weights[i + 4])):
                    expected = len(blocks) * size / int((mask & members).sum())
                    torch.testing.assert_close(
                        weight[mask & members], torch.full_like(weight[mask & members], expected)
                    )
    assert whole > 0, "some rows are masked whole"


@pytest.mark.parametrize("block_size", [2, 4, 5, 100])
def test_one_block_of_a_row_is_masked(block_size):
    collator = MaskedDiffusionCollator(MASK, PAD, block_size=block_size)
    num_blocks = math.ceil(10 / block_size)
    seen = Counter()
    for start in range(0, 960, 12):
        batch = collator([{**row, "index": start + i} for i, row in enumerate(examples(12, 10))])
        for masked, weights in zip(batch["input_ids"] == MASK, batch["loss_weights"], strict=True):
            (block,) = (masked.nonzero().flatten() // block_size).unique().tolist()
            size = min(block_size, 10 - block * block_size)
            expected = torch.where(masked, num_blocks * size / masked.sum(), 0.0)
            torch.testing.assert_close(weights, expected)
            seen[block] += 1
    assert set(seen) == set(range(num_blocks))
    assert all(abs(count - 960 / num_blocks) < 4 * math.sqrt(960 / num_blocks) + 1 for count in seen.values())


def test_noise_depends_on_seed_index_and_place_alone():
    def noise(rows, seed=3, global_seed=0):
        torch.manual_seed(global_seed)
        return MaskedDiffusionCollator(MASK, PAD, seed=seed)(rows)["input_ids"] == MASK

    rows = examples(4, 9)
    reference = noise(rows)
    assert torch.equal(noise(rows, global_seed=9), reference)
    state = torch.get_rng_state()
    MaskedDiffusionCollator(MASK, PAD)(rows)
    assert torch.equal(torch.get_rng_state(), state), "and draws nothing from the global generator"
    # Neither the tokens nor the other rows' tokens and indexes matter, only the first row's offset is shared.
    others = [{**row, "index": 100 + i} for i, row in enumerate(examples(4, 9, seed=5))]
    assert torch.equal(noise([rows[0], rows[1], others[2], others[3]])[:2], reference[:2])
    assert torch.equal(noise([others[0] | {"index": 0}, rows[1], rows[2], rows[3]]), reference)
    assert not torch.equal(noise([others[0], *rows[1:]])[1:], reference[1:])
    assert not torch.equal(noise([rows[0], others[1], *rows[2:]])[1], reference[1])
    assert not torch.equal(noise(rows, seed=4), reference)


def test_clean_rows_are_padded_and_not_masked():
    collator = MaskedDiffusionCollator(MASK, PAD)
    rows = [
        {"input_ids": [5, 6, 7], "prompt_length": 1, "index": 0},
        {"input_ids": [8], "index": 1},
        {"input_ids": torch.tensor([1, 2]), "maskable": torch.tensor([True, False]), "index": 2, "other": "x"},
    ]
    batch = collator.clean(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, PAD, PAD], [1, 2, PAD]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
        "maskable": [[False, True, True], [True, False, False], [True, False, False]],
    }
    assert batch["maskable"].dtype == torch.bool and batch["input_ids"].dtype == torch.long
    assert "other" not in collator(rows), "other keys are left out"


def test_shapes_and_dtypes_of_a_batch():
    rows = [{**row, "document_ids": [3, 3, 4, 4, 4, 9], "index": i} for i, row in enumerate(examples(2))]
    rows[1] = {"input_ids": rows[1]["input_ids"][:3], "document_ids": [0, 0, 1], "index": 1}
    batch = MaskedDiffusionCollator(MASK, PAD)(rows)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()} == {
        "input_ids": ((2, 6), torch.int64),
        "labels": ((2, 6), torch.int64),
        "attention_mask": ((2, 6), torch.int64),
        "document_ids": ((2, 6), torch.int64),
        "loss_weights": ((2, 6), torch.float32),
    }
    assert batch["document_ids"].tolist() == [[3, 3, 4, 4, 4, 9], [0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ({"input_ids": [1, 2]}, {}, "An example has no `index`"),
        ({"input_ids": [1, MASK], "index": 7}, {}, r"Example 7 holds the mask token \(22\)"),
        ({"input_ids": [1, 2, 3], "index": 8}, {"max_length": 2}, "Example 8 has 3 tokens, more than the 2 allowed"),
        ({"input_ids": [1, 2], "prompt_length": 2, "index": 9}, {}, "Example 9 has no maskable token"),
        ({"input_ids": [1, 2], "maskable": [0, 0], "index": 4}, {}, "Example 4 has no maskable token"),
        ({"input_ids": [], "index": 5}, {}, "Example 5 has no maskable token"),
    ],
    ids=["no index", "mask token", "too long", "prompt alone", "nothing maskable", "empty"],
)
def test_bad_examples_are_named(example, options, message):
    collator = MaskedDiffusionCollator(MASK, PAD, **options)
    for call in (collator, collator.clean):
        with pytest.raises(ValueError, match=message):
            call([{"input_ids": [1, 2], "index": 0}, example])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": (0.5, 0.5)}, r"`mask_ratio` is \(0.5, 0.5\)"),
        ({"mask_ratio": (0.7, 0.2)}, "`mask_ratio`"),
        ({"mask_ratio": (-0.1, 0.2)}, "`mask_ratio`"),
        ({"mask_ratio": (0.1, 1.2)}, "`mask_ratio`"),
        ({"mask_ratio": (math.nan, 1.0)}, "`mask_ratio`"),
        ({"pad_token_id": MASK}, r"`pad_token_id` is the mask token \(22\)"),
        ({"pad_token_id": None, "learn_padding": True}, "`learn_padding` needs a `pad_token_id`"),
    ],
    ids=str,
)
def test_bad_options_of_the_collator(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionCollator(MASK, **{"pad_token_id": PAD, **options})


def test_max_length_itself_is_allowed():
    batch = MaskedDiffusionCollator(MASK, PAD, max_length=2)([{"input_ids": [1, 2], "index": 0}])
    assert batch["input_ids"].shape == (1, 2)


@pytest.mark.parametrize("key", ["maskable", "document_ids"])
def test_lists_of_another_length_are_named(key):
    rows = [{"input_ids": [1, 2, 3], key: [1, 1], "index": 6}, {"input_ids": [1, 2, 3], key: [1, 1, 1], "index": 7}]
    try:
        MaskedDiffusionCollator(MASK, PAD)(rows)
    except Exception as error:
        assert isinstance(error, ValueError) and "Example 6" in str(error) and key in str(error), error
    else:
        raise AssertionError("accepted")


def test_rows_with_and_without_documents_in_a_batch():
    plain, packed = (
        {"input_ids": [1, 2, 3], "index": 0},
        {"input_ids": [4, 5, 6], "document_ids": [0, 1, 1], "index": 1},
    )
    try:
        batch = MaskedDiffusionCollator(MASK, PAD)([plain, packed])
    except ValueError:
        return  # refused: fine too
    assert batch["document_ids"][1].tolist() == [0, 1, 1]


# --- loop schedules ---


def assert_frequencies(draws: list[int], probabilities: torch.Tensor):
    """Chi-square, bins of fewer than five expected draws put together; four deviations above its mean at most."""
    counts = Counter(draws)
    rest_seen, rest_expected, statistic, bins = 0, 0.0, 0.0, 0
    for loops, probability in enumerate(probabilities.tolist(), start=1):
        seen, expected = counts.pop(loops, 0), probability * len(draws)
        if probability == 0:
            assert seen == 0
        elif expected < 5:
            rest_seen, rest_expected = rest_seen + seen, rest_expected + expected
        else:
            statistic += (seen - expected) ** 2 / expected
            bins += 1
    if rest_expected > 0.5:
        statistic += (rest_seen - rest_expected) ** 2 / rest_expected
        bins += 1
    assert not counts, "nothing outside 1..max_loops"
    assert statistic <= (bins - 1) + 4 * math.sqrt(2 * max(bins - 1, 0)) + 1e-9


SCHEDULES = [
    ("uniform", {}),
    ("fixed", {}),
    ("weighted", {}),
    ("weighted", {"power": -1.5}),
    ("growing", {}),
    ("growing", {"growth": 1.0}),
    ("late", {}),
    ("late", {"start": 0.2, "min_loops": 5, "plain": 0.0}),
    ("flops", {}),
    ("poisson", {}),
    ("poisson", {"mean_loops": 3.0, "sigma": 0.0}),
]


@pytest.mark.parametrize(("name", "options"), SCHEDULES, ids=str)
def test_draws_follow_the_probabilities(name, options):
    schedule = make_loop_schedule(name, tiny_config(), 7, **options)
    changing = name in ("growing", "late")
    for progress, steps in ((0.3, (3, 10)), (1.0, (10, 10))) if changing else ((0.0, (0, None)),):
        probabilities = schedule.probabilities(progress)
        assert probabilities.shape == (7,) and probabilities.dtype == torch.float64
        assert bool((probabilities >= 0).all()) and probabilities.sum().item() == pytest.approx(1, abs=1e-12)
        expected = sum(loops * p for loops, p in enumerate(probabilities.tolist(), start=1))
        assert schedule.mean(progress) == pytest.approx(expected, rel=1e-12)
        draws = [schedule.draw(seed, *steps) for seed in range(3000)]
        assert_frequencies(draws, probabilities)
    # and over the steps of one run
    if not changing:
        assert_frequencies([schedule.draw(11, step, 3000) for step in range(3000)], schedule.probabilities(0.0))


def test_a_draw_depends_on_seed_and_step_alone():
    for name in LOOP_SCHEDULES:
        schedule, again = (make_loop_schedule(name, tiny_config(), 6) for _ in range(2))
        torch.manual_seed(0)
        first = [schedule.draw(3, step, 50) for step in range(50)]
        torch.manual_seed(1)
        assert [again.draw(3, step, 50) for step in reversed(range(50))] == first[::-1]
        state = torch.get_rng_state()
        schedule.draw(0, 0, 1)
        assert torch.equal(torch.get_rng_state(), state)
        if name != "fixed":
            assert [schedule.draw(4, step, 50) for step in range(50)] != first
    assert [make_loop_schedule("uniform", tiny_config(), 6).draw(2, step) for step in range(50)] == [
        draw_num_loops(6, 2, step) for step in range(50)
    ]


def test_probabilities_are_those_of_the_definitions():
    config = tiny_config(num_hidden_layers=6, loop_start=1, loop_end=4)
    loops = torch.arange(1, 6, dtype=torch.float64)
    assert make_loop_schedule("uniform", config, 5).probabilities(0).tolist() == pytest.approx([0.2] * 5)
    assert make_loop_schedule("fixed", config, 5).probabilities(0).tolist() == [0, 0, 0, 0, 1]
    weighted = make_loop_schedule("weighted", config, 5, power=2).probabilities(0)
    torch.testing.assert_close(weighted, loops**2 / 55)
    # every S gets the same share of the computation
    flops = make_loop_schedule("flops", config, 5).probabilities(0)
    layers = torch.tensor([config.num_executed_layers(s) for s in range(1, 6)], dtype=torch.float64)
    torch.testing.assert_close(flops * layers, (flops * layers)[:1].expand(5))
    # a Poisson by its own formula, with what is beyond the limit at the limit
    poisson = make_loop_schedule("poisson", config, 5, mean_loops=3, sigma=0).probabilities(0)
    by_hand = [math.exp(-2) * 2**k / math.factorial(k) for k in range(4)]
    assert poisson.tolist() == pytest.approx([*by_hand, 1 - sum(by_hand)], rel=1e-9)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0])
def test_poisson_has_the_mean_asked_for(sigma):
    schedule = make_loop_schedule("poisson", tiny_config(), 400, mean_loops=9.0, sigma=sigma)
    assert schedule.mean() == pytest.approx(9.0, rel=1e-3)
    loops = torch.arange(1, 401, dtype=torch.float64)
    variance = float(schedule.probabilities(0) @ (loops - schedule.mean()) ** 2)
    # of a Poisson whose rate is log-normal: E[rate] + Var[rate]
    assert variance == pytest.approx(8 + 64 * (math.exp(sigma**2) - 1), rel=0.02)
    assert make_loop_schedule("poisson", tiny_config(), 400, mean_loops=1).mean() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("growth", [0.25, 0.5, 1.0])
def test_growing_loops_keep_to_their_limit(growth):
    schedule = make_loop_schedule("growing", tiny_config(), 8, growth=growth)
    limits, late = [], set()
    for step in range(1000):
        progress = step / 1000
        limit = int((schedule.probabilities(progress) > 0).nonzero().max()) + 1
        drawn = schedule.draw(0, step, 1000)
        assert 1 <= drawn <= limit <= 8
        assert progress < growth or limit == 8
        assert limit <= 1 + 8 * progress / growth + 1e-9
        limits.append(limit)
        late |= {drawn} if progress >= growth else set()
    assert limits == sorted(limits) and limits[0] == 1 and limits[-1] == 8
    steps_at = Counter(limits[: int(1000 * growth)])
    assert max(steps_at.values()) - min(steps_at.values()) <= 2, "it grows evenly"
    assert growth == 1 or late == set(range(1, 9))


def test_late_loops_start_late():
    schedule = make_loop_schedule("late", tiny_config(), 6)
    drawn = [schedule.draw(0, step, 1000) for step in range(1000)]
    assert set(drawn[:500]) == {1} and set(drawn[500:]) == {1, 3, 4, 5, 6}
    assert schedule.draw(0, 0) == 1  # of a run of unknown length: not begun
    assert schedule.probabilities(0.5).tolist() == pytest.approx([0.25, 0, *[0.75 / 4] * 4])
    assert make_loop_schedule("late", tiny_config(), 7).min_loops == 4
    options = {"start": 0.25, "min_loops": 2, "plain": 0.4}
    schedule = make_loop_schedule("late", tiny_config(), 4, **options)
    assert schedule.probabilities(0.2).tolist() == [1, 0, 0, 0]
    assert schedule.probabilities(0.3).tolist() == pytest.approx([0.4, 0.2, 0.2, 0.2])
    assert schedule.mean(0.3) == pytest.approx(0.4 + 0.2 * 9)
    # one loop is among those that may be drawn: both count
    assert make_loop_schedule("late", tiny_config(), 2, start=0, min_loops=1, plain=0.5).mean() == pytest.approx(1.25)


def test_max_loops_is_the_models_by_default():
    config = tiny_config(max_train_loops=9)
    for name in LOOP_SCHEDULES:
        assert make_loop_schedule(name, config).max_loops == 9
        assert make_loop_schedule(name, config, 4).max_loops == 4
        assert make_loop_schedule(name, config, 1).draw(0, 0, 1) == 1


class EvenLoops(LoopSchedule):
    """A schedule of a user."""

    def probabilities(self, progress):
        loops = torch.arange(1, self.max_loops + 1)
        return (loops % 2 == 0).double() / (self.max_loops // 2)


def test_schedules_of_ones_own():
    schedule = EvenLoops(6)
    assert make_loop_schedule(schedule, tiny_config()) is schedule
    assert_frequencies([schedule.draw(0, step) for step in range(3000)], schedule.probabilities(0))
    assert schedule.mean() == 4
    with pytest.raises(NotImplementedError):
        LoopSchedule(3).draw(0, 0)


@pytest.mark.parametrize(
    ("name", "max_loops", "options", "message"),
    [
        ("unifrom", 4, {}, "The loop schedule is 'unifrom'; choose one of uniform, late, growing"),
        (None, 4, {}, "The loop schedule is None"),
        (5, 4, {}, "The loop schedule is 5"),
        ("uniform", 4, {"power": 2}, "'uniform' does not take these options.*power"),
        ("weighted", 4, {"growth": 0.5}, "does not take these options.*growth"),
        *((name, 0, {}, "`max_loops` is 0; it must be an integer of at least 1") for name in LOOP_SCHEDULES),
        ("uniform", True, {}, "`max_loops` is True"),
        ("uniform", 2.5, {}, "`max_loops` is 2.5"),
        ("growing", 4, {"growth": 0}, "`growth` is 0"),
        ("growing", 4, {"growth": 1.5}, "`growth` is 1.5"),
        ("late", 4, {"start": 1.0}, "`start` is 1.0; .* from 0 to below 1"),
        ("late", 4, {"start": -0.1}, "`start` is -0.1"),
        ("late", 4, {"min_loops": 5}, r"`min_loops` is 5; .* from 1 to `max_loops` \(4\)"),
        ("late", 4, {"min_loops": 0}, "`min_loops` is 0"),
        ("late", 4, {"min_loops": 1.5}, "`min_loops` is 1.5"),
        ("late", 4, {"plain": 1}, "`plain` is 1"),
        ("late", 4, {"plain": math.nan}, "`plain` is nan"),
        ("poisson", 4, {"mean_loops": 0.5}, "`mean_loops` is 0.5"),
        ("poisson", 4, {"sigma": -1}, "`sigma` -1"),
        ("poisson", 4, {"mean_loops": math.nan}, "`mean_loops` is nan"),
    ],
    ids=str,
)
def test_bad_schedules(name, max_loops, options, message):
    with pytest.raises(ValueError, match=message):
        make_loop_schedule(name, tiny_config(), max_loops, **options)


def test_schedule_in_a_plain_trainer(tmp_path):
    schedule = make_loop_schedule("growing", tiny_config(), 5, growth=0.8)
    model, seen = tiny_model(), []
    forward = model.model.loop
    model.model.loop = lambda *args: seen.append(1) or forward(*args)
    counts = []

    class Counting(Trainer):
        def training_step(self, *args, **kwargs):
            seen.clear()
            loss = super().training_step(*args, **kwargs)
            counts.append(len(seen))
            return loss

    args = TrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, seed=3,
        remove_unused_columns=False, report_to="none", save_strategy="no",
    )  # fmt: skip
    collator, callback = MaskedDiffusionCollator(MASK, PAD), LoopSamplingCallback(schedule)
    Counting(model, args, data_collator=collator, train_dataset=examples(20), callbacks=[callback]).train()
    assert counts == [schedule.draw(3, step, 10) for step in range(10)]
    assert max(counts) > 2 and model.model.num_train_loops is None
    with pytest.raises(ValueError, match="`max_loops` is 0"):
        LoopSamplingCallback(0)
    with pytest.raises(ValueError, match="Linear holds no LoopMDMModel"):
        set_num_train_loops(torch.nn.Linear(1, 1), 2)


# --- gradients through the last loops ---


def training_batch(length: int = 7, rows: int = 3) -> dict[str, torch.Tensor]:
    return MaskedDiffusionCollator(MASK, PAD, seed=1)(examples(rows, length))


def reference_gradients(model, batch, num_loops: int, gradient_loops: int) -> dict[str, torch.Tensor]:
    """Loops cut in two: the first without gradient, the last with; what reaches their input goes to head as it is."""
    model.zero_grad()
    transformer = model.model
    step_size = 1 / num_loops if model.config.loop_update == "damped" else 1.0
    start, context = transformer.prelude(batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        states = start.detach()
        for _ in range(num_loops - gradient_loops):
            states = transformer.loop(states, context, step_size)
    cut = states = states.clone().requires_grad_()
    for _ in range(gradient_loops):
        states = transformer.loop(states, context, step_size)
    logits = model.lm_head(transformer.readout(states, context))
    logits = logits.masked_fill(torch.arange(logits.shape[-1]) == MASK, -math.inf)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    loss = (losses * batch["loss_weights"]).sum() / (batch["labels"] != -100).sum()
    loss.backward()
    start.backward(cut.grad)
    return {"loss": loss.detach(), **{name: grad.clone() for name, grad in gradients(model).items()}}


@pytest.mark.parametrize("overrides", [{}, {"loop_update": "damped"}, {"tie_word_embeddings": False}], ids=str)
@pytest.mark.parametrize(("num_loops", "gradient_loops"), [(5, 1), (5, 2), (3, 2), (2, 2), (1, 1), (2, 4)])
def test_gradient_loops_equal_the_reference(num_loops, gradient_loops, overrides):
    batch = training_batch()
    model = tiny_model(**overrides).double().train()
    expected = reference_gradients(model, batch, num_loops, min(num_loops, gradient_loops))
    full = tiny_model(**overrides).double().train()
    full_loss = full(**batch, num_loops=num_loops).loss
    full_loss.backward()

    model.zero_grad()
    model.model.gradient_loops = gradient_loops
    loss = model(**batch, num_loops=num_loops).loss
    loss.backward()
    assert torch.equal(loss, full_loss), "the values are those of all loops, bit for bit"
    found = gradients(model)
    assert found.keys() == expected.keys() - {"loss"} == gradients(full).keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **EXACT)
        assert gradient.abs().max() > 0, name
        if num_loops <= gradient_loops:
            assert torch.equal(gradient, gradients(full)[name]), name
    if num_loops > gradient_loops:
        mid = "model.layers.1.mlp.up_proj.weight"
        assert not torch.allclose(found[mid], gradients(full)[mid]), "and it does cut"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_loops_change_no_value_and_nothing_in_eval_mode(dtype):
    batch = training_batch()
    rest = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = tiny_model().to(dtype)
    for mode in (model.eval(), model.train()):
        mode.model.gradient_loops = None
        expected = mode(**rest, num_loops=4).logits
        mode.model.gradient_loops = 1
        assert torch.equal(mode(**rest, num_loops=4).logits, expected)
    # in eval mode the gradient is whole
    grads = []
    for gradient_loops in (None, 1):
        model.eval().zero_grad()
        model.model.gradient_loops = gradient_loops
        model(**batch, num_loops=4).loss.backward()
        grads.append({name: grad.clone() for name, grad in gradients(model).items()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


# --- loops computed again ---


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("num_loops", [1, 2, 5])
@pytest.mark.parametrize("gradient_loops", [None, 2])
@pytest.mark.parametrize("layers_too", [False, True])
def test_checkpointed_loops_have_the_same_gradients(num_loops, gradient_loops, layers_too):
    batch, results = training_batch(), []
    for checkpointed in (False, True):
        model = tiny_model(loop_update="damped" if layers_too else "replace").double().train()
        model.model.gradient_loops, model.model.checkpoint_loops = gradient_loops, checkpointed
        if layers_too and checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch, num_loops=num_loops).loss
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, **EXACT)


@pytest.mark.parametrize("layers_too", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_checkpointed_loops_with_an_adapter(layers_too):
    batch, results = training_batch(), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(tiny_model(), config).double().train()
        model.base_model.model.model.checkpoint_loops = checkpointed
        if layers_too and checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(**batch, num_loops=3).loss.backward()
        results.append(gradients(model))
    assert len(results[0]) == 2 * 7 * 4
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, **EXACT)


def saved_bytes(model, batch, num_loops: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, every storage counted once, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, sizes = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept.append(tensor)  # alive, or its address would be used again
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch, num_loops=num_loops).loss
    assert loss.requires_grad
    return sum(sizes.values())


def test_checkpointed_loops_keep_memory_flat():
    model = tiny_model(num_hidden_layers=12).train()
    batch = training_batch(length=64, rows=2)
    once, plain = saved_bytes(model, batch, 1), saved_bytes(model, batch, 12)
    model.model.checkpoint_loops = True
    checkpointed = saved_bytes(model, batch, 12)
    assert plain > 2.3 * once, "34 layers run instead of 12"
    assert checkpointed <= 1.3 * once
    model.model.checkpoint_loops, model.model.gradient_loops = False, 1
    assert saved_bytes(model, batch, 12) <= 1.01 * once, "loops without gradient keep nothing"


# --- packed documents ---

PACKED = [
    # tokens, document ids, real
    ([3, 22, 5, 9, 22, 22, 7, 8, 2], [4, 4, 4, 0, 9, 9, 9, 9, 9], 9),
    ([22, 11, 4, 22, 6, 13, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 1], 6),
    ([5, 6, 22, 1, 2, 3, 22, 9, 0], [2, 2, 3, 3, 3, 3, 3, 3, 8], 8),
]


def packed_batch() -> dict[str, torch.Tensor]:
    ids, documents, real = (list(part) for part in zip(*PACKED, strict=True))
    mask = (torch.arange(9) < torch.tensor(real)[:, None]).long()
    return {"input_ids": torch.tensor(ids), "document_ids": torch.tensor(documents), "attention_mask": mask}


def pieces():
    """Row, first and last position of every document."""
    for row, (_, documents, real) in enumerate(PACKED):
        position = 0
        for _, group in itertools.groupby(documents[:real]):
            length = len(list(group))
            yield row, position, position + length
            position += length


def assert_documents_run_alone(model, tolerance: float, num_loops: int):
    batch = packed_batch()
    logits = model(**batch, num_loops=num_loops).logits
    for row, start, end in pieces():
        alone = model(batch["input_ids"][row : row + 1, start:end], num_loops=num_loops).logits[0]
        torch.testing.assert_close(logits[row, start:end], alone, rtol=0, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"shift_logits": True},
        {"attention_block_size": 2},
        {"attention_block_size": 3, "shift_logits": True, "loop_update": "damped"},
        {"position_embedding_type": "learned"},
        {"position_embedding_type": "learned", "attention_block_size": 2, "shift_logits": True},
    ],
    ids=str,
)
def test_packed_documents_equal_each_alone(overrides, attention):
    model = tiny_model(attn_implementation=attention, **overrides).double()
    for num_loops in (1, 3):
        assert_documents_run_alone(model, 1e-11, num_loops)
    # an unpadded row needs no attention mask
    batch = {name: tensor[:1] for name, tensor in packed_batch().items()}
    masked = model(**batch).logits
    batch.pop("attention_mask")
    torch.testing.assert_close(model(**batch).logits, masked, rtol=0, atol=1e-11)
    batch["document_ids"] = torch.zeros_like(batch["document_ids"])
    one_document = model(**batch).logits
    batch.pop("document_ids")
    torch.testing.assert_close(model(**batch).logits, one_document, rtol=0, atol=1e-11)
    assert not torch.allclose(one_document, masked)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_packed_documents_with_flex_attention():
    model = tiny_model(attn_implementation="flex_attention", attention_block_size=2, shift_logits=True)
    with torch.compiler.set_stance("force_eager"):
        assert_documents_run_alone(model, 1e-5, 2)


@pytest.mark.parametrize("shift_logits", [False, True])
def test_loss_and_gradients_of_packed_documents(shift_logits):
    batch = packed_batch()
    labels = torch.randint(1, 22, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    weights = torch.rand((3, 9), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    packed, alone = (tiny_model(shift_logits=shift_logits).double().train() for _ in range(2))
    loss = packed(**batch, labels=labels, loss_weights=weights, num_loops=2).loss
    loss.backward()
    total, count = 0.0, int((labels != -100).sum())
    for row, start, end in pieces():
        part = (slice(row, row + 1), slice(start, end))
        inputs = {"input_ids": batch["input_ids"][part], "labels": labels[part], "loss_weights": weights[part]}
        part_loss = alone(**inputs, num_items_in_batch=count, num_loops=2).loss
        part_loss.backward()
        total += part_loss.item()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    for name, gradient in gradients(packed).items():
        torch.testing.assert_close(gradient, gradients(alone)[name], **EXACT)


@pytest.mark.parametrize("shape", [(9,), (3, 8), (1, 9), (3, 9, 1)], ids=str)
def test_document_ids_of_another_shape(shape):
    batch = packed_batch() | {"document_ids": torch.zeros(shape, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"`document_ids` has shape .*; the input needs \(3, 9\)"):
        tiny_model()(**batch)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn"])
@pytest.mark.parametrize("overrides", [{}, {"attention_block_size": 2}], ids=str)
def test_flash_attention_cannot_pack(attention, overrides):
    model = tiny_model(**overrides)
    model.config._attn_implementation = attention
    with pytest.raises(ValueError, match=r"attention cannot .*call `model.set_attn_implementation"):
        model(**packed_batch())


# --- operations ---


def measured_step(model, batch, num_loops: int) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**batch, num_loops=num_loops).loss.backward()
    return counter.get_total_flops()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize(
    ("num_loops", "gradient_loops", "checkpoint_loops", "layers"),
    [
        (1, None, False, False),
        (3, None, False, False),
        (4, 2, False, False),
        (3, None, True, False),
        (3, 2, False, True),
        (3, 2, True, True),
        (1, 2, True, True),
    ],
)
def test_training_flops_equal_the_measured_ones(num_loops, gradient_loops, checkpoint_loops, layers):
    """
    Exactly, but that torch stops to compute again as soon as it has what it needs: every checkpointed layer or loop
    spares its last product (the MLP's down projection), and a loop whose layers are checkpointed too, its last layer.
    """
    batch = training_batch(7, 3)
    num_logits = int(batch["loss_weights"].count_nonzero()) / 3
    model = tiny_model(attn_implementation="eager").train()
    model.model.gradient_loops, model.model.checkpoint_loops = gradient_loops, checkpoint_loops
    if layers:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    counted = training_flops(model, 3, 7, num_loops, num_logits, gradient_loops, checkpoint_loops, layers)
    with_gradient = min(num_loops, gradient_loops or num_loops)
    down = 2 * 3 * 7 * 32 * 48
    layer = (model.flops(3, 7, 2, 0) - model.flops(3, 7, 1, 0)) // 2
    spared = with_gradient * down * checkpoint_loops
    if layers:
        spared = (4 + 2 * (with_gradient - 1)) * down + with_gradient * layer * checkpoint_loops
    assert measured_step(model, batch, num_loops) == counted - spared
    assert spared <= 0.13 * counted
    if spared:
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            assert measured_step(model, batch, num_loops) == counted


def test_training_flops_by_hand():
    model = tiny_model()
    forward = [model.flops(2, 10, loops, 4) for loops in (1, 2, 3, 4, 5)]
    mid = forward[1] - forward[0]
    for loops in (1, 3, 5):
        assert training_flops(model, 2, 10, loops, 4) == 3 * forward[loops - 1]
        assert training_flops(model, 2, 10, loops, 4, gradient_loops=7) == 3 * forward[loops - 1]
    assert training_flops(model, 2, 10, 5, 4, gradient_loops=2) == 3 * forward[4] - 2 * 3 * mid
    assert training_flops(model, 2, 10, 5, 4, checkpoint_loops=True) == 3 * forward[4] + 5 * mid


# --- data ---


def test_read_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"b": "ü"}', encoding="utf-8")
    assert read_jsonl(path) == read_jsonl(str(path)) == [{"a": 1}, {"b": "ü"}]
    for content, message in [
        ('{"a": 1}\n\n{"a": \n', r"rows.jsonl, line 3 is not valid JSON"),
        ('{"a": 1}\n[1]\n', r"rows.jsonl, line 2 is a list; it must be an object"),
        ('"x"\n', r"rows.jsonl, line 1 is a str"),
        ("", "rows.jsonl holds no examples"),
        ("\n \n", "rows.jsonl holds no examples"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_jsonl(path)
    with pytest.raises(FileNotFoundError):
        read_jsonl(tmp_path / "none.jsonl")


def test_read_jsonl_names_a_file_that_is_no_utf8(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"a": 1}\n{"a": "ü"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl"):
        read_jsonl(path)


def test_read_documents(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("first\nstill first\n\n\n  second ü \r\n\r\nthird\n".encode())
    assert list(read_documents(path)) == ["first\nstill first", "second ü", "third"]
    assert list(read_documents(str(path), separator="still")) == ["first", "first\n\n\n  second ü \n\nthird"]
    assert list(read_documents(path, separator=None)) == ["first\nstill first\n\n\n  second ü \n\nthird"]
    path.write_text(" \n\n \n")
    with pytest.raises(ValueError, match=r"text\.txt holds no text"):
        list(read_documents(path))
    path.write_bytes("ü".encode("latin-1"))
    with pytest.raises(ValueError, match=r"text\.txt is no text in UTF-8"):
        list(read_documents(path))


@pytest.mark.parametrize("length", [1, 3, 4, 100])
@pytest.mark.parametrize("end_token_id", [None, 2])
@pytest.mark.parametrize("isolate", [False, True])
def test_packed_rows_hold_all_tokens_in_order(length, end_token_id, isolate):
    documents = [[5, 6, 7], [8], [], [9, 10, 11, 12, 13, 14, 15], [16, 17]]
    rows = list(pack_documents(iter(documents), length, end_token_id, isolate))
    ended = [document + ([] if end_token_id is None else [end_token_id]) for document in documents]
    assert [token for row in rows for token in row["input_ids"].tolist()] == [*itertools.chain(*ended)]
    assert all(len(row["input_ids"]) == length for row in rows[:-1]) and 1 <= len(rows[-1]["input_ids"]) <= length
    assert all(set(row) == ({"input_ids", "document_ids"} if isolate else {"input_ids"}) for row in rows)
    if isolate:
        ids = [document for row in rows for document in row["document_ids"].tolist()]
        assert ids == [i for i, document in enumerate(ended) for _ in document]
        assert all(row["document_ids"].shape == row["input_ids"].shape for row in rows)
    MaskedDiffusionCollator(MASK, PAD)([{**row, "index": i} for i, row in enumerate(rows)])


def test_packing_is_lazy_and_checks_its_length():
    def endless():
        while True:
            yield [1, 2, 3]

    assert [row["input_ids"].tolist() for row in itertools.islice(pack_documents(endless(), 2), 3)] == [
        [1, 2],
        [3, 1],
        [2, 3],
    ]
    assert list(pack_documents([], 4)) == list(pack_documents([[], []], 4)) == []
    with pytest.raises(ValueError, match="`length` is 0"):
        list(pack_documents([[1]], 0))


SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", "<user>", "<assistant>"]
WORDS = [*SPECIAL, "what", "is", "two", "and", "four", "six", "?"]


def word_tokenizer(chat_template: str | None = None, ends: bool = False, eos: str | None = "</s>"):
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", mask_token="<mask>", bos_token="<s>",
        eos_token=eos, chat_template=chat_template,
    )  # fmt: skip


TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
PROMPT, ANSWER = "what is two and four ?", "six"


@pytest.mark.parametrize("ends", [False, True], ids=["begins texts", "begins and ends texts"])
def test_plain_pairs(ends):
    tokenizer = word_tokenizer(ends=ends)
    for prompt, answer in itertools.product(
        ("prompt", "question", "instruction"), ("answer", "response", "output", "completion")
    ):
        encoded = encode_answer(tokenizer, {prompt: PROMPT, answer: ANSWER, "id": 3})
        words = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        assert words == ["<s>", *PROMPT.split(), "six", "</s>"]
        assert encoded["prompt_length"] == 7
    assert encode_answer(word_tokenizer(eos=None), {"prompt": "two", "answer": "six"})["input_ids"] == [2, 9, 12]
    # the first name wins
    both = encode_answer(tokenizer, {"question": "two", "prompt": "four", "answer": "six"})
    assert tokenizer.decode(both["input_ids"]) == "<s> four six </s>"
    batch = MaskedDiffusionCollator(4, 0)([{**both, "index": 0}])
    assert batch["labels"].tolist() == [[-100, -100, 12, 3]]


def test_conversations():
    tokenizer = word_tokenizer(TEMPLATE)
    tokenizer_adds = tokenizer("two")["input_ids"][0] == 2
    messages = [
        {"role": "user", "content": "what is two ?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "and four ?"},
        {"role": "assistant", "content": "six six"},
    ]
    encoded = encode_answer(tokenizer, {"messages": messages})
    words = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokenizer_adds and words[encoded["prompt_length"] :] == ["six", "six", "</s>"]
    assert words[: encoded["prompt_length"]].count("<assistant>") == 2
    assert words[encoded["prompt_length"] - 1] == "<assistant>"


@pytest.mark.parametrize(
    ("example", "template", "message"),
    [
        (
            {"prompt": "two"},
            None,
            "Row 3 has no text called answer or response or output or completion; it has prompt",
        ),
        ({"answer": "two"}, None, "Row 3 has no text called prompt or question or instruction"),
        ({}, None, "it has nothing"),
        ({"prompt": 5, "answer": "two"}, None, "no text called prompt"),
        ({"messages": []}, TEMPLATE, "Row 3: `messages` must be a list that ends with one of the role `assistant`"),
        ({"messages": "two"}, TEMPLATE, "Row 3: `messages` must be a list"),
        ({"messages": [{"role": "user", "content": "two"}]}, TEMPLATE, "ends with one of the role `assistant`"),
        ({"messages": [{"role": "assistant", "content": "two"}]}, None, "has no chat template"),
        (
            {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "six"}]},
            "{% for m in messages|reverse %}{{ m['content'] + ' ' }}{% endfor %}",
            "Row 3: the chat template does not put the answer behind the prompt",
        ),
    ],
    ids=str,
)
def test_bad_answers_are_named(example, template, message):
    with pytest.raises(ValueError, match=message):
        encode_answer(word_tokenizer(template), example, "Row 3")


def test_messages_that_are_no_objects():
    with pytest.raises(ValueError, match="Row 3: `messages`"):
        encode_answer(word_tokenizer(TEMPLATE), {"messages": ["two", "six"]}, "Row 3")


def test_streamed_examples_go_on_over_the_epochs():
    passes = []

    def source():
        passes.append(1)
        return ({"input_ids": [i]} for i in range(3))

    stream = StreamedExamples(source)
    seen = list(itertools.islice(stream, 8))
    assert [row["index"] for row in seen] == list(range(8))
    assert [row["input_ids"][0] for row in seen] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(passes) == 3
    assert next(iter(stream))["index"] == 0, "a new pass starts anew"
    with pytest.raises(ValueError, match="no training examples"):
        next(iter(StreamedExamples(list)))
    left = [[{"input_ids": [1]}], []]
    with pytest.raises(ValueError, match="no training examples"):
        list(StreamedExamples(lambda: left.pop(0)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_streamed_examples_are_shared_between_workers():
    stream = StreamedExamples(lambda: [{"input_ids": i} for i in range(100)])
    loader = iter(DataLoader(stream, batch_size=1, num_workers=2, collate_fn=lambda rows: rows[0]["index"]))
    seen = [next(loader) for _ in range(8)]
    assert len(set(seen)) == 8


def test_a_line_of_jsonl_becomes_a_batch(tmp_path):
    path, tokenizer = tmp_path / "train.jsonl", word_tokenizer()
    path.write_text("".join(json.dumps({"prompt": PROMPT, "answer": answer}) + "\n" for answer in ("six", "six six")))
    rows = [encode_answer(tokenizer, row, f"line {i}") for i, row in enumerate(read_jsonl(path), start=1)]
    collator = MaskedDiffusionCollator(tokenizer.mask_token_id, tokenizer.pad_token_id)
    batch = collator([{**row, "index": i} for i, row in enumerate(rows)])
    assert (batch["labels"] != -100).sum(-1).tolist() == [2, 3]
    assert (batch["input_ids"] == 4).any(-1).all()
