# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What the arms are trained on: examples in one order for all of them, the shape of the model, rows to evaluate."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sudoku6
import torch
import word_problems
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from loopmdm import LoopMDMConfig
from loopmdm.data import pack_documents, read_documents, write_atomically

PAD, MASK = 0, 1


@dataclasses.dataclass
class Rows:
    """
    Rows to evaluate.

    Args:
        input_ids (`torch.LongTensor` of shape `(num_rows, length)`): Clean tokens.
        maskable (`torch.BoolTensor`, same shape): What is denoised, given all else.
        scored (`torch.BoolTensor`, same shape, *optional*): Where a row must be right to count as solved.
    """

    input_ids: torch.Tensor
    maskable: torch.Tensor
    scored: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, part: slice) -> "Rows":
        return Rows(*(None if t is None else t[part] for t in (self.input_ids, self.maskable, self.scored)))

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
        layers: Physical layers of the same-size model, a multiple of three.
        unit: What the NELBO is counted by.
        tokenizer: Of a task on text.
    """

    name: str
    shape: dict[str, Any]
    examples: list[dict]
    held_out: dict[str, Rows]
    transform: Callable | None = None
    batch_size: int = 64
    learning_rate: float = 3e-3
    layers: int = 3
    unit: str = "blank"
    tokenizer: Tokenizer | None = None

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
        write_atomically(path, json.dumps(make()))
    return json.loads(path.read_text())


def relabel_digits(example: dict, generator: torch.Generator) -> dict:
    """Augmentation: permutes the digits of a grid."""
    digits = torch.randperm(6, generator=generator) + 2
    return {**example, "input_ids": torch.cat((torch.tensor([PAD, MASK]), digits))[example["input_ids"]]}


def _shape(width: int, vocab_size: int, **others) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 11 * width // 4,
        "num_attention_heads": 4,
        "use_qk_norm": True,
        **others,
    }


def sudoku6_rows(cache: Path, count: int, seed: int) -> Rows:
    """Puzzles of 14 to 20 clues; digits 1-6 are the tokens 2-7."""
    pairs = cached(cache / f"sudoku6-{seed}-{count}-14-20.json", lambda: sudoku6.generate_puzzles(count, seed, 14, 20))
    input_ids = torch.tensor([[int(digit) + 1 for digit in solution] for _, solution in pairs])
    blanks = torch.tensor([[cell == sudoku6.BLANK for cell in puzzle] for puzzle, _ in pairs])
    return Rows(input_ids, blanks, scored=blanks)


def sudoku6_task(cache: Path, quick: bool, texts: dict[str, str]) -> Task:
    """6x6 Sudoku with 14 to 20 clues for 36 cells."""
    count, held_out = (256, 32) if quick else (60_000, 1000)
    train = sudoku6_rows(cache, count, 0)
    return Task(
        name="sudoku6",
        shape=_shape(32 if quick else 64, 8, position_embedding_type="learned", max_position_embeddings=sudoku6.CELLS),
        examples=[
            {"input_ids": ids, "maskable": blanks} for ids, blanks in zip(train.input_ids, train.maskable, strict=True)
        ],
        held_out={"puzzles": sudoku6_rows(cache, held_out, 1)},
        transform=relabel_digits,
        batch_size=16 if quick else 32,
    )


def arithmetic_task(cache: Path, quick: bool, texts: dict[str, str]) -> Task:
    """Word problems of 4 events, see word_problems.py; the solution is learnt, its last number is scored."""
    count, held_out = (256, 32) if quick else (100_000, 1000)
    ids = {word: index for index, word in enumerate(word_problems.VOCABULARY, start=2)}

    def read(seed: int, index: int) -> dict:
        problem, solution = (text.split() for text in word_problems.generate_problem(seed, index, events=4))
        return {
            "input_ids": torch.tensor([ids[word] for word in (*problem, *solution)]),
            "maskable": torch.tensor([False] * len(problem) + [True] * len(solution)),
        }

    test = [read(1, index) for index in range(held_out)]
    input_ids, maskable = (torch.stack([example[name] for example in test]) for name in ("input_ids", "maskable"))
    scored = torch.zeros_like(maskable)
    scored[:, -1] = True
    length = input_ids.shape[1]
    return Task(
        name="arithmetic",
        shape=_shape(
            32 if quick else 64, len(ids) + 2, position_embedding_type="learned", max_position_embeddings=length
        ),
        examples=[read(0, index) for index in range(count)],
        held_out={"problems": Rows(input_ids, maskable, scored)},
        batch_size=16 if quick else 32,
        unit="token of the solution",
    )


def language_task(
    cache: Path, quick: bool, texts: dict[str, str], vocab_size: int = 1024, held_out: int = 200, **shape
) -> Task:
    """
    Text in rows of 128 tokens of a small byte-level BPE that is trained on it; the last twentieth is held out. `shape`
    has arguments of `LoopMDMConfig`.
    """
    if "train" not in texts:
        raise ValueError("A task on text needs one to train on: give --train-text, a file in UTF-8.")
    length = 128
    if quick:
        vocab_size, length, held_out, shape = 300, 32, 64, {"width": 32}
    documents = list(read_documents(texts["train"], "\n\n"))  # as the results do, which take a line of spaces for text
    if len(documents) < 20:
        raise ValueError(
            f"{texts['train']} has {len(documents)} documents (separated by blank lines); give at least 20, so that "
            "some can be held out."
        )
    split = len(documents) - max(1, len(documents) // 20)
    key = hashlib.sha256("\n\n".join(documents).encode()).hexdigest()[:12]
    bpe = cache / f"bpe-{key}-{vocab_size}.json"
    if not bpe.is_file():
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(
            documents[:split], vocab_size, special_tokens=["[PAD]", "[MASK]", "[END]"], show_progress=False
        )
        bpe.parent.mkdir(parents=True, exist_ok=True)
        trained.save(str(bpe))
    tokenizer = Tokenizer.from_file(str(bpe))

    def rows_of(documents: list[str]) -> torch.Tensor:
        encoded = (encoding.ids for encoding in tokenizer.encode_batch(documents))
        packed = [row["input_ids"] for row in pack_documents(encoded, length, tokenizer.token_to_id("[END]"))]
        return torch.stack(packed[:-1] if len(packed[-1]) < length else packed)

    def spread(documents: list[str], path: str) -> Rows:
        rows = rows_of(documents)
        if len(rows) < 2:
            raise ValueError(f"{path} is too short to evaluate: give at least {2 * length} tokens.")
        count = min(held_out, len(rows))
        rows = rows[[i * len(rows) // count for i in range(count)]]
        return Rows(rows, torch.ones_like(rows, dtype=torch.bool))

    evaluated = {"held_out": spread(documents[split:], texts["train"])}
    if "eval" in texts:
        evaluated["other"] = spread(list(read_documents(texts["eval"], "\n\n")), texts["eval"])
    everything = torch.ones(length, dtype=torch.bool)
    return Task(
        name="language",
        shape=_shape(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=length, **{"width": 64, **shape}),
        examples=[{"input_ids": row, "maskable": everything} for row in rows_of(documents[:split])],
        held_out=evaluated,
        batch_size=16 if quick else 32,
        unit="token",
        tokenizer=tokenizer,
    )


TASKS: dict[str, Callable[[Path, bool, dict[str, str]], Task]] = {
    "sudoku6": sudoku6_task,
    "arithmetic": arithmetic_task,
    "language": language_task,
    # A sixth of the parameters: tokens a parameter grow with FLOPs / parameters^2
    "language-small": functools.partial(language_task, vocab_size=512, held_out=400, width=24, num_attention_heads=2),
}


def make_task(name: str, cache: Path, quick: bool = False, texts: dict[str, str] | None = None) -> Task:
    """
    A task by name.

    Args:
        name: One of `TASKS`.
        cache: Folder for generated data.
        quick: Tiny data and a tiny model, for tests.
        texts: Paths of the texts of a language task, by use: "train", and any others to evaluate.
    """
    return TASKS[name](cache, quick, texts or {})
