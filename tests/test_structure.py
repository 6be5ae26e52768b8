# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The rules of the house that can be counted: lengths, and public signatures that are typed."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HUB_FILES = [path for path in sorted(ROOT.glob("*.py")) if not path.name.startswith("__")]
FOLDERS = ("cli", "convert", "data", "evaluation", "hub", "objective", "training", "web")
FOUND = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
FILES = [*HUB_FILES, *sorted(path for path in FOUND if "node_modules" not in path.parts)]
PUBLIC = ("loopmdm", *(f"loopmdm.{name}" for name in FOLDERS if name != "cli"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_too_long(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 800
    for node in ast.walk(ast.parse(text)):
        limit = {ast.FunctionDef: 80, ast.ClassDef: 300}.get(type(node))
        if limit is not None:
            length = node.end_lineno - node.lineno + 1
            assert length <= limit, f"{node.name} has {length} lines; at most {limit} are read in one go."


def test_what_the_hub_loads_stays_small():
    assert len(HUB_FILES) > 1
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in HUB_FILES) <= 3092


def is_inherited(owner: type, name: str) -> bool:
    """Whether a base class, which has the types then, defines the method too."""
    return any(name in vars(base) for base in owner.__mro__[1:])


def public_functions(thing: object, name: str):
    """A function, or a class's constructor and its public methods that are not overrides, with their names."""
    if inspect.isfunction(thing):
        yield name, thing
    for member, value in vars(thing).items() if inspect.isclass(thing) else ():
        function = getattr(value, "__func__", value)  # of class and static methods
        is_public = member == "__init__" or not (member.startswith("_") or is_inherited(thing, member))
        if is_public and inspect.isfunction(function) and function.__module__ == thing.__module__:
            yield f"{name}.{member}", function


def untyped(function, name: str):
    """What of a signature has no type."""
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls") and not is_variadic:
            yield f"{name}({parameter.name})"
    if signature.return_annotation is signature.empty and not name.endswith("__init__"):
        yield f"{name} -> ?"


@pytest.mark.parametrize("module", PUBLIC)
def test_public_signatures_are_typed(module):
    """What is exported says what it takes and returns; mypy (`make lint`) checks that it does."""
    package = importlib.import_module(module)
    missing = [
        gap
        for export in package.__all__
        for name, function in public_functions(getattr(package, export), export)
        for gap in untyped(function, name)
    ]
    assert not missing, ", ".join(missing)
