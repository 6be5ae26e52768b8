# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Likelihood of texts: error bars, timesteps, tokens, windows, bytes, and the files that texts come from."""

import itertools
import json
import math

import pytest
import torch
from evaluation_models import WORDS, save_looped, word_tokenizer
from tiny import tiny_config, tiny_model
from tokenizers.pre_tokenizers import Split

from loopmdm import LoopMDMForMaskedLM
from loopmdm.evaluation import Text, make_windows, nelbo, read_texts, text_likelihood

VOCAB = {"vocab_size": 6, "mask_token_id": 5, "pad_token_id": 0, "hidden_size": 16, "intermediate_size": 24}
CONFIG = tiny_config(vocab_size=32, mask_token_id=2)


@pytest.fixture(scope="module")
def model():
    return tiny_model(**VOCAB)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def row_of(length: int, seed: int = 0) -> torch.LongTensor:
    return torch.randint(1, 5, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def losses_by_mask(model, row: torch.Tensor, num_loops: int, first: int = 0) -> dict[tuple[int, ...], torch.Tensor]:
    """-log p of the masked tokens for every non-empty mask of the tokens from `first` on."""
    subsets = [
        subset
        for count in range(1, len(row) - first + 1)
        for subset in itertools.combinations(range(first, len(row)), count)
    ]
    noised = row.repeat(len(subsets), 1)
    for i, subset in enumerate(subsets):
        noised[i, list(subset)] = model.config.mask_token_id
    logits = model(noised, num_loops=num_loops).logits.double()
    logits[..., model.config.mask_token_id] = -math.inf
    log_probs = logits.log_softmax(-1)
    return {subset: -log_probs[i, list(subset), row[list(subset)]] for i, subset in enumerate(subsets)}


def exact_nelbo(losses: dict[tuple[int, ...], torch.Tensor]) -> float:
    """Every number of masked tokens k weighs alike, within it every mask, and the sum weighs L/k, over L."""
    longest = max(map(len, losses))
    return sum(loss.mean().item() / math.comb(longest, len(subset)) for subset, loss in losses.items())


def test_estimates_of_many_seeds_average_to_the_exact_value(model):
    row = row_of(5)
    exact = exact_nelbo(losses_by_mask(model, row[0], 2))
    estimates = torch.stack([nelbo(model, row, num_loops=2, num_samples=2, seed=s).nats[0, 0] for s in range(200)])
    error = estimates.std() / len(estimates) ** 0.5
    assert error < 0.05 * exact
    assert abs(estimates.mean() - exact) < 3 * error


def test_two_standard_errors_hold_the_exact_value_about_as_often_as_they_should(model):
    rows = torch.cat([row_of(5, seed) for seed in range(8)])
    exact = sum(exact_nelbo(losses_by_mask(model, row, 2)) for row in rows) / rows.numel()
    held, count = 0, 150
    for seed in range(count):
        mean, error = nelbo(model, rows, num_loops=2, num_samples=16, batch_size=128, seed=seed).per_token()
        held += abs(mean.item() - exact) <= 2 * error.item()
    # 95 % of a normal variable, somewhat fewer as the error is itself estimated. Three deviations of 150 trials: 5 %.
    assert 0.89 <= held / count <= 0.99


def test_values_by_timestep_are_those_of_each_number_of_masks(model):
    row = row_of(5)
    losses = losses_by_mask(model, row[0], 3)
    mean, error, counts = nelbo(model, row, num_loops=[1, 3], num_samples=2000, batch_size=500).by_timestep(5)
    assert mean.shape == error.shape == (2, 5) and counts.tolist() == [400] * 5
    for k in range(1, 6):
        exact = torch.stack([loss.mean() for subset, loss in losses.items() if len(subset) == k]).mean().item()
        assert abs(mean[1, k - 1].item() - exact) <= 4 * error[1, k - 1].item() + 1e-6
    assert error[1, 4] < 1e-6 < error[1, 0]  # one mask only holds all tokens


def test_the_curve_over_timesteps_averages_to_the_nelbo(model):
    # Rows of different lengths: with a bin for each number of masks the curve's mean is the value per token.
    rows = torch.cat((row_of(4), row_of(4, 1)))
    estimate = nelbo(model, rows, num_loops=2, num_samples=64)
    mean, _, counts = estimate.by_timestep(4)
    weighted = (mean[0] * counts).sum() / counts.sum()
    torch.testing.assert_close(weighted, estimate.per_token()[0][0])
    empty = estimate.by_timestep(50)
    assert math.isnan(empty[0][0, 0]) and empty[2][0] == 0
    with pytest.raises(ValueError, match="`num_bins` is 0"):
        estimate.by_timestep(0)


@pytest.mark.parametrize("block_size", [None, 2])
def test_tokens_add_up_to_their_sequence(block_size):
    model, rows = tiny_model(**VOCAB, attention_block_size=block_size), torch.cat((row_of(6), row_of(6, 1)))
    estimate = nelbo(model, rows, num_loops=[1, 2], num_samples=16)
    assert estimate.token_nats.shape == (2, 2, 6)
    torch.testing.assert_close(estimate.token_nats.sum(-1), estimate.nats)


def test_a_tokens_share_is_its_mean_over_all_masks(model):
    row = row_of(4)
    exact = torch.zeros(4, dtype=torch.float64)
    for subset, loss in losses_by_mask(model, row[0], 1).items():
        exact[list(subset)] += loss / len(subset) / math.comb(4, len(subset))
    estimate = nelbo(model, row, num_loops=1, num_samples=4000, batch_size=500)
    torch.testing.assert_close(estimate.token_nats[0, 0], exact, rtol=0.1, atol=0.02)


def test_changes_between_loops_are_known_better_than_the_values(model):
    rows = torch.cat([row_of(8, seed) for seed in range(4)])
    estimate = nelbo(model, rows, num_loops=[2, 2, 3], num_samples=16)
    change, error = estimate.change()
    mean, separate = estimate.per_token()
    torch.testing.assert_close(change, mean - mean[0])
    assert change[1] == error[1] == 0
    assert 0 < error[2] < (separate[0] ** 2 + separate[2] ** 2) ** 0.5


def test_indices_name_the_masks(model):
    rows = torch.cat((row_of(6), row_of(6, 1)))
    together = nelbo(model, rows, num_samples=4)
    second = nelbo(model, rows[1:], num_samples=4, indices=[1])
    torch.testing.assert_close(second.nats[:, 0], together.nats[:, 1], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="`indices` has 1 entries for 2 sequences"):
        nelbo(model, rows, num_samples=4, indices=[0])


# Windows


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
    model = tiny_model(**VOCAB)
    ids = row_of(5)[0].tolist()
    texts = [Text("t", ids, [True] * 5, [1] * 5)]
    result = text_likelihood(model, texts, [2], length=3, stride=1, num_samples=2000, batch_size=500)
    # The first three tokens together, then each further one given the two before it.
    exact = exact_nelbo(losses_by_mask(model, torch.tensor(ids[:3]), 2))
    for end in (4, 5):
        exact += exact_nelbo(losses_by_mask(model, torch.tensor(ids[end - 3 : end]), 2, first=2))
    assert result.num_tokens == 5 and len(result.windows) == 3
    assert abs(result.estimate.nats.sum().item() - exact) < 4 * result.per_token()[1].item() * 5
    assert result.by_text()[0]["nats"] == pytest.approx(result.estimate.nats.sum(-1).tolist())


def test_a_text_that_fits_is_scored_as_nelbo_scores_it(model):
    rows = [row_of(length, length)[0].tolist() for length in (6, 3, 5)]
    result = text_likelihood(model, [Text("t", ids, [True] * len(ids)) for ids in rows], [1, 2], num_samples=8)
    for index, ids in enumerate(rows):
        alone = nelbo(model, torch.tensor([ids]), num_loops=[1, 2], num_samples=8, indices=[index])
        torch.testing.assert_close(result.estimate.nats[:, index], alone.nats[:, 0], rtol=1e-6, atol=0)
        torch.testing.assert_close(result.estimate.token_nats[:, index, : len(ids)], alone.token_nats[:, 0])
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
    texts = [Text("t", row_of(5, seed)[0].tolist(), [True] * 5) for seed in range(30)]
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


# Bytes


def test_bits_per_byte_count_the_utf8_of_the_text(tmp_path, tokenizer):
    words = ["<pad>", "<end>", "<mask>", "grün", "日本", "a"]
    special = word_tokenizer(words)
    (tmp_path / "t.txt").write_text("grün  日本\na", encoding="utf-8")
    texts = read_texts(tmp_path / "t.txt", special, CONFIG)
    assert texts[0].input_ids == [3, 4, 5]
    # White space goes with the word before it.
    assert texts[0].num_bytes == [5 + 2, 6 + 1, 1]
    model = tiny_model(vocab_size=32, mask_token_id=2)
    result = text_likelihood(model, texts, [1], num_samples=8)
    assert result.num_bytes == len("grün  日本\na".encode()) == 15
    bits, error = result.bits_per_byte()
    assert bits.item() == pytest.approx(result.estimate.nats.sum().item() / math.log(2) / 15)
    assert error.item() == pytest.approx(result.estimate.standard_error.item() / math.log(2) / 15)
    bound, bound_error = result.perplexity_bound()
    assert bound.item() == pytest.approx(math.exp(result.estimate.nats.sum().item() / 3))
    assert bound_error.item() == pytest.approx(bound.item() * result.per_token()[1].item())


# Files


def test_texts_are_separated_as_asked(tmp_path, tokenizer):
    path = tmp_path / "t.txt"
    path.write_text("w1 w2\nw3\n\n\nw4\n")
    counts = {
        name: [len(text.input_ids) for text in read_texts(path, tokenizer, CONFIG, documents=name)]
        for name in ("file", "blank_line", "line")
    }
    assert counts == {"file": [4], "blank_line": [3, 1], "line": [2, 1, 1]}
    assert read_texts(path, tokenizer, CONFIG, documents="line", limit=2)[1].name == f"{path}, line 2"


def test_answers_are_scored_given_their_prompts(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [
        {"prompt": "w1 w2", "answer": "w3 w4 w5"},
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair, chat = read_texts(path, tokenizer, CONFIG, task="answers")
    assert pair.input_ids == [4, 5, 6, 7, 8, 1]  # with the end token
    assert pair.maskable == [False] * 2 + [True] * 4
    assert pair.num_bytes == [0, 0, 3, 3, 2, 0]
    assert chat.maskable == [False] * 3 + [True] * (len(chat.input_ids) - 3) and chat.num_bytes is None


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_what_mask_tokens_stand_for_is_scored(tmp_path, suffix):
    words = word_tokenizer(["<pad>", "<end>", ".", "ab", "cd"], mask_token=".")
    words.backend_tokenizer.pre_tokenizer = Split("-", "removed")
    path = tmp_path / f"f.{suffix}"
    row = "ab-.-cd ab-ab-cd\n" if suffix == "txt" else json.dumps({"masked": "ab-.-cd", "text": "ab-ab-cd"}) + "\n"
    path.write_text(row)
    (text,) = read_texts(path, words, CONFIG, task="fill")
    assert text.input_ids == [3, 3, 4] and text.maskable == [False, True, False]


def test_data_sets_are_read(tmp_path, tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "test.jsonl").write_text('{"body": "w1 w2"}\n{"body": "w3"}\n')
    folder = str(tmp_path / "rows")
    texts = read_texts(folder, tokenizer, CONFIG, text_column="body", dataset={"split": "test"})
    assert [text.input_ids for text in texts] == [[4, 5], [6]]
    with pytest.raises(ValueError, match="cannot be loaded"):
        read_texts(folder, tokenizer, CONFIG, dataset={"split": "nowhere"})


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("t.txt", "", {}, "holds no text"),
        ("t.txt", " \n\n", {}, "holds no text"),
        ("t.txt", "w1 <mask>", {}, 'holds the mask token (2); give clean text; the task "fill"'),
        ("t.txt", "w1", {"task": "answers"}, "is a text"),
        ("t.txt", "w1", {"task": "chat"}, "The task is 'chat'; choose one of texts, answers, fill"),
        ("t.txt", "w1", {"documents": "page"}, "separated by 'page'"),
        ("t.txt", "w1", {"limit": 0}, "The limit is 0"),
        ("t.txt", "w1", {"task": "fill"}, "line 1 has 1 fields; it needs two"),
        ("t.txt", "w1 w2", {"task": "fill"}, "line 1: token 1 is 4 in the text with mask tokens, else 5"),
        ("t.txt", "w1 w1", {"task": "fill"}, "holds no mask token (2), so there is nothing to fill in"),
        ("t.jsonl", '{"text": 3}\n', {}, "example 1 has no text in 'text'; it has text"),
        ("t.jsonl", '{"body": "w1"}\n', {}, "example 1 has no text in 'text'; it has body"),
        ("t.jsonl", '{"text": ""}\n', {}, "example 1 has no token to score; it is too short"),
        (
            "t.jsonl",
            '{"masked": "<mask> w1", "text": "w1"}\n',
            {"task": "fill"},
            "has 2 tokens with mask",
        ),
        ("t.jsonl", "{\n", {}, "line 1 is not valid JSON"),
    ],
    ids=str,
)
def test_bad_texts_are_named(tmp_path, tokenizer, name, content, arguments, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        read_texts(tmp_path / name, tokenizer, CONFIG, **arguments)
    assert message in str(error.value)


def test_missing_files_and_foreign_tokenizers_are_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"nowhere.txt is no file"):
        read_texts(tmp_path / "nowhere.txt", tokenizer, CONFIG)
    (tmp_path / "t.txt").write_text("w28")
    with pytest.raises(ValueError, match="gives the token 31, outside the model's vocabulary of 23"):
        read_texts(tmp_path / "t.txt", tokenizer, tiny_config())


def test_the_metric_gives_the_same_by_path(tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate")
    folder = save_looped(tmp_path / "model")
    metric = evaluate.load("evaluation/metrics/masked_nelbo")
    texts = [" ".join(WORDS[4:9]), " ".join(WORDS[10:20])]
    found = metric.compute(predictions=texts, model_id=folder, num_loops=[1, 3], num_samples=8)
    tokenizer = word_tokenizer()
    model = LoopMDMForMaskedLM.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    for i, row in enumerate(ids):
        alone = nelbo(model, torch.tensor([row]), num_loops=[1, 3], num_samples=8, indices=[i])
        assert [values[i] for values in found["nats"]] == pytest.approx(alone.nats[:, 0].tolist())
    size = sum(len(text) for text in texts)
    assert found["bits_per_byte"][1] == pytest.approx(sum(found["nats"][1]) / math.log(2) / size)
    assert found["perplexity_bound"][0] == pytest.approx(math.exp(found["nats_per_token"][0]))
    with pytest.raises(ValueError, match="Text 2 has no token"):
        metric.compute(predictions=["w1", ""], model_id=folder)
