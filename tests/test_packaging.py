# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The wheel and the source distribution: what is in them, and that the wheel works where nothing else is."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Folders that are not part of the package
BESIDE = {"benchmarks", "build", "dist", "docs", "examples", "tests"}


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)


def build(kind: str, tree: Path, folder: Path) -> Path:
    """A distribution of a tree, made without a word of warning."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    result = run(sys.executable, "-W", "default", "-c", code, cwd=tree)
    assert result.returncode == 0, result.stderr
    warnings = [line for line in (result.stdout + result.stderr).splitlines() if "warning" in line.lower()]
    assert warnings == []
    return folder / result.stdout.splitlines()[-1]


def repository() -> list[Path]:
    """The files of the repository, without what runs and builds leave behind."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    if listed.returncode == 0:
        names = listed.stdout.splitlines()
    else:  # in an unpacked source distribution
        made = ("PKG-INFO", "build/", "dist/", "loopmdm.egg-info/", "setup.cfg")
        names = [name for name in files(ROOT) if not name.startswith(made)]
        names = [name for name in names if name == ".ci/run" or not name.startswith(".")]
    return [Path(name) for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("source")
    for name in repository():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree" / name)
    with tarfile.open(build("sdist", folder / "tree", folder)) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.glob("loopmdm-*[0-9]")
    return unpacked


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def files(folder: Path, pattern: str = "*") -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_packages_and_nothing_twice(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - BESIDE
    assert folders == {"cli", "convert", "data", "evaluation", "hub", "objective", "training", "web"}
    expected = {f"loopmdm/{path.name}" for path in ROOT.glob("*.py")} | {"loopmdm/py.typed"}
    expected |= {"loopmdm/web/trace.css", "loopmdm/web/trace.js"}
    for folder in folders:
        package = "loopmdm_cli" if folder == "cli" else f"loopmdm/{folder}"
        expected |= {f"{package}/{name}" for name in files(ROOT / folder, "*.py")}
    assert sorted(names) == sorted(expected)


def test_the_wheel_works_alone(wheel, tmp_path):
    place = tmp_path / "place"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", place, wheel)
    result = run(sys.executable, *install, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (place / "bin" / "loopmdm").is_file() or os.name == "nt"
    # First on the path, before an editable install
    code = (
        f"import sys; sys.path.insert(0, {str(place)!r})\n"
        "import loopmdm_cli\n"
        "try: loopmdm_cli.main(['--help'])\n"
        "except SystemExit as exit_: assert not exit_.code\n"
        "import loopmdm, loopmdm.convert, loopmdm.data, loopmdm.evaluation, loopmdm.hub\n"
        "import loopmdm.objective, loopmdm.training, loopmdm.web\n"
        "print(loopmdm_cli.__file__, loopmdm.__file__, loopmdm.convert.FAMILIES[0].name)\n"
    )
    result = run(sys.executable, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Usage: loopmdm" in result.stdout
    command, package, _ = result.stdout.splitlines()[-1].split()
    assert [Path(command).parent, Path(package).parent] == [place / "loopmdm_cli", place / "loopmdm"]


def test_the_source_distribution_holds_all_that_tests_need(source):
    """The tests, what they run, the bundled model, and the files of the repository that they read."""
    left_out = [name for name in repository() if not (source / name).is_file()]
    assert all(name.name == ".gitignore" or name.parts[0] == "docs" for name in left_out), left_out
    assert not [name for name in left_out if name.suffix == ".md"]
