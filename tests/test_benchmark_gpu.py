# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/gpu.py runs on a CPU; a section that fails or takes too long is recorded, and the others go on."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(*sections: str) -> dict:
        output = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--device", "cpu", "--output", str(output)])
        sys.argv += ["--threads", "1", "--sections", *sections]
        try:
            gpu.main()
        finally:
            found.update(json.loads(output.read_text())["sections"])
        return found

    found: dict = {}
    run.found = found
    return run


def test_sections_that_have_no_test_of_their_own(run):
    found = run("logits", "calls", "waits", "loops", "training")
    assert {(row["attention"], row["dtype"]) for row in found["logits"]["rows"]} >= {("sdpa", "bfloat16")}
    assert all(row["passed"] for name in ("logits", "calls") for row in found[name]["rows"])
    greedy, *others = found["waits"]["rows"]
    # Looking at what is left, and the checks of values that a CPU makes
    assert 1 <= greedy["waits_per_step"]["operations"] <= 8
    assert len(others) == 5
    assert [row["num_loops"] for row in found["loops"]["rows"]] == [1, 3]
    assert found["training"]["ratios_to_llama"]["LoopMDM, checkpoints"]["activation_bytes"] < 1


def test_a_section_that_fails_does_not_stop_the_others(run, monkeypatch):
    def fails(args):
        raise RuntimeError("no kernel")

    sections = {"logits": (fails, 5), "calls": (lambda args: time.sleep(60), 0.2), "loops": (lambda args: {"a": 1}, 5)}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    with pytest.raises(SystemExit, match="Failed: logits; calls"):
        run("logits", "calls", "loops")
    assert run.found["logits"]["failed"] == "RuntimeError: no kernel"
    assert "longer than 0.2 seconds" in run.found["calls"]["failed"]
    assert run.found["loops"]["a"] == 1


def test_the_whole_takes_eight_minutes_at_most():
    assert sum(seconds for _, seconds in gpu.SECTIONS.values()) <= 480
