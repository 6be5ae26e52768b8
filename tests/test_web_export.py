# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What the page loads of a model: the graphs compute what the model does, and the description is right."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from browser import need
from tiny import tiny_config, tiny_model
from transformers import AutoTokenizer

from loopmdm import LoopMDMForMaskedLM
from loopmdm.web import export
from loopmdm.web.export import Board, export_board_model, export_graphs, run_graphs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


@pytest.fixture
def exporters():
    for library in ("onnx", "onnxscript", "onnxruntime"):
        need(importlib.util.find_spec(library), f"{library} (`pip install -e .[web]`)")


def board_tokenizer(side: int, folder: Path):
    """That of the bundled model for boards of another size."""
    table = json.loads((ROOT / "tokenizer.json").read_text())
    table["model"]["vocab"] = {"[PAD]": 0, ".": 1} | {str(digit): digit + 1 for digit in range(1, side + 1)}
    (folder / "tokenizer.json").write_text(json.dumps(table))
    (folder / "tokenizer_config.json").write_text((ROOT / "tokenizer_config.json").read_text())


def test_boards_of_other_sizes_are_recognised(tmp_path):
    for side, box in ((4, (2, 2)), (6, (2, 3)), (8, (2, 4)), (9, (3, 3))):
        board_tokenizer(side, tmp_path)
        model = tiny_model(vocab_size=side + 2, mask_token_id=1, max_position_embeddings=side * side)
        board = Board.of(model, AutoTokenizer.from_pretrained(tmp_path), "it")
        assert (board.side, board.box, board.blank) == (side, box, 1)
        assert board.decode(board.encode("1.2")) == "1.2"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_position_embeddings": 80}, "vocabulary"),
        ({"max_position_embeddings": 100}, "vocabulary"),
        ({"attention_block_size": 9}, "left to right"),
        ({"max_position_embeddings": 82}, "its 82 positions"),
    ],
)
def test_models_of_something_else_are_named(tokenizer, values, said):
    values = {"vocab_size": 11, "mask_token_id": 1, "max_position_embeddings": 81} | values
    with pytest.raises(ValueError, match=said):
        Board.of(tiny_model(**values), tokenizer, "it")


@pytest.mark.parametrize(
    "values",
    [
        {"loop_update": "damped", "shift_logits": True},
        {"position_embedding_type": "learned", "loop_start": 0, "loop_end": 4},
    ],
    ids=["damped-shifted-rope", "learned-all-mid"],
)
def test_the_graphs_compute_what_the_model_does(exporters, values, tmp_path):
    model = tiny_model(max_position_embeddings=16, **values)
    found = export_graphs(model, 16, tmp_path)
    assert found["weights"] == "float32"
    assert not any(b".py" in path.read_bytes() for path in tmp_path.iterdir())  # nothing of this machine
    assert found["bytes"] == {path.stem: path.stat().st_size for path in tmp_path.iterdir()}
    ids = torch.randint(22, (1, 16), generator=torch.Generator().manual_seed(1))
    ids[0, ::3] = 22
    for num_loops in (1, 2, 5):
        with torch.no_grad():
            wanted = model(ids, num_loops=num_loops).logits
        logits = torch.from_numpy(run_graphs(tmp_path, model.config, ids.numpy(), num_loops))
        assert (logits[..., 22] == -torch.inf).all()
        torch.testing.assert_close(logits[..., :22], wanted[..., :22], rtol=0, atol=1e-4)


def test_a_large_model_has_int8_weights_that_answer_alike(exporters, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "FLOAT32_LIMIT", 10_000)
    # Of usual weights; those of `tiny_model` are large.
    torch.manual_seed(0)
    model = LoopMDMForMaskedLM(tiny_config(hidden_size=128, max_position_embeddings=16, initializer_range=0.05)).eval()
    (tmp_path / "full").mkdir()
    (tmp_path / "small").mkdir()
    found = export_graphs(model, 16, tmp_path / "small")
    full = export_graphs(model, 16, tmp_path / "full", weights="float32")
    assert found["weights"] == "int8"
    assert sum(found["bytes"].values()) < 0.5 * sum(full["bytes"].values())
    assert full["largest_difference"] < 1e-4 < found["largest_difference"] < 0.02


def test_wrong_kinds_of_weights_and_missing_libraries_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`weights` is 'int4'"):
        export_graphs(tiny_model(), 16, tmp_path, weights="int4")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"(onnxscript|onnx); run `pip install 'loopmdm\[web\]'`"):
        export_graphs(tiny_model(), 16, tmp_path)


def test_the_built_page_describes_the_bundled_model(exporters):
    folder = ROOT / "web" / "dist" / "model"
    need(folder.is_dir(), "the page (`make web`)")
    about = json.loads((folder / "model.json").read_text())
    config = json.loads((ROOT / "config.json").read_text())
    assert about["layers"]["mid"] == config["loop_end"] - config["loop_start"]
    assert sum(about["layers"].values()) == config["num_hidden_layers"]
    assert about["num_loops"] == config["num_loops"]
    assert sum((folder / f"{name}.onnx").stat().st_size for name in about["bytes"]) <= 8_000_000
    assert about["samples"] and all(len(puzzle) == about["board"]["side"] ** 2 for puzzle in about["samples"].values())
    measured = json.loads((ROOT / "examples" / "sudoku" / "results.json").read_text())
    assert len(about["measured"]["rows"]) == len(measured["rows"])


def test_an_export_is_a_folder_of_four_files(exporters, tmp_path):
    """Of a model for 4 x 4 boards, as `loopmdm web MODEL` makes it."""
    model = tiny_model(vocab_size=6, mask_token_id=1, max_position_embeddings=16)
    source = tmp_path / "model"
    model.save_pretrained(source)
    board_tokenizer(4, source)
    about = export_board_model(str(source), tmp_path / "out", puzzles=["1" * 81])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.json",
        "prelude.onnx",
        "loop.onnx",
        "readout.onnx",
    }
    assert (about["samples"], about["measured"]) == ({}, None)
    assert json.loads((tmp_path / "out" / "model.json").read_text())["board"]["side"] == 4
