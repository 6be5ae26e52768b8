# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A real browser for the tests: headless Chromium, driven by playwright. `.ci/run` installs what it takes."""

import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AXE = ROOT / "web" / "node_modules" / "axe-core" / "axe.min.js"
# The last ones keep Chromium from asking for things by itself.
OPTIONS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


def need(condition: object, what: str) -> None:
    """Skips the test where something is missing; where a browser is required (.ci/run), fails it."""
    if not condition:
        (pytest.fail if os.environ.get("LOOPMDM_REQUIRE_BROWSER") else pytest.skip)(f"{what} is missing")


@contextmanager
def chromium():
    """A browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        need(False, "playwright (`pip install -e .[web-test]`)")
    need(CHROMIUM, "Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@contextmanager
def serving(server):
    """Runs a server in the background; its address."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


class Watched:
    """A page of its own context, which notes what goes wrong in it and what it asks for."""

    def __init__(self, browser, address: str, init: str | None = None, **options):
        context = browser.new_context(**{"reduced_motion": "reduce", **options})
        self.page, self.faults, self.requests = context.new_page(), [], []
        self.page.on("console", lambda message: self.faults.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        if init is not None:
            self.page.add_init_script(init)
        self.page.goto(address)

    def close(self) -> None:
        self.page.context.close()


def serious_faults(page) -> list[str]:
    """What axe-core finds that keeps people out, as one line each."""
    need(AXE.is_file(), "axe-core (`make web`)")
    page.evaluate(AXE.read_text(encoding="utf-8") + "; null")
    found = page.evaluate("axe.run().then(({ violations }) => violations)")
    return [
        f"{fault['id']}: {node['target']} {node['failureSummary']}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]
