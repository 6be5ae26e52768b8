# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Two processes train as one does: DDP and FSDP2 on CPUs, by the trainer and by a training loop of one's own."""

import json
import time
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from processes import start

from loopmdm import LoopMDMForMaskedLM
from loopmdm.training import draw_num_loops, last_complete_checkpoint, training_flops

TIMEOUT = 240  # seconds; ranks that wait for each other fail after it


def launch(folder: Path) -> list[dict]:
    """Runs the worker on two processes. Returns the results of every rank."""
    with open(folder / "output.txt", "wb") as output:
        started = [start(worker.main, folder, rank, stderr=output.fileno()) for rank in range(worker.RANKS)]
        deadline = time.monotonic() + TIMEOUT
        for process in started:
            process.join(max(0, deadline - time.monotonic()))
        for process in started:
            process.kill()
            process.join()
    assert [process.exitcode for process in started] == [0] * worker.RANKS, (folder / "output.txt").read_text()[-6000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(worker.RANKS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    """Results of one process with the same micro-batches."""
    return worker.run_trainers(folder / "alone", 1, worker.DDP_RUNS)


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return launch(folder)


@pytest.fixture(scope="module")
def ddp(ranks) -> list[dict]:
    return [rank["ddp"] for rank in ranks]


@pytest.fixture(scope="module")
def fsdp(ranks) -> list[dict]:
    return [rank["fsdp"] for rank in ranks]


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance):
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **({"rtol": 1e-9, "atol": 1e-10} | tolerance), msg=name)


def assert_same_run(ranks: list[dict], expected: dict):
    """Loops, gradients of every step, weights and log of a run of the trainer on every rank."""
    for actual in ranks:
        assert actual["steps"] == expected["steps"]
        assert actual["loops"] == expected["loops"]
        assert len(actual["gradients"]) == len(expected["gradients"]) == len(expected["loops"])
        for gradients, others in zip(actual["gradients"], expected["gradients"], strict=True):
            assert_same_tensors(gradients, others)
        assert_same_tensors(actual["weights"], expected["weights"])
        assert actual["tokens"] == pytest.approx(expected["tokens"], rel=1e-4)
        for entry, other in zip(actual["log"], expected["log"], strict=True):
            assert entry == pytest.approx(other, rel=1e-6), "the Trainer sums up losses in float32"
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name]), f"{name} differs between the ranks"


# --- DDP ---


@pytest.mark.parametrize("run", worker.DDP_RUNS)
def test_ddp_trains_as_one_process_does(ddp, alone, run):
    assert {rank[run]["wrapper"] for rank in ddp} == {"DistributedDataParallel"}
    assert_same_run([rank[run] for rank in ddp], alone[run])


def test_ranks_loop_alike_as_drawn_for_each_step(ddp):
    drawn = [draw_num_loops(4, seed=5, step=step) for step in range(worker.STEPS)]
    assert [rank["saved"]["loops"] for rank in ddp] == [drawn, drawn]
    assert len(set(drawn)) > 1
    assert max(drawn) > 2, "so that `gradient_loops` leaves some out"


def test_logged_operations_are_those_of_all_ranks(ddp):
    """Rows of one length: every rank does the same number of operations but for the head."""
    model, batch, length = worker.make_model(), worker.BATCH, 7
    body = sum(
        training_flops(model, batch, length, draw_num_loops(4, 5, step), 0) * worker.ACCUMULATION for step in range(2)
    )
    head = 3 * (model.flops(1, 1, 1, 1) - model.flops(1, 1, 1, 0))
    for rank in ddp:
        logged = [entry["training_flops"] for entry in rank["stream"]["log"] if "training_flops" in entry][-1]
        positions = (logged - worker.RANKS * body) / head
        rows = 2 * worker.RANKS * worker.ACCUMULATION * batch
        assert positions == int(positions)
        assert rows <= positions <= rows * length


def test_nelbo_is_logged_by_both_ranks(ddp, alone):
    for run in (*(rank["saved"] for rank in ddp), alone["saved"]):
        evaluations = [entry for entry in run["log"] if "eval_nelbo_3" in entry]
        assert [entry["step"] for entry in evaluations] == [2, 4]
        assert all(entry["eval_loss"] == entry["eval_nelbo_3"] != entry["eval_nelbo_1"] for entry in evaluations)


def test_ddp_resumes_exactly(ddp, alone):
    assert ddp[0]["resumed"]["steps"] == worker.STEPS
    assert len(ddp[0]["resumed"]["gradients"]) == 2, "the first two steps are not repeated"
    for rank in ddp:
        assert_same_tensors(rank["resumed"]["weights"], rank["saved"]["weights"], rtol=0, atol=0)
        assert rank["resumed"]["log"][:-1] == rank["saved"]["log"][:-1]


def test_checkpoint_of_two_ranks_on_one_process(ddp, folder, tmp_path):
    saved = folder / "ddp" / "saved"
    assert last_complete_checkpoint(saved) == str(saved / "checkpoint-4")
    model = LoopMDMForMaskedLM.from_pretrained(saved / "checkpoint-4")
    assert_same_tensors(dict(model.named_parameters()), ddp[0]["saved"]["weights"], rtol=0, atol=0)

    settings = {**worker.SAVED, "save_strategy": "no"}
    checkpoint = str(saved / "checkpoint-2")
    # The same micro-batches, one by one
    resumed = worker.train(tmp_path, 1, checkpoint, **settings)
    assert resumed["steps"] == worker.STEPS
    assert resumed["loops"] == ddp[0]["saved"]["loops"][2:]
    assert_same_tensors(resumed["weights"], ddp[0]["saved"]["weights"])
    for size, accumulation, message in (
        (worker.BATCH, worker.ACCUMULATION, "number of rows in an optimiser step is 8, here 4"),
        (2 * worker.BATCH, worker.ACCUMULATION, "number of rows in a micro-batch is 2, here 4"),
    ):
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        with pytest.raises(ValueError, match=message):
            worker.train(tmp_path, 1, checkpoint, **settings, **batches)


# --- FSDP2 ---


@pytest.fixture(scope="module")
def own_loop() -> dict:
    return worker.own_loop(worker.make_model())


@pytest.mark.parametrize("mode", worker.MODES)
def test_fsdp_gradients_equal_one_process(ranks, own_loop, mode):
    for rank in ranks:
        for gradients, others in zip(rank["own loop"]["gradients"][mode], own_loop["gradients"][mode], strict=True):
            assert_same_tensors(gradients, others)
        assert_same_tensors(rank["own loop"]["weights"], own_loop["weights"])


def test_fsdp_nelbo_equals_one_process(ranks, own_loop):
    assert (own_loop["nelbo"][0] - own_loop["nelbo"][1]).abs().min() > 0.01, "loops matter"
    for rank in ranks:
        torch.testing.assert_close(rank["own loop"]["nelbo"], own_loop["nelbo"], rtol=1e-9, atol=0)
        assert rank["own loop"]["training"], "and the model is put back"


def test_weights_gathered_from_two_ranks_load(ranks, folder):
    model = LoopMDMForMaskedLM.from_pretrained(folder / "gathered")
    assert_same_tensors(dict(model.named_parameters()), ranks[0]["own loop"]["weights"], rtol=0, atol=0)


def test_fsdp_trainer_trains_as_one_process_does(fsdp, alone):
    assert all(rank["saved"]["is_sharded"] for rank in fsdp)
    assert_same_run([rank["saved"] for rank in fsdp], alone["saved"])


def test_fsdp_trainer_resumes_exactly(fsdp):
    for rank in fsdp:
        assert len(rank["resumed"]["gradients"]) == 2
        assert_same_tensors(rank["resumed"]["weights"], rank["saved"]["weights"], rtol=0, atol=0)


def test_what_several_processes_cannot_do_is_refused(ranks):
    for rank in ranks:
        other, split, unsaved = rank["refused"]
        assert "`state_dict_type` is SHARDED_STATE_DICT, with which no model is saved; set it to FULL" in unsaved
        assert "its use of FSDP is False, here True" in other
        assert "`split_batches` is True" in split


@pytest.mark.parametrize(("run", "step"), [("saved", 4), ("plain", 1)])
def test_checkpoint_of_fsdp_loads(fsdp, folder, run, step):
    """A plain Trainer's too, which draws loops by the callback."""
    assert fsdp[0][run]["is_sharded"]
    checkpoint = folder / "fsdp" / run / f"checkpoint-{step}"
    model = LoopMDMForMaskedLM.from_pretrained(checkpoint)
    assert_same_tensors(dict(model.named_parameters()), fsdp[0][run]["weights"], rtol=0, atol=0)
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert not [name for name in auto_map.values() if "fsdp" in name.lower()]
    assert (checkpoint / "modeling_loopmdm.py").is_file(), "the code of the model's own class"
    assert not [path.name for path in checkpoint.glob("_fsdp*.py")]
