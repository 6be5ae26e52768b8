# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The command that all others hang on, and what becomes of their errors."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
evaluation = typer.Typer(help="Measure a model, at any number of loops.", no_args_is_help=True)
app.add_typer(evaluation, name="eval")


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
    Entry point: runs the command that `args` (by default those of the process) name, and exits. An argument or a file
    that is wrong ends in one line on stderr and exit status 2; the environment variable LOOPMDM_DEBUG=1 shows the
    traceback before it. Other exceptions are bugs, and are raised.
    """
    try:
        status = app(args, prog_name="loopmdm", standalone_mode=False)
    except Exception as error:
        if isinstance(error, typer.Abort):
            sys.exit(130)
        message = _explain(error)
        if message is None:
            raise
        if os.environ.get("LOOPMDM_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"loopmdm: error: {message}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status)


def _explain(error: Exception) -> str | None:
    """One line on what is wrong with the input; None where nothing is, and the error is a bug."""
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is on the screen already
        sys.exit(2)
    if hasattr(error, "format_message"):  # the parser's own; click's classes moved between versions of typer
        context = getattr(error, "ctx", None)
        hint = "" if context is None else f" See `{context.command_path} --help`."
        message = " ".join(error.format_message().split())
        return f"{message}{'' if message.endswith(('.', '?')) else '.'}{hint}"
    from huggingface_hub.errors import StrictDataclassError

    if isinstance(error, ValueError | OSError | StrictDataclassError):
        return " ".join(str(error).split())
    return None
