# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The examples of the documentation, run as they stand. Those of a page run one after another, in a folder with what a
reader has: the bundled model, the scripts, texts, and tiny models under the names that the pages use, those of the Hub
among them. A comment before an example says where it is otherwise:

    <!-- not run: why -->                    it is not run
    <!-- smaller: "300" -> "2", ... -->      it is run with other numbers
    <!-- before: a line of Python -->        what it needs comes first
    <!-- file: run.yaml -->                  YAML that is a file for the commands of the page

YAML of training runs is checked for keys that do not exist.
"""

import dataclasses
import json
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from commands import run
from conversion import FIXTURES
from tiny import tiny_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loopmdm.training.arguments import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")])
EXAMPLE = re.compile(
    r"(?P<notes>(?:^ *<!--(?:(?!-->).)*-->\n)*)^ *```(?P<language>python|bash|yaml)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
NOTE = re.compile(r"<!--\s*([\w ]+):\s*(.*?)\s*-->", re.DOTALL)
PUZZLES = [line.split() for line in (ROOT / "examples/sudoku/sample.txt").read_text().splitlines() if line]


class Example(NamedTuple):
    line: int
    language: str
    code: str
    notes: dict[str, str]


def examples_of(page: Path) -> list[Example]:
    text, found = page.read_text(encoding="utf-8"), []
    for match in EXAMPLE.finditer(text):
        code = textwrap.dedent(match["code"])
        line = text[: match.start("code")].count("\n") + 1
        notes = dict(NOTE.findall(match["notes"]))
        for old, new in re.findall(r'"([^"]+)" -> "([^"]*)"', notes.get("smaller", "")):
            assert old in code, f"{page.name}:{line}: {old!r} is not in the example"
            code = code.replace(old, new)
        found.append(Example(line, match["language"], code, notes))
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The folder that a page starts from."""
    folder = tmp_path_factory.mktemp("world")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.json"), ROOT / "model.safetensors"]:
        shutil.copy(path, folder)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("examples", "evaluation/metrics"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copytree(FIXTURES / "llada", folder / "GSAI-ML" / "LLaDA-8B-Instruct")
    sentences = [f"The president said on day {day} that {day % 7} of {day + 3} letters came." for day in range(80)]
    for name in ("train", "valid", "test", "mine", "other"):
        (folder / f"{name}.txt").write_text("\n\n".join(sentences))
    shutil.copy(ROOT / "examples/sudoku/sample.txt", folder / "puzzles.txt")
    boards = [{"prompt": puzzle, "answer": solution} for puzzle, solution in PUZZLES[:4]]
    answers = [{"prompt": f"What came on day {day}?", "answer": f"{day % 7} letters."} for day in range(8)]
    for name, rows in (("validation", boards), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    questions = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(8)]
    (folder / "gsm8k").mkdir()
    for name in ("train", "test"):
        (folder / "gsm8k" / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in questions))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sizes = ["--text", "train.txt", "--vocab-size", "300", "--output", "tokenizer"]
        script(["examples/pretrain_text/make_tokenizer.py", *sizes])
    save_models(folder)
    return folder


def save_models(folder: Path) -> None:
    """Language models of random weights that share a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    special = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
    special["eos_token_id"] = tokenizer.eos_token_id
    for name in ("my-model", "converted", "healed"):
        model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512, num_loops=2, **special)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    judge = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, bos_token_id=1, eos_token_id=1))
    judge.save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")


def script(arguments: list[str]) -> None:
    """`python` with these arguments, in this process."""
    path, modules = arguments[0], set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        patch.setattr(sys, "path", [str(Path(path).parent), *sys.path])
        runpy.run_path(path, run_name="__main__")
    for name in {"puzzles", "score", "train"} - modules:  # of this folder's scripts
        sys.modules.pop(name, None)


def execute(example: Example, page: Path, names: dict) -> None:
    exec(textwrap.dedent(example.notes.get("before", "")), names)
    if example.language == "python":
        exec(compile("\n" * (example.line - 1) + example.code, page, "exec"), names)
    for line in example.code.replace("\\\n", " ").splitlines() if example.language == "bash" else ():
        program, *arguments = shlex.split(line, comments=True) or [None]
        if program == "loopmdm":
            run(*arguments)
        elif program is not None:
            assert program == "python" and arguments[0].endswith(".py"), f"`{line}` cannot be run; say why not"
            script(arguments)


def test_every_example_is_run_or_says_why_not():
    pages = {page: examples_of(page) for page in PAGES}
    for page, examples in pages.items():
        # A fence that the pattern has missed would not be run in silence.
        assert len(examples) == len(re.findall(r"^ *```(?:python|bash|yaml)", page.read_text(), re.MULTILINE)), page
        for example in examples:
            place = f"{page.name}:{example.line}"
            assert example.notes.keys() <= {"not run", "smaller", "before", "file"}, f"{place}: {example.notes}"
            assert all(example.notes.values()), f"{place}: nothing is said"
    assert sum(len(examples) for examples in pages.values()) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples(page, world, tmp_path, monkeypatch):
    examples = [example for example in examples_of(page) if "not run" not in example.notes]
    if not examples:
        return
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    for example in examples:
        if example.language == "yaml":
            keys, known = yaml.safe_load(example.code), {field.name for field in dataclasses.fields(TrainConfig)}
            assert keys.keys() <= known, f"{page.name}:{example.line}: {keys.keys() - known}"
        if "file" in example.notes:
            Path(example.notes["file"]).write_text(example.code)
    names: dict = {"__name__": "example"}
    for example in examples:
        try:
            execute(example, page, names)
        except BaseException as error:
            error.add_note(f"in the example of {page.relative_to(ROOT)}, line {example.line}")
            raise


def test_the_notebook_runs(world, tmp_path, monkeypatch, capsys):
    """Its code from top to bottom, with fewer steps of training; up to there it prints what the file says."""
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world" / "examples")
    cells = json.loads(Path("first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate((cell for cell in cells if cell["cell_type"] == "code"), 1):
        capsys.readouterr()
        source = "".join(cell["source"]).replace("STEPS = 600", "STEPS = 4")
        exec(compile(source, f"cell {number}", "exec"), names)
        if "STEPS" not in names:
            assert capsys.readouterr().out == "".join(cell["outputs"][0]["text"])
    assert names["STEPS"] == 4
    assert torch.equal(names["output"].sequences, names["target"])
    assert len(names["held_out"]) == 200 and 0 < names["nats"] < 10
