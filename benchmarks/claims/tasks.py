# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What the arms are trained on: examples in one order for all of them, the shape of the model, rows to evaluate."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sudoku6
import torch

from loopmdm import LoopMDMConfig

PAD, MASK = 0, 1


@dataclasses.dataclass
class Rows:
    """
    Rows to evaluate.

    Args:
        input_ids (`torch.LongTensor` of shape `(num_rows, length)`): Clean tokens.
        maskable (`torch.BoolTensor`, same shape): What is denoised, given all else.
        scored (`torch.BoolTensor`, same shape, *optional*): Where a row must be right to count as solved.
        attention_mask (`torch.LongTensor`, same shape, *optional*): 0 on padding.
    """

    input_ids: torch.Tensor
    maskable: torch.Tensor
    scored: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, part: slice) -> "Rows":
        return Rows(
            *(None if t is None else t[part] for t in (getattr(self, f.name) for f in dataclasses.fields(Rows)))
        )

    def split(self, size: int) -> list["Rows"]:
        return [self[start : start + size] for start in range(0, len(self), size)]

    def prompts(self) -> torch.Tensor:
        """The rows with everything maskable masked: what a sampler starts from."""
        return self.input_ids.masked_fill(self.maskable, MASK)


@dataclasses.dataclass
class Task:
    """
    One task at one size.

    Args:
        name: Of the task.
        shape: Arguments of `LoopMDMConfig` that all arms share.
        examples: Training examples, each with `input_ids` and `maskable`.
        transform: Augmentation, see `ExampleStream`.
        held_out: Rows to evaluate, by name; the first are used for everything, the others for the NELBO.
        batch_size: Rows of an optimiser step.
        learning_rate: Of MuonAdamW.
        layers: Physical layers of the model of ordinary size.
        unit: What the NELBO is counted by.
    """

    name: str
    shape: dict[str, Any]
    examples: list[dict]
    held_out: dict[str, Rows]
    transform: Callable | None = None
    batch_size: int = 64
    learning_rate: float = 3e-3
    layers: int = 6
    unit: str = "blank"

    @property
    def rows(self) -> Rows:
        return next(iter(self.held_out.values()))

    @property
    def length(self) -> int:
        return self.rows.input_ids.shape[1]

    def config(self, **layout) -> LoopMDMConfig:
        return LoopMDMConfig(**{**self.shape, **layout}, mask_token_id=MASK, pad_token_id=PAD)


def cached(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, kept as JSON."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(make()))
        os.replace(temporary, path)
    return json.loads(path.read_text())


class RelabelDigits:
    """Augmentation: permutes the digits of a grid."""

    def __call__(self, example: dict, generator: torch.Generator) -> dict:
        digits = torch.randperm(6, generator=generator) + 2
        return {**example, "input_ids": torch.cat((torch.tensor([PAD, MASK]), digits))[example["input_ids"]]}


def sudoku6_task(cache: Path, quick: bool, texts: dict[str, str]) -> Task:
    """6x6 Sudoku with 10 to 18 clues of 36 cells; digits 1-6 are the tokens 2-7."""
    count, held_out = (256, 64) if quick else (60_000, 1000)

    def rows(count: int, seed: int) -> Rows:
        path = cache / f"sudoku6-{seed}-{count}.json"
        pairs = cached(path, lambda: sudoku6.generate_puzzles(count, seed, 10, 18))
        input_ids = torch.tensor([[int(digit) + 1 for digit in solution] for _, solution in pairs])
        blanks = torch.tensor([[cell == sudoku6.BLANK for cell in puzzle] for puzzle, _ in pairs])
        return Rows(input_ids, blanks, scored=blanks)

    train = rows(count, 0)
    width = 32 if quick else 128
    return Task(
        name="sudoku6",
        shape={
            "vocab_size": 8,
            "hidden_size": width,
            "intermediate_size": 11 * width // 4,
            "num_attention_heads": 4,
            "use_qk_norm": True,
            "position_embedding_type": "learned",
            "max_position_embeddings": sudoku6.CELLS,
        },
        examples=[
            {"input_ids": ids, "maskable": blanks} for ids, blanks in zip(train.input_ids, train.maskable, strict=True)
        ],
        held_out={"puzzles": rows(held_out, 1)},
        transform=RelabelDigits(),
        batch_size=16 if quick else 64,
    )


TASKS: dict[str, Callable[[Path, bool, dict[str, str]], Task]] = {"sudoku6": sudoku6_task}


def make_task(name: str, cache: Path, quick: bool = False, texts: dict[str, str] | None = None) -> Task:
    """
    A task by name.

    Args:
        name: One of `TASKS`.
        cache: Folder for generated data.
        quick: Tiny data and a tiny model, for tests.
        texts: Paths of the texts of a language task, by use: "train", and any others to evaluate.
    """
    if name not in TASKS:
        raise ValueError(f"The task is {name!r}; choose one of {', '.join(TASKS)}.")
    return TASKS[name](cache, quick, texts or {})
