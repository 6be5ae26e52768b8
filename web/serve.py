# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A server of the page on the loopback interface, which other machines cannot reach."""

from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

SITE = Path(__file__).resolve().parent / "dist"


def site_folder() -> Path:
    """The folder of the built page. Raises a ValueError if it is not built."""
    if not (SITE / "index.html").is_file():
        raise ValueError("The page is not built; run `make web` in a clone of the repository.")
    return SITE


def make_server(site: Path, port: int = 0, model: Path | None = None) -> ThreadingHTTPServer:
    """
    A server of the page on 127.0.0.1, to run with `serve_forever`.

    Args:
        site (`Path`): The built page.
        port (`int`, defaults to 0): The port; 0 chooses a free one.
        model (`Path`, *optional*): A folder of `export_board_model`, served instead of the page's own model.

    Raises:
        ValueError: The port cannot be used.
    """

    class Handler(SimpleHTTPRequestHandler):
        # Browsers refuse modules of other types, and the types registered on this machine may be wrong.
        extensions_map = SimpleHTTPRequestHandler.extensions_map | {
            ".js": "text/javascript",
            ".mjs": "text/javascript",
            ".wasm": "application/wasm",
        }

        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(site), **kwargs)

        def translate_path(self, path: str) -> str:
            parts = urlsplit(path).path.split("/")
            if model is not None and parts[1:2] == ["model"] and parts[2:] == [Path(parts[-1]).name]:
                return str(model / parts[2])
            return super().translate_path(path)

        def end_headers(self):
            self.send_header("Cache-Control", "no-cache")  # the page may be rebuilt, or show another model
            super().end_headers()

        def log_message(self, *args):
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ValueError(
            f"Port {port} cannot be used ({error.strerror}); give another, or 0 for a free one."
        ) from error
