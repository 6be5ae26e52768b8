# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Processes that start in milliseconds: forks of the test's own, which has imported torch already."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

FORK = multiprocessing.get_context("fork")


def start(function: Callable, *args: Any, stdout: int | None = None, stderr: int | None = None, **kwargs: Any):
    """A process that runs a function. Its output goes to descriptors, by default nowhere."""
    process = FORK.Process(target=_work, args=(function, (stdout, stderr), args, kwargs))
    process.start()
    return process


def _work(function: Callable, outputs: tuple, args: tuple, kwargs: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number, output in enumerate(outputs, start=1):
        os.dup2(nowhere if output is None else output, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not pytest's
    function(*args, **kwargs)


def as_rank(rank: int, count: int, port: int = 0) -> None:
    """Makes this process one of several, by what torchrun tells each; accelerate forgets what it knew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
