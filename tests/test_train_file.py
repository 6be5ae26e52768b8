# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The file that describes a run: its types, ranges and keys, and YAML as people write it."""

import pytest
import yaml

from loopmdm.training.run import TrainConfig, read_config, train

RUN = {"output": "out", "tokenizer": "./tokenizer", "data": "text.txt", "model_config": {"hidden_size": 32}}


@pytest.fixture
def read(tmp_path):
    """Reads a run with changes, or the given text, as the command does."""

    def read(*overrides: str, text: str | None = None, **changes) -> TrainConfig:
        values = {name: value for name, value in {**RUN, **changes}.items() if value != "absent"}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values) if text is None else text, encoding="utf-8")
        return read_config(path, overrides)

    return read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Types
        ({"output": None}, "`output` is None; it should be a valid string."),
        ({"data": [3]}, "`data.0` is 3; it should be a valid string."),
        ({"model": 3}, "`model` is 3"),
        ({"model_config": {"hidden_size": "a"}}, "`model_config.hidden_size` is 'a'; it should be a valid integer."),
        (
            {"model_config": {"loop_update": "x"}},
            "`model_config.loop_update` is 'x'; it should be 'replace' or 'damped'",
        ),
        ({"dataset": ["name"]}, "`dataset` is ['name']; it should be names and values."),
        ({"sequence_length": "16"}, "`sequence_length` is '16'; it should be a valid integer."),
        ({"sequence_length": True}, "`sequence_length` is True; it should be a valid integer."),
        ({"isolate_documents": "no"}, "`isolate_documents` is 'no'; it should be a valid boolean."),
        ({"skip_long": 1}, "`skip_long` is 1"),
        ({"text_column": 3}, "`text_column` is 3"),
        ({"loops": "late"}, "`loops` is 'late'"),
        ({"loops": {"schedule": "late", "start": "x"}}, "`loops.start` is 'x'; it should be a valid number."),
        (
            {"collator": {"complementary": "false"}},
            "`collator.complementary` is 'false'; it should be a valid boolean.",
        ),
        ({"collator": {"mask_ratio": 5}}, "`collator.mask_ratio` is 5; it should be a list."),
        ({"collator": {"mask_ratio": [0.5]}}, "`collator.mask_ratio` is [0.5]"),
        ({"lora": "mid"}, "`lora` is 'mid'; it should be names and values."),
        ({"lora": {"r": "16"}}, "`lora.r` is '16'; it should be a valid integer."),
        ({"eval_loops": 2}, "`eval_loops` is 2; it should be a list."),
        ({"trainer": {"seed": None}}, "`trainer.seed` is None; it should be a valid integer."),
        ({"trainer": {"max_steps": "abc"}}, "`trainer.max_steps` is 'abc'; it should be a valid integer or be -1."),
        (
            {"trainer": {"bf16": "x", "seed": 1.5}},
            "`trainer.bf16` is 'x'; it should be a valid boolean. `trainer.seed`",
        ),
        # Ranges
        ({"sequence_length": 0}, "`sequence_length` is 0; it should be greater than 0."),
        ({"data": []}, "`data` is []"),
        ({"eval_loops": [1, 0]}, "`eval_loops.1` is 0; it should be greater than 0."),
        ({"eval_sequences": -1}, "`eval_sequences` is -1"),
        ({"gradient_loops": 0}, "`gradient_loops` is 0"),
        ({"ema_decay": 1.5}, "`ema_decay` is 1.5; it should be less than 1."),
        ({"dtype": "float99"}, "`dtype` is 'float99'; it should be 'float32', 'bfloat16' or 'float16'."),
        ({"dtype": "float16"}, "`dtype` is 'float16', in which small updates of the weights are lost"),
        ({"trainer": {"max_steps": 0}}, "`trainer.max_steps` is 0; it should be greater than 0 or be -1."),
        (
            {"trainer": {"learning_rate": float("nan")}},
            "`trainer.learning_rate` is nan; it should be a finite number.",
        ),
        ({"trainer": {"learning_rate": -1.0}}, "`trainer.learning_rate` is -1.0; it should be greater than or"),
        ({"trainer": {"per_device_train_batch_size": 0}}, "`trainer.per_device_train_batch_size` is 0"),
        ({"trainer": {"adam_beta1": 1.0}}, "`trainer.adam_beta1` is 1.0; it should be less than 1."),
        ({"lora": {"r": 0}}, "`lora.r` is 0; it should be greater than 0."),
        ({"output": ""}, "`output` is ''; it should have at least 1 character."),
        # Without effect
        ({"eval_loops": [1, 2]}, "`eval_loops` has no effect, as there is no `eval_data`; leave it out."),
        ({"eval_texts": 1}, "`eval_texts` has no effect, as there is no `eval_data`; leave it out."),
        ({"skip_long": True}, "`skip_long` has no effect"),
        ({"task": "answers", "isolate_documents": True}, "`isolate_documents` has no effect"),
        ({"task": "answers", "text_column": "x"}, "`text_column` has no effect"),
        ({"text_column": "x"}, "`text_column` has no effect, as `data` holds .txt files alone"),
        ({"data": "x.jsonl", "documents": "line"}, "`documents` has no effect, as `data` holds no .txt files"),
        ({"dataset": {"split": "train"}}, "`dataset` has no effect, as `data` names files"),
        (
            {"optimizer": "muon", "trainer": {"adam_beta1": 0.8}},
            "`trainer.adam_beta1` has no effect with `optim",
        ),
        ({"trainer": {"data_seed": 3}}, "`trainer.data_seed` has no effect, as `seed` decides the order"),
        ({"trainer": {"bf16_full_eval": True}}, "`trainer.bf16_full_eval` has no effect, as the evaluation is"),
        ({"trainer": {"eval_steps": 5}}, "`trainer.eval_steps` has no effect, as there is no `eval_data`"),
        (
            {"trainer": {"save_strategy": "epoch"}},
            "`trainer.save_strategy` is 'epoch', which would be once, at the end: to the Trainer, a run of any length "
            "is one epoch. Use steps (`save_steps: 100`",
        ),
        # Not by the Trainer
        ({"trainer": {"push_to_hub": True}}, "`trainer.push_to_hub` would publish checkpoints that nothing has"),
        ({"trainer": {"hub_model_id": "me/model"}}, "publish the trained model with `loopmdm push`."),
        # Keys
        ({"sequence_lenght": 8}, "run.yaml has a key `sequence_lenght`, which does not exist; `sequence_length`?"),
        (
            {"trainer": {"learning_rat": 1}},
            "`trainer` has a key `learning_rat`, which does not exist; `learning_rate`?",
        ),
        ({"model_config": {"n_loops": 1}}, "`model_config` has a key `n_loops`, which does not exist; `num_loops`?"),
        ({"model_config": {"dtype": "float32"}}, "`model_config` has a key `dtype`"),
        ({"collator": {"mask_ration": 1}}, "`collator` has a key `mask_ration`, which does not exist; `mask_ratio`?"),
        ({"loops": {"max_loop": 2}}, "`loops` has a key `max_loop`, which does not exist; `max_loops`?"),
        ({"loops": {"schedule": "growing", "start": 0.5}}, "`loops` has a key `start`, which does not exist"),
        ({"lora": {"lora_alhpa": 2}}, "`lora` has a key `lora_alhpa`, which does not exist; `lora_alpha`?"),
        ({"data": "absent"}, "run.yaml has no `data`."),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_is_named(read, changes, message):
    with pytest.raises(ValueError) as error:
        read(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_numbers_as_people_write_them(read):
    settings = read("trainer.learning_rate=1e-3", "trainer.max_steps=1e4", "trainer.weight_decay=.1E-1").trainer
    assert settings == {"learning_rate": 0.001, "max_steps": 10000, "weight_decay": 0.01}
    text = yaml.safe_dump(RUN) + "trainer: {learning_rate: 3e-4, num_train_epochs: 2}\nlora: {r: 4, lora_alpha: 1e1}\n"
    config = read(text="\ufeff" + text)
    assert config.trainer == {"learning_rate": 0.0003, "num_train_epochs": 2} and config.lora["lora_alpha"] == 10
    assert read("trainer.save_strategy=no", "trainer.report_to=[none]").trainer["save_strategy"] == "no"
    assert read("data=1e-3.txt").data == "1e-3.txt", "not all that begins so is a number"
    assert read("isolate_documents=yes").isolate_documents is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {seed: 1}\ntrainer: {seed: 2}\n", "has `trainer` twice"),
        ("trainer:\n  seed: 1\n  max_steps: 3\n  seed: 2\n", "the block at line 2 has `seed` twice"),
        ("a: [1", "is not valid YAML"),
        ("[1, 2]", "holds a list; it must hold names and values"),
        ("1: 2", "has a key `1`, which does not exist"),
        ("", "has no `output`"),
    ],
)
def test_files_that_are_no_runs(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text=text)


def test_a_file_in_another_encoding(tmp_path):
    (tmp_path / "run.yaml").write_bytes("output: Käse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"run.yaml is not text in UTF-8"):
        read_config(tmp_path / "run.yaml")


def test_what_stands_there_anyway_is_no_mistake(read):
    """Values that ask for nothing, as in a file with every argument of transformers."""
    off = {"data_seed": None, "bf16_full_eval": False, "eval_do_concat_batches": True, "include_for_metrics": []}
    off |= {"eval_steps": None, "eval_on_start": False, "eval_delay": 0, "per_device_eval_batch_size": 8}
    assert read(trainer=off).trainer == off


def test_overrides_are_checked_alike(read):
    for override, message in (
        ("data=[", "'data=\\[' is not valid YAML"),
        ("output=", "`output` is None"),
        ("trainer.max_steps=abc", "`trainer.max_steps` is 'abc'"),
        ("a.b.c=1", "has a key `a`"),
    ):
        with pytest.raises(ValueError, match=message):
            read(override)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "`data`: text.txt is not a file."),
        ({"data": [__file__, "./rows"]}, "`data`: ./rows is not a file."),
        ({"data": __file__}, "./tokenizer does not hold a tokenizer; it is not a folder"),
        ({"data": __file__, "model": "/nowhere/model"}, "/nowhere/model does not hold a model; it is not a folder"),
        ({"data": __file__, "eval_data": "valid.jsonl"}, "`eval_data`: valid.jsonl is not a file."),
    ],
    ids=str,
)
def test_absent_files_are_named_before_anything_is_made(read, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    config = read(**changes)
    with pytest.raises(ValueError) as error:
        train(config)
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
