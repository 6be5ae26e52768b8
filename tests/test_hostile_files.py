# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Files, arguments and disks that do their worst: every command ends in one line on stderr and exit status 2, writes
nothing, and runs no code that it was not asked to.
"""

import errno
import io
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import refusal, run
from conversion import FIXTURES, convert, edited, fixture_weights, load, refuse, save_tokenizer, stored
from evaluation_models import save_judge, save_looped
from processes import FORK, start
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoTokenizer

import loopmdm.convert.write as write
import loopmdm_cli
from loopmdm.convert import convert_checkpoint
from loopmdm.weight_files import read_index
from loopmdm_cli.options import pairs

DEEP = '{"a":' * 100_000


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A model, a judge and a text, which tests do not change."""
    folder = tmp_path_factory.mktemp("shared")
    save_looped(folder / "model", max_train_loops=1)  # so that it can be converted, too
    save_judge(folder / "judge")
    (folder / "text.txt").write_text("w1 w2 w3 w4 w5 w6\n\nw7 w8 w9")
    return folder


@pytest.fixture
def model(shared, tmp_path) -> Path:
    return shutil.copytree(shared / "model", tmp_path / "model")


def every_command(folder: Path, shared: Path) -> dict[str, list]:
    """By name, a call that reads the model in `folder`."""
    text = ["--text", shared / "text.txt"]
    return {
        "info": ["info", folder],
        "generate": ["generate", folder, "w1 w2", "--max-new-tokens", 2],
        "convert": ["convert", folder, folder.parent / "converted"],
        "likelihood": ["eval", "likelihood", folder, *text, "--num-samples", 2, "--output", folder.parent / "results"],
        "dynamics": ["eval", "dynamics", folder, *text, "--output", folder.parent / "results"],
        "perplexity": ["eval", "generative-perplexity", folder, "--judge", shared / "judge", "--num-samples", 1],
    }


COMMANDS = ("info", "generate", "convert", "likelihood", "dynamics", "perplexity")


# The boundary


class Panic(BaseException):
    """As the tokenizers library's panics are: not even an Exception."""


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (KeyError("rope_type"), "KeyError: 'rope_type'. LOOPMDM_DEBUG=1 shows where."),
        (SafetensorError("header too large"), "SafetensorError: header too large. LOOPMDM_DEBUG=1 shows where."),
        (
            RuntimeError("size mismatch\n  for x:\n  y"),
            "RuntimeError: size mismatch for x: y. LOOPMDM_DEBUG=1 shows where.",
        ),
        (MemoryError(), "MemoryError. LOOPMDM_DEBUG=1 shows where."),
        (RecursionError("deep"), "RecursionError: deep. LOOPMDM_DEBUG=1 shows where."),
        (ImportError("needs sentencepiece"), "ImportError: needs sentencepiece. LOOPMDM_DEBUG=1 shows where."),
        (Panic("called `Option::unwrap()`"), "Panic: called `Option::unwrap()`. LOOPMDM_DEBUG=1 shows where."),
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("a\x1b[31mred\x07 name"), "a\ufffd[31mred\ufffd name"),
        (ValueError(""), "ValueError. LOOPMDM_DEBUG=1 shows where."),
        (ValueError("x" * 10**6), f"{'x' * 1000} ..."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_is_raised_ends_in_one_line(monkeypatch, error, shown):
    def fail(*args):
        raise error

    monkeypatch.setattr("loopmdm_cli.info._facts", fail)
    assert refusal("info", "anything") == f"loopmdm: error: {shown}"


def test_the_end_of_a_file_is_an_error_and_no_interruption(monkeypatch, capsys):
    def fail(*args):
        raise EOFError("cut")

    monkeypatch.setattr("loopmdm_cli.info._facts", fail)
    with pytest.raises(SystemExit) as exit_:
        loopmdm_cli.main(["info", "anything"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.strip() == "loopmdm: error: EOFError: cut. LOOPMDM_DEBUG=1 shows where."


def test_an_interruption_is_no_error(monkeypatch, capsys):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("loopmdm_cli.info._facts", fail)
    with pytest.raises(SystemExit) as exit_:
        loopmdm_cli.main(["info", "anything"])
    assert exit_.value.code == 130
    assert "error" not in capsys.readouterr().err


def test_a_place_that_cannot_show_a_character(shared, tmp_path, monkeypatch):
    """The results are written, whatever the table looks like."""
    model, place = shutil.copytree(shared / "model", tmp_path / "model"), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(place, "ascii"))
    with pytest.raises(SystemExit) as exit_:
        loopmdm_cli.main([str(part) for part in every_command(model, shared)["likelihood"]])
    sys.stdout.flush()
    assert not exit_.value.code
    assert b"+/-" in place.getvalue() and place.getvalue().isascii()
    assert json.loads((tmp_path / "results" / "results.json").read_text())["results"]


def test_names_are_not_read_as_markup(shared, tmp_path):
    text = tmp_path / "[bold]a[" / "b].txt"
    text.parent.mkdir()
    shutil.copy(shared / "text.txt", text)
    shown = run("eval", "likelihood", shared / "model", "--text", text, "--num-samples", 2, "--num-loops", 1)
    assert "[bold]a[" in "".join(shown.split())


# Models


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "content",
    [
        "null",
        "[1]",
        "{",
        "",
        DEEP,
        '{"model_type": "loopmdm"}',
        '{"model_type": ["loopmdm"]}',
        '{"model_type": "no-such"}',
    ],
    ids=["null", "list", "cut", "empty", "deep", "bare", "odd", "unknown"],
)
def test_configurations_that_are_none(shared, model, command, content):
    (model / "config.json").write_text(content)
    refusal(*every_command(model, shared)[command])
    assert sorted(os.listdir(model.parent)) == ["model"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("content", ["null", "{", DEEP], ids=["null", "cut", "deep"])
def test_settings_of_generate_that_are_damaged(shared, model, command, content):
    (model / "generation_config.json").write_text(content)
    assert "generation_config.json" in refusal(*every_command(model, shared)[command])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "info"])
@pytest.mark.parametrize("change", ["cut", "longer", "pickle", "none", "shape"])
def test_weights_that_are_damaged(shared, model, command, change):
    file = model / "model.safetensors"
    data = file.read_bytes()
    if change == "shape":
        tensors = stored(model)
        save_file(tensors | {"model.norm.weight": torch.ones(5)}, file, metadata={"format": "pt"})
    elif change == "none":
        file.unlink()
    else:
        file.write_bytes({"cut": data[:-4], "longer": data + b"0000", "pickle": b"\x80\x04."}[change])
    refusal(*every_command(model, shared)[command])
    assert sorted(os.listdir(model.parent)) == ["model"]


def generate_in_vain(place: Path) -> None:
    logging.getLogger("transformers").handlers[0].setStream(sys.stderr)  # which keeps the stderr that it found
    loopmdm_cli.main(["generate", str(place), "w1"])


@pytest.mark.parametrize("name", ["model.norm.weight", "surplus"])
def test_nothing_but_the_line_is_shown(model, tmp_path, name):
    """In a process of its own, with all that transformers reports of what it loads."""
    save_file(stored(model) | {name: torch.ones(5)}, model / "model.safetensors", metadata={"format": "pt"})
    with open(tmp_path / "stderr", "wb") as file:
        process = start(generate_in_vain, model, stderr=file.fileno())
        process.join(60)
    (line,) = [line for line in (tmp_path / "stderr").read_text().splitlines() if "torch" not in line]
    assert line.startswith("loopmdm: error: ") and name in line


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("info", "convert")])
def test_tokenizers_that_do_not_load(shared, model, command):
    (model / "tokenizer.json").write_text('{"model": 1}')
    assert "tokenizer" in refusal(*every_command(model, shared)[command])


EVIL = """
import pathlib
pathlib.Path(__file__).with_name("executed").touch()
pathlib.Path({marker!r}).touch()
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast):
    pass
"""


def bring_code(folder: Path, marker: Path) -> None:
    (folder / "tokenization_evil.py").write_text(EVIL.format(marker=str(marker)))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def modules(monkeypatch, tmp_path):
    """Where transformers keeps the code that it is allowed to run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("Nobody is there to be asked."))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("command", ["generate", "likelihood", "dynamics", "perplexity"])
def test_code_of_a_tokenizer_runs_on_request_alone(shared, model, modules, tmp_path, command):
    marker = tmp_path / "executed"
    bring_code(model, marker)
    arguments = every_command(model, shared)[command]
    assert "--trust-remote-code" in refusal(*arguments)
    assert not marker.exists()
    run(*arguments, "--trust-remote-code")
    assert marker.exists()


def test_code_of_a_model_never_runs(shared, model, modules, tmp_path):
    (model / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "executed")))
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoModelForMaskedLM": "evil.Evil"}
    for kind in ("loopmdm", "evil", None):
        config = json.loads((shared / "model" / "config.json").read_text()) | {"auto_map": code, "model_type": kind}
        (model / "config.json").write_text(json.dumps(config))
        for command, arguments in every_command(model, shared).items():
            if command == "convert":  # which goes by architecture and tensors
                run(*arguments, "--dry-run")
            elif kind != "loopmdm":
                refusal(*arguments)
            elif command == "generate":
                run(*arguments)
        refusal("eval", "generative-perplexity", "--judge", model, "--samples", shared / "text.txt")
    assert not (tmp_path / "executed").exists()


# Options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "likelihood", "MODEL", "--text", "TEXT", "--documents", "x"], "--documents is 'x'; choose one of"),
        (
            ["eval", "likelihood", "MODEL", "--text", "a.jsonl", "--documents", "line"],
            "--documents (line) has no effect",
        ),
        (["eval", "likelihood", "MODEL", "--text", "TEXT", "--split", "test"], "--split (test) has no effect"),
        (["eval", "likelihood", "MODEL", "--text", "TEXT", "--text-column", "b"], "--text-column (b) has no effect"),
        (["eval", "likelihood", "MODEL", "--text", "TEXT", "--task", "fill", "--documents", "line"], "has no effect"),
        (["eval", "likelihood", "MODEL", "--text", "TEXT", "--stride", "0"], "--stride is 0; it must be at least 1"),
        (["eval", "likelihood", "MODEL", "--text", "TEXT", "--window", "65"], "window is 65 tokens long"),
        (["eval", "dynamics", "MODEL", "--text", "TEXT", "--timesteps", "2"], "`timesteps` is [2.0]"),
        (["eval", "generative-perplexity", "--judge", "J", "--samples", "TEXT", "--num-samples", "3"], "no effect"),
        (["eval", "generative-perplexity", "MODEL", "--judge", "J", "--documents", "line"], "it is for --samples"),
        (["info", "MODEL", "--max-new-tokens", "2"], "nothing is measured without --measure"),
        (["info", "MODEL", "--measure", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["generate", "MODEL", "w1", "--stream", "--json"], "--json has no effect"),
        (["generate", "MODEL", "w1", "--batch-size", "0"], "--batch-size is 0"),
        (["generate", "MODEL", "w1", "--max-new-tokens", "2", "--num-return-sequences", "2"], "are the same"),
        (["generate", "MODEL", "w1", "--max-new-tokens", "99"], "the model has 64 positions"),
        (["calibrate", "MODEL", "--data", "TEXT", "--limit", "-1"], "--limit is -1; it must be at least 1"),
        (["calibrate", "MODEL", "--data", "TEXT", "--output", "/nowhere/at/all.json"], "cannot be written"),
        (["convert", "MODEL", "OUT", "--revision", "main"], "Only the Hub has revisions (main)"),
        (["convert", "MODEL", "OUT", "--family", "dream", "--from-causal"], "leave out either it or --from-causal"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_options_that_do_nothing_or_harm_are_refused_before_weights_are_read(
    shared, tmp_path, monkeypatch, arguments, message
):
    places = {"MODEL": shared / "model", "TEXT": shared / "text.txt", "OUT": tmp_path / "out"}
    if "99" not in arguments and "--num-return-sequences" not in arguments:
        monkeypatch.setattr("loopmdm.evaluation.loading.load_model", lambda *_: pytest.fail("loaded"))
    assert message in refusal(*(places.get(part, part) for part in arguments))


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["num_loops=[1,2],unmasking=margin"], {"num_loops": [1, 2], "unmasking": "margin"}),
        (["confidence_threshold=1e-3", "top_k=5"], {"confidence_threshold": 0.001, "top_k": 5}),
        (None, {}),
        (["a=1,a=2"], "gives 'a' twice"),
        (["=1"], "is not `key=value`"),
        (["a"], "is not `key=value`"),
        (["a=" + "[" * 50_000], "is not a value"),
        (["a=!!python/object/apply:os.system [true]"], "is not a value"),
        (["a={b: "], "is not a value"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_pairs(texts, found):
    if isinstance(found, dict):
        assert pairs("--generate", texts) == found
    else:
        with pytest.raises(ValueError, match=found):
            pairs("--generate", texts)


# generate


def answers(model: Path, *arguments: object, input: str | None = None) -> list[dict]:
    return [json.loads(line) for line in run("generate", model, *arguments, "--json", input=input).splitlines()]


DRAW = ("--max-new-tokens", 6, "--do-sample", "--temperature", 5)


def test_the_same_prompt_twice_gets_two_answers(shared):
    model = shared / "model"
    twice = answers(model, "w1 w2", "w1 w2", *DRAW)
    assert twice[0]["text"] != twice[1]["text"]
    assert twice == answers(model, "w1 w2", "w1 w2", *DRAW)
    assert twice != answers(model, "w1 w2", "w1 w2", *DRAW, "--seed", 1)


def test_several_answers_to_each_prompt_whatever_the_batch(shared):
    model, prompts = shared / "model", ("w1 w2", "w3", "w4 w5 w6")
    made = answers(model, *prompts, *DRAW, "--num-return-sequences", 3)
    assert [answer["prompt"] for answer in made] == [prompt for prompt in prompts for _ in range(3)]
    assert len({answer["text"] for answer in made[:3]}) == 3
    assert made == answers(model, *prompts, *DRAW, "--num-return-sequences", 3, "--batch-size", 1)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_lines_of_standard_input(shared, batch_size):
    """An empty line is a prompt too, and one with mask tokens is filled in; each as if it were alone."""
    model, lines = shared / "model", ["w1 w2", "", "w3 <mask> w4", "w5"]
    made = answers(model, "-", "--batch-size", batch_size, "--max-denoising-steps", 4, input="\n".join(lines) + "\n")
    assert [answer["prompt"] for answer in made] == lines
    for line, answer in zip(lines, made, strict=True):
        assert answers(model, line, "--max-denoising-steps", 4) == [answer]
    assert len(made[2]["text"].split()) <= 3  # nothing is appended
    assert answers(model, "-", "--max-new-tokens", 0, input="w1 w2\n\nw3 <mask>\n")[:2] == [
        {"prompt": prompt, "text": prompt, "forward_passes": 0, "loops": 0, "flops": 0} for prompt in ("w1 w2", "")
    ]


def test_standard_input_that_is_not_text(shared, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))
    message = refusal("generate", shared / "model", "-")
    assert message.startswith("loopmdm: error: Standard input is not text in utf-8")


# Conversion: what a source says of itself


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("tokenizer_config.json", '{"mask_token": [1]}'),
        ("tokenizer.json", '{"model": [1]}'),
        ("tokenizer.json", '{"added_tokens": 3}'),
        ("added_tokens.json", '{"a": "b"}'),
        ("generation_config.json", '{"eos_token_id": "a"}'),
        ("generation_config.json", '{"eos_token_id": {"a": 1}}'),
    ],
    ids=lambda value: value[:30],
)
def test_files_beside_the_weights(src, out, name, content):
    edited("llada", src)
    (src / name).write_text(content)
    assert "\n" not in refuse(src, out)


def test_json_beyond_all_measure(src, out):
    edited("llada", src)
    with open(src / "tokenizer.json", "wb") as file:
        file.truncate(2**27 + 1)
    refuse(src, out, "tokenizer.json has 134,217,729 bytes")


@pytest.mark.parametrize(
    ("name", "config", "part"),
    [
        ("llada", {"rms_norm_eps": "small"}, ""),
        ("dream", {"rope_theta": [1]}, ""),
        ("dream", {"rope_parameters": [1]}, "`rope_parameters`"),
        ("dream", {"architectures": "DreamModel"}, "`architectures`"),
        ("dream", {"architectures": [1]}, "`architectures`"),
        ("dream", {"num_hidden_layers": 10**9}, "4 layers"),
        ("dream", {"num_attention_heads": 10**9}, ""),
        ("dream", {"max_position_embeddings": -1}, "`max_position_embeddings`"),
        ("llada", {"eos_token_id": 128}, "`eos_token_id` is 128 in config.json"),
        ("llada", {"eos_token_id": [1, 500]}, "`eos_token_id` is [1, 500] in config.json"),
        ("llada", {"eos_token_id": True}, "`eos_token_id` is True"),
        ("llada", {"pad_token_id": 500}, "`pad_token_id` is 500 in config.json"),
        ("llada", {"bos_token_id": -2}, "`bos_token_id` is -2 in config.json"),
    ],
    ids=str,
)
def test_values_out_of_range(src, out, name, config, part):
    refuse(edited(name, src, config=config), out, part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_are_not_finite_in_any_dtype(src, out, dtype):
    def spoil(tensor):
        tensor = tensor.to(dtype, copy=True)
        tensor.view(-1)[-1] = float("nan")
        return tensor

    edited("dream", src, tensors={"model.layers.3.mlp.down_proj.weight": spoil})
    refuse(src, out, "model.layers.3.mlp.down_proj.weight", "NaN or infinite")


# Conversion: indexes


@pytest.fixture
def sharded(src) -> Path:
    return shutil.copytree(FIXTURES / "llada", src)


def edit_index(folder: Path, change) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(change(index)))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("../outside.safetensors", "leads out of its folder"),
        ("sub/inside.safetensors", "leads out of its folder"),
        ("..", "not a .safetensors file"),
        ("", "not a .safetensors file"),
        ("w.bin", "not a .safetensors file"),
    ],
)
def test_an_index_leads_nowhere_else(sharded, out, name, part):
    """Not even where the other file is what it should be."""
    first = "model-00001-of-00003.safetensors"
    shutil.copy(sharded / first, sharded.parent / "outside.safetensors")
    torch.save(stored(sharded), sharded / "w.bin")

    def change(index):
        names = {key: name if file == first else file for key, file in index["weight_map"].items()}
        return index | {"weight_map": names}

    edit_index(sharded, change)
    (sharded / first).unlink()
    refuse(sharded, out, part, repr(name), allow_pickle=True)


def test_an_honest_index(sharded, out):
    names = read_index(sharded / "model.safetensors.index.json")
    assert set(names) == set(fixture_weights("llada"))
    convert_checkpoint(sharded, out)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_what_is_not_a_file_is_not_waited_for(src, out, name, make):
    edited("llada", src)
    (src / name).unlink(missing_ok=True)
    make(src / name)
    if name in ("model.safetensors", "config.json"):
        refuse(src, out, "holds no weights" if name == "model.safetensors" else "without a config.json")
    else:
        convert_checkpoint(src, out)


# Conversion: tokenizers


def test_a_tokenizer_that_does_not_load(src, out):
    edited("llada", src)
    save_tokenizer(src, 120)
    content = json.loads((src / "tokenizer.json").read_text())
    content["model"]["type"] = "Imaginary"
    (src / "tokenizer.json").write_text(json.dumps(content))
    message = refuse(src, out, f"The tokenizer of {src} does not load")
    assert "/tmp/tmp" not in message


@pytest.mark.parametrize("with_code", [False, True])
def test_a_tokenizer_with_more_tokens_than_the_embedding(src, out, with_code):
    edited("llada", src)
    save_tokenizer(src, 178)
    if with_code:
        bring_code(src, src / "executed")
    refuse(src, out, "has the token 177, and the embedding 128 rows")


def test_code_of_a_tokenizer_is_copied_and_runs_on_request_alone(src, out, modules, tmp_path):
    marker, text = tmp_path / "executed", tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 100}" for i in range(300)))
    edited("llada", src)
    save_tokenizer(src, 126, pad="w0")
    bring_code(src, marker)
    refuse(src, out, "has code of its own", "--trust-remote-code", calibrate_on=text)
    convert_checkpoint(src, out)
    assert not marker.exists()
    assert (out / "tokenization_evil.py").read_text() == (src / "tokenization_evil.py").read_text()
    shutil.rmtree(out)
    run("convert", src, out, "--calibrate", text, "--trust-remote-code")
    assert marker.exists()
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=True).mask_token_id == 125


TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}END{% endfor %}"


@pytest.mark.parametrize("with_code", [False, True])
@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("<eot>", [120, 121]),
        ("\n<eot>\n", [120, 121]),  # on a line of its own
        ("w120", 120),  # the end token itself
        ("\n", 120),  # of the text, where it can stand within an answer too
        ("<unknown>", 120),
    ],
)
def test_the_end_of_a_turn_ends_generation(src, out, end, expected, with_code):
    """Of a tokenizer with code of its own, which is not run, its files tell."""
    edited("llada", src, config={"eos_token_id": 120})
    save_tokenizer(src, 121, extra=("<eot>", "<assistant>"), eos="w120", template=TURNS.replace("END", end))
    if with_code:
        bring_code(src, src / "executed")
    record = convert_checkpoint(src, out)
    assert record["special_tokens"]["eos_token_id"] == expected
    assert load(out).generation_config.eos_token_id == load(out).config.eos_token_id == expected


@pytest.mark.parametrize("template", ["{{ nothing.at.all }}", "{% for", "{{ raise_exception('never') }}", ""])
def test_templates_that_say_nothing(src, out, template):
    edited("llada", src, config={"eos_token_id": 120})
    save_tokenizer(src, 121, extra=("<eot>",), template=template)
    assert convert_checkpoint(src, out)["special_tokens"]["eos_token_id"] == 120


# Kills and disks


def stop_in_the_middle(source: Path, target: Path, busy) -> None:
    """Converts until the second shard is written, and then does nothing."""
    real, made = write.save_file, []

    def save(*args, **kwargs):
        real(*args, **kwargs)
        made.append(args)
        if len(made) == 2:
            busy.set()
            time.sleep(60)

    write.save_file = save
    convert_checkpoint(source, target, max_shard_size=100_000)


def test_what_a_kill_leaves_is_taken_by_the_next_conversion(out):
    busy = FORK.Event()
    process = start(stop_in_the_middle, FIXTURES / "llada", out, busy)
    assert busy.wait(60)
    with pytest.raises(ValueError, match=r"Another conversion is writing .*out; wait for it"):
        convert("llada", out)
    process.kill()
    process.join()
    assert os.listdir(out.parent) == [".out.partial"]
    assert not (out.parent / ".out.partial" / "config.json").exists()
    assert "does not hold a model" in refusal("info", out.parent / ".out.partial")
    time.sleep(0.1)
    convert("llada", out)
    assert os.listdir(out.parent) == ["out"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert len(stored(out)) == len(fixture_weights("llada"))


def test_what_a_kill_leaves_counts_as_free(out, monkeypatch):
    left = out.parent / ".out.partial"
    left.mkdir()
    (left / ".conversion.lock").touch()
    for free, size in ((60 * 2**20, 0), (10 * 2**20, 60 * 2**20)):
        with open(left / "model.safetensors", "wb") as file:
            file.truncate(size)
        monkeypatch.setattr(write.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if size == 0:
            with pytest.raises(ValueError, match="make room"):
                convert("llada", out)
    convert("llada", out)
    assert os.listdir(out.parent) == ["out"]


def test_a_folder_of_that_name_that_is_not_ours(out):
    other = out.parent / ".out.partial"
    other.mkdir()
    (other / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is in the way, and no conversion has made it"):
        convert("llada", out)
    assert (other / "mine.txt").read_text() == "keep"


def test_a_disk_that_is_full_when_results_are_written(shared, tmp_path, monkeypatch):
    real = Path.write_text

    def full(path, *args, **kwargs):
        if "results" in path.name:
            real(path, "half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    arguments = ["eval", "likelihood", shared / "model", "--text", shared / "text.txt", "--num-samples", 2]
    assert "No space left" in refusal(*arguments, "--output", tmp_path / "results")
    assert os.listdir(tmp_path) == []


def test_a_source_that_is_taken_away(src, out):
    edited("llada", src)
    refuse(src, out, "cannot be read", on_plan=lambda plan: (src / "model.safetensors").unlink())
