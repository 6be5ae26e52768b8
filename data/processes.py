# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Which of several processes this one is, as torchrun and accelerate say in the environment."""

import os
from typing import NamedTuple


class Process(NamedTuple):
    """This process's `rank` of `number`, from 0, and its `local_rank` on this machine."""

    rank: int
    number: int
    local_rank: int


def this_process() -> Process:
    """
    Reads `RANK`, `WORLD_SIZE` and `LOCAL_RANK`; without them this process is the only one. Raises a ValueError where
    they make no sense, as work would be left out, or done twice.
    """
    values = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        least = 1 if name == "WORLD_SIZE" else 0
        if not (text.isascii() and text.isdigit() and int(text) >= least):
            raise ValueError(
                f"The environment variable {name} is {text!r}; it must be a whole number of at least {least}. Start "
                "several processes with torchrun or `accelerate launch`, or unset it."
            )
        values[name] = int(text)
    process = Process(*values.values())
    if process.rank >= process.number or (process.number > 1 and "RANK" not in os.environ):
        raise ValueError(
            f"The environment says that this is process {os.environ.get('RANK', '(RANK is not set)')} of "
            f"{process.number} (RANK, WORLD_SIZE); ranks are 0 to {process.number - 1}. Start several processes with "
            "torchrun or `accelerate launch`, or unset both."
        )
    return process
