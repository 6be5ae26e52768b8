# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Pages for the browser: a generation as one HTML file, and a page that runs a model (docs/web.md)."""

from .trace import trace_to_html

__all__ = ["trace_to_html"]
