# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/generation.py runs end to end; what it measures on a tiny model means nothing, what it counts does."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import generation  # noqa: E402
import reference_samplers as references  # noqa: E402


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    output, shown = tmp_path_factory.mktemp("benchmark") / "generation.json", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr(sys, "argv", ["generation.py", "--quick", "--output", str(output)])
        generation.main()
    assert "same" in shown.getvalue()
    return json.loads(output.read_text())


def test_protocol(record):
    assert {"versions", "machine", "settings", "date", "load"} <= record["protocol"].keys()
    assert record["protocol"]["settings"]["steps"] == 3 and record["parameters"] > 0


def test_same_algorithm_gives_the_same_tokens(record):
    (part,) = record["samplers"]
    names = ["LLaDA", "Fast-dLLM", "Fast-dLLM prefix", "Fast-dLLM dual", "naive loops"]
    assert [row["reference"] for row in part["exact"]] == names
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
    assert runs["ours loops, visible"]["flops"] < runs["ours loops"]["flops"]


def test_exact_cache(record):
    (part,) = record["block_causal"]
    assert [row["same_tokens"] for row in part["exact"]] == [True, True]
    assert all(row["flop_ratio"] > 2 for row in part["exact"])


def test_phases(record):
    (rows,) = record["phases"]
    assert [(row["num_loops"], row["cache"]) for row in rows] == [(1, None), (1, "dual"), (3, None), (3, "dual")]
    for row in rows:
        assert sum(row["share_of_time"].values()) == pytest.approx(1)
        assert all(row["share_of_time"][phase] > 0 for phase in ("head", "mid", "tail", "lm_head"))


def test_caches_take_memory(record):
    (rows,) = record["memory"]
    by_name = {row["cache"]: row for row in rows}
    assert by_name["none"]["formula_bytes"] == 0
    assert by_name["block-causal, exact"]["formula_bytes"] > by_name["dual"]["formula_bytes"] > 0
    assert all(row["peak_bytes"] > row["formula_bytes"] for row in rows)


class FixedLogits(nn.Module):
    """Answers with `logits`."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits

    def forward(self) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.logits)


def test_a_reference_whose_positions_are_all_alike_is_refused():
    model = FixedLogits(torch.arange(12.0).view(1, 3, 4))
    model.register_forward_hook(references.assert_positions_differ)
    model()
    model.logits = model.logits[:, :1].expand(1, 3, 4)
    with pytest.raises(SystemExit, match="same logits"):
        model()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--llada", "."], "go together"),
        (["--llada", "nowhere", "--fast-dllm", "."], "generate.py is not there"),
        (["--llada", ".", "--fast-dllm", ".", "--batch-sizes", "8"], "give --batch-sizes 1"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["generation.py", *arguments])
    with pytest.raises(SystemExit) as error:
        generation.parse_args()
    assert error.value.code == 2
    assert message in capsys.readouterr().err
