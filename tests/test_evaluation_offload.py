# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Models whose weights are elsewhere while they do not run (accelerate): results are those of the model."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from evaluation_models import make_judge, word_tokenizer
from lm_eval.api.instance import Instance
from tiny import random_ids, tiny_model

from loopmdm.convert import calibrate
from loopmdm.evaluation import calibrate_loops, generative_perplexity, measure_dynamics, text_likelihood
from loopmdm.evaluation.lm_eval_model import LoopMDMEvalModel
from loopmdm.evaluation.protocol import protocol
from loopmdm.evaluation.texts import Text
from loopmdm.objective import input_device, nelbo

MASK = 22


def away(model, place: str, folder: Path):
    """A copy whose weights are on the meta device until its modules are called."""
    model = copy.deepcopy(model)
    if place == "cpu":
        model = cpu_offload(model, execution_device="cpu")
    else:
        model = disk_offload(model, folder, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert input_device(model).type == "cpu"
    return model


@pytest.fixture(
    scope="module",
    params=[
        ("cpu", {}),
        ("disk", {"shift_logits": True, "tie_word_embeddings": False}),
        ("disk", {"attention_block_size": 4}),
    ],
    ids=str,
)
def pair(request, tmp_path_factory):
    """A model, and the same with its weights elsewhere."""
    place, overrides = request.param
    model = tiny_model(eos_token_id=6, **overrides)
    return model, away(model, place, tmp_path_factory.mktemp("offload"))


def clean(count: int, length: int) -> torch.Tensor:
    return torch.randint(1, MASK, (count, length), generator=torch.Generator().manual_seed(3))


def same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6, equal_nan=True)


def test_likelihood(pair):
    texts = [Text(f"text {i}", ids.tolist(), [True] * 10) for i, ids in enumerate(clean(3, 10))]
    found = [text_likelihood(one, texts, [1, 3], num_samples=4) for one in pair]
    same(found[0].estimate.samples, found[1].estimate.samples)
    found = [nelbo(one, clean(2, 8), num_samples=2).nats for one in pair]
    same(*found)


def test_dynamics(pair):
    found = [measure_dynamics(one, clean(2, 9), timesteps=[0.5]) for one in pair]
    for name in ("change", "distance", "attention", "loss", "accuracy"):
        same(*(torch.tensor(getattr(one, name)) for one in found))


def test_loop_budget(pair):
    examples = []
    for number in range(4):
        ids = random_ids(1, 8, seed=number)[0]
        ids[2] = MASK
        examples.append({"input_ids": ids, "target": torch.ones_like(ids)})
    settings = {"quality": "agreement", "settings": [{"num_loops": 1}]}
    found = [calibrate_loops(one, examples, **settings).record() for one in pair]
    assert found[0] == found[1]


def test_lm_eval(tmp_path):
    model, answers = tiny_model(vocab_size=32, mask_token_id=2, eos_token_id=1), []
    for one in (model, away(model, "disk", tmp_path)):
        lm = LoopMDMEvalModel(one, tokenizer=word_tokenizer(), num_samples=4)
        scored = [Instance("loglikelihood", {}, (f"w{i} w2", " w3 w4"), i) for i in range(3)]
        rolled = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(("w1 w2 w3", "", "w4"))]
        made = [
            Instance("generate_until", {}, (text, {"max_gen_toks": 5}), i)
            for i, text in enumerate(("w1 w2", "", "w4"))
        ]
        rolls = lm.loglikelihood_rolling(rolled, disable_tqdm=True)
        assert rolls[1] == 0.0, "an empty text is certain"
        texts = lm.generate_until(made, disable_tqdm=True)
        assert texts == [lm.generate_until([one], disable_tqdm=True)[0] for one in made]
        answers.append(([score for score, _ in lm.loglikelihood(scored, disable_tqdm=True)] + rolls, texts))
    same(*(torch.tensor(scores) for scores, _ in answers))
    assert answers[0][1] == answers[1][1]


def test_generative_perplexity(tmp_path):
    judge, tokenizer = make_judge(), word_tokenizer(bos_token="<end>")
    judges = judge, away(judge, "disk", tmp_path)
    same(*(generative_perplexity(["w1 w2 w3", "w4"], one, tokenizer).nats for one in judges))


def test_calibration_of_a_conversion(pair):
    found = [calibrate(one, clean(2, 8), width=1, num_samples=2) for one in pair]
    assert [row["nelbo"] for row in found[0]["windows"]] == pytest.approx(
        [row["nelbo"] for row in found[1]["windows"]]
    )


def test_protocol(pair):
    assert protocol({}, pair[1])["model"]["device"] == "cpu"
