# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Data: read from files, tokenised, packed into rows, put in the order of a run."""

from .encode import check_tokens, encode, encode_answer, encode_with_bytes, first_text, text_of
from .files import SEPARATORS, load_dataset_rows, read_documents, read_jsonl, read_rows
from .pack import pack_documents
from .stream import ExampleStream, StreamedExamples

__all__ = [
    "SEPARATORS",
    "ExampleStream",
    "StreamedExamples",
    "check_tokens",
    "encode",
    "encode_answer",
    "encode_with_bytes",
    "first_text",
    "load_dataset_rows",
    "pack_documents",
    "read_documents",
    "read_jsonl",
    "read_rows",
    "text_of",
]
