# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Calibrating loops: what is measured, what is chosen, and what is written."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from commands import PUZZLE, SOLUTION, refusal, run
from evaluation_models import WORDS, with_special, word_tokenizer
from tiny import random_ids, tiny_model

from loopmdm import LoopMDMForMaskedLM, LoopMDMGenerationConfig
from loopmdm.data import load_tokenizer
from loopmdm.evaluation import calibrate_loops
from loopmdm.evaluation.loop_budget import budget_settings, describe, read_examples, write_budget

ROOT = Path(__file__).resolve().parents[1]
MASK = 22


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_loops=4)


def examples(model, count: int = 8, right: int = 8) -> list[dict[str, torch.Tensor]]:
    """Of different lengths; the targets of the first `right` are what the model fills in at its four loops."""
    made = []
    for number in range(count):
        ids = random_ids(1, 6 + number % 3, seed=number)[0]
        ids[2] = MASK
        target = model.generate(ids[None], max_new_tokens=0)[0].clone()
        if number >= right:
            target[ids == MASK] = (target[ids == MASK] + 1) % 20 + 1
        made.append({"input_ids": ids, "target": target})
    return made


def test_quality_and_cost_are_those_of_generate(model):
    data = examples(model)
    budget = calibrate_loops(model, data, settings=[{"num_loops": 1}, {"num_loops": 2}], max_loss=1.0)
    assert [result.arguments for result in budget.results] == [{"num_loops": 4}, {"num_loops": 1}, {"num_loops": 2}]
    assert budget.full.quality == 1.0 and budget.full.loss == 0.0
    for result in budget.results:
        right, costs = [], []
        for example in data[::2]:
            output = model.generate(
                example["input_ids"][None],
                max_new_tokens=0,
                num_loops=result.arguments["num_loops"],
                return_dict_in_generate=True,
            )
            right.append(float(torch.equal(output.sequences[0], example["target"])))
            costs.append([output[name].item() for name in ("forward_passes", "loops", "flops")])
        assert result.quality == pytest.approx(sum(right) / len(right))
        mean = [sum(values) / len(values) for values in zip(*costs, strict=True)]
        assert [result.forward_passes, result.loops, result.flops] == pytest.approx(mean)
        assert result.loss == pytest.approx(1.0 - result.quality)
        assert result.mean_loops == result.arguments["num_loops"]
    # Any loss will do, so the cheapest one is taken.
    assert budget.best.arguments == {"num_loops": 1}
    assert json.loads(json.dumps(budget.record()))["best"]["arguments"] == {"num_loops": 1}


def test_the_cheapest_within_the_loss_on_both_halves_is_chosen(model):
    data = examples(model, count=12)
    budget = calibrate_loops(model, data, max_loss=0.0)
    assert budget.best.loss <= 0 and budget.check.loss <= 0
    for result in budget.results:
        if result.flops < budget.best.flops:
            failed = [check for check in budget.checks if check.arguments == result.arguments and check.loss > 0]
            assert result.loss > 0 or failed, describe(result.arguments)
    assert budget.checks[-1] is budget.check


def test_a_setting_that_fails_on_the_other_half_is_passed_over(model):
    """Examples whose answer never changes with the loops come first, those that need all loops second."""
    easy, hard = [], []
    for number in range(60):
        ids = random_ids(1, 7, seed=100 + number)[0]
        ids[2] = MASK
        one, all_ = (model.generate(ids[None], max_new_tokens=0, num_loops=loops)[0] for loops in (1, 4))
        (easy if torch.equal(one, all_) else hard).append({"input_ids": ids, "target": all_})
    pairs = [example for both in zip(easy, hard, strict=False) for example in both]
    assert len(pairs) >= 8
    budget = calibrate_loops(model, pairs, settings=[{"num_loops": 1}], max_loss=0.1)
    assert [check.arguments for check in budget.checks] == [{"num_loops": 1}, {"num_loops": 4}]
    assert budget.best.arguments == {"num_loops": 4}


@pytest.mark.parametrize(("quality", "expected"), [("exact", 0.5), ("agreement", 1.0)])
def test_what_quality_means(model, quality, expected):
    data = examples(model, right=0)
    for number in (0, 2, 1, 3):  # half of either half is right
        data[number]["target"] = model.generate(data[number]["input_ids"][None], max_new_tokens=0)[0]
    budget = calibrate_loops(model, data, quality=quality, settings=[{"num_loops": 1}])
    assert budget.full.quality == expected


def test_the_share_of_right_tokens(model):
    data = examples(model, count=4)
    for example in data:
        first = int((example["input_ids"] == MASK).nonzero()[0])
        example["target"] = example["target"].clone()
        example["target"][first] = example["target"][first] % 20 + 1
    budget = calibrate_loops(model, data, quality="tokens", settings=[{"num_loops": 1}])
    blanks = [int((example["input_ids"] == MASK).sum()) for example in data[::2]]
    assert budget.full.quality == pytest.approx(sum((count - 1) / count for count in blanks) / len(blanks))


@pytest.mark.parametrize(("quality", "others"), [("exact", '"tokens" or "agreement"'), ("tokens", '"agreement"')])
def test_without_quality_there_is_nothing_to_choose_by(model, quality, others):
    data = examples(model, count=8)
    for example in data:
        blank = example["input_ids"] == MASK
        full = model.generate(example["input_ids"][None], max_new_tokens=0)[0]
        example["target"] = torch.where(blank, full % 20 + 1, example["input_ids"])
    with pytest.raises(ValueError, match=f"The quality of 4 loops is 0 on all 8 examples.*{others}\\)"):
        calibrate_loops(model, data, quality=quality)
    assert calibrate_loops(model, data, quality="agreement", settings=[{"num_loops": 1}]).full.quality == 1


def test_settings_stay_within_the_most_loops():
    for setting in budget_settings(6):
        assert 1 <= setting["num_loops"] <= 6
        assert setting.get("visible_loops", 1) < 6
        LoopMDMGenerationConfig(**setting)


def test_the_choice_becomes_the_default(model, tmp_path):
    model.save_pretrained(tmp_path)
    LoopMDMGenerationConfig(loop_tolerance=0.3, max_denoising_steps=5).save_pretrained(tmp_path)
    file = write_budget(tmp_path, {"num_loops": 3, "visible_loops": 2})
    loaded = LoopMDMForMaskedLM.from_pretrained(tmp_path).generation_config
    assert (loaded.num_loops, loaded.visible_loops, loaded.max_denoising_steps) == (3, 2, 5)
    assert loaded.loop_tolerance is None, "nothing of an earlier choice remains"
    assert [path.name for path in tmp_path.glob("*generation_config*")] == [file.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_loops": 1}, "`num_loops` is 1, which leaves nothing to save"),
        ({"num_loops": 0}, "`num_loops` is 0; it must be an integer of at least 1"),
        ({"quality": "good"}, "`quality` is 'good'; choose"),
        ({"max_loss": -0.1}, "`max_loss` is -0.1; it is a share"),
        ({"loop_tolerance": 0.1}, "`loop_tolerance` is what is calibrated"),
        ({"settings": [{"num_loop": 1}]}, "it may hold num_loops, loop_tolerance, visible_loops"),
        ({"settings": [{"num_loops": 2, "visible_loops": 0}]}, "`visible_loops` is 0; it must be"),
        ({"unmasking": "best"}, "`unmasking` is 'best'; choose one of"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_before_anything_runs(model, monkeypatch, arguments, message):
    data = examples(model, count=4)

    def fail(*args, **kwargs):
        raise AssertionError("ran all the same")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(ValueError, match=message):
        calibrate_loops(model, data, **arguments)


def test_bad_examples_and_models_are_named(model):
    data = examples(model, count=4)
    with pytest.raises(ValueError, match="There are 3 examples; give at least 4"):
        calibrate_loops(model, data[:3])
    with pytest.raises(ValueError, match=r"Example 3 holds no \[MASK\]"):
        calibrate_loops(model, [*data[:3], {"input_ids": torch.tensor([1, 2]), "target": torch.tensor([1, 2])}])
    with pytest.raises(ValueError, match="Example 3 has 2 tokens and a target of 3"):
        calibrate_loops(model, [*data[:3], {"input_ids": torch.tensor([1, MASK]), "target": torch.tensor([1, 2, 3])}])
    with pytest.raises(ValueError, match='`loop_update="damped"`'):
        calibrate_loops(tiny_model(loop_update="damped"), data)


def test_examples_may_come_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    mask = LoopMDMForMaskedLM.config_class.from_pretrained(ROOT).mask_token_id
    line = json.dumps({"prompt": PUZZLE, "answer": SOLUTION})
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(line,), daemon=True)
    writer.start()
    assert len(read_examples(tmp_path / "pipe", load_tokenizer(str(ROOT)), mask)) == 1
    with pytest.raises(ValueError, match="is not a file"):
        read_examples(tmp_path, None, MASK)


@pytest.mark.parametrize("template", ["<s> $A </s>", "<s> $A", "$A </s>", "$A"])
def test_prompts_to_fill_in_line_up_with_their_answers(tmp_path, template):
    tokenizer = with_special(word_tokenizer([*WORDS, "<s>", "</s>"], bos_token="<s>", eos_token="</s>"), template)
    path, start = tmp_path / "fill.jsonl", [32] * template.startswith("<s>")

    def read(prompt: str, answer: str) -> dict[str, list[int]]:
        path.write_text(json.dumps({"prompt": prompt, "answer": answer}))
        (example,) = read_examples(path, tokenizer, 2)
        return {name: tokens.tolist() for name, tokens in example.items()}

    assert read("w0 <mask> w2", "w0 w1 w2") == {"input_ids": [*start, 3, 2, 5], "target": [*start, 3, 4, 5]}
    assert read("w0 <mask>", "w0 </s>") == {"input_ids": [*start, 3, 2], "target": [*start, 3, 33]}
    assert read("w0", "w1") == {"input_ids": [*start, 3, 2, 2], "target": [*start, 3, 4, 33]}
    for prompt, message in (
        ("w0 <mask>", f"line 1: {len(start) + 2} tokens with mask tokens, but {len(start) + 3} in the complete text"),
        ("w1 <mask> w2", f"line 1: token {len(start) + 1} is 4 with mask tokens, and 3 without"),
    ):
        with pytest.raises(ValueError, match=message):
            read(prompt, "w0 w1 w2")


# The command


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(ROOT / name, folder)
    shutil.copy(ROOT / "tokenizer_config.json", folder)
    return folder


def test_command_writes_what_it_chose(folder, tmp_path):
    data, output = tmp_path / "data.jsonl", tmp_path / "out.json"
    data.write_text(f"{json.dumps({'prompt': PUZZLE, 'answer': SOLUTION})}\n" * 4)
    arguments = ("calibrate", folder, "--data", data, "--max-denoising-steps", 2, "--num-loops", 2, "--output", output)
    arguments += ("--quality", "tokens")  # two loops solve no puzzle
    before = (folder / "generation_config.json").read_text()
    run(*arguments, "--dry-run")
    assert (folder / "generation_config.json").read_text() == before
    shown = run(*arguments)
    record = json.loads(output.read_text())
    written = json.loads((folder / "generation_config.json").read_text())
    for name, value in record["best"]["arguments"].items():
        assert written[name] == value
    assert f"Chosen: {describe(record['best']['arguments'])}" in shown


def test_command_writes_nothing_where_nothing_is_right(folder, tmp_path):
    data = tmp_path / "data.jsonl"
    digits = zip(PUZZLE, SOLUTION, SOLUTION[1:] + SOLUTION[0], strict=True)
    wrong = "".join(right if given == right else other for given, right, other in digits)  # in most blanks
    data.write_text(f"{json.dumps({'prompt': PUZZLE, 'answer': wrong})}\n" * 4)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    arguments = ("--data", data, "--max-denoising-steps", 2, "--num-loops", 2, "--output", tmp_path / "out.json")
    assert "The quality of 2 loops is 0 on all 4 examples" in refusal("calibrate", folder, *arguments)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ('{"prompt": "12", "answer": "3"}\n' * 3, [], "There are 3 examples"),
        ('{"prompt": "1.", "answer": "123"}\n' * 4, [], "2 tokens with mask tokens, but 3 in the complete text"),
        ('{"text": "12"}\n' * 4, [], "prompt"),
        ('{"prompt": "12", "answer": "3"}\n' * 4, ["--max-loss", "2"], "`max_loss` is 2.0"),
        ('{"prompt": "12", "answer": "3"}\n' * 4, ["--quality", "good"], "`quality` is 'good'"),
        ('{"prompt": "12", "answer": "3"}\n' * 4, ["--block-length", "0"], "`block_length` is 0"),
    ],
    ids=["few", "lengths", "fields", "loss", "quality", "block"],
)
def test_command_refuses_bad_input_and_leaves_the_model(folder, tmp_path, lines, arguments, message):
    (folder / "model.safetensors").unlink()  # nothing has been loaded by then
    data = tmp_path / "data.jsonl"
    assert f"{data} is not a file." in refusal("calibrate", folder, "--data", data)
    data.write_text(lines)
    before = (folder / "generation_config.json").read_text()
    assert message in refusal("calibrate", folder, "--data", data, *arguments)
    data.rename(tmp_path / "data.txt")
    assert "is a text; give answers" in refusal("calibrate", folder, "--data", tmp_path / "data.txt")
    assert (folder / "generation_config.json").read_text() == before


def test_command_wants_a_folder(tmp_path):
    assert "is not the folder of a model" in refusal("calibrate", "somebody/model", "--data", tmp_path / "data.jsonl")
