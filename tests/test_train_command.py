# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm train`: runs described by a file, from texts, answers or data sets, to a model that loads."""

import json
import re
import shutil
from os import replace as os_replace
from pathlib import Path

import pytest
import torch
from commands import refusal
from evaluation_models import word_tokenizer
from peft import AutoPeftModelForCausalLM, PeftModel
from processes import FORK, start
from safetensors.torch import load_file
from tiny import tiny_model
from training_runs import SIZES, TEXT, run_writer
from transformers import AutoTokenizer, LlamaConfig, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from typer.testing import CliRunner

import loopmdm_cli
from loopmdm import LoopMDMForMaskedLM
from loopmdm.objective import seeded_generator
from loopmdm.training import LoopMDMTrainer
from loopmdm.training.checkpoints import locked
from loopmdm.training.run import make_parts, read_config, train


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path, tokenizer):
    """Writes a run's file: `run(key=value)`, see `run_writer`."""
    (tmp_path / "text.txt").write_text(TEXT)
    values = {
        "output": str(tmp_path / "out"),
        "tokenizer": tokenizer,
        "data": str(tmp_path / "text.txt"),
        "sequence_length": 16,
        "model_config": SIZES,
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
    return run_writer(tmp_path, values)


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


@pytest.mark.parametrize("ema_decay", [None, 0.8])
def test_evaluations_show_texts_at_every_number_of_loops(run, tmp_path, tokenizer, capsys, ema_decay):
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    options = {"eval_data": str(tmp_path / "text.txt"), "eval_loops": [1, 3], "eval_sequences": 4}
    path = run(**options, ema_decay=ema_decay, trainer=settings)
    before = go(path, f"output={tmp_path / 'plain'}")
    record = go(path, "eval_texts=2")
    shown = capsys.readouterr().out
    logged = [line for line in record["log"] if "eval_texts" in line]
    assert [line["step"] for line in logged] == [1, 2]
    words, model = AutoTokenizer.from_pretrained(tokenizer), LoopMDMForMaskedLM.from_pretrained(tmp_path / "out")
    rows = make_parts(read_config(path), words, tmp_path).eval_examples
    for index, texts in enumerate(logged[-1]["eval_texts"]):
        ids = rows[index]["input_ids"][None, :8]
        assert texts["prompt"] == words.decode(ids[0]) and list(texts) == ["prompt", "1", "3"]
        for loops in (1, 3):
            drawn = {"do_sample": True, "generator": seeded_generator(3, "texts", index), "max_denoising_steps": 16}
            made = model.generate(ids, num_loops=loops, max_new_tokens=24, **drawn)[0, 8:]
            assert texts[str(loops)] == words.decode(made, skip_special_tokens=True)
            assert f"loops {loops}  {texts[str(loops)]}" in shown
    # Training does not notice.
    whole, plain = weights(tmp_path / "out"), weights(tmp_path / "plain")
    assert before["evaluation"]["eval_loss"] == record["evaluation"]["eval_loss"]
    assert all(torch.equal(whole[name], plain[name]) for name in whole)


def test_answers_are_shown_to_prompts(run, tmp_path):
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": " w3 w4"} for i in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = dict.fromkeys(("data", "eval_data"), str(tmp_path / "rows.jsonl"))
    record = go(run(task="answers", eval_loops=[2], eval_sequences=2, eval_texts=1, trainer={"max_steps": 1}, **files))
    (line,) = [line for line in record["log"] if "eval_texts" in line]
    assert [text["prompt"] for text in line["eval_texts"]] == ["w1 w2"]


def test_training_learns(run, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join([f"w{i % 29}"] * 15) for i in range(58)))
    settings = {"max_steps": 60, "per_device_train_batch_size": 16, "save_strategy": "no", "eval_strategy": "no"}
    path = run(eval_data=str(tmp_path / "text.txt"), eval_loops=[1, 3], optimizer="muon", trainer=settings)
    record = go(path)
    # 29 words at random are 3.4 nats; those of a row are all the same.
    assert record["evaluation"]["eval_nelbo_3"] < 1.5


def test_a_resumed_run_repeats_an_uninterrupted_one(run, tmp_path):
    path = run(optimizer="muon", ema_decay=0.8)
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


def test_a_finished_folder_is_left_alone(run, tmp_path, monkeypatch):
    path = run()
    go(path)
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds a finished model already"):
            go(path, resume=resume)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert go(path) == {}, "the first process speaks for all"


def test_what_changes_the_result_cannot_change_on_resume(begun, tmp_path):
    path, _ = begun
    (tmp_path / "other.txt").write_text(TEXT.replace("w1 ", "w2 "))
    for change, message in {
        f"data={tmp_path / 'other.txt'}": "its data is",
        "trainer.learning_rate=0.02": "its learning_rate is 0.01, here 0.02",
        "loops={schedule: growing}": "its loop schedule is UniformLoops",
        "dtype=bfloat16": "its dtype is",
        "optimizer=muon": "its optimizer is None, here MuonAdamW",
        "collator={mask_ratio: [0.1, 0.9]}": "its noise is",
    }.items():
        with pytest.raises(ValueError, match=r"checkpoint-2 is of another run: .*Start a new run") as error:
            go(path, change, resume=True)
        assert message in str(error.value)


@pytest.fixture
def begun(run, tmp_path):
    """A run that was killed in its third step of four."""

    def step(trainer, *args):
        if trainer.state.global_step == 2:
            raise ZeroDivisionError
        return train_step(trainer, *args)

    path, train_step = run(), LoopMDMTrainer.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoopMDMTrainer, "training_step", step)
        with pytest.raises(ZeroDivisionError):
            go(path)
    return path, tmp_path / "out"


def test_a_longer_run_says_what_it_was_before(begun):
    path, output = begun
    record = go(path, "trainer.max_steps=5", resume=True)
    assert record["steps"] == 5 and record["resumed"] == [{"step": 2, "max_steps_before": 4}]
    before = json.loads((output / "checkpoints" / "checkpoint-5" / "complete.json").read_text())
    assert record["seconds"] > before["seconds"] > 0


# The output folder


def test_a_folder_that_holds_anything_else_is_refused(run, tmp_path):
    path, output = run(), tmp_path / "out"
    output.mkdir()
    (output / "README.md").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"out holds README.md, which no training wrote; name a new or an empty"):
            go(path, resume=resume)
    assert [path.name for path in output.iterdir()] == ["README.md"], "nothing is left behind"
    with pytest.raises(ValueError, match=r"text.txt/run/checkpoints cannot be made, as .* is a file"):
        go(path, f"output={tmp_path / 'text.txt' / 'run'}")


def test_a_file_that_appears_meanwhile_is_not_overwritten(begun):
    path, output = begun

    def save_model(trainer, *args, **kwargs):
        (output / "tokenizer.json").write_text("mine")
        save(trainer, *args, **kwargs)

    save = LoopMDMTrainer.save_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoopMDMTrainer, "save_model", save_model)
        message = r"holds tokenizer.json, which this training did not write.*is complete in .*give --resume"
        with pytest.raises(ValueError, match=message):
            go(path, resume=True)
    assert (output / "tokenizer.json").read_text() == "mine"
    assert not (output / "config.json").exists()
    (output / "tokenizer.json").rename(output.parent / "mine.json")
    assert go(path, resume=True)["steps"] == 4
    LoopMDMForMaskedLM.from_pretrained(output)


def test_killed_while_it_moves_the_model(begun, tmp_path, monkeypatch):
    path, output = begun
    whole = shutil.copytree(output, tmp_path / "whole")
    files = go(path, f"output={whole}", resume=True)["files"]

    def resume_killed_after(count: int) -> None:
        done = []

        def replace(source, target):
            if ".saving" in str(source) and not str(source).endswith(".tmp"):
                done.append(source)
                assert len(done) <= count, "killed"
            os_replace(source, target)

        with monkeypatch.context() as patch, pytest.raises(AssertionError, match="killed"):
            patch.setattr("loopmdm.training.run.os.replace", replace)
            go(path, resume=True)

    resume_killed_after(0)
    saved = shutil.copytree(output, tmp_path / "saved")
    for count in (0, 3, len(files) - 1, len(files)):
        shutil.rmtree(output)
        shutil.copytree(saved, output)
        resume_killed_after(count)
        assert (output / "config.json").exists() == (count == len(files)), "loads only when complete"
        with pytest.raises(ValueError, match=r"holds checkpoints of a run; give --resume|holds a finished model"):
            go(path)
        assert go(path, resume=True)["steps"] == 4
        assert json.loads((output / "training.json").read_text())["files"] == files
        found, expected = weights(output), weights(whole)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        assert not (output / ".saving").exists()


def test_two_runs_into_one_folder(run, tmp_path):
    held, done = FORK.Event(), FORK.Event()

    def hold():
        with locked(tmp_path / "out" / "checkpoints"):
            held.set()
            done.wait(60)

    other = start(hold)
    assert held.wait(60)
    with pytest.raises(ValueError, match=r"Another run is writing to .*out/checkpoints; wait for it"):
        go(run())
    other.kill()  # and the lock ends with it
    other.join()
    assert go(run())["steps"] == 4


def test_a_run_that_diverges_leaves_no_model(run, tmp_path):
    path = run(trainer={"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 8})
    with pytest.raises(ValueError, match=r"in step \d+: training has diverged"):
        go(path)
    assert not (tmp_path / "out" / "config.json").exists()


# The model and its tokenizer


@pytest.fixture
def base(tmp_path) -> str:
    tiny_model(vocab_size=32, mask_token_id=2, num_loops=2, max_position_embeddings=32).save_pretrained(
        tmp_path / "base"
    )
    return str(tmp_path / "base")


def extended(tokenizer: str, folder, **special) -> str:
    larger = AutoTokenizer.from_pretrained(tokenizer)
    larger.add_tokens(["new1", "new2"])
    larger.add_special_tokens(special)
    larger.save_pretrained(folder)
    return str(folder)


def test_a_larger_vocabulary_resizes_the_model(run, tmp_path, tokenizer, base):
    larger = extended(tokenizer, tmp_path / "larger")
    path = run(model=base, model_config=None, tokenizer=larger)
    with pytest.raises(
        ValueError, match=r"tokenizer has 34 tokens, and the model 32.*`model_config: {vocab_size: 34}`"
    ):
        go(path)
    (tmp_path / "text.txt").write_text(TEXT + " new1 new2")
    go(path, "model_config={vocab_size: 34}", "trainer.learning_rate=1e-9", "trainer.max_steps=1")
    model = LoopMDMForMaskedLM.from_pretrained(tmp_path / "out")
    before = LoopMDMForMaskedLM.from_pretrained(base)
    assert model.config.vocab_size == 34 and model(torch.tensor([[33]])).logits.shape == (1, 1, 34)
    torch.testing.assert_close(
        model.model.embed_tokens.weight[:32], before.model.embed_tokens.weight, rtol=0, atol=1e-6
    )
    assert model.model.embed_tokens.weight[32:].std() > 0.01


def test_a_tokenizer_with_another_mask_token_is_refused(run, tmp_path, tokenizer, base):
    other = extended(tokenizer, tmp_path / "other", mask_token="new1")
    with pytest.raises(ValueError, match=r"mask token is 'new1' \(32\), and the model's is 2; is it the right"):
        go(run(model=base, model_config={"vocab_size": 34}, tokenizer=other))


def test_a_mask_token_of_a_larger_vocabulary_is_trained(run, tmp_path, tokenizer, base):
    other = extended(tokenizer, tmp_path / "other", mask_token="new1")
    changes = {"vocab_size": 34, "mask_token_id": 32}
    go(run(model=base, model_config=changes, tokenizer=other), "trainer.max_steps=1")
    model = LoopMDMForMaskedLM.from_pretrained(tmp_path / "out")
    assert (model.config.vocab_size, model.config.mask_token_id) == (34, 32)
    assert (model(torch.tensor([[3, 32]])).logits[..., 32] == -torch.inf).all()


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 6}, {"hidden_size": 64}, {"tie_word_embeddings": False}, {"use_qk_norm": True}],
    ids=str,
)
def test_weights_that_the_model_lacks_are_not_made_up(run, base, change):
    with pytest.raises(ValueError, match=r"`model_config` needs other weights than .*base has \("):
        go(run(model=base, model_config=None), *(f"model_config.{name}={value}" for name, value in change.items()))


def test_a_model_of_another_kind_is_refused(run, tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"llama does not hold a LoopMDM, but llama; `loopmdm convert`"):
        go(run(model=str(tmp_path / "llama"), model_config=None))


def test_epochs_count_the_examples(run):
    # 40 documents of 13 tokens make 33 rows of 16, the last one short.
    record = go(run(trainer={"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 8}))
    assert record["steps"] == -(-2 * 33 // 8)


def test_every_step_is_whole(run, tokenizer, tmp_path):
    """In a part of a step, several processes would get other rows than one: accelerate gives some of them twice."""
    for epochs, rows, steps in ((1, 4, 9), (2, 8, 9), (0.01, 4, 1)):
        trainer = {"max_steps": -1, "num_train_epochs": epochs, "per_device_train_batch_size": rows}
        config = read_config(run(trainer=trainer))
        assert len(make_parts(config, AutoTokenizer.from_pretrained(tokenizer), tmp_path).stream) == steps * rows


def test_fsdp_of_accelerates_environment_is_known(run, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for change, message in (
        ({"optimizer": "muon"}, "muon` does not work with FSDP"),
        ({"eval_texts": 1, "optimizer": "adamw"}, "`eval_texts`"),
    ):
        config = read_config(run(eval_data=str(tmp_path / "text.txt"), **change))
        with pytest.raises(ValueError, match=message):
            make_parts(config, AutoTokenizer.from_pretrained(tokenizer), tmp_path)


def test_a_step_counts_the_rows_of_all_gpus_of_a_process(run, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)  # without torchrun, which takes one for each process
    config = read_config(run(trainer={"max_steps": 3, "per_device_train_batch_size": 4}))
    assert len(make_parts(config, AutoTokenizer.from_pretrained(tokenizer), tmp_path).stream) == 3 * 2 * 4


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


def test_answers_are_learnt_given_prompts(run, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]}] * 6
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


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets(run, tmp_path, streaming, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXT.split("\n\n")))
    record = go(run(data=str(rows), text_column="body", dataset={"streaming": streaming}))
    assert record["steps"] == 4


def test_of_a_streamed_evaluation_set_no_more_is_read_than_is_used(run, monkeypatch):
    read = []

    def rows(name, options):
        for number in range(10**9):
            read.append(name)
            yield {"text": f"w{number % 29} w1 w2 w3"}

    monkeypatch.setattr("loopmdm.data.files.load_dataset_rows", rows)
    path = run(data="owner/rows", eval_data="owner/test", eval_sequences=3, dataset={"streaming": True})
    record = go(path, "trainer.max_steps=1", "eval_samples=2")
    assert record["evaluation"]["eval_nelbo_1"] > 0
    assert 10 < read.count("owner/test") < 100  # 3 rows of 16 tokens, of texts of 5, twice at most


def test_reports_go_where_they_are_wanted(run, monkeypatch):
    """Losses with their loops, and the NELBO by loops, to any tracker of transformers."""
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    go(run(eval_data=str(Path(run()).parent / "text.txt"), eval_sequences=2), "trainer.report_to=tensorboard")
    assert any({"loss", "num_loops", "training_flops"} <= logs.keys() for logs in seen)
    assert any({"eval_nelbo_1", "eval_nelbo_2", "eval_nelbo_3"} <= logs.keys() for logs in seen)


def test_a_tracker_that_is_not_installed_is_refused_before_the_weights(run, monkeypatch):
    class Missing(TrainerCallback):
        def __init__(self):
            raise RuntimeError("TensorBoardCallback requires tensorboard to be installed.")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Missing)
    monkeypatch.setattr("loopmdm.training.run.LoopMDMTrainer", lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(ValueError, match="`trainer`: TensorBoardCallback requires tensorboard"):
        go(run(), "trainer.report_to=tensorboard")


def test_an_optimiser_that_is_not_installed_is_refused_before_the_weights(run, monkeypatch):
    def missing(*args):
        raise ImportError("You need to install `schedulefree`.")

    monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", missing)
    monkeypatch.setattr("loopmdm.training.run.LoopMDMTrainer", lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(ValueError, match="`trainer`: You need to install `schedulefree`"):
        go(run(), "trainer.optim=schedule_free_adamw")


def test_an_optimiser_that_is_not_installed_is_so_under_any_error(run, monkeypatch):
    """Transformers raises a ValueError for some, and also where an optimiser needs the model."""
    monkeypatch.setattr("loopmdm.training.run.load_trainable", lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(ValueError, match=r"`trainer`: Please install .*torchdistx"):
        go(run(), "trainer.optim=adamw_anyprecision")


def test_a_model_generates_with_no_more_loops_than_it_was_trained_with(run, tmp_path):
    with pytest.raises(ValueError, match=r"`model_config.num_loops` is 4, .* draws at most 3 loops; lower it"):
        go(run(), "model_config.num_loops=4")
    go(run(), "trainer.max_steps=1")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_loops"] == 3
    again = {"model": str(tmp_path / "out"), "model_config": {}, "output": str(tmp_path / "again")}
    go(run(**again), "trainer.max_steps=1", "loops.max_loops=2")
    assert json.loads((tmp_path / "again/config.json").read_text())["num_loops"] == 2


def test_the_first_rows_of_a_stream_are_checked_before_training(run, tmp_path, monkeypatch):
    monkeypatch.setattr("loopmdm.training.run.LoopMDMTrainer", lambda *a, **k: pytest.fail("too late"))
    monkeypatch.setattr("loopmdm.data.files.load_dataset_rows", lambda name, options: iter([{"text": "w1"}]))
    with pytest.raises(ValueError, match="owner/rows, example 1 has no text called prompt"):
        go(run(task="answers", data="owner/rows", dataset={"streaming": True}))


# Bad input


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"trainer": {"output_dir": "x"}}, ["`output_dir`, which this command sets itself"]),
        ({"model_config": {"loop_end": 9}}, ["layers[1:9] of 4 layers"]),
        ({"collator": {"mask_ratio": [0.9, 0.1]}}, ["`mask_ratio` is (0.9, 0.1)"]),
        ({"loops": {"schedule": "often"}}, ["loop schedule is 'often'", "uniform"]),
        ({"distillation": 0.5}, ["`distillation`, which does not exist"]),
        ({"loops": {"max_loops": 0}}, ["`loops.max_loops` is 0"]),
        ({"gradient_loops": 4}, ["`gradient_loops` is 4", "(3)"]),
        ({"task": "chat"}, ["`task` is 'chat'", "answers"]),
        ({"optimizer": "sgd"}, ["`optimizer` is 'sgd'"]),
        ({"sequence_length": 64}, ["`sequence_length` is 64", "1 to 32"]),
        ({"model_config": None}, ["neither a `model` to start from", "`model_config`"]),
        ({"tokenizer": None}, ["`tokenizer` is missing"]),
        ({"trainer": {"save_total_limit": 1}}, ["`save_total_limit` is 1"]),
        ({"trainer": 3}, ["`trainer` is 3"]),
        ({"trainer": {"label_smoothing_factor": 0.1}}, ["`label_smoothing_factor` is 0.1, which does not work here"]),
        ({"trainer": {"resume_from_checkpoint": "x"}}, ["`resume_from_checkpoint`, which this command sets itself"]),
        ({"trainer": {"eval_strategy": "steps"}}, ["`trainer.eval_strategy` needs `eval_data`", "`eval_data`"]),
        ({"trainer": {"lr_scheduler_type": "cosine_with_min_lr"}}, ["`trainer`: ", "min_lr"]),
        ({"trainer": {"lr_scheduler_kwargs": {"speed": 2}}}, ["`trainer`: ", "'speed'"]),
        ({"trainer": {"fp16": True, "use_cpu": True}}, ["`trainer.fp16` has no effect on a CPU", "`bf16`"]),
        ({"model_config": {"vocab_size": 20}}, ["The tokenizer has 32 tokens, and the model 20", "{vocab_size: 32}"]),
        ({"lora": {"layers": "middle"}}, ["'middle'", "mid"]),
        (
            {"isolate_documents": True, "model_config": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}},
            ["`isolate_documents` is True", "'dynamic'"],
        ),
    ],
    ids=str,
)
def test_bad_runs_are_refused_before_training(run, tmp_path, monkeypatch, changes, parts):
    monkeypatch.setattr("transformers.Trainer._inner_training_loop", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setattr(LoopMDMForMaskedLM, "__init__", lambda *a, **k: pytest.fail("made a model"))
    with pytest.raises(ValueError) as error:
        go(run(**changes))
    for part in parts:
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_command(run, tmp_path):
    path = run(eval_data=str(tmp_path / "text.txt"), eval_loops=[1, 3])
    result = CliRunner().invoke(loopmdm_cli.app, ["train", path, "trainer.max_steps=2"], catch_exceptions=False)
    assert "2 steps" in result.stdout and "eval_nelbo_3" in result.stdout
    assert "%|" not in result.stderr  # bars are for terminals
    for overrides, part in ((["max_steps"], "is not `key=value`"), (["output.x=1"], "holds a single value")):
        assert part in refusal("train", path, *overrides)
