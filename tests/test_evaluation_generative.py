# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Generative perplexity against transformers itself, degenerate text, final numbers, and both as metrics."""

import math
from decimal import Decimal

import pytest
import torch
from evaluation_models import make_judge, save_judge, word_tokenizer
from tiny import tiny_model
from transformers import BertConfig, BertLMHeadModel

from loopmdm.evaluation import generative_perplexity
from loopmdm.evaluation.final_number import final_number
from loopmdm.evaluation.perplexity import unigram_entropy

SAMPLES = ["w1 w2 w3 w4 w5", "w7 w7 w7", "w9 w8 w1 w1 w2 w3 w4 w20 w21"]


@pytest.fixture(scope="module")
def judge():
    return make_judge()


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(bos_token="<end>")


def direct_nats(judge, ids: list[int]) -> float:
    """transformers' own loss, the mean over all tokens but the first, of one text without padding."""
    ids = torch.tensor([ids])
    return judge(ids, labels=ids).loss.item() * (ids.shape[1] - 1)


def test_nats_are_those_of_transformers(judge, tokenizer):
    score = generative_perplexity(SAMPLES, judge, tokenizer, batch_size=2)
    ids = [tokenizer(sample)["input_ids"] for sample in SAMPLES]
    expected = [direct_nats(judge, [1, *row]) for row in ids]
    assert score.nats.tolist() == pytest.approx(expected, rel=1e-5)
    assert score.num_tokens.tolist() == [5, 3, 9]
    perplexity, error = score.perplexity()
    assert perplexity == pytest.approx(math.exp(sum(expected) / 17), rel=1e-5)
    assert error > 0
    calls = []
    alone = generative_perplexity(SAMPLES, judge, tokenizer, batch_size=1, progress=lambda *n: calls.append(n))
    assert alone.nats.tolist() == pytest.approx(expected, rel=1e-5) and calls[-1] == (3, 3)


def test_without_a_start_token_the_first_token_is_context(judge):
    score = generative_perplexity(["w1 w2 w3", "w4"], judge, word_tokenizer())
    assert score.nats.tolist() == pytest.approx([direct_nats(judge, [4, 5, 6]), 0], rel=1e-5)
    assert score.num_tokens.tolist() == [2, 0] and score.summary()["unscored"] == 1


def test_long_samples_are_scored_by_strides(judge, tokenizer):
    words = [f"w{i * 7 % 29}" for i in range(9)]
    score = generative_perplexity([" ".join(words)], judge, tokenizer, length=4, stride=2)
    ids = [1, *tokenizer(" ".join(words))["input_ids"]]
    expected = 0.0
    for start, first in ((0, 1), (2, 4), (4, 6), (6, 8)):
        logits = judge(torch.tensor([ids[start : start + 4]])).logits[0].log_softmax(-1)
        expected -= sum(logits[i - 1 - start, ids[i]].item() for i in range(first, min(start + 4, len(ids))))
    assert score.num_tokens.item() == 9
    assert score.nats.item() == pytest.approx(expected, rel=1e-5)


def test_degenerate_text_shows(judge, tokenizer):
    score = generative_perplexity(["w1 " * 8, "w1 w2 w3 w4 w5 w6 w7 w8", "w1 w2 w1 w2 w1 w2 w1 w2"], judge, tokenizer)
    assert score.entropy.tolist() == pytest.approx([0, math.log(8), math.log(2)])
    # Of five 4-grams one, five and two differ.
    assert score.repetition.tolist() == pytest.approx([4 / 5, 0, 3 / 5])
    assert score.distinct == {1: 8 / 24, 2: (1 + 7 + 1) / 21, 3: (1 + 6 + 2) / 18}
    summary = score.summary()
    assert summary["entropy"] == pytest.approx((math.log(8) + math.log(2)) / 3)
    assert summary["tokens"] == 24 and summary["samples"] == 3


def test_entropy_of_a_distribution():
    assert unigram_entropy([3, 3, 4, 5]) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))
    assert math.isnan(unigram_entropy([]))


def test_error_is_the_spread_between_samples(judge, tokenizer):
    samples = [f"w{i} w{i + 3} w{i + 5}" for i in range(20)]
    score = generative_perplexity(samples, judge, tokenizer)
    mean, error = score.per_token()
    assert error == pytest.approx((score.nats / 3).std().item() / 20**0.5)
    assert score.perplexity() == (pytest.approx(math.exp(mean)), pytest.approx(math.exp(mean) * error))
    assert math.isnan(generative_perplexity(samples[:1], judge, tokenizer).per_token()[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": [[4, 5, 6]]}, "token ids mean something else to the judge"),
        ({"samples": torch.tensor([[4, 5]])}, "token ids mean something else to the judge"),
        ({"samples": "w1 w2"}, "must be a list of texts"),
        ({"samples": []}, "no samples"),
        ({"samples": ["", ""]}, "All samples are too short"),
        ({"length": 33}, "33 tokens long; the judge takes 2 to 32"),
        ({"length": 1}, "1 tokens long"),
        ({"length": 4, "stride": 4}, r"stride is 4; it must be at least 1 and under the window's length \(4\)"),
        ({"batch_size": 0}, "`batch_size` is 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(judge, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        generative_perplexity(**{"samples": SAMPLES, "judge": judge, "tokenizer": tokenizer, **arguments})


def test_another_tokenizer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="gives the token 24, outside the judge's vocabulary of 24"):
        generative_perplexity(SAMPLES, make_judge(vocab_size=24), tokenizer)


def test_judges_that_see_later_tokens_are_refused(tokenizer):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    bert = BertLMHeadModel(BertConfig(vocab_size=32, initializer_range=0.5, is_decoder=False, **sizes)).eval()
    with pytest.raises(ValueError, match="not causal: its logits depend on later tokens"):
        generative_perplexity(SAMPLES, bert, tokenizer)
    with pytest.raises(ValueError, match="The judge is a LoopMDM"):
        generative_perplexity(SAMPLES, tiny_model(), tokenizer)


def test_the_metric_gives_the_same_by_path(judge, tokenizer, tmp_path):
    evaluate = pytest.importorskip("evaluate")
    metric = evaluate.load("evaluation/metrics/generative_perplexity")
    found = metric.compute(predictions=SAMPLES, model_id=save_judge(tmp_path / "judge"))
    assert found == pytest.approx(generative_perplexity(SAMPLES, judge, tokenizer).summary())


# Final numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She pays 3 + 4 = <<3+4=7>>7 dollars.\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("#### -5.50", "-5.5"),
        ("#### $1,000,000.00", "1000000"),
        ("#### \u22123", "-3"),
        ("#### 18\n\nQuestion: 20", "18"),
        ("The answer is 42.", "42"),
        ("first 1, then 2, at last 3,", "3"),
        ("so 7-3=4", "4"),
        ("5-3", "3"),
        ("x = -3", "-3"),
        ("it costs $0.75!", "0.75"),
        ("#### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_numbers(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_strict_final_numbers_need_their_mark():
    assert final_number("It is 42.", strict=True) is None
    assert final_number("It is 41. #### 42", strict=True) == 42


def test_the_metric_counts_equal_numbers():
    evaluate = pytest.importorskip("evaluate")
    metric = evaluate.load("evaluation/metrics/final_number")
    answers = ["#### 1,000", "it is 7.0", "-3", "nothing", "#### 8"]
    truth = ["#### 1000", "#### 7", "#### 3", "#### 1", "#### 9"]
    assert metric.compute(predictions=answers, references=truth) == {"exact_match": 2 / 5, "answered": 4 / 5}
    strict = metric.compute(predictions=answers, references=truth, strict=True)
    assert strict == {"exact_match": 1 / 5, "answered": 2 / 5}
    with pytest.raises(ValueError, match="Reference 2 has no number: 'none'"):
        metric.compute(predictions=["1", "1"], references=["1", "none"])
