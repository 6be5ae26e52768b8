# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Runs that are killed at any moment and resumed, and checkpoints that are refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import start
from safetensors.torch import load_file
from tiny import tiny_model
from training_runs import MASK, PAD, EachStep, assert_equal, build_run, examples, make_trainer, steps_logged, weights
from transformers import EarlyStoppingCallback, TrainingArguments

from loopmdm import LoopMDMForMaskedLM
from loopmdm.training import (
    ExampleStream,
    LoopMDMTrainer,
    MaskedDiffusionCollator,
    MuonAdamW,
    StreamedExamples,
    last_complete_checkpoint,
)
from loopmdm.training import trainer as trainer_module
from loopmdm.training.checkpoints import complete_checkpoint, read_checkpoint, run_identity

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]
# Of `TrainingArguments`: what a resumed run may not change
IDENTITY = (
    "accelerator_config adam_beta1 adam_beta2 adam_epsilon average_tokens_across_devices bf16 data_seed "
    "dataloader_drop_last dataloader_in_order deepspeed fp16 greater_is_better learning_rate length_column_name "
    "load_best_model_at_end lr_scheduler_kwargs lr_scheduler_type max_grad_norm metric_for_best_model "
    "neftune_noise_alpha optim optim_args optim_target_modules parallelism_config seed tf32 train_sampling_strategy "
    "warmup_steps weight_decay"
)


class DiesInSave(LoopMDMTrainer):
    """Killed at step 4 after transformers' part of the checkpoint, before ours."""

    def _save_checkpoint(self, *args):
        if self.state.global_step == 4:
            trainer_module.complete_checkpoint = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        super()._save_checkpoint(*args)


class DiesInTrainersSave(LoopMDMTrainer):
    """Killed at step 4 when the weights are written and the optimiser's state is not."""

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)


def child(folder, options, pause):
    # Slow steps, so that the parent can kill at a chosen moment
    callbacks = [EachStep(lambda step: time.sleep(pause))]
    trainer = build_run(folder, **options, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=True if last_complete_checkpoint(folder) else None)


def run_and_kill(folder, options, when, after: float = 0.0):
    process = start(child, folder, options, 0.03 if when else 0.0)
    deadline = time.monotonic() + 60
    while when is not None and process.is_alive() and not (folder / when).exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    if when is not None:
        time.sleep(after)
        process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, "it died before its end"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "muon", "ema": 0.8},
        {"accumulation": 2, "ema": 0.9, "loop_schedule": "growing", "gradient_loops": 2},
    ],
    ids=str,
)
def test_killed_runs_resume_bit_for_bit(tmp_path, options):
    whole = build_run(tmp_path / "whole", **options)
    whole.train()
    folder = tmp_path / "killed"
    # A moment after a folder appears may be in the middle of its save, or some steps later.
    run_and_kill(folder, options, "checkpoint-2")
    if options.get("optimizer") == "muon":
        run_and_kill(folder, options, "checkpoint-2/complete.json", after=0.05)
    run_and_kill(folder, {**options, "cls": DiesInTrainersSave}, None)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    assert (folder / "checkpoint-4" / "model.safetensors").is_file()
    assert not (folder / "checkpoint-4" / "complete.json").exists()
    run_and_kill(folder, {**options, "cls": DiesInSave}, None)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-4 has no complete.json: it was not finished"):
        build_run(folder, **options).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    if options:
        run_and_kill(folder, options, "checkpoint-6", after=0.01)

    torch.manual_seed(12345)  # the global generator must not matter
    resumed = build_run(folder, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(weights(resumed.model), weights(whole.model))
    assert resumed.state.total_flos == whole.state.total_flos
    assert [(e["step"], e["num_loops"], e["training_flops"], e["loss"]) for e in steps_logged(resumed)] == [
        (e["step"], e["num_loops"], e["training_flops"], e["loss"]) for e in steps_logged(whole)
    ]
    if options.get("ema"):
        assert resumed.ema.n_averaged == whole.ema.n_averaged == 8
        assert_equal(weights(resumed.ema.module), weights(whole.ema.module))
    files = [load_file(path / "checkpoint-8" / "model.safetensors") for path in (folder, tmp_path / "whole")]
    assert_equal(*files)


SCRIPT = """
    import sys
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    from training_runs import build_run
    from loopmdm.training import last_complete_checkpoint
    folder = sys.argv[1]
    build_run(folder, "muon", 0.9).train(resume_from_checkpoint=True if last_complete_checkpoint(folder) else None)
"""


def test_a_new_process_resumes_bit_for_bit(tmp_path):
    whole = build_run(tmp_path / "whole", "muon", 0.9)
    whole.train()
    run_and_kill(tmp_path / "run", {"optimizer": "muon", "ema": 0.9, "cls": DiesInSave}, None)
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent))))
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "run")]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    for name in ("model.safetensors", "ema.safetensors"):
        assert_equal(*(load_file(tmp_path / run / "checkpoint-8" / name) for run in ("run", "whole")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    build_run(folder, max_steps=4).train()
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of that run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(folder, *, args=None, checkpoint=True, **kwargs):
    constant = {"lr_scheduler_type": "constant", "per_device_train_batch_size": 2}
    args = {"save_strategy": "steps", "max_steps": 5, **constant, **(args or {})}
    trainer = make_trainer(folder, args=args, **kwargs)
    trained = []
    trainer.add_callback(EachStep(trained.append))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.steps_run = trained
    return trainer


def test_workers_belong_to_a_stream(tmp_path):
    """They take turns at its rows, where those of a list are numbered before."""
    datasets = {
        "list": ExampleStream(examples(10), 96, seed=0),
        "stream": StreamedExamples(lambda: iter(examples(10))),
    }
    for name, dataset in datasets.items():
        arguments = ({"dataloader_num_workers": number, "max_steps": 2} for number in (0, 2))
        one, two = (run_identity(make_trainer(tmp_path, train_dataset=dataset, args=args)) for args in arguments)
        assert (one == two) == (name == "list")


def test_a_range_given_as_a_list_belongs_to_the_run(tmp_path):
    ratios = (0.1, 0.9), [0.1, 0.9], [0.1, 0.8]
    collators = [MaskedDiffusionCollator(MASK, PAD, mask_ratio=ratio) for ratio in ratios]
    one, two, other = (run_identity(make_trainer(tmp_path, data_collator=each))["noise"] for each in collators)
    assert one == two != other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"max_train_loops": 5}}, "its model.max_train_loops is 4, here 5"),
        ({"model": {"hidden_size": 40, "max_train_loops": 4}}, "its model.hidden_size is 32, here 40"),
        ({"model": {"loop_update": "damped", "max_train_loops": 4}}, "its model.loop_update is replace, here damped"),
        ({"train_dataset": ExampleStream(examples(10, seed=1), 96, seed=0)}, "its data is"),
        ({"train_dataset": ExampleStream(examples(11), 96, seed=0)}, "its data is"),
        ({"train_dataset": ExampleStream([*examples(9), examples(1, seed=3)[0]], 96, seed=0)}, "its data is"),
        ({"train_dataset": ExampleStream(examples(10), 96, seed=1)}, "its order is 0, here 1"),
        ({"train_dataset": StreamedExamples(lambda: examples(10))}, "its data is"),
        ({"data_collator": MaskedDiffusionCollator(MASK, PAD, mask_ratio=(0.1, 0.9))}, "its noise is"),
        ({"args": {"seed": 6}}, "its seed is 5, here 6"),
        ({"args": {"per_device_train_batch_size": 3}}, "its number of rows in a micro-batch is 2, here 3"),
        ({"args": {"gradient_accumulation_steps": 2}}, "its number of rows in an optimiser step is 2, here 4"),
        ({"loop_schedule": "fixed"}, "its loop schedule is UniformLoops"),
        ({"max_loops": 3}, "its loop schedule is UniformLoops"),
        ({"gradient_loops": 2}, "its gradient loops is None, here 2"),
        ({"args": {"learning_rate": 0.02}}, "its learning_rate is 0.01, here 0.02"),
        ({"args": {"lr_scheduler_type": "cosine"}}, "its lr_scheduler_type is constant, here cosine"),
        ({"args": {"warmup_steps": 2}}, "its warmup_steps is 0, here 2"),
        ({"args": {"weight_decay": 0.1}}, "its weight_decay is 0.0, here 0.1"),
        ({"args": {"adam_beta2": 0.9}}, "its adam_beta2 is 0.999, here 0.9"),
        ({"args": {"max_grad_norm": 0.5}}, "its max_grad_norm is 1.0, here 0.5"),
        ({"args": {"optim": "sgd"}}, "its optim is adamw_torch_fused, here sgd"),
        ({"args": {"bf16": True}}, "its bf16 is False, here True"),
        ({"optimizer": "muon"}, "its optimizer is None, here MuonAdamW"),
        ({"dtype": torch.bfloat16}, "its dtype is ['float32'], here ['bfloat16']"),
        ({"frozen": True}, "its trained parameters is"),
        ({"ema_decay": 0.9}, "its ema decay is None, here 0.9"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_checkpoints_of_another_run_are_refused(folder, change, message):
    steps = []
    change = dict(change)
    model = tiny_model(**change.pop("model", {"max_train_loops": 4})).to(change.pop("dtype", torch.float32))
    model.model.embed_tokens.requires_grad_(not change.pop("frozen", False))
    if "optimizer" in change:
        change["optimizers"] = (MuonAdamW(model, lr=1e-2), None)
        del change["optimizer"]
    with pytest.raises(
        ValueError, match=r"checkpoint-4 is of another run: .*Start a new run in another folder"
    ) as error:
        resume(folder, model=model, callbacks=[EachStep(steps.append)], **change)
    assert message in str(error.value)
    assert not steps, "refused before training"


def test_which_checkpoint_is_taken(folder, tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(folder) == last_complete_checkpoint(str(folder)) == str(folder / "checkpoint-4")
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-10")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-10"), "by number, not by letter"
    (folder / "checkpoint-10" / "complete.json").unlink()
    (folder / "checkpoint-10" / "complete.json.tmp").write_text("{}")
    (folder / "complete.json").write_text("{}")
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-best")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    assert json.loads((folder / "checkpoint-4" / "complete.json").read_text())["step"] == 4
    for missing in ("checkpoint-10", "checkpoint-77"):
        with pytest.raises(ValueError, match=rf"{missing} has no complete.json.*Resume from an earlier one"):
            resume(folder, checkpoint=str(folder / missing))
    with pytest.raises(ValueError, match="holds no complete checkpoint to resume from"):
        resume(tmp_path / "empty")


def test_resume_from_a_named_checkpoint_and_with_more_steps(folder, tmp_path):
    whole = resume(tmp_path / "whole", checkpoint=None)
    for checkpoint, steps in ((True, [5]), (str(folder / "checkpoint-2"), [3, 4, 5])):
        resumed = resume(folder, checkpoint=checkpoint)
        assert resumed.steps_run == steps
        assert_equal(weights(resumed.model), weights(whole.model))
    assert resumed.looped_model.model.gradient_loops is None


def test_a_resumed_run_logs_saves_and_evaluates_when_it_is_told_to(tmp_path):
    build_run(tmp_path, max_steps=4).train()
    args = {"save_steps": 5, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 7, "save_total_limit": 9}
    trainer = build_run(tmp_path, max_steps=12, args=args, eval_dataset=examples(2), eval_loops=[1], eval_samples=2)
    trainer.train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 4, 5, 10, 12)}
    assert [line["step"] for line in steps_logged(trainer)] == [1, 2, 3, 4, 6, 9, 12]
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == [7, 12]


def test_gradient_checkpointing_may_change_on_resume(folder):
    trainer = resume(folder, checkpoint_loops=True, args={"gradient_checkpointing": True})
    assert trainer.steps_run == [5]


def test_damage_is_named(folder, monkeypatch):
    damaged, warnings = folder / "checkpoint-4", []
    monkeypatch.setattr("loopmdm.training.checkpoints.logger.warning", warnings.append)
    for name in ("optimizer.pt", "scheduler.pt", "model.safetensors", "rng_state.pth", "trainer_state.json"):
        path, content = damaged / name, (damaged / name).read_bytes()
        middle = len(content) // 2
        for change in (None, content[:-20], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
            path.unlink() if change is None else path.write_bytes(change)
            with pytest.raises(ValueError, match=f"checkpoint-4 is damaged: {name} (is missing|has changed since)"):
                read_checkpoint(damaged)
            assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
            assert "checkpoint-4 is damaged" in warnings.pop()
            path.write_bytes(content)
    for text in ("", "null", "[1]", '{"step": 4, "files": ["a", "b"]}'):
        (damaged / "complete.json").write_text(text)
        with pytest.raises(ValueError, match=r"checkpoint-4 is damaged: its complete.json does not list its files"):
            read_checkpoint(damaged)


def test_the_checkpoint_before_a_damaged_one_is_taken(folder):
    whole, damaged = resume(folder).model, folder / "checkpoint-4"
    shutil.rmtree(folder / "checkpoint-5")
    (damaged / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 is damaged: optimizer.pt is missing"):
        resume(folder, checkpoint=str(damaged))
    resumed = resume(folder)
    assert resumed.steps_run == [3, 4, 5]
    assert_equal(weights(resumed.model), weights(whole))
    assert read_checkpoint(damaged)["step"] == 4, "written anew"


def test_checkpoints_without_the_optimiser_cannot_be_resumed(tmp_path):
    args = {"save_only_model": True}
    build_run(tmp_path, max_steps=2, args=args).train()
    with pytest.raises(ValueError, match=r"checkpoint-2 holds only the model \(`save_only_model`\)"):
        build_run(tmp_path, max_steps=4, args=args).train(resume_from_checkpoint=True)


def adapted(alpha: int = 8, layers=None, base_seed: int = 0):
    model = tiny_model(base_seed, max_train_loops=4)
    torch.manual_seed(0)
    where = {} if layers is None else {"layers_to_transform": layers, "layers_pattern": "layers"}
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], **where))


def test_adapters_of_other_settings_or_on_other_weights_are_refused(tmp_path):
    resume(tmp_path, model=adapted(), checkpoint=None, args={"max_steps": 2})
    for model, message in (
        (adapted(alpha=16), "its adapter.default.lora_alpha is 8, here 16"),
        (adapted(layers=[1, 2]), "its adapter.default.layers_to_transform is None, here [1, 2]"),
        (adapted(base_seed=1), "its base weights is"),
        (tiny_model(max_train_loops=4), "its adapter is"),
    ):
        with pytest.raises(ValueError, match="is of another run") as error:
            resume(tmp_path, model=model)
        assert message in str(error.value)
    assert resume(tmp_path, model=adapted()).steps_run == [3, 4, 5]


def test_the_time_and_the_history_of_all_parts_are_kept(folder):
    record = json.loads((folder / "checkpoint-4" / "complete.json").read_text())
    assert record["step"] == record["max_steps"] == 4 and record["resumed"] == []
    resumed = resume(folder)
    assert resumed.seconds > record["seconds"] > 0
    assert resumed.resumed == [{"step": 4, "max_steps_before": 4}]
    with pytest.raises(ValueError, match="The checkpoint is of step 4, but the run has only 3"):
        resume(folder, checkpoint=str(folder / "checkpoint-4"), args={"max_steps": 3})


def test_callbacks_with_a_state_are_resumed_with_it(tmp_path):
    args = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "load_best_model_at_end": True}

    def go(**more):
        options = {"args": {**args, **more}, "eval_dataset": examples(2), "eval_loops": [1], "eval_samples": 2}
        stop = EarlyStoppingCallback(early_stopping_patience=5)
        build_run(tmp_path, max_steps=4, callbacks=[stop], **options).train(resume_from_checkpoint=bool(more) or None)

    go()
    with pytest.raises(ValueError, match="EarlyStoppingCallback has a state, which would be reset"):
        go(restore_callback_states_from_checkpoint=False)
    go(restore_callback_states_from_checkpoint=True)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_finished_run_trains_no_further(tmp_path, streamed):
    def data():
        return StreamedExamples(lambda: iter(examples(7))) if streamed else ExampleStream(examples(7), 96, seed=0)

    whole = build_run(tmp_path, train_dataset=data(), max_steps=4)
    whole.train()
    steps = []
    resumed = build_run(tmp_path, train_dataset=data(), max_steps=4, callbacks=[EachStep(steps.append)])
    resumed.train(resume_from_checkpoint=True)
    assert steps == [] and resumed.state.global_step == 4
    assert "train_loss" not in resumed.state.log_history[-1], "there is none"
    assert_equal(weights(resumed.model), weights(whole.model))


def test_streams_resume_exactly(tmp_path):
    def stream():
        return StreamedExamples(lambda: iter(examples(7)))

    whole = build_run(tmp_path, train_dataset=stream(), max_steps=5)
    whole.train()
    resumed = build_run(tmp_path, train_dataset=stream(), max_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(resumed.model), weights(whole.model))


def test_old_checkpoints_are_deleted_only_when_the_next_is_complete(tmp_path, monkeypatch):
    args = {"save_steps": 1, "save_total_limit": 2}
    seen = []

    def watching(folder, record):  # between transformers' part of a checkpoint and ours
        seen.append(last_complete_checkpoint(tmp_path))
        complete_checkpoint(folder, record)

    monkeypatch.setattr(trainer_module, "complete_checkpoint", watching)
    build_run(tmp_path, max_steps=5, args=args).train()
    assert seen == [None, *(str(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3, 4))]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_unfinished_checkpoints_do_not_count(tmp_path, monkeypatch):
    """A run that is killed in its saves keeps the complete checkpoints, the best one too."""
    args = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 2}
    args["metric_for_best_model"] = "score"

    class Scored(LoopMDMTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_score": 1.0 if self.state.global_step == 2 else 0.0}
            self.log(dict(metrics))
            return metrics

    def go(last, checkpoint=None):
        options = {"max_steps": last, "args": {**args, "greater_is_better": True}, "eval_dataset": examples(2)}
        build_run(tmp_path, cls=Scored, **options).train(resume_from_checkpoint=checkpoint)
        return sorted(path.name for path in tmp_path.glob("checkpoint-*"))

    assert go(6) == ["checkpoint-2", "checkpoint-6"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "complete_checkpoint", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go(8, checkpoint=True)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert (tmp_path / "checkpoint-2" / "complete.json").exists(), "the best"
    shutil.copytree(tmp_path / "checkpoint-8", tmp_path / "checkpoint-7")
    assert go(8, checkpoint=True) == ["checkpoint-2", "checkpoint-8"], "and what was unfinished is gone"
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-2, the best checkpoint so far, is missing"):
        go(10, checkpoint=True)


def test_a_folder_is_locked_while_a_run_writes_to_it(tmp_path):
    def other(step):
        process = start(refused, tmp_path)
        process.join(60)
        assert process.exitcode == 7

    build_run(tmp_path, max_steps=1, callbacks=[EachStep(other)]).train()
    build_run(tmp_path, max_steps=1).train()


def refused(folder):
    try:
        build_run(folder, max_steps=1).train()
    except ValueError as error:
        os._exit(7 if "Another run is writing to" in str(error) else 1)


def test_a_checkpoint_written_over_is_incomplete_meanwhile(folder):
    shutil.rmtree(folder / "checkpoint-2")
    # A new run in the same folder, killed while it writes checkpoint-4: new weights, old optimiser.
    process = start(build_and_train, folder, cls=DiesInTrainersSave)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert last_complete_checkpoint(folder) != str(folder / "checkpoint-4")


def build_and_train(folder, **options):
    build_run(folder, **options).train()


def test_the_same_model_from_another_folder_is_the_same_run(tmp_path):
    tiny_model(max_train_loops=4).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = {"max_steps": 2}
    resume(tmp_path / "run", model=LoopMDMForMaskedLM.from_pretrained(tmp_path / "a"), checkpoint=None, args=first)
    assert resume(tmp_path / "run", model=LoopMDMForMaskedLM.from_pretrained(tmp_path / "b")).steps_run == [3, 4, 5]


def test_every_training_argument_may_change_or_may_not(tmp_path):
    """A new one of transformers fails here until it is decided; meanwhile it may not change."""
    trainer = make_trainer(tmp_path)
    trainer.args.to_dict = lambda: dict.fromkeys([field.name for field in fields(TrainingArguments)], "new")
    found = {name for name, value in run_identity(trainer).items() if value == "new"}
    assert found <= set(IDENTITY.split()), "decide on these, in training/checkpoints.py or here"
    assert {"seed", "learning_rate", "optim", "bf16"} <= found and not {"save_steps", "output_dir"} & found
