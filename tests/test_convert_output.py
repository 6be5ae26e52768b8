# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What a conversion writes and when: arguments, shards and dtypes, memory, interruptions, verification, calibration, the
choice of the loop, and the command.
"""

import errno
import gc
import json
import os
import re
import runpy
import shutil
import sys
import weakref
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import transformers
from commands import refusal, run
from conversion import (
    FIXTURES,
    OPTIONS,
    TOLERANCES,
    convert,
    edited,
    fixture_weights,
    largest_difference,
    load,
    references,
    refuse,
    same_weights,
    save_tokenizer,
    stored,
)
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoTokenizer

import loopmdm.convert.engine as engine
import loopmdm.convert.plan as plan_module
import loopmdm.convert.write as write
from loopmdm import LoopMDMForMaskedLM
from loopmdm.convert import Source, convert_checkpoint, default_window
from loopmdm.convert.loop_window import read_sequences
from loopmdm.objective import nelbo

SCRIPT = Path(__file__).parents[1] / "convert" / "write_reference.py"

# Arguments


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"loop_start": 1, "loop_end": 5}, ["layers[1:5] of 4 layers", "loop_end <= num_hidden_layers"]),
        ({"loop_start": 3, "loop_end": 1}, ["layers[3:1]"]),
        ({"loop_start": 1}, ["`loop_start` and `loop_end` go together"]),
        ({"loop_end": 2}, ["`loop_start` and `loop_end` go together"]),
        ({"num_loops": 0}, ["`num_loops` is 0", "at least 1"]),
        ({"max_train_loops": 0}, ["`max_train_loops` is 0"]),
        ({"loop_update": "add"}, ["loop_update", "'replace', 'damped'", "add"]),
        ({"dtype": "float8"}, ["`dtype` is 'float8'", "bfloat16"]),
        ({"calibrate_on": "nowhere.txt"}, ["nowhere.txt is not a file"]),
        ({"verify_against": "nowhere.npz"}, ["nowhere.npz is not a file"]),
        ({"calibrate_on": __file__, "loop_start": 1, "loop_end": 2}, ["Calibration", "`loop_start`"]),
        ({"calibrate_on": __file__, "loop_end": 2}, ["Calibration", "`loop_start`"]),
        ({"calibration_width": 2}, ["calibrat", "without a text"]),
        ({"calibrate_on": __file__, "calibration_sequences": 0}, ["`calibration_sequences` is 0", "at least 1"]),
        ({"calibrate_on": __file__, "calibration_length": -1}, ["`calibration_length` is -1", "at least 1"]),
        ({"calibrate_on": FIXTURES / "llada" / "config.json"}, ["config.json is JSON", "plain text"]),
        ({"calibrate_on": __file__}, ["no tokenizer", Path(__file__).name]),
        ({"verify": True}, ["no class of its own", "--verify-against", "write_reference.py"]),
        ({"max_shard_size": "many"}, ["`max_shard_size` is 'many'"]),
        ({"max_shard_size": 0}, ["`max_shard_size` is 0"]),
    ],
)
def test_arguments_that_do_not_fit_are_found_before_anything_is_read(out, monkeypatch, options, parts):
    monkeypatch.setattr(Source, "read", lambda self, name: pytest.fail("read"))
    monkeypatch.setattr(engine, "new_folder", lambda output: pytest.fail("wrote"))
    refuse(FIXTURES / "llada", out, *parts, **options)


@pytest.mark.parametrize("what", ["folder", "file", "dangling link"])
def test_existing_output_is_left_alone(tmp_path, out, what):
    if what == "folder":
        out.mkdir()
    elif what == "file":
        out.write_text("keep")
    else:
        out.symlink_to(tmp_path / "target")
    with pytest.raises(ValueError, match="out exists already; name a new folder, or remove it"):
        convert("llada", out)
    assert [path.name for path in out.parent.rglob("*")] == ["out"]
    assert {"folder": out.is_dir, "file": out.read_text, "dangling link": out.is_symlink}[what]()
    assert not (tmp_path / "target").exists()


def test_output_that_appears_during_the_conversion(out):
    def appear(what, done, total):
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("keep")

    with pytest.raises(ValueError, match="was made by someone else"):
        convert("llada", out, progress=appear)
    assert os.listdir(out.parent) == ["out"]
    assert os.listdir(out) == ["mine.txt"]


def test_parents_are_made_and_unmade(tmp_path):
    deep = tmp_path / "a" / "b" / "c"
    with pytest.raises(ValueError, match="differs"):
        convert("dream", deep, verify_against=reference_file(tmp_path / "wrong.npz", "sdar"))
    assert not (tmp_path / "a").exists()
    convert("llada", deep)
    assert load(deep).config.mask_token_id == 125
    with pytest.raises(ValueError, match=r"cannot be made, as .*config\.json"):
        convert("llada", deep / "config.json" / "d")


# Weights


@pytest.mark.parametrize("max_shard_size", [60_000, "60KB"])
def test_shards(out, max_shard_size):
    convert("mdlm_hf", out, max_shard_size=max_shard_size)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    index, weights = json.loads((out / "model.safetensors.index.json").read_text()), stored(out)
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in weights.values())
    assert {name: file.name for file in shards for name in load_file(file)} == index["weight_map"]
    assert all(file.stat().st_size < 60_000 + 10_000 for file in shards)
    whole = out.with_name("whole")
    convert("mdlm_hf", whole)
    assert [file.name for file in whole.glob("model.*")] == ["model.safetensors"]
    assert same_weights(out, whole)
    assert largest_difference(load(out), "mdlm_hf", "f32") <= TOLERANCES["f32"]


def test_conversions_with_different_loops_hold_the_same_weights(out):
    loop = {"loop_start": 0, "loop_end": 3, "num_loops": 4}
    convert("llada", out, **loop)
    convert("llada", out.with_name("plain"))
    assert same_weights(out, out.with_name("plain"))
    config = load(out).config
    assert {name: getattr(config, name) for name in loop} == loop
    assert config.loop_update == "damped"
    assert load(out.with_name("plain")).config.num_loops == 1


@pytest.mark.parametrize("name", ["fast_dllm_v2", "bd3lm_noadaln"])
@pytest.mark.parametrize(
    ("kept", "asked", "expected"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float16"),
        ("float32", "bfloat16", "bfloat16"),
        ("float32", "float16", "float16"),
        ("bfloat16", "float32", "float32"),
        ("float64", "float32", "float32"),
    ],
)
def test_dtypes(src, out, name, kept, asked, expected):
    kept, expected = getattr(torch, kept), getattr(torch, expected)
    edited(name, src, tensors={key: lambda tensor: tensor.to(kept) for key in fixture_weights(name)})
    record = convert_checkpoint(src, out, dtype=asked, **OPTIONS.get(name, {}))
    assert record["dtype"] == str(expected).removeprefix("torch.")
    weights = stored(out)
    assert {tensor.dtype for tensor in weights.values()} == {expected}
    assert LoopMDMForMaskedLM.from_pretrained(out, dtype="auto").dtype == expected
    embedding = "model.embed_tokens.weight" if name == "fast_dllm_v2" else "backbone.vocab_embed.embedding"
    original = fixture_weights(name)[embedding]
    assert torch.equal(weights["model.embed_tokens.weight"], original.to(kept).to(expected))


@pytest.mark.parametrize("others", [torch.float32, torch.float16])
def test_the_dtype_of_mixed_sources_holds_them_all(src, out, others):
    tensors = {key: lambda tensor: tensor.to(others) for key in fixture_weights("dream")}
    edited("dream", src, tensors=tensors | {"model.norm.weight": lambda tensor: tensor.bfloat16()})
    assert convert_checkpoint(src, out)["dtype"] == "float32"


@pytest.mark.parametrize("name", ["dream", "mdlm_hf", "diffugpt"])
def test_one_shard_is_in_memory_at_a_time(out, monkeypatch, name):
    limit, alive, peak, saved = 60_000, [], [], []
    real_read, real_make = Source.read, write.make_tensor

    def track(tensor):
        alive.append((weakref.ref(tensor), tensor.nbytes))
        peak.append(sum(size for reference, size in alive if reference() is not None))
        return tensor

    def save(tensors, path, **kwargs):
        saved.append(len(tensors))
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(Source, "read", lambda self, key: track(real_read(self, key)))
    monkeypatch.setattr(write, "make_tensor", lambda plan, key: track(real_make(plan, key)))
    monkeypatch.setattr(write, "save_file", save)
    gc.disable()
    try:
        convert(name, out, max_shard_size=limit)
    finally:
        gc.enable()
    assert len(saved) > 3
    # A shard, and the tensors that the next one is made of
    assert max(peak) <= limit + 2.5 * max(tensor.nbytes for tensor in fixture_weights(name).values())
    assert max(peak) < sum(size for _, size in alive) / 2


def test_plan_and_progress(out):
    plans, calls = [], []

    def on_plan(plan):
        plans.append(plan)
        assert os.listdir(out.parent) == []

    record = convert("llada", out, on_plan=on_plan, progress=lambda *call: calls.append(call), max_shard_size=100_000)
    (plan,) = plans
    assert plan.record().items() <= record.items()
    assert json.loads((out / "conversion.json").read_text()) == record
    weights = stored(out)
    assert plan.num_bytes == sum(tensor.nbytes for tensor in weights.values())
    assert {(what, total) for what, _, total in calls} == {("writing", plan.num_bytes)}
    done = [done for _, done, _ in calls]
    assert all(first < second for first, second in pairwise(done))
    assert (len(done), done[-1]) == (len(weights), plan.num_bytes)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_are_readable_as_the_umask_says(src, out, umask):
    edited("llada", src)
    save_tokenizer(src, 120, mask="<|mask|>")
    for path in src.iterdir():
        path.chmod(0o600)
    before = {path.name: path.read_bytes() for path in src.iterdir()}
    old = os.umask(umask)
    try:
        convert_checkpoint(src, out, max_shard_size=100_000, mask_token_id=125)
    finally:
        os.umask(old)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o666 for path in out.rglob("*")} == {0o666 & ~umask}
    assert {path.name: path.read_bytes() for path in src.iterdir()} == before


# A disk that is full, and interruptions


def test_too_little_space_is_found_beforehand(out, monkeypatch):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 2**20))
    monkeypatch.setattr(Source, "read", lambda self, name: pytest.fail("read"))
    message = refuse(FIXTURES / "llada", out, str(out), "0.01 GB free", "make room")
    assert float(re.search(r"needs ([\d.]+) GB", message)[1]) == pytest.approx(0.0675, abs=0.003)


FULL = OSError(errno.ENOSPC, "No space left on device")


def failing_save(monkeypatch, error: BaseException) -> None:
    """At the second shard `save_file` leaves half a file and raises."""
    calls = []

    def save(tensors, path, metadata=None):
        calls.append(path)
        save_file(tensors, path, metadata=metadata)
        if len(calls) == 2:
            os.truncate(path, os.path.getsize(path) // 2)
            raise error

    monkeypatch.setattr(write, "save_file", save)


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), SystemExit()])
def test_nothing_is_left_of_an_interrupted_conversion(out, monkeypatch, error):
    failing_save(monkeypatch, error)
    with pytest.raises(type(error)) as raised:
        convert("llada", out, max_shard_size=100_000)
    assert raised.value is error
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize("step", ["write_tokenizer", "write_code", "load_written"])
def test_nothing_is_left_when_a_later_step_fails(out, monkeypatch, step):
    def fail(*args, **kwargs):
        raise FULL

    monkeypatch.setattr(engine, step, fail)
    with pytest.raises(OSError, match="No space"):
        convert("dream", out, verify=True)
    assert os.listdir(out.parent) == []


# Verification


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # rounding to which is what was asked for
@pytest.mark.parametrize("name", ["a2d_qwen3", "dream", "sdar", "diffugpt"])
def test_verification_with_transformers(out, name, dtype):
    found = convert(name, out, verify=True, dtype=dtype)["verification"]
    assert found["max_difference"] <= 1e-5 < 0.1 < found["max_logit"]
    assert found["max_difference"] <= found["tolerance"]
    assert json.loads((out / "conversion.json").read_text())["verification"] == found
    assert (found["transformers"], found["dtype"]) == (transformers.__version__, "float32")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dream", {"rms_norm_eps": 0.01}),
        ("a2d_qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("diffugpt", {"hidden_act": "relu"}),
    ],
)
def test_a_wrong_conversion_is_found_out(out, monkeypatch, name, changes):
    family = plan_module.choose_family(Source(name, FIXTURES / name, None, fixture_weights(name), config_of(name)))
    real = type(family).config
    monkeypatch.setattr(type(family), "config", lambda self, source: real(self, source) | changes)
    refuse(FIXTURES / name, out, "differs from the source", "tolerance", verify=True, **OPTIONS.get(name, {}))


def config_of(name: str) -> dict:
    return json.loads((FIXTURES / name / "config.json").read_text())


def test_wrong_weights_are_found_out(out, monkeypatch):
    real, wrong = write.make_tensor, "model.layers.2.self_attn.k_proj.weight"
    monkeypatch.setattr(write, "make_tensor", lambda plan, name: real(plan, name).flip(0 if name == wrong else ()))
    refuse(FIXTURES / "dream", out, "differs from the source", verify=True)


def reference_file(path: Path, name: str = "llada", **changes) -> Path:
    arrays = {"input_ids": references(name)["input_ids"].numpy(), "logits": references(name)["logits_f32"].numpy()}
    numpy.savez(path, **arrays | changes)
    return path


@pytest.mark.parametrize("name", ["llada", "dream", "diffugpt", "diffullama"])
def test_verification_with_a_file(tmp_path, out, name):
    """The file has the logits as the source returns them; the shift is the converted model's."""
    file = reference_file(tmp_path / "reference.npz", name)
    found = convert(name, out, verify_against=str(file))["verification_against_file"]
    assert (found["against"], found["tokens"]) == ("reference.npz", references(name)["input_ids"].numel())
    assert found["max_difference"] < 1e-5
    shutil.rmtree(out)
    logits, options = references(name)["logits_f32"], OPTIONS.get(name, {})
    for wrong, part in ((logits.roll(1, 1), "differs"), (logits + 1e-2, "differs from the source by 0.01")):
        reference_file(file, name, logits=wrong.numpy())
        refuse(FIXTURES / name, out, part, verify_against=file, **options)
    reference_file(file, name, logits=logits.clone().index_fill_(0, torch.tensor(1), float("nan")).numpy())
    refuse(FIXTURES / name, out, "not finite", verify_against=file, **options)


TOKENS, UNREADABLE = numpy.zeros((1, 4), int), "is not a readable .npz file"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"text", UNREADABLE),
        (0, UNREADABLE),
        (10_000, UNREADABLE),
        ({"input_ids": numpy.array([{}], object), "logits": numpy.zeros((1, 4, 9))}, UNREADABLE),
        ({"input_ids": TOKENS}, "no array 'logits'; make it with convert/write_reference.py"),
        ({"logits": numpy.zeros((1, 4, 128))}, "no array 'input_ids'"),
        ({"input_ids": TOKENS[0], "logits": numpy.zeros((1, 4, 128))}, "tokens (4,) and logits (1, 4, 128)"),
        ({"input_ids": TOKENS, "logits": numpy.zeros((1, 5, 128))}, "tokens (1, 4) and logits (1, 5, 128)"),
        ({"input_ids": TOKENS + 128, "logits": numpy.zeros((1, 4, 128))}, "outside the vocabulary of 128"),
        ({"input_ids": TOKENS[:, :0], "logits": numpy.zeros((1, 0, 128))}, "it must hold integers"),
        ({"input_ids": TOKENS.astype(str), "logits": numpy.zeros((1, 1, 128))}, "it must hold integers"),
        ({"input_ids": TOKENS, "logits": numpy.zeros((1, 4, 0))}, "it must hold floating point numbers"),
    ],
)
def test_reference_files_that_say_nothing(tmp_path, out, content, part):
    file = reference_file(tmp_path / "reference.npz")
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, int):
        os.truncate(file, content)
    else:
        numpy.savez(file, allow_pickle=True, **content)
    refuse(FIXTURES / "llada", out, "reference.npz", part, verify_against=file)


def test_the_reference_script(tmp_path, out, monkeypatch, capsys):
    """What the script writes of a model that needs remote code is what the option wants."""
    plain = tiny_model(max_train_loops=1, num_loops=1)
    plain.save_pretrained(tmp_path / "plain")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["--auto-class", "AutoModelForMaskedLM", "--length", "9", "--batch-size", "3", "--max-token", "20"]
    file = tmp_path / "reference.npz"
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, str(tmp_path / "plain"), str(file), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "logits (3, 9, 23)" in capsys.readouterr().out
    with numpy.load(file) as arrays:
        assert arrays["input_ids"].max() < 20
    record = convert_checkpoint(tmp_path / "plain", out, verify_against=file, loop_start=0, loop_end=2)
    assert record["verification_against_file"]["max_difference"] < 1e-6
    with torch.no_grad():
        plain.model.norm.weight[3] += 0.1
    plain.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="differs from the source"):
        convert_checkpoint(tmp_path / "other", out.with_name("other"), verify_against=file)


def test_the_reference_script_needs_nothing_of_this_package():
    imported = set(re.findall(r"^ *(?:import|from) ([\w.]+)$", SCRIPT.read_text(), re.MULTILINE))
    assert imported == {"argparse", "numpy", "torch", "transformers"}


# The loop's place


@pytest.mark.parametrize(
    ("num_layers", "replace_window", "damped_window"),
    [
        (1, (0, 1), (0, 1)),
        (2, (1, 2), (0, 1)),
        (6, (1, 2), (2, 3)),
        (12, (1, 3), (5, 7)),
        (32, (3, 8), (13, 17)),
    ],
)
def test_default_window(num_layers, replace_window, damped_window):
    assert default_window(num_layers, "replace") == replace_window
    assert default_window(num_layers, "damped") == damped_window


def test_default_windows_are_valid():
    for num_layers in range(1, 200):
        for update in ("replace", "damped"):
            start, end = default_window(num_layers, update)
            assert 0 <= start < end <= num_layers
            if num_layers >= 3:
                assert start >= 1 and end < num_layers  # a layer for head and one for tail


@pytest.mark.parametrize(("num_loops", "update"), [(1, "replace"), (2, "damped")])
def test_the_default_update_is_by_num_loops(out, num_loops, update):
    loop = convert("dream", out, num_loops=num_loops)["loop"]
    assert (loop["loop_update"], loop["chosen"]) == (update, "by depth")
    assert (loop["loop_start"], loop["loop_end"]) == default_window(4, update)


@pytest.fixture(scope="module")
def readable(tmp_path_factory) -> Path:
    """A LLaDA checkpoint with a tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("calibration")
    save_tokenizer(edited("llada", folder / "source"), 120, pad="w0")
    words = torch.randint(1, 120, (400,), generator=torch.Generator().manual_seed(3)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    (folder / "short.txt").write_text("w1 w2 w3")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
    return folder


def test_calibration(readable, out):
    text, calls = readable / "text.txt", []
    options = {"calibrate_on": text, "calibration_sequences": 2, "calibration_length": 32}
    record = convert_checkpoint(readable / "source", out, progress=lambda *call: calls.append(call), **options)
    found = record["calibration"]
    assert json.loads((out / "calibration.json").read_text()) == found
    assert json.loads((out / "conversion.json").read_text())["calibration"] == found
    assert (out / "calibration.png").read_bytes().startswith(b"\x89PNG")
    windows = found["windows"]
    assert [(row["loop_start"], row["loop_end"]) for row in windows] == [(1, 2), (2, 3)]
    for row in windows:
        assert row["nelbo"] - found["without_loops"]["nelbo"] == pytest.approx(row["change"], abs=1e-6)
        assert row["change_standard_error"] > 0 and row["standard_error"] > 0
    best = min(windows, key=lambda row: row["nelbo"])
    config, loop = load(out).config, record["loop"]
    assert found["best"] == [best["loop_start"], best["loop_end"]] == [config.loop_start, config.loop_end]
    assert [loop["loop_start"], loop["loop_end"]] == found["best"]
    assert loop["chosen"] == "by calibration on text.txt"
    assert (found["num_loops"], found["sequences"], found["length"], found["text"]) == (2, 2, 32, "text.txt")
    total = sum(value for key, value in record["parameters"].items() if key != "total")
    assert total == record["parameters"]["total"]
    assert [call[1:] for call in calls if call[0] == "calibrating"] == [(1, 3), (2, 3), (3, 3)]
    assert convert_checkpoint(readable / "source", out.with_name("again"), **options)["calibration"] == found


def test_calibration_measures_what_the_model_scores(readable, out):
    """The recorded numbers are the NELBO of the written model with that window."""
    options = {"calibration_sequences": 1, "calibration_length": 40, "num_loops": 3}
    found = convert_checkpoint(readable / "source", out, calibrate_on=readable / "text.txt", **options)["calibration"]
    assert (found["num_loops"], found["loop_update"]) == (3, "damped")
    text = (readable / "text.txt").read_text()
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)(text)["input_ids"][:40]])
    expected = {1: found["without_loops"]["nelbo"], 3: min(row["nelbo"] for row in found["windows"])}
    for num_loops, value in expected.items():
        measured = nelbo(load(out), ids, num_loops=num_loops, num_samples=8, batch_size=8).per_token()[0]
        assert measured.item() == pytest.approx(value, abs=1e-5)
    # One sequence has no standard error, and JSON no NaN.
    for name in ("calibration.json", "conversion.json"):
        json.loads((out / name).read_text(), parse_constant=pytest.fail)
    (readable / "marked.txt").write_text("\ufeff" + text)
    marked = read_sequences(AutoTokenizer.from_pretrained(out), readable / "marked.txt", 1, 40)
    assert torch.equal(marked, ids), "a byte-order mark is no part of the text"
    (readable / "empty.txt").touch()
    with pytest.raises(ValueError, match="holds no text"):
        read_sequences(AutoTokenizer.from_pretrained(out), readable / "empty.txt", 1, 40)


@pytest.mark.parametrize(("width", "windows"), [(2, [(1, 3)]), (3, [(0, 3), (1, 4)])])
def test_calibration_width(readable, out, width, windows):
    options = {"calibration_width": width, "calibration_sequences": 1, "calibration_length": 16}
    record = convert_checkpoint(readable / "source", out, calibrate_on=readable / "text.txt", **options)
    assert [(row["loop_start"], row["loop_end"]) for row in record["calibration"]["windows"]] == windows
    assert load(out).config.num_mid_layers == width


@pytest.mark.parametrize(
    ("text", "width", "parts"),
    [
        ("short.txt", None, ["short.txt has 3 tokens", "at least 64"]),
        ("binary.txt", None, ["binary.txt", "UTF-8"]),
        *(("text.txt", width, [f"width of the loop is {width}", "4 layers"]) for width in (0, 5, -1)),
    ],
)
def test_calibration_that_cannot_be_done(readable, out, text, width, parts):
    refuse(readable / "source", out, *parts, calibrate_on=readable / text, calibration_width=width)


# The command


def test_convert_command(src, out):
    edited("llada", src)
    save_tokenizer(src, 125, extra=("<|mdm_mask|>",), pad="w120", eos="w120")
    printed = run("convert", src, out, "--num-loops", 4)
    for part in ("as llada", "parameters", "layers[0:1]", "layers[1:2]", "layers[2:4]", "num_loops 4", "damped"):
        assert part in printed, printed
    assert "125 <|mdm_mask|> (from config.json)" in printed
    assert "is written" in " ".join(printed.split())
    facts = json.loads(run("info", out, "--json"))
    assert (facts["mid"], facts["num_loops"], facts["mask_token_id"]) == ("layers[1:2]", 4, 125)
    printed = run("generate", out, "w1 w2 w3", "--max-new-tokens", 4, "--max-denoising-steps", 2)
    assert printed.startswith("w1 w2 w3") and "mdm_mask" not in printed


def test_dry_run_and_verify_options(out):
    for target in (out, out.parent / "missing" / "out"):
        printed = run("convert", FIXTURES / "dream", target, "--dry-run", "--verify")
        assert "as dream" in printed and "is written" not in printed
        assert os.listdir(out.parent) == []
    printed = run("convert", FIXTURES / "dream", out, "--verify")
    assert "Qwen2ForCausalLM" in printed and "largest difference" in printed


@pytest.mark.parametrize(
    ("name", "args", "part"),
    [
        ("nowhere/at/all", [], "does not exist"),
        ("a2d_qwen3", [], "--mask-token-id"),
        ("dream", ["--loop-start", "1", "--loop-end", "9"], "layers[1:9]"),
        ("dream", ["--no-shift-logits"], "`shift_logits`"),
        ("dream", ["--from-causal"], "not a causal model"),
        ("mdlm_ckpt", [], "--allow-pickle"),
        ("dream", ["--max-shard-size", "100KB"], "No space left on device"),
    ],
)
def test_convert_command_errors_are_one_line(monkeypatch, out, name, args, part):
    failing_save(monkeypatch, FULL)
    assert part in refusal("convert", FIXTURES / name, out, *args)
    assert os.listdir(out.parent) == []
