# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Running `loopmdm` within the process of a test."""

import contextlib
import io

import pytest
from typer.testing import CliRunner

import loopmdm_cli

# For the bundled model
PUZZLE = "..7.583.6.8...1.4734..628.9..497..8.9.8..5..475..2.1.35...496..87..1.4..4..58...."
SOLUTION = "297458316685391247341762859134976582928135764756824193513249678879613425462587931"


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
