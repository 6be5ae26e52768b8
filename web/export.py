# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A model of boards as files that a browser runs: three ONNX graphs, and a description of model and board.

The graphs are the parts of the loop: `prelude` (embeddings and head), `loop` (mid once) and `readout` (tail, norm and
output head). Whoever runs them decides how often mid is applied, and may read out the prediction after every loop.
"""

import json
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..modeling_loopmdm import LoopMDMForMaskedLM

GRAPHS = ("prelude", "loop", "readout")
FLOAT32_LIMIT = 8_000_000  # bytes of the graphs together, above which weights become int8
MISSING = "Exporting a model takes {}; run `pip install 'loopmdm[web]'`."


@dataclass
class Board:
    """How the tokens of a model lie on a board: `side` x `side` cells, row by row, in boxes."""

    side: int
    box: tuple[int, int]  # rows and columns of a box
    digits: list[int]  # token ids of 1, 2, ..., side
    blank: int  # token id of a blank, the mask token

    @classmethod
    def of(cls, model: LoopMDMForMaskedLM, tokenizer: Any, name: str) -> "Board":
        """
        The board of a model whose vocabulary is the digits 1 to n, n not a prime, and special tokens, and which sees
        n * n positions. Raises a ValueError for other models.
        """
        config, special = model.config, set(tokenizer.all_special_ids)
        ids = {text: token for text, token in tokenizer.get_vocab().items() if token not in special}
        side, wrong = math.isqrt(config.max_position_embeddings), None
        names = [str(digit) for digit in range(1, side + 1)]
        if config.attention_block_size is not None:
            wrong = "it writes from left to right"
        elif set(ids) != set(names):
            wrong = f"its vocabulary is not that of a board ({len(ids)} tokens beside the special ones)"
        elif side * side != config.max_position_embeddings or _box(side)[0] == 1 or side > 9:
            wrong = f"its {config.max_position_embeddings} positions are not those of a board"
        if wrong is not None:
            raise ValueError(
                f"{name} does not fill in boards: {wrong}. The page shows models of n x n boards of digits (n = 4, 6, "
                "8, 9); `loopmdm generate --html` makes a page of what any model writes."
            )
        return cls(side, _box(side), [ids[digit] for digit in names], config.mask_token_id)

    def encode(self, puzzle: str) -> list[int]:
        """The tokens of a puzzle's characters: digits, and anything else for a blank."""
        return [self.digits[int(char) - 1] if char in "123456789" else self.blank for char in puzzle]

    def decode(self, tokens: list[int]) -> str:
        return "".join(str(self.digits.index(token) + 1) if token in self.digits else "." for token in tokens)


def _box(side: int) -> tuple[int, int]:
    """Rows and columns of the boxes of a board: 3 x 3 of 9, 2 x 3 of 6."""
    rows = max(divisor for divisor in range(1, math.isqrt(side) + 1) if side % divisor == 0)
    return rows, side // rows


class Part(nn.Module):
    """One of the `GRAPHS` as a module of one input. Everything else about the positions becomes constants."""

    def __init__(self, name: str, model: LoopMDMForMaskedLM, context: Any, length: int):
        super().__init__()
        self.name, self.model, self.context = name, model, context
        # The position whose state predicts each token, found by aligning the positions themselves
        positions = torch.arange(length, dtype=torch.float32)[None, :, None]
        self.sources = model.align(positions)[0, :, 0].long()

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Tokens `(1, length)` or states `(1, length, hidden_size)` to states or logits `(1, length, vocab_size)`."""
        base = self.model.model
        if self.name == "prelude":
            return base.prelude(value)[0]
        if self.name == "loop":  # mid(h); damped models go a part of the way there
            return base.loop(value, self.context)
        return self.model.logits(base.readout(value, self.context)[:, self.sources])


@torch.no_grad()
def export_graphs(model: LoopMDMForMaskedLM, length: int, folder: Path, weights: str = "auto") -> dict[str, Any]:
    """
    Writes `prelude.onnx`, `loop.onnx` and `readout.onnx` for one row of `length` positions, and compares them with
    the model.

    Args:
        model ([`LoopMDMForMaskedLM`]): In float32 and eval mode.
        length (`int`): Positions.
        folder (`Path`): An existing folder.
        weights (`str`): `"float32"`, `"int8"` (matrices, with a scale for each column), or `"auto"`: int8 where
            float32 takes more than 8 MB.

    Returns:
        `dict`: The kind of weights, the bytes of every file, and the largest difference of a probability.

    Raises:
        ValueError: onnx, onnxscript or onnxruntime is missing, or float32 graphs do not compute what the model does.
    """
    if weights not in ("auto", "float32", "int8"):
        raise ValueError(f"`weights` is {weights!r}; choose auto, float32 or int8.")
    for library in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(library)
        except ImportError:
            raise ValueError(MISSING.format(library)) from None
    ids = torch.full((1, length), model.config.mask_token_id)
    states, context = model.model.prelude(ids)
    examples = {"prelude": ids, "loop": states, "readout": states}
    protos = {name: _to_onnx(Part(name, model, context, length), examples[name]) for name in GRAPHS}
    if weights == "auto":
        weights = "float32" if sum(proto.ByteSize() for proto in protos.values()) <= FLOAT32_LIMIT else "int8"
    for name, proto in protos.items():
        if weights == "int8":
            _round_weights(proto)
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
    difference = _largest_difference(model, ids, folder)
    if weights == "float32" and difference > 1e-3:
        raise ValueError(f"The exported graphs differ from the model: probabilities by up to {difference:.2g}.")
    sizes = {name: (folder / f"{name}.onnx").stat().st_size for name in GRAPHS}
    return {"weights": weights, "bytes": sizes, "largest_difference": difference}


def _to_onnx(part: Part, example: torch.Tensor) -> Any:
    """The ModelProto of a part, weights included."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": ["input"], "output_names": ["output"]}
        proto = torch.onnx.export(part.eval(), (example,), dynamo=True, verbose=False, **names).model_proto
    for entry in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        entry.ClearField("metadata_props")  # where in this machine's files it comes from
    return proto


def _round_weights(proto: Any) -> None:
    """Stores matrices as int8 with a scale for each column, and turns them back into float32 in the graph."""
    import numpy as np
    from onnx import helper, numpy_helper

    graph, kept, nodes = proto.graph, [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.ndim != 2:
            kept.append(tensor)
            continue
        scale = np.maximum(np.abs(values).max(0), 1e-12) / np.float32(127)
        whole, scales = f"{tensor.name}_int8", f"{tensor.name}_scale"
        kept.append(numpy_helper.from_array(np.round(values / scale).astype(np.int8), whole))
        kept.append(numpy_helper.from_array(scale.astype(np.float32), scales))
        nodes.append(helper.make_node("DequantizeLinear", [whole, scales], [tensor.name], axis=1))
    nodes += graph.node
    for field, values in (("initializer", kept), ("node", nodes), ("value_info", [])):
        graph.ClearField(field)
        getattr(graph, field).extend(values)


def run_graphs(folder: Path, config: Any, ids: Any, num_loops: int) -> Any:
    """Logits `(1, length, vocab_size)` of the exported graphs, as onnxruntime computes them here, for int64 `ids`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = (onnxruntime.InferenceSession(folder / f"{name}.onnx", options) for name in GRAPHS)
    prelude, loop, readout = sessions
    (states,) = prelude.run(None, {"input": ids})
    step_size = 1 / num_loops if config.loop_update == "damped" else 1
    for _ in range(num_loops):
        (looped,) = loop.run(None, {"input": states})
        states = looped if step_size == 1 else states + (looped - states) * looped.dtype.type(step_size)
    return readout.run(None, {"input": states})[0]


def _largest_difference(model: LoopMDMForMaskedLM, ids: torch.Tensor, folder: Path) -> float:
    """Of a probability, between graphs and model, at one loop and at the model's own number, on random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, ids.shape, generator=generator)
    tokens = tokens.where(torch.rand(ids.shape, generator=generator) < 0.5, ids)
    differences = []
    for num_loops in {1, model.config.num_loops}:
        ours = torch.from_numpy(run_graphs(folder, model.config, tokens.numpy(), num_loops)).softmax(-1)
        differences.append(float((ours - model(tokens, num_loops=num_loops).logits.softmax(-1)).abs().max()))
    return max(differences)


@torch.no_grad()
def export_board_model(
    source: str, folder: Path, puzzles: list[str] | None = None, measured: dict[str, Any] | None = None
) -> dict[str, Any]:
    """
    Writes what the page needs of a model into a new folder: the graphs, and `model.json`, which is returned.

    Args:
        source (`str`): Folder or Hub id of a model of boards.
        folder (`Path`): Is made.
        puzzles (`list[str]`, *optional*): Among them are found samples that show what loops and steps are for.
        measured (`dict`, *optional*): Solve rates by loops and steps, as `examples/sudoku/score.py` writes them.

    Raises:
        ValueError: The model does not fill in boards, or cannot be exported.
    """
    from ..evaluation.loading import load_model, load_tokenizer

    model, tokenizer = load_model(source, "float32", "cpu"), load_tokenizer(source)
    board, config = Board.of(model, tokenizer, source), model.config
    folder.mkdir(parents=True)
    files = export_graphs(model, board.side**2, folder)
    limit = model.generation_config.max_denoising_steps
    description = {
        "board": asdict(board),
        "parameters": model.num_parameters(),
        "layers": {
            "head": config.loop_start,
            "mid": config.num_mid_layers,
            "tail": config.num_hidden_layers - config.loop_end,
        },
        "num_loops": config.num_loops,
        "max_train_loops": config.max_train_loops,
        "is_damped": config.loop_update == "damped",
        "max_denoising_steps": min(limit or board.side**2, board.side**2),
        **files,
        "samples": dict(_find_samples(model, board, puzzles or [])),
        "measured": _solve_rates(measured),
    }
    (folder / "model.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return description


def _solve_rates(measured: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of a results file, the share solved by loops and steps, and of how many puzzles."""
    if measured is None:
        return None
    rows = [[row["num_loops"], row["max_denoising_steps"], row["solved"]] for row in measured["rows"]]
    return {"count": measured["settings"]["count"], "rows": rows}


def _find_samples(model: LoopMDMForMaskedLM, board: Board, puzzles: list[str]) -> Iterator[tuple[str, str]]:
    """
    Names and puzzles: easy (one loop solves it in one step), hard (only more loops do, and one loop errs most), and
    harder (loops alone do not, but steps do), as far as there are such.
    """
    puzzles = [puzzle for puzzle in puzzles if len(puzzle) == board.side**2]
    if not puzzles:
        return
    ids, loops = torch.tensor([board.encode(puzzle) for puzzle in puzzles]), model.config.num_loops
    once, looped, stepped = (
        model.generate(ids, max_new_tokens=0, num_loops=num_loops, max_denoising_steps=steps)
        for num_loops, steps in ((1, 1), (loops, 1), (loops, 8))
    )
    best = [_clashes(board, row) == 0 for row in stepped.tolist()]
    few, many = ([_clashes(board, row) for row in answers.tolist()] for answers in (once, looped))
    blanks = (ids == board.blank).sum(-1).tolist()
    kinds = {
        "easy": [(-blanks[i], i) for i in range(len(puzzles)) if best[i] and few[i] == 0],
        "hard": [(few[i], i) for i in range(len(puzzles)) if best[i] and many[i] == 0 and few[i] > 0],
        "harder": [(many[i], i) for i in range(len(puzzles)) if best[i] and many[i] > 0],
    }
    for name, found in kinds.items():
        if found:
            yield name, puzzles[max(found)[1]]


def _clashes(board: Board, tokens: list[int]) -> int:
    """Cells that share their digit with another of their row, column or box."""
    (rows, columns), side = board.box, board.side
    clashing = set()
    for unit in (
        lambda cell: cell // side,
        lambda cell: cell % side,
        lambda cell: (cell // side // rows, cell % side // columns),
    ):
        seen: dict[Any, list[int]] = {}
        for cell, token in enumerate(tokens):
            seen.setdefault((unit(cell), token), []).append(cell)
        clashing |= {cell for cells in seen.values() if len(cells) > 1 for cell in cells}
    return len(clashing)
