# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/generation.py runs end to end; what it measures on a tiny model means nothing, what it counts does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("benchmark") / "generation.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "generation.py"), "--quick", "--output", str(output)]
    command += ["--plot", str(output.with_suffix(".png"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "same" in done.stdout
    assert output.with_suffix(".png").stat().st_size > 0
    return json.loads(output.read_text())


def test_protocol_and_model(record):
    assert {"torch", "transformers", "threads", "settings", "timing"} <= record["protocol"].keys()
    passes = record["model"]["pass_flops"]
    assert passes["3"] > passes["1"] > 0


def test_same_algorithm_gives_the_same_tokens(record):
    (part,) = record["samplers"]
    assert {row["reference"] for row in part["exact"]} == {
        "LLaDA",
        "Fast-dLLM",
        "Fast-dLLM prefix",
        "Fast-dLLM dual",
        "naive loops",
    }
    for row in part["exact"]:
        assert row["same_tokens"], row
        assert row["flop_ratio"] > 1
        assert row["share"] == pytest.approx(row["factor"] / row["flop_ratio"])


def test_options_and_looping(record):
    (part,) = record["samplers"]
    assert all(row["flop_ratio"] >= 1 and 0 <= row["agreement"] <= 1 for row in part["approximate"])
    assert any(row["flop_ratio"] > 2 for row in part["approximate"])
    plain, dual = part["looping"]
    assert 1 < plain["flop_ratio"] < 3 and 1 < dual["flop_ratio"] < 3
    runs = part["runs"]
    assert runs["ours loops"]["loops_per_pass"] == 3
    assert runs["ours loops, token"]["token_layer_passes"] < runs["ours loops"]["token_layer_passes"]


def test_exact_cache(record):
    (part,) = record["block_causal"]
    assert [row["same_tokens"] for row in part["exact"]] == [True, True]
    assert all(row["flop_ratio"] > 2 for row in part["exact"])


def test_phases(record):
    for row in record["phases"]:
        assert sum(row["share_of_time"].values()) == pytest.approx(1)
        assert all(row["flops"][phase] > 0 for phase in ("head", "mid", "tail", "lm_head"))
        assert all(value > 0 for value in row["share_of_matmul_rate"].values())


def test_caches_hold_what_the_formula_says(record):
    rows = {row["cache"]: row for row in record["memory"]}
    assert rows["none"]["held_bytes"] == rows["none"]["formula_bytes"] == 0
    for row in rows.values():
        assert row["held_bytes"] == row["formula_bytes"], row
    assert rows["dual, each"]["held_bytes"] > rows["dual, last"]["held_bytes"] > 0
    assert rows["dual, each"]["peak_over_no_cache_bytes"] > 0


def test_compilation(record):
    (part,) = record["compile"]
    assert part["recompilations"] == 0
    assert all(row["same_tokens"] for row in part["against_plain"])
    assert len(part["first_calls"]) == 3
