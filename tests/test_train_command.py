# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm train`: runs described by a file, from texts, answers or data sets, to a model that loads."""

import json
import re

import pytest
import torch
import yaml
from commands import refusal
from commands import run as command
from evaluation_models import word_tokenizer
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import AutoTokenizer

from loopmdm import LoopMDMForMaskedLM
from loopmdm.training.run import read_config, train

TEXT = "\n\n".join(" ".join(f"w{(start + 3 * i) % 29}" for i in range(12)) for start in range(40))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path, tokenizer):
    """Writes a run's file; `run(key=value)` changes it and returns its path."""
    (tmp_path / "text.txt").write_text(TEXT)
    values = {
        "output": str(tmp_path / "out"),
        "tokenizer": tokenizer,
        "data": str(tmp_path / "text.txt"),
        "sequence_length": 16,
        "model_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "max_train_loops": 3,
        },
        "trainer": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "save_steps": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
            "seed": 3,
        },
    }

    def write(**changes) -> str:
        for name, value in changes.items():
            if isinstance(value, dict) and isinstance(values.get(name), dict):
                value = {**values[name], **value}
            values[name] = value
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return str(tmp_path / "run.yaml")

    return write


def go(path: str, *overrides: str, resume: bool = False) -> dict:
    return train(read_config(path, overrides), resume=resume)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_pretraining_makes_a_model_that_loads(run, tmp_path):
    record = go(run(eval_data=str(tmp_path / "text.txt"), eval_loops=[1, 2], eval_sequences=4))
    model = LoopMDMForMaskedLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == model.config.mask_token_id == 2
    assert (model.config.vocab_size, model.config.pad_token_id, model.config.eos_token_id) == (32, 0, 1)
    assert record["steps"] == 4 and record["training_flops"] > 0
    assert set(record["evaluation"]) >= {"eval_nelbo_1", "eval_nelbo_2", "eval_loss"}
    saved = json.loads((tmp_path / "out" / "training.json").read_text())
    assert saved["run"]["sequence_length"] == 16
    losses = [line for line in saved["log"] if "loss" in line]
    assert len(losses) == 4
    assert all(
        {"num_loops", "tokens_per_second", "training_flops", "flops_per_second"} <= set(line) for line in losses
    )
    assert not list((tmp_path / "out").glob("*.bin")) and not (tmp_path / "out" / ".saving").exists()


def test_training_learns(run, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join([f"w{i % 29}"] * 15) for i in range(58)))
    settings = {"max_steps": 60, "per_device_train_batch_size": 16, "save_strategy": "no", "eval_strategy": "no"}
    path = run(eval_data=str(tmp_path / "text.txt"), eval_loops=[1, 3], optimizer="muon", trainer=settings)
    record = go(path)
    # 29 words at random are 3.4 nats; those of a row are all the same.
    assert record["evaluation"]["eval_nelbo_3"] < 1.5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_repeats_an_uninterrupted_one(run, tmp_path, optimizer):
    path = run(optimizer=optimizer, ema_decay=0.8)
    go(path)
    whole = weights(tmp_path / "out")
    # Stopped after two of four steps: what is left is what a killed process leaves.
    interrupted = tmp_path / "interrupted"
    (tmp_path / "out" / "checkpoints" / "checkpoint-4").rename(tmp_path / "gone")
    (interrupted / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "checkpoint-2").rename(interrupted / "checkpoints" / "checkpoint-2")
    with pytest.raises(ValueError, match="holds checkpoints of a run; give --resume"):
        go(path, f"output={interrupted}")
    go(path, f"output={interrupted}", resume=True)
    resumed = weights(interrupted)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_folder_is_left_alone(run, tmp_path):
    path = run()
    go(path)
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds a finished model already"):
            go(path, resume=resume)


def test_another_data_set_cannot_be_resumed(run, tmp_path):
    path = run()
    go(path)
    (tmp_path / "out" / "config.json").unlink()
    (tmp_path / "text.txt").write_text(TEXT.replace("w1 ", "w2 "))
    with pytest.raises(ValueError, match="is of another run: its data is"):
        go(path, "trainer.max_steps=6", resume=True)


def test_epochs_count_the_examples(run):
    # 40 documents of 13 tokens make 33 rows of 16, the last one short.
    record = go(run(trainer={"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 8}))
    assert record["steps"] == -(-2 * 33 // 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"loops": {"schedule": "growing", "growth": 0.5}, "gradient_loops": 2, "checkpoint_loops": True},
        {"loops": {"schedule": "late", "max_loops": 4, "start": 0.25}},
        {"isolate_documents": True, "collator": {"complementary": True, "mask_ratio": [0.2, 0.8]}},
        {"model_config": {"attention_block_size": 4, "shift_logits": True}},
        {"documents": "line", "dtype": "bfloat16"},
        {"trainer": {"bf16": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_options_train(run, changes):
    record = go(run(**changes))
    losses = [line["loss"] for line in record["log"] if "loss" in line]
    assert len(losses) == 4 and all(0 < loss < 100 for loss in losses)


def answers(tmp_path, rows) -> str:
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "w1 w2", "answer": "w3 w4"}] * 6,
        [{"question": "w1 w2", "response": "w3 w4"}] * 6,
        [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]}] * 6,
    ],
    ids=["pairs", "other names", "messages"],
)
def test_answers_are_learnt_given_prompts(run, tmp_path, rows):
    record = go(run(task="answers", data=answers(tmp_path, rows), trainer={"max_steps": 30}))
    losses = [line["loss"] for line in record["log"] if "loss" in line]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_lora_trains_an_adapter_alone(run, tmp_path, tokenizer):
    base = tmp_path / "base"
    tiny_model(vocab_size=32, mask_token_id=2, num_loops=2).save_pretrained(base)
    rows = [{"prompt": "w1 w2", "answer": "w3 w4"}] * 6
    path = run(
        model=str(base),
        model_config=None,
        task="answers",
        data=answers(tmp_path, rows),
        lora={"layers": "mid", "r": 4},
    )
    go(path, "trainer.max_steps=20")
    model = LoopMDMForMaskedLM.from_pretrained(base)
    adapted = PeftModel.from_pretrained(model, tmp_path / "out")
    touched = {
        int(re.search(r"layers\.(\d+)\.", name)[1]) for name, _ in adapted.named_parameters() if "lora_" in name
    }
    assert touched == {1, 2}
    ids = torch.tensor([[4, 5, 2, 2]])
    with adapted.disable_adapter():
        before = adapted(ids, num_loops=3).logits
    assert not torch.allclose(adapted(ids, num_loops=3).logits, before, atol=0.01)
    for loops in (1, 4):
        out = adapted.generate(input_ids=ids[:, :2], max_new_tokens=2, num_loops=loops)
        assert out.shape == (1, 4)
    assert isinstance(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True), PeftModel)


def test_json_lines_of_texts(run, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXT.split("\n\n")))
    assert go(run(data=str(path), text_column="body"))["steps"] == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets(run, tmp_path, streaming, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT.split("\n\n")))
    record = go(run(data=str(rows), dataset={"streaming": streaming}))
    assert record["steps"] == 4


# Bad input


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sequence_lenght": 8}, ["`sequence_lenght`, which does not exist", "`sequence_length`?"]),
        ({"trainer": {"learning_rat": 1}}, ["`learning_rat`", "`learning_rate`?"]),
        ({"trainer": {"output_dir": "x"}}, ["`output_dir`, which this command sets itself"]),
        ({"model_config": {"hidden": 8}}, ["`model_config` has a key `hidden`"]),
        ({"model_config": {"loop_end": 9}}, ["layers[1:9] of 4 layers"]),
        ({"collator": {"ratio": 1}}, ["`collator` has a key `ratio`"]),
        ({"collator": {"mask_ratio": [0.9, 0.1]}}, ["`mask_ratio` is (0.9, 0.1)"]),
        ({"loops": {"schedule": "often"}}, ["loop schedule is 'often'", "uniform"]),
        ({"distillation": 0.5}, ["`distillation`, which does not exist"]),
        ({"loops": {"speed": 2}}, ["'uniform' does not take these options", "speed"]),
        ({"loops": {"max_loops": 0}}, ["`max_loops` is 0"]),
        ({"gradient_loops": 4}, ["`gradient_loops` is 4", "(3)"]),
        ({"task": "chat"}, ["`task` is 'chat'", "answers"]),
        ({"optimizer": "sgd"}, ["`optimizer` is 'sgd'"]),
        ({"sequence_length": 64}, ["`sequence_length` is 64", "1 to 32"]),
        ({"data": "nowhere.txt"}, ["nowhere.txt is not a file"]),
        ({"data": None}, ["has no `data`"]),
        ({"model_config": None}, ["no `model` to start from", "`model_config`"]),
        ({"tokenizer": None}, ["`tokenizer` is missing"]),
        ({"ema_decay": 1.5}, ["`ema_decay` is 1.5"]),
        ({"trainer": {"save_total_limit": 1}}, ["`save_total_limit` is 1"]),
        ({"trainer": 3}, ["`trainer` is 3"]),
        ({"model_config": {"vocab_size": 20}}, ["the token", "vocabulary of 20"]),
        ({"lora": {"layers": "middle"}}, ["'middle'", "mid"]),
        ({"lora": {"rank": 3}}, ["LoRA does not take", "rank"]),
    ],
    ids=str,
)
def test_bad_runs_are_refused_before_training(run, tmp_path, monkeypatch, changes, parts):
    monkeypatch.setattr("transformers.Trainer._inner_training_loop", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ValueError) as error:
        go(run(**changes))
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"prompt": "w1", "answer": "w2"}\n{"prompt": "w1"\n', ["answers.jsonl, line 2 is not valid JSON"]),
        ("[1]\n", ["line 1 is a list"]),
        ("\n", ["holds no examples"]),
        ('{"prompt": "w1"}\n', ["answers.jsonl, line 1 has no text called answer"]),
        ('{"messages": [{"role": "user", "content": "w1"}]}\n', ["line 1: `messages` must be a list that ends"]),
        ('{"prompt": "' + "w1 " * 20 + '", "answer": "w2"}\n', ["line 1 has 22 tokens", "skip_long"]),
    ],
)
def test_bad_answers_are_named(run, tmp_path, content, parts):
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        go(run(task="answers", data=str(path)))
    for part in parts:
        assert part in str(error.value)


def test_unreadable_texts_are_named(run, tmp_path):
    for content, part in ((b"", "holds no text"), (b"\xff\xfe\x00\xd8", "is not text in UTF-8")):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(ValueError, match=part):
            go(run(data=str(tmp_path / "bad.txt")))


def test_command(run, tmp_path):
    path = run(eval_data=str(tmp_path / "text.txt"), eval_loops=[1, 3])
    shown = command("train", path, "trainer.max_steps=2")
    assert "2 steps" in shown and "eval_nelbo_3" in shown
    for overrides, part in ((["max_steps"], "is not `key=value`"), (["output.x=1"], "holds a single value")):
        assert part in refusal("train", path, *overrides)
