# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Training examples in the order in which they are seen."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..objective.seeds import seeded_generator
from .files import all_rows

Row = TypeVar("Row")


class ExampleStream(Dataset):
    """
    The examples of a whole run in the order in which they are seen: epoch after epoch, each shuffled differently.

    Use it with `TrainingArguments(train_sampling_strategy="sequential")`. The augmentation and the noise of an example
    then depend only on its place in the run.

    Args:
        examples: A sequence of examples, each a `dict`.
        num_examples (`int`): Length of the run: optimiser steps times examples per step (of all processes). A second
            pass over the run would repeat its masks.
        seed (`int`): Seed of the order.
        transform (*optional*): A random augmentation, `transform(example, generator) -> example`.

    Items are copies of the examples with `"index"`, their place in the run, and `"row"`, their place in `examples`.
    """

    def __init__(
        self,
        examples: Any,
        num_examples: int,
        seed: int,
        transform: Callable[[dict, torch.Generator], dict] | None = None,
    ):
        if len(examples) == 0:
            raise ValueError("There are no training examples.")
        self.examples = examples
        self.num_examples = num_examples
        self.seed = seed
        self.transform = transform
        self._epoch, self._order = -1, []

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_examples:
            raise IndexError(f"Example {index} of a run of {self.num_examples}.")
        epoch, position = divmod(index, len(self.examples))
        if epoch != self._epoch:
            generator = seeded_generator(self.seed, "order", epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.examples), generator=generator).tolist()
        row = self._order[position]
        example = dict(self.examples[row])
        if self.transform is not None:
            example = self.transform(example, seeded_generator(self.seed, "transform", index))
        return {**example, "index": index, "row": row}


def check_passes(dataset: Any, passes: int, needed: int | None = None) -> None:
    """
    Raises a ValueError if `passes` over a data set, or `needed` examples of it, would repeat masks, since its examples
    have their places in a run.
    """
    is_run = isinstance(dataset, ExampleStream)
    names = getattr(dataset, "column_names", None) if hasattr(dataset, "__len__") else None  # of a `datasets.Dataset`
    if isinstance(dataset, list) and dataset and isinstance(dataset[0], dict):
        names = dataset[0]
    if passes > 1 and (is_run or "index" in (names or ())):
        count = needed or passes * len(dataset)
        fix = f"raise its `num_examples` to {count}" if is_run else "wrap it in `ExampleStream`"
        raise ValueError(
            f"`train_dataset` has {len(dataset)} examples with their places in the run (`index`), and training would "
            f"pass over them {passes} times, with the same masks; {fix}, and pass over it once (`num_train_epochs=1`)."
        )


class StreamedExamples(IterableDataset):
    """
    The examples of a data set that is too large for the memory, in its own order, and again from the start when they
    end. Items have `"index"`, their place in the run, as in [`ExampleStream`]. Each of n workers takes every n-th
    example.

    Args:
        examples (`Callable[[], Iterable[dict]]`): Starts a pass over the data.

    Raises:
        ValueError: `examples` is not a function.
    """

    def __init__(self, examples: Callable[[], Iterable[dict[str, Any]]]):
        if not callable(examples):
            raise ValueError(
                f"`examples` is of type {type(examples).__name__}; give a function that starts a pass over it: "
                "`StreamedExamples(lambda: examples)`."
            )
        self.examples = examples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        index = 0
        while True:
            start = index
            for example in all_rows(self.examples()):
                if index % parts == part:
                    yield {**example, "index": index}
                index += 1
            if index == start:
                raise ValueError("There are no training examples.")


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` of the rows, evenly spread over them."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]
