# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The command that all others hang on, and what becomes of their errors."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

# Characters of an error message: a file may name a tensor by a text of megabytes.
MAX_MESSAGE = 1000

# What commands are for, in the order of the help
USE, TRAIN, MEASURE, SHARE = TOPICS = ("Use a model", "Make a model", "Measure a model", "Share a model")


class _ByTopic(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        commands: dict[str, Any] = self.commands
        topics = [*TOPICS, *{command.rich_help_panel for command in commands.values()}]  # and those of others
        return sorted(commands, key=lambda name: topics.index(commands[name].rich_help_panel))


app = typer.Typer(cls=_ByTopic, no_args_is_help=True, pretty_exceptions_enable=False)
evaluation = typer.Typer(help="Measure a model, at any number of loops.", no_args_is_help=True)
app.add_typer(evaluation, name="eval", rich_help_panel=MEASURE)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"loopmdm {metadata.version('loopmdm')}")
        raise typer.Exit


@app.callback()
def loopmdm(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Looped masked diffusion language models."""


def main(args: Sequence[str] | None = None) -> None:
    """
    Entry point: runs the command that `args` (by default those of the process) name, and exits. Whatever an argument,
    a file or a disk can do ends here, in one line on stderr and exit status 2. The environment variable
    LOOPMDM_DEBUG=1 shows the traceback before it, which the report of a fault should have.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a place that cannot show a character is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no two lines for each of its attempts to reach the Hub
    try:
        status = app(args, prog_name="loopmdm", standalone_mode=False)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # of all kinds: a panic of the tokenizers library is not even an Exception
        if isinstance(error, typer.Abort) and error.__cause__ is not None:  # typer's word for the end of a file
            error = error.__cause__
        if isinstance(error, typer.Abort):
            sys.exit(130)
        message = _explain(error)
        if os.environ.get("LOOPMDM_DEBUG", "0") not in ("", "0"):
            traceback.print_exception(error)
        print(f"loopmdm: error: {message}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status)


def _explain(error: BaseException) -> str:
    """One line on what is wrong."""
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is on the screen already
        sys.exit(2)
    if hasattr(error, "format_message"):  # the parser's own; click's classes moved between versions of typer
        context = getattr(error, "ctx", None)
        hint = "" if context is None else f" See `{context.command_path} --help`."
        message = _one_line(error.format_message())
        return f"{message}{'' if message.endswith(('.', '?')) else '.'}{hint}"
    from huggingface_hub.errors import StrictDataclassError

    message, kind = _one_line(str(error)), type(error).__name__
    if isinstance(error, ValueError | OSError | StrictDataclassError) and message:
        return message
    return f"{kind}{': ' if message else ''}{message.rstrip('.')}. LOOPMDM_DEBUG=1 shows where."


def _one_line(text: str) -> str:
    """What a terminal can show of a text that may quote anything: no control characters, and not too much."""
    text = "".join(part if part.isprintable() else "\ufffd" for part in " ".join(text.split()))
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ..."
