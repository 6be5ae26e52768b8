# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Processes that generate for many rows, started in milliseconds: they are forks of one that has imported torch."""

import multiprocessing
import os
from typing import Any

import torch

from loopmdm.evaluation.rows import generate_rows

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["loopmdm.evaluation.rows"])


def start(*arguments: Any, rank: int = 0, processes: int = 1, **options: Any) -> multiprocessing.Process:
    """`generate_rows` in a process that is one of several."""
    process = CONTEXT.Process(target=_work, args=(arguments, options, rank, processes))
    process.start()
    return process


def _work(arguments: tuple, options: dict[str, Any], rank: int, processes: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
    torch.set_num_threads(1)
    generate_rows(*arguments, **options)
