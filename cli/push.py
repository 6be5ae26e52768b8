# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm push`."""

from pathlib import Path
from typing import Annotated

import typer

from .application import SHARE, app
from .output import console, show_facts


@app.command(rich_help_panel=SHARE, epilog="Example: loopmdm push my-model me/my-model --private --dry-run")
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a model or an adapter.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Where it goes on the Hub: owner/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, show what would go, and stop.")] = False,
) -> None:
    """Load a model the way its users will, and upload it to the Hugging Face Hub."""
    from loopmdm.hub import check_upload, load_in_fresh_process, upload

    checked = check_upload(folder, repo)
    loaded = load_in_fresh_process(folder)
    license = checked.license if isinstance(checked.license, str) else ", ".join(checked.license)
    show_facts(
        f"{folder} to {repo}",
        {
            "loads as": loaded["class"],
            "parameters": loaded["parameters"],
            "licence": license,
            "files": f"{len(checked.files)}, {sum(checked.files.values()) / 1e6:,.1f} MB",
            "": ", ".join(checked.files),
        },
    )
    if not dry_run:
        console.print(f"{upload(checked, private, message)} is up to date.")
