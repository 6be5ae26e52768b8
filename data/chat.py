# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Conversations as tokens: where a chat template puts the answer, and with which token it ends a turn."""

from typing import Any

from .tokens import encode

# Stands for an answer where what a template puts behind it is looked for
_ANSWER = "LOOPMDM-ANSWER"


def encode_conversation(
    tokenizer: Any, prompt: list[dict], answer: list[dict], where: str, tools: list | None = None
) -> dict[str, Any]:
    """
    Tokens of a conversation: `input_ids`, of which the first `prompt_length` are the prompt, up to and with the
    opening of the assistant's turn. The rest is the answer up to and with its turn end. What a template puts behind
    that, such as the opening of another turn, is left out.

    Args:
        tokenizer: With a chat template. It may open an assistant's turn whether it is asked or not, end turns with any
            token, and needs no `{% generation %}`.
        prompt, answer: Messages `{"role": ..., "content": ...}`; the last one is the assistant's.
        where: What to call the conversation in errors.
        tools (*optional*): As the template takes them.
    """
    if not all(
        isinstance(one, list) and all(isinstance(message, dict) for message in one) for one in (prompt, answer)
    ):
        raise ValueError(f"{where}: messages must be a list of objects with `role` and `content`.")
    if not answer or answer[-1].get("role") != "assistant":
        raise ValueError(f"{where}: the answer must be a list of messages that ends with one of the role `assistant`.")
    for number, message in enumerate([*prompt, *answer], start=1):
        if message.get("role") is None or (message.get("content") is None and not message.get("tool_calls")):
            raise ValueError(
                f"{where}: message {number} needs `role` and `content`; it has {', '.join(message) or 'nothing'}."
            )
    if tokenizer.chat_template is None:
        raise ValueError(f"{where} is a conversation, and the tokenizer has no chat template.")
    if not prompt:
        raise ValueError(f"{where} has no message before the answer.")
    # Data sets fill up messages with None, which templates take for a value.
    prompt, answer = ([{k: v for k, v in one.items() if v is not None} for one in part] for part in (prompt, answer))
    opened = _render(tokenizer, prompt, where, tools, opens=True)
    whole = _render(tokenizer, [*prompt, *answer], where, tools)
    if not whole.startswith(opened):
        raise ValueError(f"{where}: the chat template does not put the answer behind the prompt.")
    end, rest = _behind_answer(tokenizer, prompt, answer, where, tools)
    if rest and whole.endswith(end + rest):
        whole = whole[: -len(rest)]
    given, ids = encode(tokenizer, opened, where), encode(tokenizer, whole, where)
    if ids[: len(given)] != given:  # a token spans the border; in generation none does
        ids = given + encode(tokenizer, whole[len(opened) :], where)
    return {"input_ids": ids, "prompt_length": len(given)}


def turn_end(tokenizer: Any) -> int | None:
    """The token with which the chat template ends an assistant's turn; None without a template, or such a token."""
    if tokenizer.chat_template is None:
        return None
    prompt, answer = [{"role": "user", "content": "?"}], [{"role": "assistant", "content": _ANSWER}]
    try:
        end, _ = _behind_answer(tokenizer, prompt, answer, "A conversation", None)
    except ValueError:  # the template wants more than this
        return None
    end = end.strip()  # white space ends no turn: it stands within answers too
    ids = encode(tokenizer, end, "A turn end")
    if not ids:
        return None
    last = tokenizer.decode(ids[-1:]).strip()
    return ids[-1] if last in _special_tokens(tokenizer) or last == end else None


def _behind_answer(
    tokenizer: Any, prompt: list[dict], answer: list[dict], where: str, tools: list | None
) -> tuple[str, str]:
    """What the template puts behind an answer: the end of the turn, and what comes after that."""
    marked = [*prompt, *answer[:-1], {**answer[-1], "content": _ANSWER}]
    _, found, behind = _render(tokenizer, marked, where, tools).rpartition(_ANSWER)
    if not found:
        return "", ""
    end, opening = behind, ""
    if _render(tokenizer, prompt, where, tools) == _render(tokenizer, prompt, where, tools, opens=True):
        opening = _opening(tokenizer)
    if opening and end.rstrip().endswith(opening):
        end = end.rstrip()[: -len(opening)]
    places = [(end.find(token), token) for token in _special_tokens(tokenizer) if token in end]
    if places:
        place, token = min(places)
        end = end[: place + len(token)]
    end = end.rstrip() or end  # white space behind a turn end is not part of it
    return end, behind[len(end) :]


def _opening(tokenizer: Any) -> str:
    """What the template puts before an answer; an empty text where it does not begin with one."""
    try:
        text = _render(tokenizer, [{"role": "assistant", "content": _ANSWER}], "A conversation")
    except ValueError:  # some want the user's turn first
        return ""
    before, found, _ = text.partition(_ANSWER)
    return before.strip().removeprefix(tokenizer.bos_token or "").strip() if found else ""


def _render(tokenizer: Any, messages: list[dict], where: str, tools: list | None = None, opens: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens, tools=tools)
    except Exception as error:  # whatever a template raises
        raise ValueError(f"{where}: the chat template does not take these messages: {error}.") from error


def _special_tokens(tokenizer: Any) -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
