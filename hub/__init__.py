# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Model cards, and folders that go to the Hub."""

from .card import CARD, SOURCE_CARD, is_own_card, write_card, write_export_card
from .push import Upload, check_upload, load_in_fresh_process, upload
from .sections import BUDGET, recorded
from .source import CARD_FILES, SourceCard, read_source_card

__all__ = [
    "BUDGET",
    "CARD",
    "CARD_FILES",
    "SOURCE_CARD",
    "SourceCard",
    "Upload",
    "check_upload",
    "is_own_card",
    "load_in_fresh_process",
    "read_source_card",
    "recorded",
    "upload",
    "write_card",
    "write_export_card",
]
