# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What evaluations read and check before they measure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .options import given, integers


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


def measured_texts(
    text: str,
    tokenizer: Any,
    config: Any,
    length: int,
    task: str,
    text_column: str,
    documents: str,
    split: str,
    subset: str | None,
    limit: int | None,
) -> Sequence[Any]:
    """The texts that the options of an evaluation name. Those to fill in must have at most `length` tokens."""
    from loopmdm.evaluation.texts import read_texts

    dataset = given(split=split, name=subset)
    texts = read_texts(text, tokenizer, config, task, text_column, documents, dataset, limit)
    if task == "fill":  # what is given stands on both sides, so nothing can be cut off
        for entry in texts:
            if len(entry.input_ids) > length:
                raise ValueError(
                    f"{entry.name} has {len(entry.input_ids)} tokens, more than the {length} that the model sees at "
                    "once."
                )
    return texts
