# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Conversations as tokens: where a chat template puts the answer, and which token ends a turn."""

import contextlib
import itertools
import json
import re
from typing import Any

from .tokens import encode

# Fields of a message that hold calls of tools, and what a model thinks before it answers
_REASONING = ("reasoning_content", "reasoning", "thinking")
# A mark in place of an answer, to find what a template puts behind it
_ANSWER = "LOOPMDM-ANSWER"


def encode_conversation(
    tokenizer: Any, prompt: list[dict], answer: list[dict], where: str, tools: list | None = None
) -> dict[str, Any]:
    """
    Tokenises a conversation. What a template puts behind the end of the answer's turn, such as the opening of another
    turn, is left out.

    Args:
        tokenizer: A tokenizer with a chat template. The template may ignore `add_generation_prompt`, may end turns
            with any token, and needs no `{% generation %}`.
        prompt, answer (`list[dict]`): Messages `{"role": ..., "content": ...}`; the last one is the assistant's.
        where (`str`): The name of the conversation in errors.
        tools (`list`, *optional*): Tools, as the template expects them.

    Returns:
        `dict`: `input_ids` (`list[int]`), and `prompt_length` (`int`), the number of tokens up to the end of the
        opening of the assistant's turn. The others are the answer and the end of its turn.

    Raises:
        ValueError: Messages that the template does not take or of which it leaves out a part, or a template that does
            not tell where an answer is.
    """
    if not isinstance(answer, list) or not answer or not _is_by_assistant(answer[-1]):
        raise ValueError(f"{where}: the answer must be a list of messages that ends with one of the role `assistant`.")
    messages = _check_messages(tokenizer, [*prompt, *answer] if isinstance(prompt, list) else None, where, tools)
    if not prompt:
        raise ValueError(f"{where} has no message before the answer.")
    prompt, answer = messages[: len(prompt)], messages[len(prompt) :]
    weight = next((message["weight"] for message in answer if message.get("weight", 1) != 1), None)
    if weight is not None:  # OpenAI's format of answers that are not learnt
        raise ValueError(
            f"{where} has an answer of `weight` {weight!r}, which would be learnt in full; leave the row out, or the "
            "`weight`."
        )
    opened = _render(tokenizer, prompt, where, tools, opens=True)
    whole = _render(tokenizer, [*prompt, *answer], where, tools)
    if not whole.startswith(opened):
        start = next((i for i, (a, b) in enumerate(zip(opened, whole, strict=False)) if a != b), len(whole))
        raise ValueError(
            f"{where}: the chat template does not put the answer behind the prompt: it ends a prompt with "
            f"{opened[start:]!r}, but continues with {whole[start:][:40]!r} if there is an answer. The tokenizer "
            "needs a template that does the same in both cases."
        )
    _check_nothing_is_lost(tokenizer, whole, messages, where, tools, context=len(prompt))
    end, rest = _behind_answer(tokenizer, prompt, answer, where, tools)
    if whole.endswith(end + rest):
        whole = whole[: len(whole) - len(rest)]
    elif rest.strip():
        raise ValueError(
            f"{where}: the chat template puts {rest!r} behind the turn end of other answers, but ends this one in "
            f"{whole[-40:]!r}, so that it is not clear where the answer ends."
        )
    elif rest:  # a call ends otherwise than a text; white space behind it is not part of it either
        whole = whole.rstrip()
    given, ids = encode(tokenizer, opened, where), encode(tokenizer, whole, where)
    if ids[: len(given)] != given:  # a token spans the border, which cannot happen in generation
        ids = given + encode(tokenizer, whole[len(opened) :], where)
    return {"input_ids": ids, "prompt_length": len(given)}


def encode_question(tokenizer: Any, messages: Any, where: str, tools: list | None = None) -> list[int]:
    """
    Tokens of a conversation up to and including the opening of the assistant's next turn. An answer at its end is left
    out, so that training examples can serve as questions. Arguments as in [`encode_conversation`].
    """
    if isinstance(messages, list) and messages and _is_by_assistant(messages[-1]):
        messages = messages[:-1]
    if not messages:
        raise ValueError(f"{where} has no message to answer.")
    ids = encode(tokenizer, read_question(tokenizer, messages, where, tools)[1], where)
    if tokenizer.mask_token_id in ids:
        raise ValueError(
            f"{where} holds the mask token {tokenizer.mask_token}, which stands for what is to be written."
        )
    return ids


def read_question(
    tokenizer: Any, messages: Any, where: str, tools: list | None = None, options: dict | None = None
) -> tuple[list[dict], str]:
    """
    The messages of a conversation as the chat template reads them, and the text that it makes of them, up to the
    opening of the assistant's turn. `options` are the template's own. Raises a ValueError if it leaves out tools or
    calls.
    """
    messages = _check_messages(tokenizer, messages, where, tools, options)
    text = _render(tokenizer, messages, where, tools, True, options)
    _check_nothing_is_lost(tokenizer, text, messages, where, tools, len(messages), True, options)
    return messages, text


def _check_nothing_is_lost(
    tokenizer: Any,
    text: str,
    messages: list[dict],
    where: str,
    tools: list | None,
    context: int,
    opens: bool = False,
    options: dict | None = None,
) -> None:
    """
    Raises a ValueError if the template writes the same `text` without the tools or without the calls of a message; or
    without the reasoning of a learnt one, or what it says beside its calls. The first `context` messages may lose
    their reasoning, which some templates want.
    """
    without: list[tuple] = [("tools", messages, None)] if tools else []
    for place, message in enumerate(messages):
        groups = [("tool_calls",), *([_REASONING] if place >= context else [])]
        groups += [("content",)] if place >= context and message.get("tool_calls") else []
        for names in groups:
            if found := [name for name in names if not _is_blank(message.get(name))]:
                rest = {name: value for name, value in message.items() if name not in found}
                rest |= {"content": ""} if "content" in found else {}
                without.append((found[0], [*messages[:place], rest, *messages[place + 1 :]], tools))
    for name, others, other_tools in without:
        same = None
        with contextlib.suppress(ValueError):  # a template that refuses the others has read the field
            same = _render(tokenizer, others, where, other_tools, opens, options)
        if same == text:
            raise ValueError(
                f"{where} has `{name}`, which the chat template leaves out; give a tokenizer whose template writes "
                "it, or remove the field."
            )


def _is_by_assistant(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _check_messages(
    tokenizer: Any, messages: Any, where: str, tools: list | None = None, options: dict | None = None
) -> list[dict]:
    """
    The messages without fields that are None and lists of no calls, which data sets add and templates would take for
    values. The arguments of calls become objects, which most templates read, or JSON, for those that put texts
    together (DeepSeek's). A content that is missing beside calls becomes an empty one, if the template needs it.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: messages must be a list of objects with `role` and `content`.")
    for number, message in enumerate(messages, start=1):
        if not _is_blank(message.get("function_call")):
            raise ValueError(f"{where}: message {number} has `function_call`; give `tool_calls`, which followed it.")
        if message.get("role") is None or (message.get("content") is None and not message.get("tool_calls")):
            raise ValueError(
                f"{where}: message {number} needs `role` and `content`; it has {', '.join(message) or 'nothing'}."
            )
    if tokenizer.chat_template is None:
        raise ValueError(f"{where} is a conversation, and the tokenizer has no chat template.")
    messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
    calls = {
        number: _calls(message.pop("tool_calls"), f"{where}: message {number + 1}")
        for number, message in enumerate(messages)
        if "tool_calls" in message
    }
    calls = {number: made for number, made in calls.items() if made}
    return _with_calls(tokenizer, messages, calls, where, tools, options) if calls else messages


def _with_calls(
    tokenizer: Any,
    messages: list[dict],
    calls: dict[int, list[dict]],
    where: str,
    tools: list | None,
    options: dict | None,
) -> list[dict]:
    """The messages with their calls, by the message's number, in the first form that the template writes as JSON."""
    names = [str(_function(call).get("name", "")) for made in calls.values() for call in made]
    silent = {number for number in calls if _is_blank(messages[number].get("content"))}
    contents: tuple[dict, ...] = ({}, {"content": ""}) if silent else ({},)
    found, taken = messages, []
    for content, is_text in itertools.product(contents, (False, True)):
        found = list(messages)
        for number, made in calls.items():
            given = content if number in silent else {}
            found[number] = {**found[number], **given, "tool_calls": [_with_arguments(call, is_text) for call in made]}
        with contextlib.suppress(ValueError):
            text = _render(tokenizer, found, where, tools, options=options)
            arguments = [_function(call).get("arguments") for number in calls for call in found[number]["tool_calls"]]
            if any(isinstance(one, dict) and one and str(one) in text for one in arguments):
                continue  # as Python shows objects
            if all(name in text for name in names):
                return found
            taken.append(found)
    return (taken or [found])[0]  # of a template that leaves out names, or takes none of these


def _calls(value: Any, where: str) -> list[dict]:
    """The calls of a message, which data sets may hold as JSON."""
    with contextlib.suppress(ValueError):
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
    value = value or []
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise ValueError(f"{where} has `tool_calls` that are {value!r}; give a list of objects.")
    return value


def _function(call: dict) -> dict:
    function = call.get("function", call)
    return function if isinstance(function, dict) else {}


def _with_arguments(call: dict, is_text: bool) -> dict:
    """A call of a tool with its arguments as JSON, or as an object."""
    function = _function(call)
    arguments = function.get("arguments")
    if isinstance(arguments, str) == is_text or arguments is None:
        return call
    with contextlib.suppress(ValueError):
        changed = json.dumps(arguments, ensure_ascii=False) if is_text else json.loads(arguments)
        function = {**function, "arguments": changed}
    return {**call, "function": function} if "function" in call else function


def _is_blank(value: Any) -> bool:
    """Whether a field says nothing: None, white space, an empty list, parts with no text."""
    if isinstance(value, list):
        return all(
            isinstance(part, dict) and part.get("type") == "text" and _is_blank(part.get("text")) for part in value
        )
    return not (value.strip() if isinstance(value, str) else value)


def turn_end(tokenizer: Any) -> int | None:
    """The token that ends an assistant's turn in the chat template; None if there is no template or no such token."""
    if tokenizer.chat_template is None:
        return None
    end = ""
    for content in (_ANSWER, [{"type": "text", "text": _ANSWER}]):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        with contextlib.suppress(ValueError):  # the template needs the other kind of content, or more messages
            end = end or _behind_answer(tokenizer, messages[:1], messages[1:], "A conversation", None)[0]
    end = end.strip()  # white space cannot end a turn, since it occurs in answers
    ids = encode(tokenizer, end, "A turn end")
    if not ids:
        return None
    last = tokenizer.decode(ids[-1:]).strip()
    return ids[-1] if last in _special_tokens(tokenizer) or last == end else None


def _behind_answer(
    tokenizer: Any, prompt: list[dict], answer: list[dict], where: str, tools: list | None
) -> tuple[str, str]:
    """What the template puts behind an answer: the end of the turn, and what follows it."""
    content = answer[-1].get("content")
    mark = [{"type": "text", "text": _ANSWER}] if isinstance(content, list) else _ANSWER
    # A message that calls tools ends like a text; the calls may stand between its content and its end.
    last = {"role": "assistant"} if content is None or answer[-1].get("tool_calls") else answer[-1]
    marked = _render(tokenizer, [*prompt, *answer[:-1], {**last, "content": mark}], where, tools)
    _, found, end = marked.rpartition(_ANSWER)
    if not found:
        kind = "a list of parts" if isinstance(content, list) else "a text"
        raise ValueError(f"{where}: the chat template leaves out the answer, whose `content` is {kind}.")
    behind = end
    heeds = _render(tokenizer, prompt, where, tools) != _render(tokenizer, prompt, where, tools, opens=True)
    opening = "" if heeds else _opening(tokenizer)
    if opening and end.rstrip().endswith(opening):
        end = end.rstrip()[: -len(opening)]
    special = "|".join(map(re.escape, sorted(_special_tokens(tokenizer), key=len, reverse=True)))
    # Several special tokens in a row end a turn together, unless the last ones may open the next turn.
    first = re.search(rf"({special})+" if heeds else special, end) if special else None
    if first is not None:
        end = end[: first.end()]
    end = end.rstrip() or end  # white space behind a turn end is not part of it
    return end, behind[len(end) :]


def _opening(tokenizer: Any) -> str:
    """The text that the template puts before an answer at the start; empty if it does not allow one there."""
    try:
        text = _render(tokenizer, [{"role": "assistant", "content": _ANSWER}], "A conversation")
    except ValueError:  # some templates need the user's turn first
        return ""
    before, found, _ = text.partition(_ANSWER)
    return before.strip().removeprefix(tokenizer.bos_token or "").strip() if found else ""


def _render(
    tokenizer: Any,
    messages: list[dict],
    where: str,
    tools: list | None = None,
    opens: bool = False,
    options: dict | None = None,
) -> str:
    given = {**(options or {}), "add_generation_prompt": opens, "tokenize": False, "tools": tools}
    try:
        return tokenizer.apply_chat_template(messages, **given)
    except Exception as error:  # a template can raise anything
        raise ValueError(f"{where}: the chat template does not take these messages: {error}.") from error


def _special_tokens(tokenizer: Any) -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
