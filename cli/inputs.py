# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What evaluations read and check before they measure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .options import check_idle, given, integers


def start(model: str, output: Path | None) -> Any:
    """The configuration of a LoopMDM, after a check that the results can be written."""
    from loopmdm.evaluation.loading import read_model_config
    from loopmdm.evaluation.protocol import check_output

    if output is not None:
        check_output(output)
    return read_model_config(model)


def loop_numbers(text: str | None, default: list[int]) -> list[int]:
    """The numbers of loops to measure: those of a list such as `1,2,4`, or the default."""
    from loopmdm.configuration_loopmdm import check_num_loops

    loops = default if text is None else integers("--num-loops", text)
    for number in loops:
        check_num_loops(number)
    if len(set(loops)) != len(loops):
        raise ValueError(f"--num-loops is {text}; name each number once.")
    return loops


def measured_texts(settings: dict[str, Any], tokenizer: Any, config: Any, length: int) -> Sequence[Any]:
    """
    The texts that the options of an evaluation, `settings`, name. Those to fill in must have at most `length` tokens.
    """
    from loopmdm.evaluation.texts import read_texts

    names = ("text", "task", "text_column", "documents", "split", "subset", "limit")
    text, task, text_column, documents, split, subset, limit = (settings[name] for name in names)
    check_text_options(text, text_column=text_column, documents=documents, split=split, subset=subset)
    if task == "fill":
        check_idle("texts to fill in stand one on a line", documents=documents)
    elif task == "answers":
        check_idle("answers are read from their own fields", text_column=text_column)
    dataset = given(split=split or "train", name=subset)
    texts = read_texts(text, tokenizer, config, task, text_column or "text", documents or "file", dataset, limit)
    if not any(any(entry.maskable) for entry in texts):
        raise ValueError(f"{text} holds no token to score.")
    if task == "fill":  # what is given stands on both sides, so nothing can be cut off
        for entry in texts:
            if len(entry.input_ids) > length:
                raise ValueError(
                    f"{entry.name} has {len(entry.input_ids)} tokens, more than the {length} that the model sees at "
                    "once."
                )
    return texts


def check_text_options(text: str, **options: str | None) -> None:
    """Raises a ValueError for options that mean nothing for texts of this kind, and for unknown `documents`."""
    from loopmdm.data import SEPARATORS

    documents = options.get("documents")
    if documents is not None and documents not in SEPARATORS:
        raise ValueError(f"--documents is {documents!r}; choose one of {', '.join(SEPARATORS)}.")
    idle = {".txt": ("text_column", "split", "subset"), ".jsonl": ("documents", "split", "subset")}
    names = idle.get(Path(text).suffix, ("documents",))
    check_idle(f"{text} is not that kind of source", **{name: options.get(name) for name in names})
