# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The tests of other packages, which only their source distributions have."""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def source_distribution(package: str) -> Iterator[Path]:
    """
    The unpacked source distribution of the installed version of a package, downloaded with pip into a temporary
    folder. The environment variable `<PACKAGE>_SDIST` names an unpacked one in its place.
    """
    given = os.environ.get(f"{package.upper()}_SDIST")
    if given is not None:
        yield Path(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        requirement = f"{package}=={importlib.metadata.version(package)}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", package]
        subprocess.check_call([*pip, "--dest", folder, requirement])
        (archive,) = Path(folder).glob(f"{package}-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        yield archive.with_name(archive.name.removesuffix(".tar.gz"))
