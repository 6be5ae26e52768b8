# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Training examples: read from files, tokenised, packed, put in order."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..randomness import seeded_generator

# What stands between the documents of a text file
SEPARATORS = {"blank_line": "\n\n", "line": "\n", "file": None}
# What prompts and answers are called in examples
PROMPT_NAMES = ("prompt", "question", "instruction")
ANSWER_NAMES = ("answer", "response", "output", "completion")


class ExampleStream(Dataset):
    """
    The examples of a whole run in the order they are seen: epoch after epoch, every epoch in an order of its own.

    Use it with `TrainingArguments(train_sampling_strategy="sequential")`: an example's place in the run is then all
    that its augmentation and its noise derive from.

    Args:
        examples: Indexable source of examples, each a `dict`.
        num_examples (`int`): Length of the run: optimiser steps times examples per step.
        seed (`int`): Seed of the order.
        transform (*optional*): `transform(example, generator) -> example`, a random augmentation with its own
            generator.

    Items are copies of the examples with `"index"`, their place in the run.
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
        self._epoch, self._order = -1, None

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_examples:
            raise IndexError(f"Example {index} of a run of {self.num_examples}.")
        epoch, position = divmod(index, len(self.examples))
        if epoch != self._epoch:
            generator = seeded_generator(self.seed, "order", epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.examples), generator=generator).tolist()
        example = dict(self.examples[self._order[position]])
        if self.transform is not None:
            example = self.transform(example, seeded_generator(self.seed, "transform", index))
        return {**example, "index": index}


class StreamedExamples(IterableDataset):
    """
    Examples that come one after the other, from a data set too large to hold, again from the start when they end.
    Items have `"index"`, their place in the run, as in [`ExampleStream`]; the order is the source's. Each of several
    workers takes every n-th example.

    Args:
        examples (`Callable[[], Iterable[dict]]`): Starts a pass over the data.
    """

    def __init__(self, examples: Callable[[], Iterable[dict[str, Any]]]):
        self.examples = examples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        index = 0
        while True:
            start = index
            for example in self.examples():
                if index % parts == part:
                    yield {**example, "index": index}
                index += 1
            if index == start:
                raise ValueError("There are no training examples.")


def read_documents(path: str | Path, separator: str | None = "\n\n") -> Iterator[str]:
    """
    The documents of a text file in UTF-8.

    Args:
        path: The file.
        separator (`str`, *optional*, defaults to a blank line): What stands between documents; None: the whole file
            is one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error
    documents = [text] if separator is None else text.split(separator)
    documents = [document.strip() for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{path} holds no text.")
    yield from documents


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line. Empty lines are skipped; a bad one is named by number."""
    path, rows = Path(path), []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)  # bytes, so that text in another encoding is an error of its line too
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is a {type(row).__name__}; it must be an object.")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no examples.")
    return rows


def load_dataset_rows(name: str, options: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The rows of a data set, its training split by default; `options` are arguments of `datasets.load_dataset`."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{name} is no .txt or .jsonl file; `pip install datasets` to load data sets.") from error
    try:
        return load_dataset(name, **{"split": "train", **options})
    except Exception as error:  # of the network, the Hub, the data set's files
        raise ValueError(f"The data set {name} cannot be loaded: {' '.join(str(error).split())}") from error


def pack_documents(
    documents: Iterable[list[int]], length: int, end_token_id: int | None = None, isolate: bool = False
) -> Iterator[dict[str, Any]]:
    """
    Packs tokenised documents one behind the other into rows of `length` tokens; what is left at the end makes a short
    row.

    Args:
        documents: Lists of token ids.
        length (`int`): Tokens per row.
        end_token_id (`int`, *optional*): Put behind every document.
        isolate (`bool`, defaults to `False`):
            Whether documents in one row are kept from seeing each other (`document_ids`). Otherwise attention runs
            over the whole row, as is usual in pretraining.
    """
    if length < 1:
        raise ValueError(f"`length` is {length}; it must be at least 1.")
    tokens, ids = [], []

    def row(count: int) -> dict[str, Any]:
        packed = {"input_ids": torch.tensor(tokens[:count])}
        if isolate:
            packed["document_ids"] = torch.tensor(ids[:count])
        del tokens[:count], ids[:count]
        return packed

    for document, part in enumerate(documents):
        part = part if end_token_id is None else [*part, end_token_id]
        tokens.extend(part)
        ids.extend([document] * len(part))
        while len(tokens) >= length:
            yield row(length)
    if tokens:
        yield row(len(tokens))


def encode_answer(tokenizer: Any, example: dict[str, Any], where: str = "An example") -> dict[str, Any]:
    """
    Tokens of a prompt and its answer, of which only the answer is learnt.

    Args:
        tokenizer: With a chat template where examples are conversations; with an end token, which is put behind the
            answer of a plain pair.
        example: `{"prompt": str, "answer": str}` (`question`, `instruction` and `response`, `output`, `completion` are
            understood too), or `{"messages": [{"role": ..., "content": ...}, ...]}`, whose last message is the answer.
        where: What to call the example in errors.
    """
    if "messages" in example:
        messages = example["messages"]
        is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
        if not is_list or not messages or messages[-1].get("role") != "assistant":
            raise ValueError(f"{where}: `messages` must be a list that ends with one of the role `assistant`.")
        if tokenizer.chat_template is None:
            raise ValueError(f"{where} is a conversation, and the tokenizer has no chat template.")
        whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=True, return_dict=True, add_generation_prompt=True
        )["input_ids"]
        if whole[: len(prompt)] != prompt:
            raise ValueError(f"{where}: the chat template does not put the answer behind the prompt.")
        return {"input_ids": whole, "prompt_length": len(prompt)}
    prompt = first_text(example, PROMPT_NAMES, where)
    answer = first_text(example, ANSWER_NAMES, where)
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if prompt_ids and end and prompt_ids[-1] == end[0]:
        prompt_ids = prompt_ids[:-1]  # some tokenizers end every text
    return {"input_ids": [*prompt_ids, *answer_ids, *end], "prompt_length": len(prompt_ids)}


def first_text(example: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    """The first of the fields `names` that holds a text. Raises a ValueError where none does."""
    for name in names:
        if isinstance(example.get(name), str):
            return example[name]
    raise ValueError(f"{where} has no text called {' or '.join(names)}; it has {', '.join(example) or 'nothing'}.")
