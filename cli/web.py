# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm web`."""

import contextlib
import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from .application import USE, app


@app.command(rich_help_panel=USE, epilog="Example: loopmdm web my-sudoku-model")
def web(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or Hub id of a model of boards; by default the page's own.", show_default=False),
    ] = None,
    port: Annotated[int, typer.Option(help="Port on this machine; 0 takes a free one.")] = 8018,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Watch a model of boards, such as Sudokus, at work in a browser. `make web` builds the page."""
    from loopmdm.web.serve import make_server, site_folder

    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}; it must be from 0 to 65535.")
    site = site_folder()
    with contextlib.ExitStack() as stack:
        exported = None
        if model is not None:
            exported = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        server = stack.enter_context(make_server(site, port, exported))  # first, as the port may be taken
        if model is not None:
            from loopmdm.web.build import example_data
            from loopmdm.web.export import export_board_model

            print(f"Exporting {model} ...", flush=True)
            export_board_model(model, exported, *example_data(model))
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        if open_browser:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
