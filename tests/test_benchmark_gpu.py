# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/gpu.py runs on a CPU with tiny models; one section that fails does not stop the others."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu


def run(monkeypatch, tmp_path, *sections) -> tuple[int, dict]:
    output = tmp_path / "gpu.json"
    given = ["--device", "cpu", "--tiny", "--output", str(output), *(["--sections", *sections] if sections else [])]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *given])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return int(ended.value.code), json.loads(output.read_text())["sections"]


def test_every_section_finds_something(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "VARIANTS", {"block-causal": gpu.VARIANTS["block-causal"]})
    monkeypatch.setattr(gpu, "SECTIONS", {name: (section, 600) for name, (section, _) in gpu.SECTIONS.items()})
    code, sections = run(monkeypatch, tmp_path)
    assert code == 0 and [*sections] == [*gpu.SECTIONS], sections
    results = {name: section["result"] for name, section in sections.items()}
    assert len(results["correctness"]) == 4 and all(row["is_right"] for row in results["correctness"])
    assert len(results["calls"]) == 6 and all(row["is_right"] for row in results["calls"])
    assert all(row["same_tokens"] for row in results["float32"]["exact"])
    assert [row["same_tokens"] for row in results["bfloat16"]["block_causal"]["exact"]] == [True, True]
    assert [row["num_loops"] for row in results["bfloat16"]["loops"]] == [1, 2, 4, 8]
    assert [row["model"] for row in results["training"]["rows"]][2:] == ["LoopMDM, checkpoints", "LoopMDM, compiled"]
    assert all(0 < row["waits_per_step"] <= 8 for row in results["synchronisations"])


def test_sections_that_fail_or_take_too_long_are_recorded(monkeypatch, tmp_path):
    def fail(sections):
        raise RuntimeError("no such kernel")

    sections = {"bad": (fail, 60), "slow": (lambda _: time.sleep(9), 0.05), "good": (lambda _: 1, 60)}
    sections["dead"] = (lambda _: os._exit(3), 60)
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    code, found = run(monkeypatch, tmp_path)
    assert code == 1
    assert found["bad"]["failed"] == "RuntimeError: no such kernel"
    assert found["dead"]["failed"] == "The process ended with 3."
    assert "longer than 0.05 s" in found["slow"]["failed"] and found["good"]["result"] == 1


def test_one_of_two_folders_is_refused_before_anything_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--llada", str(tmp_path)])
    monkeypatch.setattr(gpu, "run_section", lambda *_: pytest.fail("ran"))
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2 and "--fast-dllm" in capsys.readouterr().err


def test_a_machine_without_a_gpu_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2 and "--device cpu --tiny" in capsys.readouterr().err
