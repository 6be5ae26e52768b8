# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Texts, prompts with answers, and conversations as tokens."""

from itertools import pairwise
from typing import Any

# What prompts and answers are called in examples
PROMPT_NAMES = ("prompt", "question", "instruction")
ANSWER_NAMES = ("answer", "response", "output", "completion")


def encode(tokenizer: Any, text: str, where: str) -> list[int]:
    """Tokens of a text, without special ones; `where` is what to call it in errors."""
    return list(_tokenize(tokenizer, text, where)["input_ids"])


def encode_with_bytes(tokenizer: Any, text: str, where: str) -> tuple[list[int], list[int] | None]:
    """
    The same, and the bytes of UTF-8 that each token stands for: what comes before the next token's first character, so
    that they add up to the bytes of the text, white space that the tokenizer drops included. None for a tokenizer
    without offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        return encode(tokenizer, text, where), None
    encoded = _tokenize(tokenizer, text, where, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    # Tokens of a part of a character share its offsets; it counts where they begin.
    starts = [0, *(start for start, _ in encoded["offset_mapping"][1:]), len(text)]
    return ids, [len(text[a:b].encode()) for a, b in pairwise(starts)][: len(ids)]


def _tokenize(tokenizer: Any, text: str, where: str, **options: Any) -> Any:
    try:
        return tokenizer(text, add_special_tokens=False, verbose=False, **options)
    except Exception as error:  # tokenizers raises nothing more specific for a character that it does not know
        raise ValueError(f"The tokenizer cannot read {where}: {error}") from error


def check_tokens(ids: list[int], vocab_size: int, where: str) -> list[int]:
    """The tokens again. Raises a ValueError where one is outside a vocabulary of `vocab_size`."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"{where} gives the token {largest}, outside the model's vocabulary of {vocab_size}; is it the right "
            "tokenizer?"
        )
    return ids


def encode_answer(tokenizer: Any, example: dict[str, Any], where: str = "An example") -> dict[str, Any]:
    """
    Tokens of a prompt and its answer, of which only the answer is learnt.

    Args:
        tokenizer: With a chat template where examples are conversations; with an end token, which is put behind the
            answer of a plain pair.
        example: `{"prompt": str, "answer": str}` (`question`, `instruction` and `response`, `output`, `completion` are
            understood too), or `{"messages": [{"role": ..., "content": ...}, ...]}`, whose last message is the answer.
        where: What to call the example in errors.
    """
    if isinstance(example, str):
        raise ValueError(f"{where} is a text; what is needed are prompts and answers (.jsonl).")
    if "messages" in example:
        return _encode_conversation(tokenizer, example["messages"], where)
    prompt = first_text(example, PROMPT_NAMES, where)
    answer = first_text(example, ANSWER_NAMES, where)
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if prompt_ids and end and prompt_ids[-1] == end[0]:
        prompt_ids = prompt_ids[:-1]  # some tokenizers end every text
    return {"input_ids": [*prompt_ids, *answer_ids, *end], "prompt_length": len(prompt_ids)}


def _encode_conversation(tokenizer: Any, messages: Any, where: str) -> dict[str, Any]:
    is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    if not is_list or not messages or messages[-1].get("role") != "assistant":
        raise ValueError(f"{where}: `messages` must be a list that ends with one of the role `assistant`.")
    if tokenizer.chat_template is None:
        raise ValueError(f"{where} is a conversation, and the tokenizer has no chat template.")

    def tokens(part: list[dict], **options: Any) -> list[int]:
        return tokenizer.apply_chat_template(part, tokenize=True, return_dict=True, **options)["input_ids"]

    whole, prompt = tokens(messages), tokens(messages[:-1], add_generation_prompt=True)
    if whole[: len(prompt)] != prompt:
        raise ValueError(f"{where}: the chat template does not put the answer behind the prompt.")
    return {"input_ids": whole, "prompt_length": len(prompt)}


def text_of(row: str | dict[str, Any], name: str, where: str) -> str:
    """A row that is a text itself, or its field `name`. Raises a ValueError where that is not a text."""
    if isinstance(row, str):
        return row
    if isinstance(row.get(name), str):
        return row[name]
    raise ValueError(f"{where} has no text in {name!r}; it has {', '.join(row) or 'nothing'}.")


def first_text(example: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    """The first of the fields `names` that holds a text. Raises a ValueError where none does."""
    for name in names:
        if isinstance(example.get(name), str):
            return example[name]
    raise ValueError(f"{where} has no text called {' or '.join(names)}; it has {', '.join(example) or 'nothing'}.")
