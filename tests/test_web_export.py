# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What the page loads of a model: the graphs compute what the model does, and the description is right."""

import importlib.util
import json
from pathlib import Path

import pytest
from browser import need
from tiny import tiny_model
from transformers import AutoTokenizer

from loopmdm.web.export import Board, export_board_model, page_settings

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
    ("settings", "said"),
    [
        ({"suppress_tokens": [4]}, r"`suppress_tokens` \(\[4\]\)"),
        ({"do_sample": True, "temperature": 0.5}, "`do_sample`"),
        ({"loop_tolerance": 0.1}, "`loop_tolerance`"),
        ({"num_loops": [1, 2]}, r"`num_loops` \(\[1, 2\]\)"),
        ({"unmasking": "random"}, "`unmasking`"),
        ({"max_new_tokens": 3}, "`max_new_tokens`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_the_page_does_not_have_are_named(settings, said):
    model = tiny_model()
    model.generation_config.update(**settings)
    with pytest.raises(ValueError, match=f"The generation_config.json of it asks for {said}"):
        page_settings(model, "it", 16)


def test_other_saved_settings_are_those_that_the_page_begins_with():
    model = tiny_model(num_loops=3)
    assert page_settings(model, "it", 16) == {"num_loops": 3, "max_denoising_steps": 16, "unmasking": "confidence"}
    model.generation_config.update(num_loops=5, unmasking="margin", max_denoising_steps=4, max_new_tokens=0)
    assert page_settings(model, "it", 16) == {"num_loops": 5, "max_denoising_steps": 4, "unmasking": "margin"}


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
