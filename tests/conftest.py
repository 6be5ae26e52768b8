# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
import gc
from pathlib import Path

import pytest
import torch
from browser import chromium

# Threads cost tiny matrices more than they give: on a busy machine seven times the run time.
torch.set_num_threads(1)


def pytest_collection_finish():
    """Imported modules are not garbage; every Trainer looks through them for a quarter of a second."""
    gc.freeze()


@pytest.fixture
def src(tmp_path) -> Path:
    """A folder to make, for a checkpoint to convert."""
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path) -> Path:
    """The folder that a conversion writes; its parent is empty."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser
