# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Perplexities: of texts by windows against `nelbo` and enumeration, of samples against transformers itself."""

import math
from dataclasses import replace

import pytest
import torch
from evaluation_models import make_judge, word_tokenizer
from objective_reference import clean_ids, exact_nelbo, small_model
from tiny import tiny_config, tiny_model
from transformers import BertConfig, BertLMHeadModel

from loopmdm.evaluation import Text, generative_perplexity, make_windows, nelbo, read_texts, text_likelihood
from loopmdm.evaluation.perplexity import unigram_entropy

SAMPLES = ["w1 w2 w3 w4 w5", "w7 w7 w7", "w9 w8 w1 w1 w2 w3 w4 w20 w21"]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def judge():
    return make_judge()


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(bos_token="<end>")


# Texts


@pytest.mark.parametrize(("length", "window", "stride"), [(10, 4, 4), (10, 4, 2), (11, 4, 3), (3, 4, 1), (9, 1, 1)])
def test_windows_score_every_token_once_with_its_context(length, window, stride):
    text = Text("t", list(range(100, 100 + length)), [True] * length, [1] * length)
    windows = make_windows([text, text], window, stride)
    for number in (0, 1):
        scored = [
            one.start + i for one in windows if one.text == number for i, fresh in enumerate(one.maskable) if fresh
        ]
        assert scored == list(range(length))
    for one in windows:
        assert len(one.input_ids) <= window
        assert one.input_ids == text.input_ids[one.start : one.start + len(one.input_ids)]
        fresh = one.maskable.index(True)
        assert fresh == (0 if one.start + fresh == 0 else min(window - stride, one.start + fresh))
        assert one.num_bytes == sum(one.maskable)


def test_windows_without_anything_to_score_are_left_out():
    windows = make_windows([Text("t", [1] * 6, [False] * 4 + [True] * 2)], 2)
    assert [(one.start, one.maskable) for one in windows] == [(4, [True, True])]


def test_strides_sum_to_the_direct_computation():
    model = small_model()
    ids = clean_ids(1, 5)[0].tolist()
    texts = [Text("t", ids, [True] * 5, [1] * 5)]
    result = text_likelihood(model, texts, [2], length=3, stride=1, num_samples=2000, batch_size=500)
    # The first three tokens together, then each further one given the two before it.
    exact = exact_nelbo(model, ids[:3]) + exact_nelbo(model, ids[1:4], maskable=[2])
    exact += exact_nelbo(model, ids[2:5], maskable=[2])
    assert result.num_tokens == 5 and len(result.windows) == 3
    assert abs(result.estimate.nats.sum().item() - exact) < 4 * result.per_token()[1].item() * 5
    assert result.by_text()[0]["nats"] == pytest.approx(result.estimate.nats.sum(-1).tolist())


def test_a_text_that_fits_is_scored_as_nelbo_scores_it(model):
    rows = [clean_ids(1, length, length)[0].tolist() for length in (6, 3, 5)]
    result = text_likelihood(model, [Text("t", ids, [True] * len(ids)) for ids in rows], [1, 2], num_samples=8)
    for index, ids in enumerate(rows):
        alone = nelbo(model, torch.tensor([ids]), num_loops=[1, 2], num_samples=8, indices=[index])
        torch.testing.assert_close(result.estimate.nats[:, index], alone.nats[:, 0], rtol=1e-6, atol=0)
        found = result.estimate.token_nats[:, index, : len(ids)]
        torch.testing.assert_close(found, alone.token_nats[:, 0], rtol=1e-6, atol=1e-6)
    tokens = result.by_token()
    assert tokens["token"].tolist() == [token for ids in rows for token in ids]
    assert tokens["text"].tolist() == [0] * 6 + [1] * 3 + [2] * 5
    assert tokens["position"].tolist() == [*range(6), *range(3), *range(5)]
    torch.testing.assert_close(tokens["nats"].sum(-1), result.estimate.nats.sum(-1))


def test_a_part_of_the_windows_is_spread_evenly(model):
    texts = [Text("t", [1, 2] * 10, [True] * 20)]
    calls = []
    result = text_likelihood(
        model, texts, length=2, max_windows=5, num_samples=2, progress=lambda *counts: calls.append(counts)
    )
    assert [window.start for window in result.windows] == [0, 4, 8, 12, 16]
    assert result.num_tokens == 10 and result.num_bytes is None and result.bits_per_byte() is None
    assert calls == [(5, 5)]


def test_error_between_texts_is_the_spread_of_their_means(model):
    texts = [Text("t", clean_ids(1, 5, seed)[0].tolist(), [True] * 5) for seed in range(30)]
    result = text_likelihood(model, texts, 2, num_samples=32)
    means = result.estimate.nats[0] / 5
    assert result.error_between_texts().item() == pytest.approx(means.std().item() / 30**0.5)
    assert result.error_between_texts().item() > result.per_token()[1].item()
    single = text_likelihood(model, texts[:1], 2, num_samples=2)
    assert math.isnan(single.error_between_texts().item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 65}, "window is 65 tokens long; the model takes 1 to 64"),
        ({"length": 0}, "window is 0 tokens long"),
        ({"length": 4, "stride": 5}, r"stride is 5; it must be 1 to the length of the window \(4\)"),
        ({"length": 4, "stride": 0}, "stride is 0"),
        ({"max_windows": 0}, "`max_windows` is 0"),
        ({"num_loops": [0, 1]}, "`num_loops` is 0"),
        ({"texts": []}, "no text to score"),
    ],
    ids=str,
)
def test_bad_windows_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        text_likelihood(model, **{"texts": [Text("t", [1, 2], [True] * 2)], **arguments})


def test_bits_per_byte_count_the_utf8_of_the_text(tmp_path):
    words = ["<pad>", "<end>", "<mask>", "grün", "日本", "a"]
    special = word_tokenizer(words)
    (tmp_path / "t.txt").write_text("grün  日本\na", encoding="utf-8")
    texts = read_texts(tmp_path / "t.txt", special, tiny_config(vocab_size=32, mask_token_id=2))
    model = tiny_model(vocab_size=32, mask_token_id=2)
    result = text_likelihood(model, texts, [1], num_samples=8)
    assert result.num_bytes == len("grün  日本\na".encode()) == 15
    bits, error = result.bits_per_byte()
    assert bits.item() == pytest.approx(result.estimate.nats.sum().item() / math.log(2) / 15)
    assert error.item() == pytest.approx(result.estimate.standard_error.item() / math.log(2) / 15)
    bound, bound_error = result.perplexity_bound()
    assert bound.item() == pytest.approx(math.exp(result.estimate.nats.sum().item() / 3))
    assert bound_error.item() == pytest.approx(bound.item() * result.per_token()[1].item())


# Samples


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
    assert replace(score, nats=1000.0 * score.num_tokens).perplexity()[0] == math.inf
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
