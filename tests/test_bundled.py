# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The bundled checkpoint, its demo and its figures: what a newcomer sees first."""

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import PUZZLE, SOLUTION
from transformers import AutoTokenizer

from loopmdm import LoopMDMForMaskedLM

ROOT = Path(__file__).resolve().parents[1]
SUDOKU = ROOT / "examples" / "sudoku"


@pytest.fixture(scope="module")
def model():
    return LoopMDMForMaskedLM.from_pretrained(ROOT).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


@pytest.fixture(scope="module")
def puzzles():
    sys.path.insert(0, str(SUDOKU))
    try:
        import puzzles

        return puzzles
    finally:
        sys.path.remove(str(SUDOKU))


def solve_rate(model, tokenizer, pairs, **kwargs) -> float:
    inputs = tokenizer([puzzle for puzzle, _ in pairs], return_tensors="pt")
    answers = tokenizer.batch_decode(model.generate(**inputs, **kwargs))
    return sum(answer == solution for answer, (_, solution) in zip(answers, pairs, strict=True)) / len(pairs)


# The bundled model


def test_a_tokenizer_that_cannot_look_for_stop_strings(model, tokenizer):
    """Its tokens are single characters, and it has none for others."""
    ids = torch.tensor([[tokenizer.mask_token_id] * 3])
    with pytest.raises(ValueError, match="`stop_strings` is '12', which this tokenizer cannot look for"):
        model.generate(ids, stop_strings="12", tokenizer=tokenizer)


def test_more_loops_solve_more_puzzles(model, tokenizer, puzzles):
    easy = puzzles.generate_puzzles(40, seed=11, min_clues=32, max_clues=46)
    minimal = puzzles.generate_puzzles(40, seed=11, min_clues=None, max_clues=None)
    few, half, all_loops = (
        [solve_rate(model, tokenizer, pairs, num_loops=loops, max_denoising_steps=1) for pairs in (easy, minimal)]
        for loops in (1, 8, model.config.max_train_loops)
    )
    assert few[0] <= 0.1 and half[0] >= 0.9 and all_loops[0] >= 0.95
    assert few[1] == 0 and all_loops[1] >= 0.6 and half[1] < all_loops[1] - 0.3


def test_defaults_of_the_bundled_model(model, tokenizer):
    """Without any argument it fills in the puzzle, with the loops and steps of its configuration files."""
    inputs = tokenizer(PUZZLE, return_tensors="pt")
    output = model.generate(**inputs, return_dict_in_generate=True)
    assert tokenizer.decode(output.sequences[0]) == SOLUTION
    assert output.forward_passes.item() == model.generation_config.max_denoising_steps == 16
    assert output.loops.item() == 16 * model.config.num_loops


def test_tokenizer_reads_boards(tokenizer):
    board = PUZZLE.replace(".", "0")
    drawn = "\n".join(" ".join(board[9 * row : 9 * row + 9]) for row in range(9))
    assert tokenizer(drawn)["input_ids"] == tokenizer(PUZZLE)["input_ids"]
    assert tokenizer.decode(tokenizer(PUZZLE)["input_ids"]) == PUZZLE
    assert tokenizer(PUZZLE)["input_ids"].count(tokenizer.mask_token_id) == PUZZLE.count(".")


def test_bundled_files_are_small_and_complete(model, tokenizer):
    assert (ROOT / "model.safetensors").stat().st_size <= 8e6
    assert tokenizer.mask_token_id == model.config.mask_token_id
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert json.loads((ROOT / "config.json").read_text())["auto_map"]["AutoModel"].endswith("LoopMDMForMaskedLM")


@pytest.fixture
def script(monkeypatch):
    """Runs a script of the example as a command would, in this process."""

    def run(name: str, *arguments: object) -> None:
        monkeypatch.syspath_prepend(SUDOKU)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(SUDOKU / name), run_name="__main__")

    return run


def test_demo_shows_loops_at_work(script, capsys):
    """In a pipe it is plain text."""
    script("demo.py", "--count", 12)
    output = capsys.readouterr().out
    assert "\x1b" not in output and max(map(len, output.splitlines())) <= 80
    wrong = re.search(r"^loop 1: (\d+) wrong +loop 4: (\d+) wrong .*loop 16: solved$", output, re.MULTILINE)
    boards = output[wrong.end() :].split("\n\n")[0].strip("\n").splitlines()
    assert len(boards) == 9
    assert [sum(line[i : i + 18].count("x") for line in boards) for i in (0, 20)] == [int(n) for n in wrong.groups()]
    assert re.search(r"^8 loops +\| +\d+\.\d% ", output, re.MULTILINE)


# Training it


def test_training_script_resumes_and_writes_a_model(tmp_path, script):
    """An interrupted run that is started again ends with the weights of an uninterrupted one."""
    data = tmp_path / "puzzles.txt"
    script("puzzles.py", "--count", 300, "--output", data)

    def train(folder):
        settings = {"puzzles": data, "hidden-size": 16, "intermediate-size": 16, "batch-size": 4, "tflop": 0.0006}
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        script("train.py", *flags, "--output", folder, "--save-steps", 2)

    train(tmp_path / "whole")
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert record["steps"] >= 4, record
    assert record["training_tflop"] == pytest.approx(0.0006, rel=0.5)

    checkpoints = sorted((tmp_path / "whole" / "checkpoints").iterdir(), key=lambda path: int(path.name[11:]))
    interrupted = tmp_path / "interrupted" / "checkpoints"
    interrupted.mkdir(parents=True)
    checkpoints[0].rename(interrupted / checkpoints[0].name)
    train(tmp_path / "interrupted")
    first, second = (LoopMDMForMaskedLM.from_pretrained(tmp_path / name) for name in ("whole", "interrupted"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.generation_config.max_new_tokens == 0


# The README


def test_readme_names_targets_that_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text())) <= set(targets)


def test_readme_table_is_the_measured_one():
    """The README's figures are those of results.json, to the digit."""
    text = (ROOT / "README.md").read_text()
    scores = json.loads((SUDOKU / "results.json").read_text())
    rows = {str(loops): [] for loops in scores["settings"]["loops"]}
    for row in scores["rows"]:
        rows[str(row["num_loops"])].append(f"{100 * row['solved']:.1f}")
    table = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    for name, cells in rows.items():
        assert [cell.strip() for cell in table[name].split("|")[2 : 2 + len(cells)]] == cells, name


def test_rules_that_stop_loops_are_compared_on_recorded_passes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sudoku_stopping

    output = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["", "--quick", "--work", str(tmp_path), "--output", str(output)])
    sudoku_stopping.main()
    result = json.loads(output.read_text())
    assert sum(row["puzzles"] for row in result["rows"] if "technique" in row) == 4
    # A pass with so many loops and one denoising step give the same answers as the recorded pass.
    model, boards = LoopMDMForMaskedLM.from_pretrained(ROOT).eval(), sudoku_stopping.puzzles.generate_puzzles
    inputs = AutoTokenizer.from_pretrained(ROOT)([puzzle for puzzle, _ in boards(6, 1, None, None)])["input_ids"]
    recorded = sudoku_stopping.record(model, torch.tensor(inputs))["answers"]
    for loops in (4, 16):
        given = model.generate(torch.tensor(inputs), num_loops=loops, max_denoising_steps=1)
        assert torch.equal(recorded[loops - 1].long(), given)
    probe = sudoku_stopping.Unchanged(lambda states: model.logits(model.model.norm(states)).argmax(-1), 2)
    output = model.generate(
        torch.tensor(inputs), loop_policy=probe, max_denoising_steps=1, return_dict_in_generate=True
    )
    for row, (loops, found) in enumerate(zip(output.loops.tolist(), recorded.transpose(0, 1), strict=True)):
        same = (found[1:] == found[:-1]).all(-1)
        first = [i + 3 for i in range(14) if same[i] and same[i + 1]]
        assert loops == (first or [16])[0], row
    assert {row["rule"] for row in result["stopping"]} >= {"gate", "loop_tolerance"}
    scores = torch.tensor([[9.0, 9.0], [1.0, 3.0], [0.0, 2.0]])
    assert sudoku_stopping.stop(scores, 2.0).tolist() == [1, 2]


def test_a_later_look_masks_doubted_digits_again(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sudoku_search

    def step(index, masked, tokens, seen):
        """One row of three positions, the last one a filler; `seen` is the probability of token 1."""
        one = torch.tensor(seen)
        fields = {"masked": torch.tensor([[*masked, False]]), "counted": torch.tensor([[True, True, False]])}
        fields |= {"tokens": torch.tensor([tokens]), "logits": torch.stack((1 - one, one), -1).log()[None]}
        fields |= {"num_steps": torch.tensor([3]), "best": lambda scores: scores, "confidence": fields["masked"]}
        return SimpleNamespace(index=index, **fields)

    rule = sudoku_search.LaterLook(0.5)
    for index, expected in ((1, [True, False, False]), (2, [False, False, False])):  # never in the last step
        rule(step(0, [True, True], [1, 0, 0], [0.9, 0.4, 0.5]))
        later = step(index, [False, True], [0, 0, 0], [0.2, 0.1, 0.5])  # token 1, held at the first, is now unlikely
        rule(later)
        assert later.remask.tolist() == [expected]


def test_judges_of_answers_are_trained_and_compared(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sudoku_judges

    output = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["", "--quick", "--output", str(output)])
    sudoku_judges.main()
    result = json.loads(output.read_text())
    assert set(result["limits"]) == {row["choice"] for row in result["until"]} == {"second look", "head"}
    assert {"rules", "second look", "head"} <= {row["choice"] for row in result["rows"]}
    # The limit that separates right from wrong lies between them.
    scores, right = torch.tensor([1.0, 1e-4, 1e-2]), torch.tensor([False, True, True])
    assert sudoku_judges.best_limit(scores, right) == pytest.approx(0.1)
