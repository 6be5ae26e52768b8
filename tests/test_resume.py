# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Runs that are killed at any moment and resumed, and checkpoints that are refused."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from training_runs import EachStep, assert_equal, build_run, examples, make_trainer, steps_logged, weights

from loopmdm import LoopMDMForMaskedLM
from loopmdm.training import ExampleStream, LoopMDMTrainer, StreamedExamples, last_complete_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]
FORK = multiprocessing.get_context("fork")


class DiesInSave(LoopMDMTrainer):
    """Killed at step 4 after transformers' part of the checkpoint, before ours."""

    def _identity(self):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._identity()


class DiesInTrainersSave(LoopMDMTrainer):
    """Killed at step 4 when the weights are written and the optimiser's state is not."""

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)


def child(folder, options, pause):
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    # Slow steps, so that the parent can kill at a chosen moment
    callbacks = [EachStep(lambda step: time.sleep(pause))]
    trainer = build_run(folder, **options, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=True if last_complete_checkpoint(folder) else None)


def run_and_kill(folder, options, when, after: float = 0.0):
    process = FORK.Process(target=child, args=(folder, options, 0.03 if when else 0.0))
    process.start()
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
    args = {"save_strategy": "steps", "max_steps": 5, "per_device_train_batch_size": 2, **(args or {})}
    trainer = make_trainer(folder, args=args, **kwargs)
    trained = []
    trainer.add_callback(EachStep(trained.append))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.steps_run = trained
    return trainer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"max_train_loops": 5}}, "its model is"),
        ({"model": {"hidden_size": 40, "max_train_loops": 4}}, "its model is"),
        ({"model": {"loop_update": "damped", "max_train_loops": 4}}, "its model is"),
        ({"train_dataset": ExampleStream(examples(10, seed=1), 96, seed=0)}, "its data is"),
        ({"train_dataset": ExampleStream(examples(11), 96, seed=0)}, "its data is"),
        ({"train_dataset": StreamedExamples(lambda: examples(10))}, "its data is .*, here stream"),
        ({"args": {"seed": 6}}, "its seed is 5, here 6"),
        ({"args": {"per_device_train_batch_size": 3}}, "its batch size is 2, here 3"),
        ({"args": {"gradient_accumulation_steps": 2}}, "its gradient accumulation steps is 1, here 2"),
        ({"loop_schedule": "fixed"}, "its loop schedule is UniformLoops"),
        ({"max_loops": 3}, "its loop schedule is UniformLoops"),
        ({"gradient_loops": 2}, "its gradient loops is None, here 2"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_checkpoints_of_another_run_are_refused(folder, change, message):
    steps = []
    change = dict(change)
    if "model" in change:
        change["model"] = tiny_model(**change["model"])
    with pytest.raises(ValueError, match=r"checkpoint-4 is of another run: .*Start anew in another folder") as error:
        resume(folder, callbacks=[EachStep(steps.append)], **change)
    assert message.split(" .*")[0] in str(error.value)
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
    constant = {"lr_scheduler_type": "constant"}
    whole = resume(tmp_path / "whole", checkpoint=None, args=constant)
    for checkpoint, steps in ((True, [5]), (str(folder / "checkpoint-2"), [3, 4, 5])):
        resumed = resume(folder, checkpoint=checkpoint, args=constant)
        assert resumed.steps_run == steps
        assert_equal(weights(resumed.model), weights(whole.model))
    assert resumed.looped_model.model.gradient_loops is None


def test_gradient_checkpointing_may_change_on_resume(folder):
    trainer = resume(folder, checkpoint_loops=True, args={"gradient_checkpointing": True})
    assert trainer.steps_run == [5]


def test_streams_resume_exactly(tmp_path):
    def stream():
        return StreamedExamples(lambda: iter(examples(7)))

    whole = build_run(tmp_path, train_dataset=stream(), max_steps=5)
    whole.train()
    resumed = build_run(tmp_path, train_dataset=stream(), max_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(resumed.model), weights(whole.model))


def test_old_checkpoints_are_deleted_only_when_the_next_is_complete(tmp_path):
    args = {"save_steps": 1, "save_total_limit": 2}
    seen = []

    class Watching(LoopMDMTrainer):
        def _identity(self):  # between transformers' part of a checkpoint and ours
            seen.append(last_complete_checkpoint(tmp_path))
            return super()._identity()

    build_run(tmp_path, cls=Watching, max_steps=5, args=args).train()
    assert seen == [None, *(str(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3, 4))]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_a_checkpoint_written_over_is_incomplete_meanwhile(folder):
    shutil.rmtree(folder / "checkpoint-2")
    # A new run in the same folder, killed while it writes checkpoint-4: new weights, old optimiser.
    process = FORK.Process(target=dies_over_old, args=(folder,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert last_complete_checkpoint(folder) != str(folder / "checkpoint-4")


def dies_over_old(folder):
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    build_run(folder, cls=DiesInTrainersSave).train()


def test_an_average_cannot_begin_on_resume(folder):
    with pytest.raises(ValueError, match="ema"):
        resume(folder, ema_decay=0.9)


def test_the_same_model_from_another_folder_is_the_same_run(tmp_path):
    tiny_model(max_train_loops=4).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = {"max_steps": 2}
    resume(tmp_path / "run", model=LoopMDMForMaskedLM.from_pretrained(tmp_path / "a"), checkpoint=None, args=first)
    assert resume(tmp_path / "run", model=LoopMDMForMaskedLM.from_pretrained(tmp_path / "b")).steps_run == [3, 4, 5]
