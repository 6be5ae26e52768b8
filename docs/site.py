# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What mkdocs does not do by itself: pages outside of docs/, the notebook and the command's help become pages of the
site, and docstrings in transformers' style become Markdown.
"""

import json
import os
import re
import textwrap
import tomllib
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "examples/first_steps.ipynb"
# Links to these are downloads; folders lead to their README.
LINK = re.compile(r"(\]\()((?:\.\./)+|(?=[a-z_]+/))([^)#:\s]+)(#[^)\s]*)?\)")


def on_config(config):
    """Griffe reads the packages from folders of their names, without what else is in the repository."""
    packages = ROOT / "build" / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    top = {name.split(".")[0]: [] for name in setup["packages"]}
    for name in setup["packages"]:
        package, *rest = name.split(".")
        top[package] += rest[:1]
    for package, folders in top.items():
        source, place = ROOT / setup["package-dir"][package], packages / package
        place.mkdir(exist_ok=True)
        for path in [*source.glob("*.py"), *(source / folder for folder in folders)]:
            link = place / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(path, place))
    return config


def on_files(files, config):
    """Adds pages from outside of docs/, and whatever any page links to."""
    files.append(File.generated(config, "reference/command.md", content=command_help()))
    files.append(File.generated(config, NOTEBOOK.replace(".ipynb", ".md"), content=notebook_page()))
    outside = [ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("examples/*/README.md"))]
    pages = [*outside, *(ROOT / "docs").rglob("*.md")]
    linked = {target for page in pages for target in targets(page)}
    for path in sorted({*outside, *linked, ROOT / NOTEBOOK}):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and ROOT / "docs" not in path.parents and files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def resolve(page: Path, target: str) -> Path:
    """The file in the repository that a link leads to."""
    path = (page.parent / target).resolve()
    return path / "README.md" if (path / "README.md").is_file() else path


def targets(page: Path):
    for _, up, rest, _ in LINK.findall(page.read_text(encoding="utf-8")):
        yield resolve(page, up + rest)


def on_page_markdown(markdown, page, config, files):
    """docs/ is the root of the site, so that links to and from files outside of it change."""
    source = Path(page.file.abs_src_path) if page.file.abs_src_path else ROOT / page.file.src_uri

    def rewrite(match):
        path = resolve(source, match[2] + match[3])
        if not path.is_relative_to(ROOT) or not path.exists():
            return match[0]  # mkdocs reports it
        inside = path.relative_to(ROOT / "docs" if path.is_relative_to(ROOT / "docs") else ROOT)
        link = os.path.relpath(inside, Path(page.file.src_uri).parent)
        return f"{match[1]}{link}{match[4] or ''})"

    return LINK.sub(rewrite, markdown)


def notebook_page() -> str:
    """The notebook's cells and what they print, one under the other."""
    parts = []
    for cell in json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [f"```text\n{''.join(output['text'])}```" for output in cell.get("outputs", ())]
    return "\n\n".join([*parts, f"[Download the notebook]({Path(NOTEBOOK).name})"])


def command_help() -> str:
    """What `--help` of every command says."""
    import typer

    from loopmdm_cli import app

    def describe(command, context, name):
        lines = []
        for option in command.get_params(context):
            record = option.get_help_record(context)
            names, text = record or (option.human_readable_name, getattr(option, "help", None) or "")
            if option.name != "help":
                lines.append(f"- `{names}`: {' '.join(text.split())}")
        yield "\n\n".join([f"## `{name}`", re.sub(r"\n(?=\S)", " ", (command.help or "").strip()), "\n".join(lines)])
        for key, sub in getattr(command, "commands", {}).items():
            yield from describe(sub, typer.Context(sub, info_name=key, parent=context), f"{name} {key}")

    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="loopmdm")
    return "\n\n".join(["# The command", *describe(group, context, "loopmdm")])


class TransformersDocstrings(griffe.Extension):
    """Sections of arguments become lists, and [`Name`] is a name in code."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(docstring: str) -> str:
    text = re.sub(r"\[`~?([\w.]+)`\](?![(\[])", r"`\1`", docstring)
    text = re.sub(r"^( +)[a-z]\. ", r"\1- ", text, flags=re.MULTILINE)
    section = r"^((?:Args|Arguments|Returns|Raises|Yields)[^\n]*):\n((?:    .*\n|\n)+)"
    return re.sub(section, as_list, text + "\n", flags=re.MULTILINE)


def as_list(section: re.Match) -> str:
    """An entry for every line that is not indented further than the section."""
    entries = []
    for line in textwrap.dedent(section[2]).splitlines():
        name, bracket, rest = line.partition(" (")
        if line.startswith(">"):
            entries.append(f"\n**{line[1:].strip()}**\n")
        elif re.match(r"\s|$", line) and entries:
            entries[-1] += f" {line.strip()}"
        elif bracket and re.fullmatch(r"\w+(, \w+)*", name):
            entries.append(f"- `{name.replace(', ', '`, `')}` ({rest}")
        else:
            entries.append(f"- {line}")
    title = "Arguments" if section[1] == "Args" else section[1]
    return f"**{title}**\n\n" + "\n".join(entries) + "\n\n"
