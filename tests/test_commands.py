# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The `loopmdm` command: its help, its errors, and `generate` and `info` on the bundled model."""

import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer
from commands import PUZZLE, SOLUTION, refusal, run
from rich.console import Console
from typer.testing import CliRunner

import loopmdm_cli
from loopmdm_cli import output

ROOT = Path(__file__).resolve().parents[1]

COMMANDS = {
    ("info",): ["--length", "--measure", "--json"],
    ("generate",): ["--num-loops", "--stream", "--json", "--html"],
    ("convert",): ["--num-loops", "--dry-run", "--verify", "--calibrate"],
    ("chat",): ["--system", "--num-loops"],
    ("train",): ["--resume", "--dry-run", "--init"],
    ("push",): ["--private", "--message", "--dry-run"],
    ("web",): ["--port", "--no-open"],
    ("serve",): ["--host", "--port"],
    ("export",): ["--num-loops", "--format", "--verify"],
    ("calibrate",): ["--data", "--max-loss"],
    ("eval", "likelihood"): ["--text", "--num-samples", "--output"],
    ("eval", "generative-perplexity"): ["--judge", "--samples", "--output"],
    ("eval", "lm-eval"): ["--tasks", "--data-files", "--output"],
    ("eval", "dynamics"): ["--text", "--timesteps", "--output"],
}


# The whole


def test_help_does_not_import_torch():
    """Nor does a mistake on the command line."""
    code = (
        "import contextlib, sys, typer.testing, loopmdm_cli\n"
        f"for command in {[*COMMANDS, ()]}:\n"
        "    result = typer.testing.CliRunner().invoke(loopmdm_cli.app, [*command, '--help'])\n"
        "    assert result.exit_code == 0, result.output\n"
        "with contextlib.suppress(SystemExit): loopmdm_cli.main(['generate', '--nonsense'])\n"
        "assert not {'torch', 'transformers', 'loopmdm', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_names_the_options(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = run(*command, "--help")
    assert all(option in shown for option in COMMANDS[command])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_ends_with_an_example_that_is_one(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    *_, last = run(*command, "--help").rstrip().splitlines()
    example = shlex.split(last.strip().removeprefix("Example: "))
    assert tuple(example[: 1 + len(command)]) == ("loopmdm", *command)
    # The parser takes it, whatever becomes of it.
    parser = typer.main.get_command(loopmdm_cli.app)
    for name in command:
        parser = parser.commands[name]
    assert parser.make_context("loopmdm", example[1 + len(command) :]).params


def test_help_lists_commands_by_topic(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("--help").splitlines()
    found = [line.strip("╭─╮ │").split()[0] for line in lines if re.match(r"╭─ \w+ a model|│ [a-z]+  ", line)]
    expected = "Use chat generate serve web Make convert train Measure calibrate info eval Share export push"
    assert found == expected.split()


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("loopmdm gen", {"generate"}),
        ("loopmdm eval li", {"likelihood"}),
        ("loopmdm generate . --num", {"--num-loops", "--num-return-sequences"}),
    ],
)
def test_shells_complete_commands_and_options(line, completions, monkeypatch, capsys):
    """What --install-completion asks, as bash does."""
    variables = {"_LOOPMDM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_:
        loopmdm_cli.main([])
    assert exit_.value.code in (None, 0) and set(capsys.readouterr().out.split()) == completions


def test_all_commands_are_tested():
    def names(commands) -> list[str]:
        return [command.callback.__name__.replace("_", "-") for command in commands.registered_commands]

    (evaluation,) = (group.typer_instance for group in loopmdm_cli.app.registered_groups)
    found = {(name,) for name in names(loopmdm_cli.app)} | {("eval", name) for name in names(evaluation)}
    assert found == set(COMMANDS)


@pytest.mark.parametrize("module", ["loopmdm", "loopmdm_cli"])
def test_the_modules_run(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--version"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module(module, run_name="__main__")
    assert not exit_.value.code and capsys.readouterr().out == f"loopmdm {metadata.version('loopmdm')}\n"


# Errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nonsense"], "No such option: --nonsense. See `loopmdm --help`."),
        (["generat"], "No such command 'generat'"),
        (["info"], "Missing argument 'model'. See `loopmdm info --help`."),
        (["eval", "likelihood", "."], "Missing option '--text'. See `loopmdm eval likelihood --help`."),
        (["generate", ".", PUZZLE, "--seed", "x"], "Invalid value for '--seed'"),
        (["info", "./nowhere"], "./nowhere does not hold a model: there is no config.json in it"),
        (["info", "a/b/c"], "a/b/c does not hold a model: there is no config.json in it; it is not a folder"),
        (["info", ".", "--length", "82"], "--length is 82; the model takes 1 to 81"),
        (["info", ".", "--measure", "--batch-size", "0"], "--batch-size is 0"),
        (["generate", "./nowhere", "1"], "there is no config.json"),
        (["generate", "."], "There is no prompt; give one (loopmdm generate . 'Once upon a time'), or pipe in lines."),
        (["generate", ".", PUZZLE, "--num-loops", "0"], "`num_loops` is 0"),
        (["generate", ".", PUZZLE, "--num-loops", "many"], "--num-loops is 'many'"),
        (["generate", ".", PUZZLE, "--unmasking", "best"], "`unmasking` is 'best'"),
        (["generate", ".", PUZZLE, "--temperature", "0.5"], "add `do_sample=True`"),
        (["generate", ".", PUZZLE, "--dtype", "float12"], "`dtype` is 'float12'"),
        (["generate", ".", PUZZLE, "--device", "meta"], "`device` is 'meta', which does not work here"),
        (["generate", ".", PUZZLE, "--device", "gpu"], "`device` is 'gpu', which does not work here"),
        (["generate", ".", PUZZLE, PUZZLE, "--stream"], "--stream shows one row, and there are 2"),
        (["generate", ".", SOLUTION], "nothing to generate; give --max-new-tokens, or mask tokens ('.') in"),
        (["generate", ".", "sudoku"], "cannot read the prompt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(monkeypatch, args, message):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert message in refusal(*args)


def test_errors_show_their_traceback_on_request(monkeypatch, capsys):
    monkeypatch.setenv("LOOPMDM_DEBUG", "1")
    with pytest.raises(SystemExit) as exit_:
        loopmdm_cli.main(["info", "./nowhere"])
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert lines[0].startswith("Traceback") and lines[-1].startswith("loopmdm: error: ./nowhere")


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for command in (["info", tmp_path], ["generate", tmp_path, "1"]):
        assert "is a 'llama' model, not a LoopMDM" in refusal(*command)


# generate


def test_generate():
    result = CliRunner().invoke(
        loopmdm_cli.app, ["generate", str(ROOT), PUZZLE, "--num-loops", "6", "--max-denoising-steps", "8"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == SOLUTION
    assert result.stderr.startswith("8 forward passes, 48 loops, ")
    assert "GFLOP" in result.stderr and "tokens/s" in result.stderr


def test_generate_reads_lines_and_writes_json():
    arguments = ("-", "--num-loops", "2,6", "--max-denoising-steps", 2, "--json")
    shown = run("generate", ROOT, *arguments, input=f"{PUZZLE}\n" * 2)
    lines = [json.loads(line) for line in shown.splitlines()]
    assert [line["prompt"] for line in lines] == [PUZZLE, PUZZLE]
    assert lines[0] == lines[1]
    assert (lines[0]["forward_passes"], lines[0]["loops"]) == (2, 8)
    assert lines[0]["flops"] > 0


def test_a_pipe_is_read_a_batch_at_a_time(monkeypatch):
    """So its answers come while it is open, and it may be of any length."""
    read = []

    class Pipe(io.StringIO):
        def __next__(self):
            line = super().__next__()
            read.append(line)
            return line

    shown = []
    monkeypatch.setattr("loopmdm_cli.generate._show", lambda prompt, *_: shown.append((prompt, len(read))))
    for arguments in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", Pipe(f"{SOLUTION}\n" * 2 + f"{PUZZLE}\n" * 3))
        with pytest.raises(SystemExit) as exit_:
            loopmdm_cli.main(["generate", str(ROOT), *arguments, "--batch-size=2", "--max-denoising-steps=1"])
        assert not exit_.value.code
        assert shown == [(SOLUTION, 2)] * 2 + [(PUZZLE, 4)] * 2 + [(PUZZLE, 5)]
        shown.clear()
        read.clear()
    monkeypatch.setattr(sys, "stdin", Pipe(f"{SOLUTION}\n" * 2))
    assert "nothing to generate" in refusal("generate", ROOT, "--batch-size", 2)


def test_generate_streams(monkeypatch):
    """Into a pipe what is finished, as text; on a terminal every step, in place, within the screen."""
    arguments = ("generate", ROOT, PUZZLE, "--stream", "--max-denoising-steps", 8)
    assert run(*arguments) == f"{SOLUTION}\n"
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system="standard")
    monkeypatch.setattr("loopmdm_cli.generate.console", screen)
    run(*arguments)
    shown = screen.file.getvalue()
    assert f"\x1b[2m{'░' * 2}" in shown.replace("29\x1b", "\x1b") or "░" in shown
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 81 and lines[-1] == SOLUTION


def test_generate_spends_fewer_loops_on_request():
    def cost(*options):
        line = json.loads(run("generate", ROOT, PUZZLE, "--max-denoising-steps", 8, "--json", *options))
        assert line["text"] == SOLUTION
        return line["flops"]

    plain = cost("--num-loops", 16)
    assert cost("--num-loops", 16, "--visible-loops", 12) < plain
    assert cost("--num-loops", "12,16") < plain
    assert cost("--num-loops", 16, "--loop-tolerance", 0.05) < plain
    assert cost("--num-loops", 16, "--entropy-bound", 0.03) < plain / 2


# info


def test_info():
    facts = json.loads(run("info", ROOT, "--json", "--length", 40))
    assert facts["mid"] == "layers[0:2]"
    assert facts["parameters"] == 415_360
    assert [row["layers"] for row in facts["cost"]] == [2, 4, 8, 16, 32, 64]
    assert facts["cost"][0]["length"] == 40
    shown = run("info", ROOT)
    assert "num loops" in shown and "415,360" in shown


def test_info_says_what_memory_takes():
    """By hand, for the bundled model: width 128, four heads of 32, attention over the whole sequence."""
    memory = json.loads(run("info", ROOT, "--json", "--length", 40, "--batch-size", 2))["memory"]
    one, two, four = memory[:3]
    assert one["weights"] == 4 * 415_360 and one["training_state"] == 16 * 415_360
    assert one["cache"] == four["cache"] == 2 * 2 * 41 * 128 * 4 * 2  # one place for all loops
    assert four["activations"] - one["activations"] == 3 * (two["activations"] - one["activations"])
    # A layer keeps at least its input, queries, keys, values, what attention gives, and three times the MLP's width.
    assert two["activations"] - one["activations"] > 2 * (5 * 128 + 3 * 352) * 4 * 2 * 40
    shown = run("info", ROOT, "--length", 40)
    assert (
        "Memory in MiB, of 1 x 40 positions" in shown
        and "activations" in shown
        and max(map(len, shown.splitlines())) <= 80
    )


def test_info_measures_a_generation():
    arguments = ("info", ROOT, "--measure", "--max-new-tokens", 20)
    measured = json.loads(run(*arguments, "--batch-size", 2, "--json"))["measured"]
    # 16 steps (generation_config.json) of 16 loops
    assert (measured["forward_passes_per_row"], measured["loops_per_row"]) == (16, 256)
    assert measured["tokens_per_second"] == pytest.approx(2 * 20 / measured["seconds"])
    assert measured["flops_per_row"] > 0
    assert "tokens per second" in run(*arguments)


def test_numbers_stay_whole_on_a_narrow_screen(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(output, "console", Console(file=file, width=80))
    cells = ["4", "5.8861 ± 0.0053", "360.0 ± 1.9", "4.6102 ± 0.0041", "-0.01162 ± 0.00076"]
    output.show_table("NELBO", ["num_loops", "nats/token", "perplexity at most", "bits/byte", "change"], [cells])
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and any(all(cell in line for cell in cells) for line in lines)
