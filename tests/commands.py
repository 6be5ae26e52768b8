# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Running `loopmdm` within the process of a test."""

import contextlib
import io

import pytest
from typer.testing import CliRunner

import loopmdm_cli


def run(*args: object, input: str | None = None) -> str:
    """Standard output of a command that succeeds; any exception is raised."""
    result = CliRunner().invoke(loopmdm_cli.app, [str(arg) for arg in args], input=input, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*args: object) -> str:
    """What a command says that refuses its input: one line on stderr, and exit status 2."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as exit_:
        loopmdm_cli.main([str(arg) for arg in args])
    assert exit_.value.code == 2
    (line,) = errors.getvalue().splitlines()
    assert line.startswith("loopmdm: error: ")
    return line
