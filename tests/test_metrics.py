# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The metrics for the `evaluate` library, loaded by path, and the final numbers of answers."""

import math
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from evaluation_models import WORDS, make_judge, save_judge, save_looped, word_tokenizer

from loopmdm import LoopMDMForMaskedLM
from loopmdm.evaluation import generative_perplexity, nelbo
from loopmdm.evaluation.final_number import final_number

evaluate = pytest.importorskip("evaluate")
METRICS = Path(__file__).resolve().parents[1] / "evaluation" / "metrics"


def test_masked_nelbo(tmp_path):
    folder = save_looped(tmp_path / "model")
    metric = evaluate.load(f"{METRICS}/masked_nelbo")
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
    with pytest.raises(ValueError, match="Text 2 does not have a token"):
        metric.compute(predictions=["w1", ""], model_id=folder)


def test_generative_perplexity(tmp_path):
    metric, samples = evaluate.load(f"{METRICS}/generative_perplexity"), ["w1 w2 w3 w4 w5", "w7 w7 w7"]
    found = metric.compute(predictions=samples, model_id=save_judge(tmp_path / "judge"))
    assert found == pytest.approx(
        generative_perplexity(samples, make_judge(), word_tokenizer(bos_token="<end>")).summary()
    )


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


def test_final_number():
    metric = evaluate.load(f"{METRICS}/final_number")
    answers = ["#### 1,000", "it is 7.0", "-3", "nothing", "#### 8"]
    truth = ["#### 1000", "#### 7", "#### 3", "#### 1", "#### 9"]
    assert metric.compute(predictions=answers, references=truth) == {"exact_match": 2 / 5, "answered": 4 / 5}
    strict = metric.compute(predictions=answers, references=truth, strict=True)
    assert strict == {"exact_match": 1 / 5, "answered": 2 / 5}
    with pytest.raises(ValueError, match="Reference 2 has no number: 'none'"):
        metric.compute(predictions=["1", "1"], references=["1", "none"])
