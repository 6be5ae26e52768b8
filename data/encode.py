# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Rows of text as tokens: documents, prompts with answers, conversations."""

import json
from typing import Any

from .chat import encode_conversation, encode_question
from .columns import REFUSED, refuse
from .tokens import encode, encode_given

# Names of the fields with prompts and answers
PROMPT_NAMES = ("prompt", "question", "instruction")
ANSWER_NAMES = ("answer", "response", "output", "completion")
# Fields that would be lost beside any prompt, beside a text, and beside messages, and what to do about them
_BESIDE_PROMPTS = {
    "chat_template_kwargs": "write the template so that it needs none",
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "the model reads text alone"),
}
_BESIDE_TEXTS = _BESIDE_PROMPTS | dict.fromkeys(
    ("input", "context", "system", "system_prompt", "history"), "write it into the prompt"
)
_BESIDE_MESSAGES = {
    **_BESIDE_PROMPTS,
    **dict.fromkeys(("system", "system_prompt"), "write it as a message of the role `system`"),
    "functions": "give them as `tools`, and calls as `tool_calls`",
    **dict.fromkeys(("input", "context", "history"), "write it into the messages"),
}
# Fields of other formats, of which an answer may be a part
_OTHER_FORMATS = {
    **dict.fromkeys(("conversations", "conversation"), "give `messages`, objects with `role` and `content`"),
    **dict.fromkeys(("chosen", "rejected"), "give prompts with one answer each (`prompt` and `completion`)"),
}


def encode_answer(tokenizer: Any, example: dict[str, Any], where: str = "An example") -> dict[str, Any]:
    """
    Tokenises a prompt and its answer, of which only the answer is learnt.

    Args:
        tokenizer: A tokenizer, with a chat template if the example is a conversation. Its end token, if it has one, is
            added to the answer of a plain pair that does not end with it.
        example (`dict`): `{"messages": [{"role": ..., "content": ...}, ...]}`, whose last message is the answer, or
            `{"prompt": ..., "completion": ...}`, both texts or both lists of messages. The prompt may also be called
            `question` or `instruction`, and the answer `answer`, `response` or `output`. `tools` go to the chat
            template. `messages` take precedence.
        where (`str`): The name of the example in errors.

    Returns:
        `dict`: `input_ids` (`list[int]`), and `prompt_length` (`int`), the number of tokens of the prompt.

    Raises:
        ValueError: A part is missing, is in another format, or would be lost.
    """
    if isinstance(example, str):
        raise ValueError(f"{where} is a text; give prompts and answers (.jsonl).")
    refuse(example, REFUSED, where)
    if example.get("label") is False:  # TRL's format of answers that are to be unlearnt
        raise ValueError(f"{where} has the `label` false, a bad answer; keep only the rows whose label is true.")
    messages = example.get("messages")
    if messages is not None:
        is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
        if not is_list or not messages or messages[-1].get("role") != "assistant":
            raise ValueError(f"{where}: `messages` must be a list that ends with one of the role `assistant`.")
        return _encode_messages(tokenizer, example, messages[:-1], messages[-1:], where)
    refuse(example, _OTHER_FORMATS, where)
    lists = [name for name in (*PROMPT_NAMES, *ANSWER_NAMES) if isinstance(example.get(name), list)]
    if lists:
        prompt = next((example[name] for name in lists if name in PROMPT_NAMES), None)
        answer = next((example[name] for name in lists if name in ANSWER_NAMES), None)
        if prompt is None or answer is None:
            raise ValueError(f"{where}: `{lists[0]}` is a list of messages; the other part must be one too.")
        return _encode_messages(tokenizer, example, prompt, answer, where)
    prompt, answer = first_text(example, PROMPT_NAMES, where), first_text(example, ANSWER_NAMES, where)
    refuse(example, _BESIDE_TEXTS, where)
    return _encode_pair(tokenizer, prompt, answer, where)


def columns_of_answer(example: dict[str, Any]) -> set[str]:
    """The names of the fields that [`encode_answer`] reads."""
    if example.get("messages") is not None:
        return {"messages", "tools"}
    kind = list if any(isinstance(example.get(name), list) for name in (*PROMPT_NAMES, *ANSWER_NAMES)) else str
    read = (next((n for n in names if isinstance(example.get(n), kind)), "") for names in (PROMPT_NAMES, ANSWER_NAMES))
    return {*read, *(("tools",) if kind is list else ())}


def encode_prompt(
    tokenizer: Any, example: dict[str, Any], where: str = "An example", text_column: str | None = None
) -> list[int]:
    """
    Tokens of a text to continue or to fill in, as in training: with the special tokens that the tokenizer adds, except
    an end token. Or those of a conversation to answer, see [`~loopmdm.data.chat.encode_question`].

    Args:
        tokenizer: A tokenizer, with a chat template if the example is a conversation.
        example (`dict`): What [`encode_answer`] reads, with or without an answer, or `{"text": ...}`; a prompt takes
            precedence over `text`.
        where (`str`): The name of the example in errors.
        text_column (`str`, *optional*): Read this field, whatever others there are.

    Raises:
        ValueError: The text is missing, is in another format, or a part of the example would be lost.
    """
    name = prompt_column(example, text_column)
    if name == "messages" or isinstance(example.get(name), list):
        _refuse_beside(example, example[name], where)
        return encode_question(tokenizer, example[name], where, _tools(example, where))
    if name == "":
        refuse(example, _OTHER_FORMATS, where)
    if name in PROMPT_NAMES:
        refuse(example, _BESIDE_TEXTS, where)
    text = first_text(example, (text_column,) if text_column else (*PROMPT_NAMES, "text"), where)
    return encode_given(tokenizer, text, where)


def prompt_column(example: dict[str, Any], text_column: str | None = None) -> str:
    """The name of the field that [`encode_prompt`] reads; empty if there is none."""
    if text_column is not None:
        return text_column
    names = ("messages", *PROMPT_NAMES, "text")
    return next((n for n in names if isinstance(example.get(n), list if n == "messages" else str | list)), "")


def _encode_pair(tokenizer: Any, prompt: str, answer: str, where: str) -> dict[str, Any]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    given = encode_given(tokenizer, prompt, where)
    ids = encode(tokenizer, answer, where)
    return {"input_ids": [*given, *ids, *([] if ids[-1:] == end else end)], "prompt_length": len(given)}


def _encode_messages(tokenizer: Any, example: dict, prompt: list, answer: list, where: str) -> dict[str, Any]:
    _refuse_beside(example, prompt, where)
    return encode_conversation(tokenizer, prompt, answer, where, _tools(example, where))


def _refuse_beside(example: dict, messages: list, where: str) -> None:
    """Raises a ValueError for fields that would be lost beside messages; the text of the first one is not lost."""
    is_list = isinstance(messages, list) and messages and isinstance(messages[0], dict)
    first = messages[0].get("content") if is_list else None
    kept = {name for name in ("system", "system_prompt") if first is not None and example.get(name) == first}
    refuse({name: value for name, value in example.items() if name not in kept}, _BESIDE_MESSAGES, where)


def _tools(example: dict[str, Any], where: str) -> Any:
    tools = example.get("tools") or None
    if not isinstance(tools, str):
        return tools
    try:  # TRL's data sets hold them as JSON
        return json.loads(tools) or None
    except ValueError as error:
        raise ValueError(f"{where}: `tools` is not a list, and not valid JSON: {error}.") from error


def text_of(row: str | dict[str, Any], name: str, where: str) -> str:
    """The row itself if it is a text, or else its field `name`. Raises a ValueError if that is not a text."""
    if isinstance(row, str):
        return row
    if isinstance(row.get(name), str):
        return row[name]
    raise ValueError(f"{where} has no text in {name!r}; it has {_names(row)}.")


def first_text(example: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    """The first of the fields `names` that holds a text. Raises a ValueError if none does."""
    for name in names:
        if isinstance(example.get(name), str):
            return example[name]
    raise ValueError(f"{where} has no text called {' or '.join(names)}; it has {_names(example)}.")


def _names(row: dict[str, Any]) -> str:
    """The fields of a row, with the types of those that are not texts."""
    kinds = (name if isinstance(value, str) else f"{name} ({type(value).__name__})" for name, value in row.items())
    return ", ".join(kinds) or "nothing"
