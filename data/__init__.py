# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Data for training and evaluation: read from files, tokenised, packed into rows, and ordered for a run."""

from .chat import turn_end
from .columns import TOKEN_COLUMNS, UnusedColumns, read_columns
from .encode import encode_answer, encode_prompt, first_text, prompt_column, text_of
from .examples import least_tokens, read_examples
from .files import (
    SEPARATORS,
    json_lines,
    load_dataset_rows,
    read_documents,
    read_jsonl,
    read_rows,
    share_weights,
    write_atomically,
    write_json,
)
from .pack import pack_documents
from .pretrained import adapter_base, check_tokenizer, load_adapter, load_tokenizer, locate, vocabulary_size
from .processes import Process, this_process
from .stream import ExampleStream, StreamedExamples, check_passes, spread
from .tokens import check_tokens, encode, encode_given, encode_with_bytes

__all__ = [
    "SEPARATORS",
    "TOKEN_COLUMNS",
    "ExampleStream",
    "Process",
    "StreamedExamples",
    "UnusedColumns",
    "adapter_base",
    "check_passes",
    "check_tokenizer",
    "check_tokens",
    "encode",
    "encode_answer",
    "encode_given",
    "encode_prompt",
    "encode_with_bytes",
    "first_text",
    "json_lines",
    "least_tokens",
    "load_adapter",
    "load_dataset_rows",
    "load_tokenizer",
    "locate",
    "pack_documents",
    "prompt_column",
    "read_columns",
    "read_documents",
    "read_examples",
    "read_jsonl",
    "read_rows",
    "share_weights",
    "spread",
    "text_of",
    "this_process",
    "turn_end",
    "vocabulary_size",
    "write_atomically",
    "write_json",
]
