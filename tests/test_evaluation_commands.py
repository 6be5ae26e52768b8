# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm eval`: what each command writes, and that nothing is written where the input is wrong."""

import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PUZZLE, SOLUTION, refusal, run
from evaluation_models import make_judge, save_judge, save_looped, word_tokenizer

import loopmdm_cli
from loopmdm import LoopMDMForMaskedLM
from loopmdm.evaluation import generative_perplexity, nelbo
from loopmdm.evaluation.protocol import output_folder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with models, texts and a task."""
    place = tmp_path_factory.mktemp("place")
    save_looped(place / "model")
    save_looped(place / "damped", loop_update="damped")
    save_judge(place / "judge")
    (place / "foreign").mkdir()
    (place / "foreign" / "config.json").write_text(
        '{"model_type": "llada", "auto_map": {"AutoConfig": "code.Config"}}'
    )
    (place / "nameless").mkdir()
    (place / "nameless" / "config.json").write_text('{"auto_map": {"AutoConfig": "code.Config"}}')
    (place / "text.txt").write_text("w1 w2 w3 w4 w5\n\nw6 w7 w8 w9\n")
    (place / "empty.txt").write_text(" \n")
    (place / "puzzles.txt").write_text(f"{PUZZLE} {SOLUTION}\n")
    (place / "ids.jsonl").write_text('{"text": [4, 5, 6]}\n')
    (place / "docs.jsonl").write_text('{"q": "w1 w2", "a": "w3"}\n')
    (place / "task.yaml").write_text(
        "task: ask\noutput_type: generate_until\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {place}/docs.jsonl}}}}\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\ngeneration_kwargs: {until: [w9], max_gen_toks: 5}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def measure(*args: object) -> str:
    return run("eval", *args)


def results(folder: Path) -> dict:
    """Strict JSON: a NaN would be an error."""
    text = (folder / "results.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_likelihood(place, tmp_path):
    out = tmp_path / "out"
    arguments = ("likelihood", place / "model", "--text", place / "text.txt", "--documents", "blank_line")
    shown = measure(*arguments, "--num-loops", "1,3", "--num-samples", "4", "--output", out)
    assert "NELBO of" in shown and "nats/token" in shown
    record = results(out)
    model = LoopMDMForMaskedLM.from_pretrained(place / "model")
    tokens = word_tokenizer()
    rows = [tokens(text)["input_ids"] for text in ("w1 w2 w3 w4 w5", "w6 w7 w8 w9")]
    options = {"num_loops": [1, 3], "num_samples": 4}
    alone = [nelbo(model, torch.tensor([row]), indices=[i], **options) for i, row in enumerate(rows)]
    total = sum(one.nats[:, 0] for one in alone)
    for i, row in enumerate(record["results"]):
        assert row["num_loops"] == (1, 3)[i]
        assert row["nats_per_token"] == pytest.approx(total[i].item() / 9)
        assert row["perplexity_bound"] == pytest.approx(math.exp(total[i].item() / 9))
        assert row["bits_per_byte"] == pytest.approx(total[i].item() / math.log(2) / 25)
    assert (record["tokens"], record["bytes"], record["texts"]) == (9, 25, 2)
    assert [row["tokens"] for row in record["by_text"]] == [5, 4]
    curve = record["by_timestep"]
    assert len(curve["edges"]) == 11 and sum(curve["masks"]) == 8 and None in curve["nats_per_masked_token"][0]
    with np.load(out / "tokens.npz") as arrays:
        assert arrays["token"].tolist() == [token for row in rows for token in row]
        np.testing.assert_allclose(arrays["nats"].sum(-1), total)
    assert is_png(out / "likelihood.png")

    protocol = record["protocol"]
    assert protocol["versions"]["torch"] == torch.__version__ and protocol["versions"]["loopmdm"]
    assert protocol["settings"]["seed"] == 0 and protocol["settings"]["num_samples"] == 4
    assert protocol["machine"]["threads"] == torch.get_num_threads()
    assert (protocol["model"]["device"], protocol["model"]["dtype"]) == ("cpu", "float32")
    weights = (place / "model" / "model.safetensors").read_bytes()
    assert protocol["model"]["sha256"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert "config.json" in protocol["model"]["sha256"]
    text = (place / "text.txt").read_bytes()
    assert protocol["data"]["sha256"] == {"text.txt": hashlib.sha256(text).hexdigest()}
    assert record["seconds"] > 0 and "perf_counter" in protocol["timing"]

    again = tmp_path / "again"
    measure(*arguments, "--num-loops", "1,3", "--num-samples", "4", "--output", again)
    assert results(again)["results"] == record["results"]


def test_likelihood_of_the_bundled_model_on_puzzles(place):
    shown = measure("likelihood", ROOT, "--text", place / "puzzles.txt", "--task", "fill", "--num-samples", "2")
    assert "1 texts" in " ".join(shown.split())
    with pytest.raises(ValueError, match='the task "fill" scores what stands for mask tokens'):
        measure("likelihood", ROOT, "--text", place / "puzzles.txt")


def test_generative_perplexity_of_a_model(place, tmp_path):
    out = tmp_path / "out"
    arguments = ("generative-perplexity", place / "model", "--judge", place / "judge", "--num-samples", 5)
    shown = measure(*arguments, "--max-new-tokens", 8, "--num-loops", "1,2", "--output", out)
    assert "entropy" in shown
    record = results(out)
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [line["num_loops"] for line in lines] == [1] * 5 + [2] * 5
    judge = make_judge(), word_tokenizer(bos_token="<end>")
    for row, number in zip(record["results"], (1, 2), strict=True):
        texts = [line["text"] for line in lines if line["num_loops"] == number]
        assert row["perplexity"] == pytest.approx(generative_perplexity(texts, *judge).perplexity()[0], rel=1e-5)
        assert len(row["by_sample"]["nats"]) == 5
    assert record["protocol"]["judge"]["sha256"]["model.safetensors"]
    assert is_png(out / "generative_perplexity.png")
    # Batches make no difference, and prompts are continued.
    other = tmp_path / "other"
    measure(*arguments, "--max-new-tokens", 8, "--num-loops", "2", "--batch-size", 2, "--output", other)
    assert (other / "samples.jsonl").read_text().splitlines() == (out / "samples.jsonl").read_text().splitlines()[5:]
    prompted = tmp_path / "prompted"
    prompts = ("--prompts", place / "text.txt", "--generate", "unmasking=confidence", "--generate", "block_length=2")
    measure(*arguments, "--max-new-tokens", 4, *prompts, "--output", prompted)
    assert results(prompted)["protocol"]["settings"]["generate"] == ["unmasking=confidence", "block_length=2"]


def test_generative_perplexity_of_a_file(place, tmp_path):
    out = tmp_path / "out"
    measure("generative-perplexity", "--samples", place / "text.txt", "--judge", place / "judge", "--output", out)
    (row,) = results(out)["results"]
    assert row["samples"] == 2 and row["tokens"] == 9
    assert sorted(path.name for path in out.iterdir()) == ["results.json"]


def test_lm_eval(place, tmp_path):
    out = tmp_path / "out"
    arguments = ("lm-eval", place / "model", "--tasks", place / "task.yaml", "--num-loops", "1,2")
    shown = measure(*arguments, "--generate", "max_denoising_steps=2", "--output", out)
    assert "exact_match" in shown
    record = results(out)
    assert [(row["task"], row["num_loops"]) for row in record["results"]] == [("ask", 1), ("ask", 2)]
    assert record["lm_eval"]["2"]["config"]["num_loops"] == 2
    assert record["lm_eval"]["1"]["configs"]["ask"]["generation_kwargs"]["max_denoising_steps"] == 2
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2
    assert is_png(out / "lm_eval.png")


def test_dynamics(place, tmp_path):
    out = tmp_path / "out"
    arguments = ("dynamics", place / "model", "--text", place / "text.txt", "--num-loops", 3)
    shown = measure(*arguments, "--timesteps", "0.3,1", "--window", 5, "--output", out)
    assert "masked" in shown
    record = results(out)
    assert [row["loop"] for row in record["results"]] == [1, 2, 3]
    assert record["windows"] == 2 and record["results"][0]["changed"] is None
    with np.load(out / "dynamics.npz") as arrays:
        assert arrays["attention"].shape == (2, 8, 2, 2)
        assert arrays["timesteps"].tolist() == [0.3, 1.0]
    assert is_png(out / "dynamics.png")
    measure("dynamics", place / "damped", "--text", place / "text.txt", "--no-lens", "--output", tmp_path / "damped")
    assert "loss" not in results(tmp_path / "damped")["results"][0]


def test_folders_are_complete_or_absent(tmp_path):
    with pytest.raises(RuntimeError), output_folder(tmp_path / "out") as folder:
        (folder / "part").write_text("x")
        raise RuntimeError("stopped")
    assert list(tmp_path.iterdir()) == []
    with output_folder(tmp_path / "out") as folder:
        (folder / "part").write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "part").read_text() == "x" and len(list(tmp_path.iterdir())) == 1


LIKELIHOOD = ["likelihood", "model", "--text", "text.txt"]
PERPLEXITY = ["generative-perplexity", "model", "--judge", "judge"]
TASKS = ["lm-eval", "model", "--tasks", "task.yaml"]
DYNAMICS = ["dynamics", "model", "--text", "text.txt"]


def test_a_long_text_to_fill_in_is_one_window(tmp_path):
    save_looped(tmp_path / "model", max_position_embeddings=1200)
    words = ["w1", "<mask>", *["w2"] * 1100, "<mask>"]
    (tmp_path / "fill.jsonl").write_text(
        json.dumps({"masked": " ".join(words), "text": " ".join(words).replace("<mask>", "w3")})
    )
    arguments = ("--text", tmp_path / "fill.jsonl", "--task", "fill", "--num-loops", 1, "--num-samples", 2)
    measure("likelihood", tmp_path / "model", *arguments, "--output", tmp_path / "out")
    assert results(tmp_path / "out")["windows"] == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*LIKELIHOOD[:3], "empty.txt"], "empty.txt holds no text"),
        ([*LIKELIHOOD[:3], "nowhere.txt"], "nowhere.txt is not a file"),
        (["likelihood", "judge", "--text", "text.txt"], "judge is a 'llama' model, not a LoopMDM"),
        (
            ["likelihood", "foreign", "--text", "text.txt"],
            "foreign is a 'llada' model, not a LoopMDM; `loopmdm convert`",
        ),
        (["likelihood", "nameless", "--text", "text.txt"], "nameless contains custom code"),
        (["likelihood", "./nowhere", "--text", "text.txt"], "there is no config.json"),
        ([*LIKELIHOOD, "--num-loops", "0,1"], "`num_loops` is 0"),
        ([*LIKELIHOOD, "--num-loops", "1,1"], "name each number once"),
        ([*LIKELIHOOD, "--num-loops", "many"], "--num-loops is 'many'"),
        ([*LIKELIHOOD, "--num-samples", "5"], "`num_samples` is 5; it must be even"),
        ([*LIKELIHOOD, "--window", "100"], "window is 100 tokens long; the model takes 1 to 64"),
        ([*LIKELIHOOD, "--window", "4", "--stride", "5"], "stride is 5"),
        ([*LIKELIHOOD[:2], "--text", "text.txt", "--task", "fill", "--stride", "5"], "--stride (5) has no effect"),
        ([*LIKELIHOOD, "--bins", "0"], "--bins is 0"),
        ([*LIKELIHOOD, "--dtype", "float12"], "`dtype` is 'float12'"),
        ([*LIKELIHOOD, "--device", "gpu"], "`device` is 'gpu', which does not work here"),
        ([*LIKELIHOOD, "--task", "chat"], "The task is 'chat'"),
        ([*LIKELIHOOD, "--batch-size", "0"], "--batch-size is 0"),
        (["generative-perplexity", "--judge", "judge"], "Give either a model that makes samples, or --samples"),
        (["generative-perplexity", "--judge", "judge", "--samples", "ids.jsonl"], "holds token ids"),
        (["generative-perplexity", "--judge", "judge", "--samples", "empty.txt"], "holds no text"),
        (["generative-perplexity", "--judge", "judge", "--samples", "task.yaml"], "is not a .txt or .jsonl file"),
        (["generative-perplexity", "model", "--judge", "damped"], "The judge damped is a LoopMDM"),
        ([*PERPLEXITY, "--num-loops", "0"], "`num_loops` is 0"),
        ([*PERPLEXITY, "--num-samples", "0"], "--num-samples is 0"),
        ([*PERPLEXITY, "--max-new-tokens", "65"], "65 new ones (--max-new-tokens) are more than the 64 positions"),
        ([*PERPLEXITY, "--generate", "steps"], "which is not `key=value`"),
        ([*PERPLEXITY, "--generate", "unmasking=best"], "`unmasking` is 'best'"),
        ([*PERPLEXITY, "--generate", "num_loops=2"], "--generate gives `num_loops`; use --num-loops"),
        ([*PERPLEXITY, "--generate", "max_new_tokens=2"], "--generate gives `max_new_tokens`; use --max-new-tokens"),
        ([*TASKS[:3], "asks"], "lm-eval knows no task 'asks' (ask?)"),
        ([*TASKS[:3], "asks.yaml"], "--tasks names asks.yaml, which is not a file"),
        ([*TASKS, "--num-loops", "0"], "`num_loops` is 0"),
        ([*TASKS, "--limit", "0"], "--limit is 0"),
        ([*TASKS, "--include-path", "nowhere"], "nowhere is not a folder"),
        ([*TASKS, "--data-files", "test=nowhere.jsonl"], "there is no such file"),
        ([*TASKS, "--max-gen-toks", "64"], "`max_gen_toks` is 64"),
        ([*TASKS, "--generate", "num_loops=2"], "--generate gives `num_loops`; use --num-loops"),
        ([*TASKS, "--generate", "max_length=9"], "--generate gives `max_length`; use --max-gen-toks"),
        ([*TASKS, "--generate", "seed=2"], "`generate` takes no argument `seed`"),
        (["lm-eval", "judge", "--tasks", "task.yaml"], "not a LoopMDM"),
        ([*DYNAMICS, "--num-loops", "0"], "`num_loops` is 0"),
        ([*DYNAMICS, "--timesteps", "0,1"], "above 0 and at most 1"),
        ([*DYNAMICS, "--timesteps", "x"], "--timesteps is 'x'"),
        ([*DYNAMICS, "--window", "65"], "--window is 65 tokens"),
        ([*DYNAMICS[:3], "empty.txt"], "holds no text"),
        (["dynamics", "damped", "--text", "text.txt"], "Leave out the logit lens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(place, monkeypatch, args, message):
    monkeypatch.chdir(place)
    # lm-eval looks for its own thousands of tasks beside this file.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(place / "manager.py"))
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked"))
    before = sorted(place.rglob("*"))
    assert message in refusal("eval", *args, "--output", "out")
    assert sorted(place.rglob("*")) == before


def test_lm_eval_takes_files_of_tasks_and_of_data(place, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(place)
    assert "exact_match" in run("eval", *TASKS, "--data-files", "test=docs.jsonl")
    (tmp_path / "field.yaml").write_text(Path("task.yaml").read_text().replace("'{{q}}'", "!function field.read"))
    (tmp_path / "field.py").write_text("def read(row):\n    return row['question']\n")
    for task, split, needs in (("task.yaml", "tst", "test"), (str(tmp_path / "field.yaml"), "test", "question")):
        with pytest.raises(SystemExit) as exit_:
            loopmdm_cli.main(["eval", *TASKS[:3], task, "--data-files", f"{split}=docs.jsonl"])
        message = f"{task} needs {needs!r}, which is neither a split that --data-files names ({split}) nor a field"
        assert exit_.value.code == 2 and message in capfd.readouterr().err


def test_without_lm_eval(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it is an ImportError
    assert 'pip install "loopmdm[eval]"' in refusal("eval", "lm-eval", place / "model", "--tasks", "x")


def test_existing_folders_are_left_alone(place, tmp_path):
    (tmp_path / "out").mkdir()
    for args in (LIKELIHOOD, PERPLEXITY, TASKS, DYNAMICS):
        paths = [str(place / part) if (place / part).exists() else part for part in args]
        with pytest.raises(ValueError, match="exists already; name another folder"):
            measure(*paths, "--output", tmp_path / "out")
        with pytest.raises(ValueError, match="is not a folder; make it"):
            measure(*paths, "--output", tmp_path / "missing" / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_model_without_a_tokenizer_is_refused(place, tmp_path):
    for path in (place / "model").iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for args in (LIKELIHOOD, DYNAMICS):
        with pytest.raises(ValueError, match="does not have a tokenizer that loads"):
            measure(args[0], tmp_path, "--text", place / "text.txt")


def test_a_model_without_a_mask_token_is_refused(place, tmp_path):
    for path in (place / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    del values["mask_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(Exception, match="`mask_token_id` is missing"):
        measure("likelihood", tmp_path, "--text", place / "text.txt")
