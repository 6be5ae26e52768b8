# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Options that several commands share, and the parsing of their values."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Argument(help="Folder of a model, or its id on the Hugging Face Hub.", show_default=False)
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, ... or auto.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the tokenizer's own code.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Of `generate`
MaxDenoisingSteps = Annotated[int | None, typer.Option(help="Forward passes per block at most.")]
BlockLength = Annotated[int | None, typer.Option(help="Positions denoised together.")]
ConfidenceThreshold = Annotated[float | None, typer.Option(help="Commit all tokens with at least this confidence.")]
GenerateArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--generate", help="Arguments of `generate`, such as unmasking=entropy,block_length=32; may be repeated."
    ),
]

# Of evaluations
Output = Annotated[Path | None, typer.Option(help="Folder for JSON, arrays and pictures; it must not exist.")]
LoopList = Annotated[str | None, typer.Option(help="Numbers of loops to measure, such as 1,2,4.")]
NumMasks = Annotated[int, typer.Option(help="Masks of each text or window; even.")]
Text = Annotated[
    str, typer.Option(help="A text (.txt), JSON lines (.jsonl), or the name of a data set.", show_default=False)
]
Task = Annotated[
    str, typer.Option(help="What is scored: texts (all of each), answers (given prompts) or fill (the mask tokens).")
]
TextColumn = Annotated[str | None, typer.Option(help="Column with the text, in JSON and data sets (default: text).")]
Documents = Annotated[
    str | None, typer.Option(help="What separates the texts of a .txt: file (none, the default), blank_line or line.")
]
Split = Annotated[str | None, typer.Option(help="Split of a data set (default: train).")]
Subset = Annotated[str | None, typer.Option(help="Configuration of a data set, by name.")]
TextLimit = Annotated[int | None, typer.Option(help="Read at most this many texts.")]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given, without those that are None."""
    return {name: value for name, value in options.items() if value is not None}


def check_idle(why: str, **options: Any) -> None:
    """Raises a ValueError for the first option that was given although it has no effect, which `why` explains."""
    for name, value in options.items():
        if value is not None and value is not False:
            shown = "" if value is True else f" ({value})"
            raise ValueError(f"--{name.replace('_', '-')}{shown} has no effect: {why}; leave it out.")


def at_least(least: int, **options: int | None) -> None:
    """Raises a ValueError for the first option that was given and is less than `least`."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}.")


def integers(name: str, text: str | None) -> list[int] | None:
    """The integers of a list such as `1,2,4`."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} is {text!r}; give an integer, or a list such as 1,2,4.") from None


def pairs(name: str, texts: list[str] | None, read: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """`key=value` pairs, separated by commas. Values are YAML unless `read` is given; commas may stand in `[...]`."""
    found: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", ",".join(texts or [])):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if part and not (key and equals):
            raise ValueError(f"{name} holds {part!r}, which is not `key=value`.")
        if key in found:
            raise ValueError(f"{name} gives {key!r} twice; give it once.")
        if part:
            found[key] = (read or _yaml)(value)
    return found


def generate_arguments(texts: list[str] | None, length: str) -> dict[str, Any]:
    """
    What --generate gives. Raises a ValueError for what `generate` does not take, and for what other options of the
    command give: the number of loops, and, by the option called `length`, that of new tokens.
    """
    from loopmdm.generation_utils import LoopMDMGenerationConfig, reject_unknown

    arguments = pairs("--generate", texts)
    for name, option in {"num_loops": "--num-loops", "max_new_tokens": length, "max_length": length}.items():
        if name in arguments:
            raise ValueError(f"--generate gives `{name}`; use {option} instead.")
    reject_unknown({name: arguments[name] for name in arguments.keys() - LoopMDMGenerationConfig.FIELDS.keys()})
    return arguments


def _yaml(text: str) -> Any:
    import yaml

    if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text):  # which YAML takes for a text
        return float(text)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{text!r} is not a value: {error}") from error
