# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
LoopMDMTrainer: what it logs, evaluates, averages and distils; runs killed at any moment and resumed; adapters.
"""

import copy
import json
import math
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
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import random_ids, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from loopmdm import LoopMDMForMaskedLM
from loopmdm.evaluation import nelbo
from loopmdm.training import (
    ExampleStream,
    LoopMDMTrainer,
    MaskedDiffusionCollator,
    MuonAdamW,
    StreamedExamples,
    draw_num_loops,
    last_complete_checkpoint,
    make_loop_schedule,
    training_flops,
)

MASK, PAD = 22, 0
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


def examples(count: int, length: int = 6, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 22, (length,), generator=generator)} for _ in range(count)]


def training_args(folder, **overrides) -> TrainingArguments:
    values = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 5,
        "learning_rate": 1e-2,
    }
    return TrainingArguments(**values | overrides)


def make_trainer(folder, model=None, stream=None, args=None, **kwargs) -> LoopMDMTrainer:
    model = tiny_model(max_train_loops=4) if model is None else model
    stream = ExampleStream(examples(10), 64, seed=0) if stream is None else stream
    kwargs.setdefault("data_collator", MaskedDiffusionCollator(MASK, PAD))
    return LoopMDMTrainer(model, training_args(folder, **args or {}), train_dataset=stream, **kwargs)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


def steps_logged(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class EachStep(TrainerCallback):
    """Calls `function(step)` after every optimiser step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(state.global_step)


# --- log ---


@pytest.mark.parametrize(
    ("options", "args"),
    [
        ({}, {}),
        ({"gradient_loops": 2, "checkpoint_loops": True}, {"gradient_accumulation_steps": 2}),
        ({"loop_schedule": "growing", "max_loops": 3, "gradient_loops": 1}, {"gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_log_counts_loops_operations_and_tokens(tmp_path, monkeypatch, options, args):
    clock = [0.0]
    monkeypatch.setattr("loopmdm.training.trainer.time.perf_counter", lambda: clock[0])
    model = tiny_model(max_train_loops=4)
    ran, mid = [], model.model.loop
    model.model.loop = lambda *args, **kwargs: ran.append(1) or mid(*args, **kwargs)
    collator = MaskedDiffusionCollator(MASK, PAD)
    stream = ExampleStream([row for n in (4, 6) for row in examples(5, n)], 64, seed=0)
    args = {"max_steps": 6, "logging_steps": 2, **args}
    accumulation = args.get("gradient_accumulation_steps", 1)

    def tick(step):
        clock[0] += 0.5

    trainer = make_trainer(tmp_path, model, stream, args, callbacks=[EachStep(tick)], **options)
    trainer.train()
    schedule = make_loop_schedule(options.get("loop_schedule", "uniform"), model.config, options.get("max_loops"))
    draws = [schedule.draw(5, step, 6) for step in range(6)]
    if not args.get("gradient_checkpointing") and not options:
        assert len(ran) == sum(draws)
    batches = [collator([stream[4 * i + j] for j in range(4)]) for i in range(6 * accumulation)]
    total, before, lines = 0, 0, steps_logged(trainer)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        tokens = 0
        for step in (line["step"] - 2, line["step"] - 1):
            for batch in batches[step * accumulation : (step + 1) * accumulation]:
                tokens += batch["input_ids"].numel()
                total += training_flops(
                    model,
                    *batch["input_ids"].shape,
                    draws[step],
                    int(batch["loss_weights"].count_nonzero()) / 4,
                    options.get("gradient_loops"),
                    options.get("checkpoint_loops", False),
                    args.get("gradient_checkpointing", False),
                )
        assert line["num_loops"] == sum(draws[line["step"] - 2 : line["step"]]) / 2
        assert line["training_flops"] == total
        assert line["tokens_per_second"] == tokens, "two steps of half a second"
        assert line["flops_per_second"] == total - before
        before = total
    assert trainer.state.total_flos == total
    assert model.model.gradient_loops is None and model.model.checkpoint_loops is False, "nothing stays behind"
    assert model.model.num_train_loops is None


def test_time_of_evaluation_is_no_time_of_training(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("loopmdm.training.trainer.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(
        "loopmdm.training.trainer.nelbo",
        lambda *args, **kwargs: clock.__setitem__(0, clock[0] + 100) or nelbo(*args, **kwargs),
    )
    trainer = make_trainer(
        tmp_path, args={"eval_strategy": "steps", "eval_steps": 1}, eval_dataset=examples(2), eval_loops=[1],
        eval_samples=2, callbacks=[EachStep(lambda step: clock.__setitem__(0, clock[0] + 2))],
    )  # fmt: skip
    trainer.train()
    assert [line["tokens_per_second"] for line in steps_logged(trainer)] == [12, 12, 12, 12]


@pytest.mark.parametrize("how", ["resumed", "trained again"])
def test_speed_counts_the_operations_of_this_run_alone(tmp_path, how):
    trainer = make_trainer(tmp_path, args={"save_strategy": "steps"})
    trainer.train()
    if how == "resumed":
        trainer = make_trainer(tmp_path, args={"save_strategy": "steps", "max_steps": 5})
        trainer.train(resume_from_checkpoint=True)
        line, before = steps_logged(trainer)[4], steps_logged(trainer)[3]["training_flops"]
    else:
        trainer.train()
        line, before = steps_logged(trainer)[0], 0
    seconds = 24 / line["tokens_per_second"]
    assert line["flops_per_second"] * seconds == pytest.approx(line["training_flops"] - before, rel=1e-6)


def test_operations_of_distillation_are_counted(tmp_path):
    totals = []
    for weight in (0.0, 1.0):
        trainer = make_trainer(tmp_path, args={"max_steps": 1}, distillation=weight, loop_schedule="fixed")
        trainer.train()
        totals.append(trainer.state.total_flos)
    assert totals[1] > totals[0]


# --- evaluation ---


@pytest.mark.parametrize("averaged", [False, True])
def test_evaluation_is_the_nelbo_at_every_number_of_loops(tmp_path, averaged):
    held_out = [*examples(2, 6, seed=9), {"input_ids": torch.tensor([3, 4, 5]), "prompt_length": 1}]
    trainer = make_trainer(
        tmp_path, args={"per_device_eval_batch_size": 3, "eval_strategy": "steps", "eval_steps": 2},
        eval_dataset=held_out, eval_loops=[3, 1], eval_samples=4, ema_decay=0.5 if averaged else None,
    )  # fmt: skip
    trainer.train()
    model = trainer.ema.module if averaged else trainer.model
    ids = torch.stack([*(row["input_ids"] for row in held_out[:2]), torch.tensor([3, 4, 5, 0, 0, 0])])
    mask, maskable = torch.ones(3, 6), torch.ones(3, 6, dtype=torch.bool)
    mask[2, 3:], maskable[2, :1] = 0, False
    mean, error = nelbo(model, ids, mask, maskable, num_loops=[3, 1], num_samples=4, batch_size=3, seed=5).per_token()
    metrics = trainer.evaluate()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 4]
    for found in (metrics, logged[1]):
        assert [found["eval_nelbo_3"], found["eval_nelbo_1"]] == mean.tolist()
        assert found["eval_nelbo_3_standard_error"] == error[0].item()
        assert found["eval_loss"] == found["eval_nelbo_1"]
        assert found["eval_runtime"] > 0
    assert logged[0]["eval_loss"] != logged[1]["eval_loss"]
    other = trainer.evaluate(held_out[:1], metric_key_prefix="test")
    assert {"test_loss", "test_nelbo_1", "test_nelbo_3"} <= other.keys()
    assert math.exp(other["test_loss"]) > 1 and other["test_loss"] != metrics["eval_loss"]


def test_evaluation_without_eval_loops_is_the_trainers(tmp_path):
    rows = [{**row, "index": index} for index, row in enumerate(examples(4, seed=3))]
    trainer = make_trainer(tmp_path, eval_dataset=rows, args={"per_device_eval_batch_size": 4})
    batch = MaskedDiffusionCollator(MASK, PAD)(rows)
    expected = trainer.model(**batch, num_loops=3).loss.item()  # the config's loops
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_evaluation_needs_examples_and_their_reader(tmp_path):
    for dataset in (None, []):
        trainer = make_trainer(tmp_path, eval_dataset=dataset, eval_loops=[1])
        with pytest.raises(ValueError, match="`eval_loops` needs an `eval_dataset` with examples"):
            trainer.evaluate()
    trainer = make_trainer(tmp_path, eval_dataset=examples(2), eval_loops=[1], data_collator=lambda rows: rows)
    with pytest.raises(ValueError, match="`eval_loops` needs a MaskedDiffusionCollator"):
        trainer.evaluate()


def test_several_evaluation_sets(tmp_path):
    sets = {"a": examples(2), "b": examples(2, seed=1)}
    metrics = make_trainer(tmp_path, eval_dataset=sets, eval_loops=[1], eval_samples=2).evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= metrics.keys()


@pytest.mark.parametrize("options", [{"eval_loops": [0]}, {"eval_loops": []}, {"eval_loops": [1], "eval_samples": 3}])
def test_bad_evaluation_options_are_found_at_once(tmp_path, options):
    with pytest.raises(ValueError, match=r"num_loops|num_samples|eval_loops|eval_samples"):
        make_trainer(tmp_path, eval_dataset=examples(2), **options)


def test_evaluation_keeps_packed_documents_apart(tmp_path):
    # Of one token each: there is one mask only, so their bound is exact.
    packed = [{"input_ids": [3, 4, 5, 6, 7, 8], "document_ids": [0, 1, 2, 3, 4, 5]}]
    alone = [{"input_ids": [token]} for token in range(3, 9)]
    try:
        found = [
            make_trainer(tmp_path, eval_dataset=rows, eval_loops=[2], eval_samples=100).evaluate()
            for rows in (packed, alone)
        ]
    except ValueError:
        return  # refused: fine too
    error = math.hypot(*(metrics["eval_nelbo_2_standard_error"] for metrics in found))
    assert abs(found[0]["eval_loss"] - found[1]["eval_loss"]) < 4 * error + 1e-6


# --- moving average ---


def test_moving_average_by_hand(tmp_path):
    decay, average, states = 0.7, {}, []
    trainer = make_trainer(tmp_path, args={"save_strategy": "steps", "max_steps": 5}, ema_decay=decay)

    def follow(step):
        for name, parameter in trainer.model.named_parameters():
            value = parameter.detach().double()
            average[name] = value.clone() if step == 1 else decay * average[name] + (1 - decay) * value
        states.append(weights(trainer.model))

    trainer.add_callback(EachStep(follow))
    trainer.train()
    for name, parameter in trainer.ema.module.named_parameters():
        torch.testing.assert_close(parameter.double(), average[name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(trainer.ema.module.lm_head.weight, trainer.model.lm_head.weight)
    assert_equal(weights(trainer.model), states[-1])

    # Checkpoints hold the weights of training, the final model their average; afterwards the weights are back.
    for step in (2, 4):
        saved = LoopMDMForMaskedLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert_equal(weights(saved), states[step - 1])
        assert (tmp_path / f"checkpoint-{step}" / "ema.safetensors").is_file()
    trainer.save_model(str(tmp_path / "final"))
    final = LoopMDMForMaskedLM.from_pretrained(tmp_path / "final")
    assert_equal(weights(final), weights(trainer.ema.module))
    assert_equal(weights(trainer.model), states[-1])
    with pytest.raises(RuntimeError), trainer.averaged_weights():
        assert_equal(weights(trainer.model), weights(final))
        raise RuntimeError
    assert_equal(weights(trainer.model), states[-1])


def test_moving_average_changes_no_weight(tmp_path):
    results = []
    for decay in (None, 0.9):
        trainer = make_trainer(tmp_path, ema_decay=decay)
        trainer.train()
        results.append(weights(trainer.model))
    assert_equal(*results)


def test_before_the_first_step_there_is_no_average(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=examples(2), eval_loops=[2], eval_samples=2, ema_decay=0.9)
    plain = make_trainer(tmp_path, eval_dataset=examples(2), eval_loops=[2], eval_samples=2)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_an_average_does_not_go_with_the_best_checkpoint(tmp_path):
    """What is loaded at the end would not be what the average is of."""
    args = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    with pytest.raises(ValueError, match="`ema_decay` does not go with `load_best_model_at_end`"):
        make_trainer(tmp_path, args=args, ema_decay=0.5, eval_dataset=examples(3), eval_loops=[1], eval_samples=4)


# --- distillation ---


def divergence(model, batch, num_loops: int) -> torch.Tensor:
    """KL(p at one loop || p at `num_loops`) at masked positions, weighted, per label; in float64 by its formula."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = [model(**inputs, num_loops=loops).logits.double() for loops in (1, num_loops)]
    keep = [token for token in range(23) if token != MASK]
    teacher, student = (part[..., keep].softmax(-1) for part in logits)
    teacher = teacher.detach()
    kl = (teacher * (teacher / student).log()).sum(-1)
    return (kl * batch["loss_weights"]).sum() / (batch["labels"] != -100).sum()


@pytest.mark.parametrize("num_loops", [1, 3])
def test_distillation_by_hand(tmp_path, num_loops):
    rows = [{**row, "index": index} for index, row in enumerate([*examples(2), *examples(2, 4, seed=2)])]
    batch = MaskedDiffusionCollator(MASK, PAD)(rows)
    model = tiny_model().double().train()
    trainer = make_trainer(tmp_path, model, distillation=0.3)
    model.model.num_train_loops = num_loops
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    plain = model(**batch, num_loops=num_loops).loss
    extra = divergence(model, batch, num_loops)
    (plain + 0.3 * extra).backward()
    # The Trainer's softmax is in float32
    torch.testing.assert_close(loss.detach(), (plain + 0.3 * extra).detach(), rtol=1e-6, atol=1e-7)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert extra.item() == pytest.approx(0, abs=1e-12) if num_loops == 1 else extra > 0.05
    returned, _ = trainer.compute_loss(model, batch, return_outputs=True)
    assert torch.equal(returned, loss)
    # The divisor of an optimiser step, and no second loss in evaluation
    doubled = trainer.compute_loss(model, batch, num_items_in_batch=2 * (batch["labels"] != -100).sum())
    torch.testing.assert_close(2 * doubled, loss)
    assert trainer.compute_loss(model.eval(), batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-12)


def test_distillation_keeps_the_loops_close(tmp_path):
    batch = MaskedDiffusionCollator(MASK, PAD)([{**row, "index": index} for index, row in enumerate(examples(8))])
    found = []
    for weight in (0.0, 5.0):
        trainer = make_trainer(tmp_path, distillation=weight, loop_schedule="fixed", args={"max_steps": 8})
        trainer.train()
        with torch.no_grad():
            found.append(divergence(trainer.model.eval(), batch, 4).item())
    assert found[1] < 0.6 * found[0]


def test_accumulated_steps_equal_whole_ones(tmp_path):
    results = []
    for size, accumulation in ((4, 1), (2, 2)):
        # One row's noise does not depend on its micro-batch where every row has one token to mask.
        rows = [{**row, "prompt_length": 5} for row in examples(10)]
        trainer = make_trainer(
            tmp_path, tiny_model(max_train_loops=4).double(), ExampleStream(rows, 64, seed=0), distillation=0.5,
            args={"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 3},
        )  # fmt: skip
        trainer.train()
        results.append((weights(trainer.model), [line["loss"] for line in steps_logged(trainer)]))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, rtol=1e-5, atol=1e-7)


# --- arguments ---


@pytest.mark.parametrize(
    ("options", "args", "message"),
    [
        ({"gradient_loops": 5}, {}, r"`gradient_loops` is 5; it must be from 1 to the most loops of training \(4\)"),
        ({"gradient_loops": 3, "max_loops": 2}, {}, r"`gradient_loops` is 3.*\(2\)"),
        ({"gradient_loops": 0}, {}, "`gradient_loops` is 0"),
        ({"ema_decay": 0.0}, {}, r"`ema_decay` is 0.0; it must be between 0 and 1"),
        ({"ema_decay": 1.0}, {}, r"`ema_decay` is 1.0"),
        ({"ema_decay": math.nan}, {}, "`ema_decay` is nan"),
        ({"distillation": -0.1}, {}, r"`distillation` is -0.1; it must be at least 0"),
        ({"loop_schedule": "exact"}, {}, "The loop schedule is 'exact'; choose one of uniform"),
        ({"max_loops": 0}, {}, "`max_loops` is 0"),
        ({}, {"save_strategy": "steps", "save_total_limit": 1}, "`save_total_limit` is 1, which deletes a checkpoint"),
    ],
    ids=str,
)
def test_bad_arguments(tmp_path, options, args, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, args=args, **options)


def test_models_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Linear holds no LoopMDMForMaskedLM"):
        make_trainer(tmp_path, torch.nn.Linear(2, 2))


def test_max_loops_beside_a_schedule_that_has_its_own(tmp_path):
    with pytest.raises(ValueError, match="max_loops"):
        make_trainer(tmp_path, loop_schedule=make_loop_schedule("uniform", None, 4), max_loops=8)


# --- resume ---

FORK = multiprocessing.get_context("fork")


def build_run(folder, optimizer="adamw", ema=None, accumulation=1, cls=LoopMDMTrainer, max_steps=8, **kwargs):
    model = tiny_model(max_train_loops=4)
    args = training_args(
        folder, save_strategy="steps", max_steps=max_steps, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2, lr_scheduler_type="constant",
    )  # fmt: skip
    optimizers = (MuonAdamW(model, lr=1e-2) if optimizer == "muon" else None, None)
    return cls(
        model, args, train_dataset=kwargs.pop("stream", None) or ExampleStream(examples(10), 64, seed=0),
        data_collator=MaskedDiffusionCollator(MASK, PAD), optimizers=optimizers, ema_decay=ema, **kwargs,
    )  # fmt: skip


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
    from test_trainer import build_run, last_complete_checkpoint
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


def resume(folder, *, model=None, args=None, stream=None, checkpoint=True, **kwargs):
    model = tiny_model(max_train_loops=4) if model is None else model
    args = training_args(
        folder, **{"save_strategy": "steps", "max_steps": 5, "per_device_train_batch_size": 2, **(args or {})}
    )
    stream = ExampleStream(examples(10), 64, seed=0) if stream is None else stream
    trainer = LoopMDMTrainer(
        model, args, train_dataset=stream, data_collator=MaskedDiffusionCollator(MASK, PAD), **kwargs
    )
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
        ({"stream": ExampleStream(examples(10, seed=1), 64, seed=0)}, "its data is"),
        ({"stream": ExampleStream(examples(11), 64, seed=0)}, "its data is"),
        ({"stream": StreamedExamples(lambda: examples(10))}, "its data is .*, here stream"),
        ({"args": {"seed": 6}}, "its seed is 5, here 6"),
        ({"args": {"per_device_train_batch_size": 3}}, "its batch size is 2, here 3"),
        ({"args": {"gradient_accumulation_steps": 2}}, "its gradient accumulation steps is 1, here 2"),
        ({"loop_schedule": "fixed"}, "its loop schedule is UniformLoops"),
        ({"max_loops": 3}, "its loop schedule is UniformLoops"),
        ({"gradient_loops": 2}, "its gradient loops is None, here 2"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_checkpoints_of_another_run_are_refused(finished, tmp_path, change, message):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    steps = []
    change = dict(change)
    if "model" in change:
        change["model"] = tiny_model(**change["model"])
    with pytest.raises(ValueError, match=r"checkpoint-4 is of another run: .*Start anew in another folder") as error:
        resume(folder, callbacks=[EachStep(steps.append)], **change)
    assert message.split(" .*")[0] in str(error.value)
    assert not steps, "refused before training"


def test_which_checkpoint_is_taken(finished, tmp_path):
    folder = tmp_path / "run"
    assert last_complete_checkpoint(folder) is None
    shutil.copytree(finished, folder)
    assert last_complete_checkpoint(folder) == last_complete_checkpoint(str(folder)) == str(folder / "checkpoint-4")
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-10")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-10"), "by number, not by letter"
    (folder / "checkpoint-10" / "complete.json").unlink()
    (folder / "checkpoint-10" / "complete.json.tmp").write_text("{}")
    (folder / "complete.json").write_text("{}")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    record = json.loads((folder / "checkpoint-4" / "complete.json").read_text())
    assert record["step"] == 4
    for missing in ("checkpoint-10", "checkpoint-77"):
        with pytest.raises(ValueError, match=rf"{missing} has no complete.json.*Resume from an earlier one"):
            resume(folder, checkpoint=str(folder / missing))
    with pytest.raises(ValueError, match="holds no complete checkpoint to resume from"):
        resume(tmp_path / "empty")


def test_resume_from_a_named_checkpoint_and_with_more_steps(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    constant = {"lr_scheduler_type": "constant"}
    whole = resume(tmp_path / "whole", checkpoint=None, args=constant)
    for checkpoint, steps in ((True, [5]), (str(folder / "checkpoint-2"), [3, 4, 5])):
        resumed = resume(folder, checkpoint=checkpoint, args=constant)
        assert resumed.steps_run == steps
        assert_equal(weights(resumed.model), weights(whole.model))
    assert resumed.looped_model.model.gradient_loops is None


def test_gradient_checkpointing_may_change_on_resume(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    trainer = resume(folder, checkpoint_loops=True, args={"gradient_checkpointing": True})
    assert trainer.steps_run == [5]


def test_streams_resume_exactly(tmp_path):
    def stream():
        return StreamedExamples(lambda: iter(examples(7)))

    whole = build_run(tmp_path, stream=stream(), max_steps=5)
    whole.train()
    resumed = build_run(tmp_path, stream=stream(), max_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(resumed.model), weights(whole.model))


def test_old_checkpoints_are_deleted_only_when_the_next_is_complete(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "save_total_limit": 2}
    seen = []

    class Watching(LoopMDMTrainer):
        def _identity(self):  # between transformers' part of a checkpoint and ours
            seen.append(last_complete_checkpoint(tmp_path))
            return super()._identity()

    Watching(
        tiny_model(max_train_loops=4), training_args(tmp_path, **args), train_dataset=examples_with_index(20),
        data_collator=MaskedDiffusionCollator(MASK, PAD),
    ).train()  # fmt: skip
    assert seen == [None, *(str(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3, 4))]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def examples_with_index(count: int) -> list[dict]:
    return [{**row, "index": index} for index, row in enumerate(examples(count))]


def test_a_checkpoint_written_over_is_incomplete_meanwhile(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
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


def test_an_average_cannot_begin_on_resume(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    with pytest.raises(ValueError, match="ema"):
        resume(folder, ema_decay=0.9)


def test_the_same_model_from_another_folder_is_the_same_run(tmp_path):
    tiny_model(max_train_loops=4).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = {"max_steps": 2}
    resume(tmp_path / "run", model=LoopMDMForMaskedLM.from_pretrained(tmp_path / "a"), checkpoint=None, args=first)
    assert resume(tmp_path / "run", model=LoopMDMForMaskedLM.from_pretrained(tmp_path / "b")).steps_run == [3, 4, 5]


def test_folders_of_other_names_are_no_checkpoints(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-best")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")


# --- adapters ---

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    "lora all-linear": LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"),
    "dora": LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def adapted_model(name: str):
    torch.manual_seed(0)
    return get_peft_model(tiny_model(max_train_loops=4), copy.deepcopy(ADAPTERS[name]))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_learn_and_travel(tmp_path, name):
    base = weights(tiny_model(max_train_loops=4))
    model = adapted_model(name)
    stream = ExampleStream([{"input_ids": torch.tensor([2, 4, 6, 8, 10, 12])}] * 4, 400, seed=0)
    args = {"max_steps": 24, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    trainer = make_trainer(tmp_path, model, stream, args, ema_decay=0.5 if name == "lora" else None)
    trainer.train()
    learnt = torch.tensor([[2, 4, 6, 8, 10, 12]])
    before, after = (
        nelbo(m, learnt, num_loops=[1, 4], num_samples=32).per_token()[0] for m in (adapted_model(name), model)
    )
    assert (after < 0.8 * before).all()
    draws = [draw_num_loops(4, 5, step) for step in range(24)]
    assert [line["num_loops"] for line in steps_logged(trainer)] == draws
    inner = {
        key.replace(".base_layer", "").replace("base_model.model.", ""): value for key, value in weights(model).items()
    }
    assert all(torch.equal(inner[key], value) for key, value in base.items()), "the base is left alone"

    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny_model(max_train_loops=4), tmp_path / "adapter").eval()
    ids, prompt = random_ids(2, 8), torch.tensor([[2, 4, 6]])
    with torch.no_grad(), trainer.averaged_weights():
        model.eval()
        results = {loops: model(ids, num_loops=loops).logits for loops in (1, 3, 6)}
        generated = {loops: model.generate(prompt, max_new_tokens=3, num_loops=loops) for loops in (1, 3, 6)}
        merged = copy.deepcopy(model).merge_and_unload()
        plain = tiny_model(max_train_loops=4)
        for loops, expected in results.items():
            assert torch.equal(loaded(ids, num_loops=loops).logits, expected)
            torch.testing.assert_close(merged(ids, num_loops=loops).logits, expected, rtol=0, atol=2e-4)
            assert not torch.allclose(plain(ids, num_loops=loops).logits, expected, atol=0.1)
            assert torch.equal(loaded.generate(prompt, max_new_tokens=3, num_loops=loops), generated[loops])
            assert generated[loops].shape == (1, 6) and not (generated[loops] == MASK).any()


@pytest.mark.parametrize("ema", [None, 0.8])
def test_adapters_resume_bit_for_bit(tmp_path, ema):
    def run(checkpoint=None):
        args = {"save_strategy": "steps", "max_steps": 5}
        trainer = make_trainer(tmp_path, adapted_model("lora"), args=args, ema_decay=ema, checkpoint_loops=True)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run()
    resumed = run(str(tmp_path / "checkpoint-2"))
    assert_equal(weights(resumed.model), weights(whole.model))
    assert not torch.equal(
        *(run.model.state_dict()["base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"]
          for run in (whole, make_trainer(tmp_path, adapted_model("lora"))))
    )  # fmt: skip
    if ema:
        assert_equal(weights(resumed.ema.module), weights(whole.ema.module))
    with pytest.raises(ValueError, match="has no complete"):
        (tmp_path / "checkpoint-2" / "complete.json").unlink()
        run(str(tmp_path / "checkpoint-2"))


def test_loss_of_adapted_models_is_per_label(tmp_path):
    """transformers must see through PEFT that the model divides its loss itself, or accumulation counts it twice."""
    results = []
    for size, accumulation in ((4, 1), (2, 2)):
        rows = [{**row, "prompt_length": 5} for row in examples(10)]
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        trainer = make_trainer(tmp_path, adapted_model("lora"), ExampleStream(rows, 64, seed=0), args)
        assert isinstance(trainer, Trainer)
        trainer.train()
        results.append([line["loss"] for line in steps_logged(trainer)])
    assert results[0] == pytest.approx(results[1], rel=1e-4)
