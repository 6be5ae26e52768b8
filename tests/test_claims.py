# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tests of the matched-FLOP studies: data, FLOP matching, measurements, resuming, and the quick runs end to end."""

import itertools
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopmdm import LoopMDMForMaskedLM
from loopmdm.evaluation import nelbo

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks" / "claims"), str(ROOT / "benchmarks")]
import arms  # noqa: E402
import healing  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import samples  # noqa: E402
import study  # noqa: E402
import sudoku6  # noqa: E402
import tasks  # noqa: E402
import word_problems  # noqa: E402

NAMES = ("same_size", "looped")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims")
    rng = random.Random(0)
    words = "the a dog cat house tree sees likes big small runs to from with old new".split()  # noqa: SIM905
    for name, documents in (("train", 60), ("other", 10)):
        text = "\n\n".join(" ".join(rng.choices(words, k=60)) for _ in range(documents))
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def task(folder):
    return tasks.make_task("sudoku6", folder / "data", quick=True)


def command(monkeypatch, folder, *arguments):
    texts = ("--train-text", str(folder / "train.txt"), "--eval-text", str(folder / "other.txt"))
    paths = ("--work", str(folder / "work"), "--results", str(folder / "results"))
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", *paths, *texts, *arguments])
    run.main()


@pytest.mark.parametrize("name", ["sudoku6", "arithmetic", "language"])
def test_a_quick_study_runs_from_end_to_end(monkeypatch, capsys, folder, name):
    command(monkeypatch, folder, "--task", name, "--arms", ",".join(NAMES))
    path = folder / "results" / f"{name}.json"
    records = {arm: study.find(path, arm, 0) for arm in NAMES}
    task = tasks.make_task(name, folder / "work" / "data", quick=True, texts={"train": str(folder / "train.txt")})
    longest = arms.training_flops(
        LoopMDMForMaskedLM(arms.build_config(arms.ARMS["looped"], task)), task.batch_size, task.length, 6, task.length
    )
    for record in records.values():
        assert abs(record["training"]["training_flops"] - 0.002e12) < longest
        assert record["training"]["examples"] == record["training"]["steps"] * task.batch_size
    # The same data in the same order, of which cheaper steps see more
    assert len({record["data_order"] for record in records.values()}) == 1
    assert records["same_size"]["training"]["examples"] > records["looped"]["training"]["examples"]
    assert records["same_size"]["training"]["parameters"] == records["looped"]["training"]["parameters"]
    if name == "language":
        by_text = {name: record["likelihood"] for name, record in records.items()}
        assert list(by_text["looped"]) == ["held_out", "other"]
        for text, loops in itertools.product(("held_out", "other"), ("1", "6")):
            found = by_text["looped"][text][loops]
            difference = found["nelbo"] - by_text["same_size"][text]["1"]["nelbo"]
            assert found["to_base"] == pytest.approx(difference, abs=1e-5)
            assert 0 < found["to_base_error"] < found["error"]  # on the same rows and masks
    else:
        assert set(records["looped"]["one_step"]["solved"]) == {str(loops) for loops in range(1, 13)}
    if name == "sudoku6":
        command(monkeypatch, folder, "--task", name, "--arms", "same_size,looped", "--grid")

    # Finished arms are not run again.
    monkeypatch.setattr(run, "run_arm", None)
    command(monkeypatch, folder, "--task", name, "--arms", ",".join(NAMES))
    assert capsys.readouterr().out.count(f"is in {path}") == len(NAMES)
    assert [record["arm"] for record in study.read(path)] == list(NAMES)

    plots = folder / "plots"
    arguments = [
        "report.py",
        "--results",
        str(folder / "results"),
        "--study",
        name,
        "--plots",
        str(plots),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    printed = capsys.readouterr().out
    assert all(f"| {arm} |" in printed for arm in NAMES)
    held_out, found = next(iter(records["looped"]["likelihood"].items()))
    _, differences = printed.split(f"NELBO on {held_out} less that of the same-size arm")
    assert f"| {found['1']['to_base']:.4f} ± {found['1']['to_base_error']:.4f} |" in differences
    assert (plots / f"{name}.png").stat().st_size > 10_000
    assert (plots / f"{name}-grid.png").exists() == (name == "sudoku6")


def test_samples_of_trained_arms_are_judged(monkeypatch, capsys, folder):
    command(monkeypatch, folder, "--task", "language", "--arms", ",".join(NAMES))
    trained, text = ["language/same_size-0", "language/looped-0"], folder / "train.txt"
    paths = ["--work", str(folder / "work"), "--results", str(folder / "results"), "--train-text", str(text)]

    def judge(*arms):
        monkeypatch.setattr(sys, "argv", ["samples.py", "--quick", "--task", "language", *paths, *arms])
        samples.main()

    judge(*trained)
    held_out, same_size, looped = study.read(folder / "results" / "samples.json")
    assert [record["arm"] for record in (held_out, same_size, looped)] == [
        "held_out",
        "language/same_size",
        "language/looped",
    ]
    assert [(one["steps"], one["loops"]) for one in same_size["settings"]] == [(2, 1), (4, 1)]
    assert [(one["steps"], one["loops"]) for one in looped["settings"]] == [(2, 1), (2, 2), (4, 1), (4, 2)]
    # Arms of a few steps write worse than people, and what they write is in the judge's tokens and bytes.
    assert all(one["perplexity"] > held_out["perplexity"] for one in looped["settings"] + same_size["settings"])

    task = tasks.make_task("language", folder / "work" / "data", quick=True, texts={"train": str(text)})
    # Rows cut the documents, with blank lines between them, and nothing else.
    rows = torch.stack([example["input_ids"] for example in task.examples])
    assert text.read_text().startswith("".join(samples.texts_of(rows, task)))
    # The judge's own loss on the real text, a row at a time
    model, tokenizer = (
        kind.from_pretrained(folder / "work" / "judge") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    nats, texts = 0.0, samples.texts_of(task.rows.input_ids, task)
    for row in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(row)["input_ids"]]])
        nats += (ids.shape[1] - 1) * model(ids, labels=ids).loss.item()
    assert held_out["nats_per_token"] * held_out["tokens"] == pytest.approx(nats, rel=1e-3)
    assert held_out["nats_per_byte"] == pytest.approx(nats / len("".join(texts)), rel=1e-3)

    model = LoopMDMForMaskedLM.from_pretrained(folder / "work" / trained[1] / "model").eval()
    drawn = samples.sample(model, task, 6, 4, 2)
    assert drawn == samples.sample(model, task, 6, 4, 2) and len(set(drawn)) == 6
    assert not any(token in text for text in drawn for token in ("[MASK]", "[PAD]", "[END]"))

    monkeypatch.setattr(samples, "sample", None)  # nothing is run again
    capsys.readouterr()
    judge(*trained)
    assert capsys.readouterr().out.count("is in") == 2
    with pytest.raises(SystemExit):
        judge("language/deeper-0")
    assert "no trained arm language/deeper-0" in capsys.readouterr().err


def test_the_study_of_conversion(monkeypatch, capsys, tmp_path):
    path, boards = tmp_path / "healing.json", tasks.sudoku6_rows
    monkeypatch.setattr(tasks, "sudoku6_rows", lambda cache, count, seed: boards(cache, min(count, 16), seed))
    monkeypatch.setattr(healing, "LOOPS", (1, 2, 6))
    options = ["--quick", "--threads", "1", "--work", str(tmp_path), "--output", str(path)]
    for more in ([], ["--windows"], ["--pilots"]):
        monkeypatch.setattr(sys, "argv", ["healing.py", *options, *more])
        healing.main()
    records = {record["arm"]: record for record in study.read(path)}
    assert list(records) == [
        "base",
        "plain-25",
        "looped-25",
        "windows",
        "pilot-base",
        *(f"pilot-{n}" for n in healing.QUICK),
    ]
    windows = records["windows"]["windows"]  # all share one loop, and no two of them two
    assert list(windows) == ["0:1", "0:2", "0:3", "1:2", "1:3", "2:3"]
    assert len({once for once, _ in windows.values()}) == 1 and len({twice for _, twice in windows.values()}) == 6
    # Both went on with a quarter of the FLOPs, and the converted one with loops
    for name in ("plain-25", "looped-25"):
        assert records[name]["training"]["training_flops"] == pytest.approx(0.001e12, rel=0.25)
    assert records["looped-25"]["training"]["steps"] < records["plain-25"]["training"]["steps"]
    # An adapter of mid leaves the others' weights alone, and the converted model starts from the base's.
    base, lora = (
        LoopMDMForMaskedLM.from_pretrained(tmp_path / name / "model").state_dict()
        for name in ("base-0", "pilot-lora-0")
    )
    changed = {name.split(".")[2] for name in base if not torch.equal(base[name], lora[name])}
    assert changed == {"1"}
    assert LoopMDMForMaskedLM.from_pretrained(tmp_path / "pilot-damped-0" / "model").config.loop_update == "damped"

    monkeypatch.setattr(arms, "train", None)  # nothing is run again
    healing.main()
    assert "| pilot-lora | 1 | 6 |" in capsys.readouterr().out


def test_an_interrupted_arm_ends_as_an_uninterrupted_one(monkeypatch, tmp_path, task):
    arm = arms.Arm("", schedule="late", options={"start": 0.0, "plain": 0.0})
    whole = arms.train(arm, task, 0, 0.004e12, tmp_path / "whole")
    step = arms.LoopMDMTrainer.training_step

    def interrupted(trainer, *args):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(arms.LoopMDMTrainer, "training_step", interrupted)
        arms.train(arm, task, 0, 0.004e12, tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoints").is_dir()
    assert not (tmp_path / "parts" / "model").exists()
    parts = arms.train(arm, task, 0, 0.004e12, tmp_path / "parts")
    assert parts["training_flops"] == whole["training_flops"]
    first, second = (LoopMDMForMaskedLM.from_pretrained(tmp_path / name / "model") for name in ("whole", "parts"))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize("name", list(arms.ARMS))
def test_every_arm_has_its_share_of_the_flops(task, name):
    arm = arms.ARMS[name]
    model = LoopMDMForMaskedLM(arms.build_config(arm, task))
    sums = arms.plan(arm, task, model, 0, 0.05e12 * arm.budget)
    step = max(b - a for a, b in itertools.pairwise(sums))
    assert abs(sums[-1] - 0.05e12 * arm.budget) <= step


def test_measurements_agree_with_the_library(task):
    torch.manual_seed(0)
    model = LoopMDMForMaskedLM(arms.build_config(arms.ARMS["looped"], task)).eval()
    for parameter in model.parameters():  # so that loops differ
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    rows = task.rows[:16]
    ours = measure.likelihood(model, rows, [1, 3], samples=40)
    for loops in (1, 3):
        estimate = nelbo(model, rows.input_ids, maskable=rows.maskable, num_loops=loops, num_samples=40, seed=1)
        mean, error = estimate.per_token()
        assert abs(ours[loops]["nelbo"] - mean) < 5 * error
        assert sum(ours[loops]["by_share"]) / measure.BINS == pytest.approx(ours[loops]["nelbo"], rel=0.05)

    single = measure.one_step(model, rows, range(1, 9), [0.3, 0.05])
    everything = model(rows.prompts(), num_loops=5).logits.argmax(-1)
    solved = ((everything == rows.input_ids) | ~rows.scored).all(-1).double().mean()
    assert single["solved"][5] == solved
    for entry in single["adaptive"]:
        loops = model(rows.prompts(), num_loops=8, loop_tolerance=entry["tolerance"]).loops
        assert entry["loops"] == loops.double().mean()

    made = measure.generations(model, rows, 3, 2)
    assert made["forward_passes"] == 2 and made["loops"] == 6
    assert made["flops"] == 2 * model.flops(1, task.length, 3)

    # With every position masked all attention is from masked to masked positions.
    blank = tasks.Rows(rows.input_ids, torch.ones_like(rows.maskable))
    found = measure.dynamics(model, blank, 4)
    assert found["uniform"][-1] == pytest.approx(1) and len(found["masked_to_masked"][-1]) == 4
    assert torch.tensor(found["masked_to_masked"][-1]).sub(1).abs().max() < 1e-5
    logits = model(blank.prompts(), num_loops=3).logits
    loss = -logits.log_softmax(-1).gather(-1, rows.input_ids[..., None]).mean()
    assert found["loss"][-1][2] == pytest.approx(loss.item(), rel=1e-4)


def test_a_study_keeps_what_it_has(tmp_path):
    path = tmp_path / "new" / "study.json"
    assert study.read(path) == []
    study.add(path, {"arm": "late", "seed": 0, "likelihood": {1: float("nan")}})
    study.add(path, {"arm": "late", "seed": 1})
    study.add(path, {"arm": "late", "seed": 0, "grid": [0.123456789]})
    assert study.find(path, "late", 0) == {"arm": "late", "seed": 0, "likelihood": {"1": None}, "grid": [0.123457]}
    assert len(study.read(path)) == 2 and study.find(path, "looped", 0) == {}


def test_the_crossing_is_interpolated():
    points = [(1.0, 1.0), (4.0, 0.25), (8.0, 0.1)]
    assert study.crossing(points, 0.5) == pytest.approx(2.0)
    assert study.crossing(points, 0.05) is None
    assert study.crossing(points, 2.0) == 1.0


def made_up_run(arm, seed, tflop, nelbo, solved):
    loops = str(arms.ARMS[arm].max_loops)
    return {
        "arm": arm,
        "seed": seed,
        "settings": {"tflop": tflop, "budget": arms.ARMS[arm].budget, "max_loops": int(loops), "unit": "blank"},
        "likelihood": {"puzzles": {loops: {"nelbo": nelbo}}},
        "one_step": {"solved": {loops: solved}},
    }


def test_fewer_flops():
    runs = [
        made_up_run("same_size", 0, 4, 0.2, 0.5),
        made_up_run("same_size", 1, 4, 0.1, 0.5),
        made_up_run("same_size", 0, 16, 0.02, 0.9),
        made_up_run("late", 0, 16, 0.01, 0.95),
        made_up_run("late_50", 0, 16, 0.04, 0.6),  # on 8 TFLOP
        made_up_run("late_50", 1, 16, 0.4, 0.3),
    ]
    found = {(entry["quantity"], entry["tflop"], entry["arm"]): entry["seeds"] for entry in study.fewer_flops(runs)}
    at = 8 * 2 ** (math.log(0.04 / 0.02) / math.log(0.04 / 0.01))
    assert found["NELBO", 16, "late"][0]["ratio"] == pytest.approx(16 / at)
    # what is reached on the smallest budget already is a bound, here of a ratio below 1; seed 1 does not get there
    assert found["NELBO", 4, "late"] == {0: {"ratio": 0.5, "is_bound": True}, 1: {"ratio": None, "is_bound": False}}
    at = 8 * 2 ** (math.log(0.4 / 0.1) / math.log(0.4 / 0.05))
    assert found["one-step accuracy", 16, "late"][0]["ratio"] == pytest.approx(16 / at)
    assert "| NELBO | 16 | late | 1.41 |" in "\n".join(report.scaling_tables(runs))


def brute_force(board):
    """Number of solutions, straight from the rules, up to two."""
    blank = board.find(".")
    if blank < 0:
        return 1
    row, column = divmod(blank, 6)
    seen = {
        board[6 * r + c]
        for r in range(6)
        for c in range(6)
        if r == row or c == column or (r // 2 == row // 2 and c // 3 == column // 3)
    }
    count = 0
    for digit in "123456":
        if digit not in seen and count < 2:
            count += brute_force(board[:blank] + digit + board[blank + 1 :])
    return min(count, 2)


def test_small_sudokus_have_one_solution():
    pairs = sudoku6.generate_puzzles(60, seed=5, min_clues=10, max_clues=20)
    assert pairs[:20] == sudoku6.generate_puzzles(20, seed=5, min_clues=10, max_clues=20)
    assert len({solution for _, solution in pairs}) == 60
    for puzzle, solution in pairs:
        assert 10 <= sum(cell != "." for cell in puzzle) <= 20
        assert all(clue in (".", digit) for clue, digit in zip(puzzle, solution, strict=True))
        assert all({solution[cell] for cell in unit} == set("123456") for unit in sudoku6.units())
        assert brute_force(puzzle) == 1
    with pytest.raises(ValueError, match="clues"):
        sudoku6.generate_puzzles(1, 0, 5, 12)


def solution_of(problem):
    """The solution, read from the sentences."""
    amounts, lines = {}, []
    for sentence in re.findall(r"[^.?]+[.?]", problem):
        assert len(sentence.split()) == 6
        match sentence.split():
            case [name, "has", number, _, "now", "."]:
                amounts[name] = int(number)
                continue
            case [name, "buys", number, "more", _, "."]:
                amounts[name] += int(number)
            case [name, "loses", number, "of", "them", "."]:
                amounts[name] -= int(number)
            case [name, "gives", number, "to", other, "."]:
                amounts[name] -= int(number)
                amounts[other] += int(number)
            case [name, "doubles", "all", "the", _, "."]:
                amounts[name] *= 2
            case ["How", "many", "has", name, "now", "?"]:
                return " ".join([*lines, f"#### {amounts[name]}"])
        assert set(amounts.values()) <= set(range(10))
        lines.append(" ".join(f"{name} {amount}" for name, amount in amounts.items()) + " ;")
    raise AssertionError(problem)


def test_word_problems_are_solved():
    problems = [word_problems.generate_problem(0, index, 4) for index in range(300)]
    for problem, solution in problems:
        assert solution == solution_of(problem)
        assert set(problem.split()) | set(solution.split()) <= set(word_problems.VOCABULARY)
    assert word_problems.generate_problem(0, 7, 4) == problems[7]
    assert len({problem for problem, _ in problems}) == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arms", "looped,loooped"), "no such arm: loooped"),
        (("--task", "chess"), "invalid choice: 'chess'"),
        (("--tflop", "0"), "give a budget above 0"),
        (("--learning-rate", "nan"), "give a rate above 0"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, folder, arguments, message):
    with pytest.raises(SystemExit):
        command(monkeypatch, folder, *arguments)
    assert message in capsys.readouterr().err


def test_a_study_has_one_rate_and_one_budget(monkeypatch, capsys, folder):
    rates = "--study", "rates", "--arms", "same_size", "--learning-rate"
    command(monkeypatch, folder, *rates, "1e-3")
    assert study.find(folder / "results" / "rates.json", "same_size", 0)["settings"]["learning_rate"] == 1e-3
    for others, name in ((("2e-3",), "learning_rate"), (("1e-3", "--tflop", "1e-3"), "tflop")):
        for results in ("results", "new"):  # whether the arm is reported or only trained
            with pytest.raises(SystemExit):
                command(monkeypatch, folder, *rates, *others, "--results", str(folder / results))
            assert f"the study rates has another {name} than" in capsys.readouterr().err


def test_bad_texts(tmp_path):
    with pytest.raises(ValueError, match="--train-text"):
        tasks.make_task("language", tmp_path, quick=True)
    (tmp_path / "short.txt").write_text("one\n\ntwo")
    with pytest.raises(ValueError, match="has 2 documents"):
        tasks.make_task("language", tmp_path, quick=True, texts={"train": str(tmp_path / "short.txt")})
