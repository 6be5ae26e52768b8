# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The collator: what it masks and how it weighs, against enumeration, for whole rows, blocks and packed documents."""

import itertools
import math
from collections import Counter

import pytest
import torch
from objective_reference import SMALL_MASK, exact_nelbo, small_model
from training_runs import MASK, PAD, examples

from loopmdm.training import MaskedDiffusionCollator

ROW = [3, 1, 4, 1, 2]
PACKED = {"input_ids": [3, 1, 4, 2, 4, 4, 1, 3], "document_ids": [7, 7, 7, 1, 2, 2, 2, 2]}
LEARN_PADDING = {"learn_padding": True, "pad_token_id": 1}


def test_what_a_batch_holds():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "maskable": [False, True, True, True, True], "index": 3, "other": "x"},
        {"input_ids": torch.tensor([5, 6, 7]), "prompt_length": 1, "index": 4},
    ]
    collator = MaskedDiffusionCollator(MASK, PAD, seed=1)
    batch = collator(rows)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()} == {
        "input_ids": ((2, 5), torch.int64),
        "labels": ((2, 5), torch.int64),
        "attention_mask": ((2, 5), torch.int64),
        "loss_weights": ((2, 5), torch.float32),
    }
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, 8, 9], [-100, 6, 7, -100, -100]]
    clean, masked = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, PAD, PAD]]), batch["input_ids"] == MASK
    assert torch.equal(batch["input_ids"][~masked], clean[~masked]) and not (masked & (batch["labels"] == -100)).any()
    for i, maskable in enumerate((4, 2)):
        expected = torch.where(masked[i], maskable / masked[i].sum(), 0.0)
        torch.testing.assert_close(batch["loss_weights"][i], expected)

    unmasked = collator.clean(rows)
    assert {name: tensor.dtype for name, tensor in unmasked.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "maskable": torch.bool,
    }
    assert torch.equal(unmasked["input_ids"], clean)
    assert torch.equal(unmasked["maskable"], batch["labels"] != -100)


def test_what_is_scored_does_not_depend_on_the_longest_row():
    rows = [{"input_ids": [3, 2], "index": 0}, {"input_ids": ROW, "index": 1}]
    clean = MaskedDiffusionCollator(SMALL_MASK, **LEARN_PADDING).clean(rows)
    assert clean["maskable"].sum(-1).tolist() == clean["attention_mask"].sum(-1).tolist() == [2, len(ROW)]


def test_packed_rows_keep_their_documents():
    rows = [{**row, "document_ids": [3, 3, 4, 4, 4, 9]} for row in examples(2)]
    rows[1] = {"input_ids": rows[1]["input_ids"][:3], "document_ids": [0, 0, 1], "index": 1}
    collator = MaskedDiffusionCollator(MASK, PAD)
    for batch in (collator(rows), collator.clean(rows)):
        assert batch["document_ids"].dtype == torch.int64
        assert batch["document_ids"].tolist() == [[3, 3, 4, 4, 4, 9], [0, 0, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match="Example 1 has `document_ids`, and others of its batch have none"):
        collator([examples(1)[0], rows[1]])


def expected_loss(model, collator, rows, counts=None) -> float:
    """Nats per label, each document of a row for itself."""
    total, labels, longest = 0.0, 0, max(len(row["input_ids"]) for row in rows)
    for row in rows:
        missing = (longest - len(row["input_ids"])) * collator.learn_padding
        tokens = [*row["input_ids"], *[collator.pad_token_id] * missing]
        maskable = [*row.get("maskable", [True] * len(row["input_ids"])), *[True] * missing]
        places = [i for i, may in enumerate(maskable) if may and i >= row.get("prompt_length", 0)]
        labels += len(places)
        start = 0
        for _, group in itertools.groupby(row.get("document_ids", [0] * len(tokens))):
            end = start + len(list(group))
            own = [place - start for place in places if start <= place < end]
            total += exact_nelbo(model, tokens[start:end], 2, own, counts)
            start = end
    return total / labels


@torch.no_grad()
@pytest.mark.parametrize(
    ("overrides", "options", "rows"),
    [
        ({}, {}, [{"input_ids": ROW}]),
        ({}, {"complementary": True}, [{"input_ids": ROW}]),
        ({"attention_block_size": 2}, {}, [{"input_ids": ROW}]),
        ({"attention_block_size": 3}, {}, [{"input_ids": ROW}]),
        ({"attention_block_size": 2}, {"complementary": True}, [{"input_ids": ROW}]),
        ({}, {}, [{"input_ids": ROW, "prompt_length": 3}]),
        ({"attention_block_size": 2}, {}, [{"input_ids": ROW, "maskable": [True, False, True, True, False]}]),
        ({}, {}, [{"input_ids": ROW, "prompt_length": 1, "maskable": [True, False, True, False, True]}]),
        ({}, {}, [PACKED]),
        ({"attention_block_size": 2}, {}, [PACKED]),
        ({"shift_logits": True}, {"complementary": True}, [PACKED]),
        ({"attention_block_size": 2, "shift_logits": True}, {"complementary": True}, [PACKED]),
        ({}, {}, [{"input_ids": [3, 2]}, {"input_ids": ROW}]),
        ({}, LEARN_PADDING, [{"input_ids": [3, 2]}, {"input_ids": ROW}]),
        (
            {},
            {"learn_padding": True, "pad_token_id": 1},
            [{"input_ids": [3, 2], "prompt_length": 1}, {"input_ids": ROW}],
        ),
    ],
    ids=str,
)
def test_loss_estimates_the_enumerated_nelbo(overrides, options, rows):
    model = small_model(**overrides)
    collator = MaskedDiffusionCollator(
        SMALL_MASK, **{"pad_token_id": 0, "block_size": model.config.attention_block_size, **options}
    )
    assert_loss_is(expected_loss(model, collator, rows), model, collator, rows)


@torch.no_grad()
def test_narrow_mask_ratio_has_the_mean_over_its_range():
    model, rows = small_model(), [{"input_ids": [3, 1, 4, 2]}]
    collator = MaskedDiffusionCollator(SMALL_MASK, 0, mask_ratio=(0.25, 0.75))
    assert_loss_is(expected_loss(model, collator, rows, counts=[2, 3]), model, collator, rows)


def assert_loss_is(expected: float, model, collator, rows):
    """The mean loss over the collator's noise, within four standard errors, themselves small."""
    losses = []
    for start in range(20):
        batch = collator([{**rows[i % len(rows)], "index": 1000 * start + i} for i in range(24)])
        losses.append(model(**batch, num_loops=2).loss.double())
    losses = torch.stack(losses)
    error = losses.std().item() / math.sqrt(len(losses))
    assert error < 0.05 * expected
    assert abs(losses.mean().item() - expected) < 4 * error + 1e-6


@pytest.mark.parametrize("mask_ratio", [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.25, 0.75), (0.3, 0.31)])
def test_numbers_of_masks_are_spread_over_a_batch_within_their_range(mask_ratio):
    """k = ceil(u L) with u uniform in the range: the counts are from floor(low L) + 1 to ceil(high L)."""
    collator = MaskedDiffusionCollator(MASK, PAD, mask_ratio=mask_ratio)
    low, high = math.floor(mask_ratio[0] * 8) + 1, math.ceil(mask_ratio[1] * 8)
    seen = Counter()
    for start in range(0, 1280, 64):
        batch = collator([{**row, "index": start + i} for i, row in enumerate(examples(64, 8))])
        torch.testing.assert_close(batch["loss_weights"].sum(-1), torch.full((64,), 8.0))
        counts = Counter((batch["input_ids"] == MASK).sum(-1).tolist())
        assert set(counts) == set(range(low, high + 1))
        assert max(counts.values()) - min(counts.values()) <= 2, "evenly in every batch"
        seen += counts
    assert max(seen.values()) - min(seen.values()) < 60


def blocks_of(row: dict, block_size: int | None) -> list[tuple[int, int]]:
    """Document and block of every token; without blocks all is one."""
    if block_size is None:
        return [(0, 0)] * len(row["input_ids"])
    places = []
    for document, group in itertools.groupby(row.get("document_ids", [0] * len(row["input_ids"]))):
        places += [(document, i // block_size) for i, _ in enumerate(group)]
    return places


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("block_size", [None, 2, 4, 100])
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
def test_one_block_of_every_document_is_masked(row, block_size, complementary):
    row = {"input_ids": [5, 6, 7, 8, 9, 10, 11], **row}
    collator = MaskedDiffusionCollator(MASK, PAD, block_size=block_size, complementary=complementary)
    blocks, drawn, whole = blocks_of(row, block_size), Counter(), 0
    for start in range(0, 96, 8):
        batch = collator([{**row, "index": start + i} for i in range(8)])
        assert len(batch["input_ids"]) == 8 * (1 + complementary)
        masked, weights = batch["input_ids"] == MASK, batch["loss_weights"]
        assert torch.equal(weights > 0, masked) and torch.equal(batch["labels"][:8], batch["labels"][-8:])
        learnt = {place for place in range(7) if batch["labels"][0, place] != -100}
        for i in range(8):
            own = [{place for place in range(7) if masked[j, place]} for j in range(i, len(masked), 8)]
            for document in {blocks[place][0] for place in learnt}:
                of_document = {place for place in learnt if blocks[place][0] == document}
                (block,) = {blocks[place] for place in own[0] & of_document}
                drawn[block] += 1
                members = {place for place in of_document if blocks[place] == block}
                num_blocks = len({blocks[place] for place in of_document})
                hidden = [part & of_document for part in own]
                assert all(part and part <= members for part in hidden)
                for j, part in enumerate(hidden):
                    expected = num_blocks * len(members) / len(part)
                    assert weights[i + 8 * j, sorted(part)].tolist() == pytest.approx([expected] * len(part))
                if complementary:
                    whole += hidden[0] == members
                    assert hidden[1] == (members if hidden[0] == members else members - hidden[0])
    assert set(drawn) == {blocks[place] for place in learnt}, "every block has its turn"
    assert whole or not complementary, "what is masked whole is its own complement"


def test_blocks_are_drawn_evenly():
    collator, seen = MaskedDiffusionCollator(MASK, PAD, block_size=4), Counter()
    for start in range(0, 960, 12):
        batch = collator([{**row, "index": start + i} for i, row in enumerate(examples(12, 10))])
        seen.update(((batch["input_ids"] == MASK).long().argmax(-1) // 4).tolist())
    assert set(seen) == {0, 1, 2} and all(abs(count - 320) < 70 for count in seen.values())


def test_noise_depends_on_seed_index_and_place_alone():
    def noise(rows, seed=3, global_seed=0):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        masked = MaskedDiffusionCollator(MASK, PAD, seed=seed)(rows)["input_ids"] == MASK
        assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
        return masked

    rows = examples(4, 9)
    reference = noise(rows)
    assert torch.equal(noise(rows, global_seed=9), reference)
    # Neither the tokens nor the other rows' tokens and indexes matter, only the first row's offset is shared.
    others = [{**row, "index": 100 + i} for i, row in enumerate(examples(4, 9, seed=5))]
    assert torch.equal(noise([rows[0], rows[1], others[2], others[3]])[:2], reference[:2])
    assert torch.equal(noise([others[0] | {"index": 0}, rows[1], rows[2], rows[3]]), reference)
    assert not torch.equal(noise([others[0], *rows[1:]])[1:], reference[1:])
    assert not torch.equal(noise([rows[0], others[1], *rows[2:]])[1], reference[1])
    assert not torch.equal(noise(rows, seed=4), reference)


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ({"input_ids": [1, 2]}, {}, r"An example has no `index`.*`StreamedExamples\(lambda: dataset\)`"),
        ({"input_ids": [1, MASK], "index": 7}, {}, r"Example 7 holds the mask token \(22\)"),
        ({"input_ids": [1, 2, 3], "index": 8}, {"max_length": 2}, "Example 8 has 3 tokens, more than the 2 allowed"),
        ({"input_ids": [1, 2], "prompt_length": 2, "index": 9}, {}, "Example 9 has no maskable token"),
        ({"input_ids": [1, 2], "maskable": [0, 0], "index": 4}, {}, "Example 4 has no maskable token"),
        ({"input_ids": [], "index": 5}, {}, "Example 5 has no maskable token"),
        ({"input_ids": [1, 2], "maskable": [1], "index": 6}, {}, r"Example 6 has 2 tokens and `maskable` of shape"),
        ({"input_ids": [1, 2], "document_ids": [1], "index": 6}, {}, "Example 6 has 2 tokens and `document_ids`"),
    ],
    ids=str,
)
def test_bad_examples_are_named(example, options, message):
    collator = MaskedDiffusionCollator(MASK, PAD, **options)
    assert collator([{"input_ids": [1, 2], "index": 0}])["input_ids"].shape == (1, 2)
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
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionCollator(MASK, **{"pad_token_id": PAD, **options})


@pytest.mark.parametrize("mask", [MASK, 0])
def test_rows_of_different_lengths_need_no_padding_token(mask):
    rows = [{"input_ids": [3, 2], "index": 0}, {"input_ids": [3], "index": 1}]
    batch = MaskedDiffusionCollator(mask)(rows)
    assert batch["labels"].tolist() == [[3, 2], [3, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["input_ids"][1, 1] != mask
