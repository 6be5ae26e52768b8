# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm train --dry-run` and `--init`: what a run will do, before it does, and files to begin with."""

import json
import re
from pathlib import Path

import pytest
import torch
from commands import refusal
from commands import run as command
from evaluation_models import word_tokenizer
from tiny import tiny_model
from training_runs import SIZES, TEXT, run_writer

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM
from loopmdm.objective import find_model
from loopmdm.training import preview as preview_module
from loopmdm.training.preview import preview
from loopmdm.training.run import CHECKPOINTS, make_parts, read_config, train

ANSWERS = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}"} for i in range(20)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The file of a run in the current folder: `run(key=value)`, see `run_writer`."""
    monkeypatch.chdir(tmp_path)
    word_tokenizer().save_pretrained("tokenizer")
    Path("text.txt").write_text(TEXT)
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
    values = {
        "output": "out",
        "tokenizer": "tokenizer",
        "data": "text.txt",
        "sequence_length": 16,
        "model_config": SIZES,
        "loops": {"schedule": "fixed"},
        "trainer": {"max_steps": 4, "per_device_train_batch_size": 4, "disable_tqdm": True, "save_strategy": "no"},
    }
    return run_writer(tmp_path, values)


def look(path: str, *overrides: str):
    return preview(read_config(path, overrides))


def test_it_writes_nothing_and_says_what_the_run_will_say(run, tmp_path):
    path = run()
    before = sorted(tmp_path.rglob("*"))
    found = look(path)
    assert sorted(tmp_path.rglob("*")) == before
    record = train(read_config(path))
    assert found.facts["steps"] == record["steps"] == 4
    assert found.facts["tokens of all steps"] == 4 * 4 * 16
    # All but the number of masked tokens is exact, and that is sampled from the run itself.
    assert found.facts["training FLOPs"] == pytest.approx(record["training_flops"], rel=1e-6)
    assert found.is_measured and found.facts["seconds"] > 0
    assert found.facts["parameters"] == LoopMDMForMaskedLM.from_pretrained("out").num_parameters()
    for name in ("text.txt", "text.txt/run"):
        with pytest.raises(ValueError, match=rf"{name} cannot be made, as .*text.txt is a file"):
            look(path, f"output={tmp_path / name}")


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer": {"max_steps": -1, "num_train_epochs": 2.5, "gradient_accumulation_steps": 3}},
        {"loops": {"schedule": "late"}},
        {"trainer": {"max_steps": -1, "per_device_train_batch_size": 7, "dataloader_drop_last": True}},
    ],
)
def test_steps_and_flops_are_those_of_the_run(run, changes):
    path = run(**changes)
    found, record = look(path), None
    record = train(read_config(path))
    assert found.facts["steps"] == record["steps"]
    assert found.facts["training FLOPs"] == pytest.approx(record["training_flops"], rel=0.6)


def test_rows_are_those_of_the_first_step(run):
    path = run(data="answers.jsonl", task="answers")
    config = read_config(path)
    parts = make_parts(config, word_tokenizer(), Path("out") / CHECKPOINTS)
    batch = parts.collator([parts.stream[i] for i in range(4)])
    rows = preview(config).rows
    for i, row in enumerate(rows):
        assert [kind == "masked" for _, kind in row] == (batch["loss_weights"][i] != 0).tolist()[: len(row)]
        assert [kind == "given" for _, kind in row] == (batch["labels"][i] == -100).tolist()[: len(row)]
        clean = torch.where(batch["labels"][i] == -100, batch["input_ids"][i], batch["labels"][i])[: len(row)]
        assert "".join(piece for piece, _ in row).split() == word_tokenizer().decode(clean).split()


@pytest.mark.parametrize("options", [{}, {"gradient_loops": 1}, {"dtype": "bfloat16"}, {"trainer": {"bf16": True}}])
def test_activations_are_what_a_step_keeps(run, options):
    path = run(**options)
    config = read_config(path)
    memory = preview(config).memory
    parts = make_parts(config, word_tokenizer(), Path("out") / CHECKPOINTS)
    model = LoopMDMForMaskedLM._from_config(parts.model_config, dtype=getattr(torch, config.dtype)).train()
    model.model.gradient_loops = config.gradient_loops
    batch = parts.collator([parts.stream[i] for i in range(4)])
    kept, weights = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=parts.arguments.bf16),
    ):
        model(**batch, num_loops=3)
    # The estimate has the gradient of the logits too.
    expected = sum(size for size, _ in kept.values())
    assert memory["activations at 3 loops"] == pytest.approx(expected, rel=0.15)


def test_memory_by_hand(run):
    found = look(run(optimizer="muon", ema_decay=0.9))
    config = LoopMDMConfig(**read_config("run.yaml").model_config, vocab_size=32, mask_token_id=2)
    parameters = found.facts["parameters"]
    matrices = config.num_hidden_layers * (4 * 32 * 32 + 3 * 32 * 48)
    memory = found.memory
    assert memory["weights"] == memory["gradients"] == memory["moving average"] == 4 * parameters
    assert memory["optimiser"] == 4 * (matrices + 2 * (parameters - matrices))
    assert memory["together"] == sum(size for name, size in memory.items() if name != "together")
    assert look(run(dtype="bfloat16")).memory["moving average"] == 4 * parameters
    recomputed = look(run(checkpoint_loops=True)).memory
    assert recomputed["activations at 3 loops"] < memory["activations at 3 loops"]


def test_an_adapter_trains_few_parameters(run):
    tiny_model(vocab_size=32, mask_token_id=2).save_pretrained("base")
    found = look(
        run(model="base", model_config={"max_train_loops": 2}, lora={"r": 2, "layers": "mid"}), "model_config={}"
    )
    base = tiny_model(vocab_size=32, mask_token_id=2)
    assert found.facts["trained parameters"] == found.facts["parameters"] - find_model(base).num_parameters()
    assert found.memory["optimiser"] == 8 * found.facts["trained parameters"]


def test_what_is_too_large_is_estimated_without_being_loaded(run, monkeypatch):
    monkeypatch.setattr(preview_module, "_CHEAP_SECONDS", 0.0)
    monkeypatch.setattr(preview_module, "load_trainable", None)
    found = look(run())
    assert not found.is_measured and found.facts["seconds"] > 0


def test_the_command_shows_plain_text_in_a_pipe(run, tmp_path):
    shown = command("train", run(), "--dry-run")
    assert re.search(r"\[\[w\d+( w\d+)*\]\]", shown) and "\x1b" not in shown and "Nothing was written." in shown
    assert re.search(r"weights +│ 0\.[0-9]*[1-9]", shown)  # of a model so small, in MiB
    assert "measured on three steps" in shown and not (tmp_path / "out").exists()
    train(read_config("run.yaml"))
    assert "holds a finished model already" in refusal("train", "run.yaml", "--dry-run")


@pytest.mark.parametrize("kind", ["pretraining", "answers", "adapter"])
def test_a_file_to_begin_with_runs(run, kind):
    run()
    tiny_model(vocab_size=32, mask_token_id=2).save_pretrained("model")
    word_tokenizer().save_pretrained("model")
    for name in ("train", "valid"):
        Path(f"{name}.txt").write_text(TEXT)
        Path(f"{name}.jsonl").write_text(Path("answers.jsonl").read_text())
    command("train", "new.yaml", "--init", kind)
    assert Path("new.yaml").read_text().count("#") > 10
    config = read_config("new.yaml")
    make_parts(config, word_tokenizer(), Path(config.output) / CHECKPOINTS)  # as it is
    small = ["hidden_size=32", "intermediate_size=48", "num_attention_heads=2"] if kind == "pretraining" else []
    size = [f"model_config.{one}" for one in small]
    command("train", "new.yaml", *size, "trainer.max_steps=1", "eval_sequences=2", "trainer.disable_tqdm=true")
    assert (Path(config.output) / "README.md").is_file()
    assert "exists already" in refusal("train", "new.yaml", "--init", kind)


def test_what_init_does_not_take(run):
    assert "choose one of pretraining, answers, adapter" in refusal("train", "new.yaml", "--init", "rl")
    assert "--resume has no effect" in refusal("train", "new.yaml", "--init", "answers", "--resume")
    assert "output=x has no effect" in refusal("train", "new.yaml", "output=x", "--init", "answers")
    assert not Path("new.yaml").exists()
