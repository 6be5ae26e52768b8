# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Rows of tokens as other tools leave them: each column is honoured, or refused by name."""

import json
import logging

import numpy
import pytest
import torch
from evaluation_models import word_tokenizer
from tiny import tiny_config
from training_runs import MASK, PAD

from loopmdm.data import ExampleStream, check_tokenizer, read_examples, vocabulary_size
from loopmdm.training import MaskedDiffusionCollator

CONFIG = tiny_config(vocab_size=32, mask_token_id=2)
TOKENS = [5, 6, 7, 8]


def collate(*rows: dict, **options) -> tuple[dict, dict]:
    """What is trained on, and what is evaluated."""
    collator, rows = MaskedDiffusionCollator(MASK, PAD, **options), [{**row, "index": i} for i, row in enumerate(rows)]
    return collator(rows), collator.clean(rows)


def learnt(row: dict) -> list[int]:
    """The tokens of a row that are learnt, which are those that are evaluated."""
    batch, clean = collate(row)
    assert (batch["labels"] != -100).equal(clean["maskable"])
    return batch["labels"][batch["labels"] != -100].tolist()


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, TOKENS),
        ({"labels": [-100, -100, 7, 8]}, [7, 8]),
        ({"completion_mask": [0, 0, 1, 1]}, [7, 8]),
        ({"assistant_masks": [0, 1, 0, 1]}, [6, 8]),
        ({"assistant_masks": [0, 1, 0, 1], "completion_mask": [0, 0, 1, 1]}, [8]),
        ({"labels": [5, 6, 7, -100], "maskable": [False, True, True, True]}, [6, 7]),
        ({"labels": [-100, 6, 7, 8], "prompt_length": 2}, [7, 8]),
        ({"attention_mask": [1, 1, 1, 0]}, [5, 6, 7]),
        ({"attention_mask": [0, 1, 1, 1], "prompt_length": 1}, [7, 8]),  # of the real ones
        ({"attention_mask": [0, 1, 1, 1], "labels": [-100, -100, 7, 8]}, [7, 8]),
        ({"attention_mask": [1, 1, 1, 1], "labels": None, "maskable": None, "token_type_ids": [0, 0, 0, 0]}, TOKENS),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [list, torch.tensor, numpy.array])
def test_what_columns_say_is_learnt(columns, expected, kind):
    columns = {name: kind(values) if isinstance(values, list) else values for name, values in columns.items()}
    assert learnt({"input_ids": kind(TOKENS), **columns}) == expected


def test_padding_of_rows_is_taken_away():
    rows = [
        {
            "input_ids": [5, 6, 7, 0, 0, 0],
            "attention_mask": [1, 1, 1, 0, 0, 0],
            "labels": [-100, 6, 7, -100, -100, -100],
        },
        {"input_ids": [0, 0, 3, 4], "attention_mask": [0, 0, 1, 1], "document_ids": [9, 9, 0, 1]},
    ]
    batch, clean = collate(rows[0])
    assert batch["labels"].tolist() == [[-100, 6, 7]] and batch["attention_mask"].tolist() == [[1, 1, 1]]
    assert clean["input_ids"].tolist() == [[5, 6, 7]] and clean["maskable"].tolist() == [[False, True, True]]
    batch, _ = collate(rows[1], {"input_ids": [1, 2, 3], "document_ids": [4, 4, 4]})
    assert batch["labels"].tolist() == [[3, 4, -100], [1, 2, 3]]
    assert batch["document_ids"].tolist() == [[0, 1, 1], [4, 4, 4]]


def test_a_padded_row_weighs_as_it_does_without_padding():
    plain = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    padded = {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]}
    for a, b in zip(collate(plain), collate(padded), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_end_is_learnt_where_it_is_the_padding_token_too():
    rows = [{"input_ids": [5, 6, 1]}, {"input_ids": [5, 1, 1], "attention_mask": [1, 1, 0]}]
    collator = MaskedDiffusionCollator(MASK, 1)
    batch = collator([{**row, "index": i} for i, row in enumerate(rows)])
    assert batch["labels"].tolist() == [[5, 6, 1], [5, 1, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"labels": [6, 7, 8, -100]}, "token 1 is 5, and its label 6; labels must be the tokens themselves"),
        ({"labels": 1}, "has 4 tokens and `labels` of shape ()"),
        ({"labels": [5, 6]}, "has 4 tokens and `labels` of shape (2,)"),
        ({"attention_mask": [2, 2, 2, 0]}, "`attention_mask` holds 2; it must hold 0 and 1"),
        ({"completion_mask": [0, 0, 1, -1]}, "`completion_mask` holds -1"),
        ({"assistant_masks": [0, 0, 0, 0]}, "Is `assistant_masks` from a chat template without a generation block?"),
        ({"attention_mask": [0, 0, 0, 0]}, "has no maskable token"),
        ({"token_type_ids": [0, 0, 1, 1]}, "`token_type_ids` that are not 0"),
        ({"position_ids": [0, 1, 0, 1]}, "has `position_ids`, which would be lost; positions are counted"),
        ({"seq_lengths": [2, 2]}, "has `seq_lengths`, which would be lost; give `document_ids`"),
        ({"special_tokens_mask": [1, 0, 0, 0]}, "has `special_tokens_mask`"),
        ({"loss_mask": [1, 0, 0, 0]}, "has `loss_mask`, which would be lost; say what is learnt with `labels`"),
        ({"weight": 0.5}, "has `weight`"),
        ({"prompt_length": 5}, "`prompt_length` is 5; it must be a number of tokens, from 0 to the row's 4"),
        ({"prompt_length": -1}, "`prompt_length` is -1"),
        ({"prompt_length": 1.5}, "`prompt_length` is 1.5"),
        ({"prompt_length": 3, "attention_mask": [1, 1, 0, 0]}, "`prompt_length` is 3; it must be a number of tokens"),
        ({"input_ids": [[5, 6, 7]]}, "`input_ids` has shape (1, 3); it must be one row"),
        ({"input_ids": [5.0, 6.5]}, "`input_ids` holds torch.float32 numbers"),
        ({"input_ids": [5, None]}, "`input_ids` does not hold integers"),
        ({"input_ids": ["a", "b"]}, "`input_ids` does not hold integers"),
        ({"input_ids": [5, -1]}, "has the token -1; tokens are counted from 0"),
        ({"input_ids": None, "text": "a"}, "has no `input_ids`; it has input_ids, text"),
    ],
    ids=str,
)
def test_columns_that_would_be_lost_are_refused(columns, message):
    with pytest.raises(ValueError) as error:
        collate({"input_ids": TOKENS, **columns})
    assert "Example 0" in str(error.value) and message in str(error.value)


def test_columns_without_effect_are_named_once(caplog):
    rows = [{"input_ids": TOKENS, "id": i, "text": "a", "index": i} for i in range(3)]
    collator = MaskedDiffusionCollator(MASK, PAD)
    with caplog.at_level(logging.WARNING):
        collator(rows)
        collator(rows)
    assert [record.getMessage() for record in caplog.records] == ["Columns of the examples: not used: id, text."]


def test_a_row_of_the_data_is_named(tmp_path):
    rows = [{"input_ids": [5, 6]}, {"input_ids": [5, MASK]}]
    stream = ExampleStream(rows, 8, seed=0)
    bad = next(i for i in range(8) if stream[i]["row"] == 1)
    with pytest.raises(ValueError, match=rf"Example {bad} \(row 2 of the data\) holds the mask token \(22\)"):
        MaskedDiffusionCollator(MASK, PAD)([stream[bad]])


# Files of them


def read(path, task: str, rows: list[dict], length: int = 8, **options) -> list[dict]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_examples([str(path)], word_tokenizer(), CONFIG, task, length, **options))


def test_rows_of_tokens_are_answers(tmp_path):
    rows = [
        {"input_ids": [4, 5, 6, 0], "attention_mask": [1, 1, 1, 0], "labels": [-100, 5, 6, -100], "text": "not read"},
        {"input_ids": [4, 5, 6], "completion_mask": [0, 0, 1], "messages": "not read"},
    ]
    found = read(tmp_path / "r.jsonl", "answers", rows)
    batch = MaskedDiffusionCollator(2, 0)([{**row, "index": i} for i, row in enumerate(found)])
    assert batch["labels"].tolist() == [[-100, 5, 6], [-100, -100, 6]]


def test_rows_of_tokens_are_packed_like_texts(tmp_path):
    rows = [
        {"input_ids": [4, 5, 6, 0], "attention_mask": [1, 1, 1, 0]},
        {"text": "w3"},
        {"input_ids": [4, 1]},  # has its end
    ]
    packed = read(tmp_path / "r.jsonl", "pretrain", rows, 4)
    assert [row["input_ids"].tolist() for row in packed] == [[4, 5, 6, 1], [6, 1, 4, 1]]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("answers", {"input_ids": [4, 5]}, "does not say which of its tokens are the answer; add `labels`"),
        ("answers", {"input_ids": [4, 5], "labels": [5, -100]}, "token 1 is 4, and its label 5"),
        ("answers", {"input_ids": [4, 2], "labels": [-100, 2]}, "holds the mask token (2)"),
        (
            "answers",
            {"input_ids": [4, 40], "labels": [-100, 40]},
            "gives the token 40, outside the model's vocabulary",
        ),
        ("answers", {"input_ids": [4] * 9, "labels": [4] * 9}, "has 9 tokens, more than `sequence_length` (8)"),
        ("answers", {"input_ids": [4, 5], "labels": [-100, -100]}, "has no maskable token"),
        ("pretrain", {"input_ids": [4, 5], "labels": [-100, 5]}, "use `task: answers`"),
        ("pretrain", {"input_ids": [4, 40]}, "gives the token 40"),
        ("pretrain", {"input_ids": [4, 2]}, "holds the mask token (2)"),
        ("pretrain", {"text": "w1", "weight": 0}, "has `weight`, which would be lost; the objective sets"),
        ("pretrain", {"text": "w1", "loss_mask": [1]}, "has `loss_mask`, which would be lost"),
        ("pretrain", {"messages": []}, "has no text in 'text', but prompt and answer; use `task: answers`"),
    ],
    ids=str,
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, task, row, message):
    good = {"text": "w1"} if task == "pretrain" else {"prompt": "w1", "completion": "w2"}
    with pytest.raises(ValueError) as error:
        read(tmp_path / "r.jsonl", task, [good, row])
    assert "r.jsonl, line 2" in str(error.value) and message in str(error.value)


# Tokenizers


def test_vocabularies_with_gaps_and_added_tokens():
    tokenizer = word_tokenizer(["<pad>", "<end>", "w0"], mask_token=None)
    assert vocabulary_size(tokenizer) == 3
    tokenizer.add_special_tokens({"mask_token": "<new mask>"})
    assert vocabulary_size(tokenizer) == tokenizer.mask_token_id + 1 == 4
    assert tokenizer("w0 <new mask>")["input_ids"] == [2, 3]
    with pytest.raises(ValueError, match=r"mask token is '<new mask>' \(3\), and the model's is 2; is it"):
        check_tokenizer(tokenizer, CONFIG)
    check_tokenizer(tokenizer, tiny_config(vocab_size=8, mask_token_id=3))
    check_tokenizer(word_tokenizer(mask_token=None), CONFIG)  # the model knows it
    with pytest.raises(ValueError, match=r"`eos_token_id` is 31, outside the model's vocabulary of 30.*resize_token"):
        check_tokenizer(word_tokenizer(eos_token="w28"), tiny_config(vocab_size=30, mask_token_id=2))
    with pytest.raises(ValueError, match=r"`pad_token_id` is the mask token \(2\); give it a token of its own"):
        check_tokenizer(word_tokenizer(pad_token="<mask>"), CONFIG)


def test_a_vocabulary_with_gaps():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 9}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert len(tokenizer) == 3 and vocabulary_size(tokenizer) == 10
