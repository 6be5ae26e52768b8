# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A model of boards as files that a browser runs: three ONNX graphs, and a description of the model and the board."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..convert.onnx_graphs import export_graphs, saved_settings
from ..data import write_json
from ..modeling_loopmdm import LoopMDMForMaskedLM

FLOAT32_LIMIT = 8_000_000  # bytes of weights, above which they become int8
SHOWN = (
    "The page shows LoopMDMs of n x n boards of digits (n = 4, 6, 8, 9); for other models `loopmdm generate --html` "
    "makes a page of what they write."
)
RULES = ("confidence", "margin", "entropy", "left_to_right")  # values of `unmasking` that the page supports


@dataclass
class Board:
    """The layout of a model's tokens on a board of `side` x `side` cells, row by row, with boxes."""

    side: int
    box: tuple[int, int]  # rows and columns of a box
    digits: list[int]  # token ids of 1, 2, ..., side
    blank: int  # token id of a blank, the mask token

    @classmethod
    def of(cls, model: LoopMDMForMaskedLM, tokenizer: Any, name: str) -> "Board":
        """
        The board of a model with n * n positions whose vocabulary consists of the digits 1 to n, where n is not a
        prime, and special tokens. Raises a ValueError for other models.
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
            raise ValueError(f"{name} does not fill in boards: {wrong}. {SHOWN}")
        return cls(side, _box(side), [ids[digit] for digit in names], config.mask_token_id)

    def encode(self, puzzle: str) -> list[int]:
        """The tokens of a puzzle's characters; any character but a digit is a blank."""
        return [self.digits[int(char) - 1] if char in "123456789" else self.blank for char in puzzle]

    def decode(self, tokens: list[int]) -> str:
        return "".join(str(self.digits.index(token) + 1) if token in self.digits else "." for token in tokens)


def page_settings(model: LoopMDMForMaskedLM, name: str, cells: int) -> dict[str, Any]:
    """
    The loops, most steps and commit rule that are saved with the model. Raises a ValueError for saved settings of
    `generate` that the page does not support, since it would write other tokens.
    """
    saved = saved_settings(model)
    for key, value in saved.items():
        taken = {
            "pad_token_id": True,  # boards have no padding
            "max_denoising_steps": True,
            "max_new_tokens": value == 0,
            "num_loops": isinstance(value, int),
            "unmasking": value in RULES,
        }
        if not taken.get(key):
            raise ValueError(
                f"The generation_config.json of {name} asks for `{key}` ({value!r}), which the page does not support; "
                "remove it there. `loopmdm generate --html` makes a page of what any model writes."
            )
    return {
        "num_loops": saved.get("num_loops", model.config.num_loops),
        "max_denoising_steps": min(saved.get("max_denoising_steps", cells), cells),
        "unmasking": saved.get("unmasking", "confidence"),
    }


def _box(side: int) -> tuple[int, int]:
    """Rows and columns of the boxes of a board: 3 x 3 of 9, 2 x 3 of 6."""
    rows = max(divisor for divisor in range(1, math.isqrt(side) + 1) if side % divisor == 0)
    return rows, side // rows


@torch.no_grad()
def export_board_model(
    source: str, folder: Path, puzzles: list[str] | None = None, measured: dict[str, Any] | None = None
) -> dict[str, Any]:
    """
    Writes the files of a model for the page into a new folder: the graphs, and `model.json`, whose contents are
    returned.

    Args:
        source (`str`): Folder or Hub id of a model of boards.
        folder (`Path`): The new folder.
        puzzles (`list[str]`, *optional*): Puzzles to choose samples from that show the use of loops and steps.
        measured (`dict`, *optional*): Solve rates by loops and steps, as `examples/sudoku/score.py` writes them.

    Raises:
        ValueError: The model does not fill in boards, is saved with settings of `generate` that the page does not
            support, or cannot be exported.
    """
    from ..evaluation.loading import load_model, load_tokenizer

    try:
        model, tokenizer = load_model(source, "float32", "cpu"), load_tokenizer(source)
    except ValueError as error:
        raise ValueError(f"{error} {SHOWN}") from error
    board, config = Board.of(model, tokenizer, source), model.config
    settings = page_settings(model, source, board.side**2)
    folder.mkdir(parents=True)
    weights = "float32" if 4 * model.num_parameters() <= FLOAT32_LIMIT else "int8"
    files = export_graphs(model, folder, weights, board.side**2)
    description = {
        "board": asdict(board),
        "parameters": model.num_parameters(),
        "layers": {
            "head": config.loop_start,
            "mid": config.num_mid_layers,
            "tail": config.num_hidden_layers - config.loop_end,
        },
        **settings,
        "max_train_loops": config.max_train_loops,
        "is_damped": config.loop_update == "damped",
        **files,
        "samples": dict(_find_samples(model, board, puzzles or [])),
        "measured": _solve_rates(measured),
    }
    write_json(folder / "model.json", description)
    return description


def _solve_rates(measured: dict[str, Any] | None) -> dict[str, Any] | None:
    """The shares of solved puzzles by loops and steps, and the number of puzzles, from a results file."""
    if measured is None:
        return None
    rows = [[row["num_loops"], row["max_denoising_steps"], row["solved"]] for row in measured["rows"]]
    return {"count": measured["settings"]["count"], "rows": rows}


def _find_samples(model: LoopMDMForMaskedLM, board: Board, puzzles: list[str]) -> Iterator[tuple[str, str]]:
    """
    Yields names and puzzles: an easy one, which one loop solves in one step; a hard one, which only more loops solve,
    with the most errors of one loop; and a harder one, which takes steps as well; as far as there are any.
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
    """The number of cells that share their digit with another cell of their row, column or box."""
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
