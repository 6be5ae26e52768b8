# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Processes that start in milliseconds: forks of the test's own, which has imported torch already."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

FORK = multiprocessing.get_context("fork")


def start(function: Callable, *args: Any, stdout: int | None = None, **kwargs: Any) -> multiprocessing.Process:
    """A process that runs a function; its output goes to the descriptor `stdout`, by default nowhere."""
    process = FORK.Process(target=_work, args=(function, stdout, args, kwargs))
    process.start()
    return process


def _work(function: Callable, stdout: int | None, args: tuple, kwargs: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere if stdout is None else stdout, 1)
    os.dup2(nowhere, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not pytest's
    function(*args, **kwargs)
