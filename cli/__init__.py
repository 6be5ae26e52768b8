# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The `loopmdm` command, a module for each of its commands. It is a package beside `loopmdm`, because importing a part of
`loopmdm` imports torch and transformers: modules here import those inside functions, so that `--help` and usage errors
are quick. All modules are imported below, so a new command is one new file whose function is decorated with
`@app.command()`.
"""

import importlib
import pkgutil

from .application import app, main

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["app", "main"]
