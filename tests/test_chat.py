# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm chat`: answers, commands, the cache from turn to turn, and what a terminal shows."""

import io
import json
import math
import re

import pytest
import torch
from commands import refusal, run
from evaluation_models import save_looped, word_tokenizer
from rich.console import Console

from loopmdm import LoopMDMForMaskedLM
from loopmdm.objective import seeded_generator
from loopmdm_cli.chat import Conversation
from loopmdm_cli.drafts import MASK, DraftStreamer


@pytest.fixture(scope="module", params=[{}, {"attention_block_size": 4}], ids=["whole", "blocks"])
def folder(request, tmp_path_factory):
    return save_looped(tmp_path_factory.mktemp("model"), **request.param)


def answers(folder: str, questions: list[str], **options) -> list[str]:
    """By `generate`, turn by turn, without a cache."""
    model, tokenizer, messages, texts = LoopMDMForMaskedLM.from_pretrained(folder), word_tokenizer(), [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        generator = seeded_generator(0, "chat", len(messages))
        output = model.generate(ids, generator=generator, **options)[0, ids.shape[1] :]
        texts.append(tokenizer.decode(output, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": texts[-1]})
    return texts


def talk(folder: str, *lines: str, options: tuple[str, ...] = ()) -> list[str]:
    return run("chat", folder, "--max-new-tokens", 6, *options, input="\n".join(lines) + "\n").splitlines()


def test_a_pipe_gets_the_answers(folder):
    expected = answers(folder, ["w3 w4", "w5"], max_new_tokens=6)
    assert talk(folder, "w3 w4", "", "w5") == expected
    drawn = answers(folder, ["w3 w4"], max_new_tokens=6, do_sample=True, temperature=2.0)
    assert talk(folder, "w3 w4", options=("--do-sample", "--temperature", "2")) == drawn


def test_commands(folder, tmp_path):
    loops, steps = (
        answers(folder, ["w3"], max_new_tokens=6, num_loops=1),
        answers(folder, ["w3"], max_new_tokens=6, num_loops=1, max_denoising_steps=1),
    )
    path = tmp_path / "talk.jsonl"
    lines = ["/loops 1", "w3", "/undo", "/steps 1", "w3", "/undo", "/system w9", "w3", f"/save {path}", "/quit", "w8"]
    assert talk(folder, *lines)[:2] == [*loops, *steps]
    saved = json.loads(path.read_text())["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert saved[0]["content"] == "w9"
    assert "/undo" in "".join(talk(folder, "/help"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/dance", "/dance is not a command"),
        ("/loops none", "'none' is not a number"),
        ("/undo", "nothing to undo"),
        ("/save", "Name the file"),
        ("w3 " * 70, "the model sees 64"),
    ],
)
def test_mistakes_are_named(monkeypatch, folder, line, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(line + "\n"))
    assert message in refusal("chat", folder)


def test_a_template_is_needed(tmp_path):
    folder = save_looped(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    assert "no chat template" in refusal("chat", folder)
    assert "--max-new-tokens is 0; it must be at least 1" in refusal("chat", folder, "--max-new-tokens", 0)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    message = refusal("chat", folder)
    assert "holds none of a tokenizer's files, such as tokenizer.json" in message and "sentencepiece" not in message


def test_the_cache_goes_on_across_turns(tmp_path, monkeypatch):
    folder = save_looped(tmp_path, attention_block_size=4)
    model = LoopMDMForMaskedLM.from_pretrained(folder)
    generate, stored = model.generate, []

    def watched(*args, past_key_values=None, **kwargs):
        stored.append(0 if past_key_values is None else past_key_values.length)
        return generate(*args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(model, "generate", watched)
    conversation = Conversation(model, word_tokenizer(), {"max_new_tokens": 6}, 0, None)
    for line in ("w3 w4 w5", "w6", "/loops 2", "w7", "w8", "/undo", "w9"):
        assert conversation.take(line)
    assert stored[0] == 0 and stored[1] >= 4  # the second question begins with the first and its answer
    assert stored[2] == 0 and stored[3] >= stored[1]  # other loops begin anew
    assert 0 < stored[4] <= stored[3]


def test_an_interrupted_answer_leaves_the_conversation_as_it_was(tmp_path, monkeypatch):
    model = LoopMDMForMaskedLM.from_pretrained(save_looped(tmp_path))
    conversation = Conversation(model, word_tokenizer(), {"max_new_tokens": 6}, 0, None)
    forward, calls = model.forward, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", interrupted)
    assert conversation.take("w3") and conversation.messages == []
    assert conversation.take("w3") and len(conversation.messages) == 2


def screen(text: str) -> str:
    """What is printed, without the codes that move and colour."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize(("is_terminal", "no_color"), [(True, False), (True, True), (False, False)])
def test_drafts_are_dim_and_coloured_and_make_way_for_the_text(is_terminal, no_color):
    file, tokenizer = io.StringIO(), word_tokenizer()
    colours = {"color_system": "standard", "no_color": no_color}
    console = Console(file=file, force_terminal=is_terminal, width=20, height=6, **colours)
    streamer = DraftStreamer(tokenizer, console)
    ids = tokenizer("w1 w2 w3 <mask> w4 <mask> w5 <end>", return_tensors="pt").input_ids[0]
    streamer.put(ids[:2])
    streamer.put_draft(ids[2:6], torch.tensor([0.95, 0.5, math.nan, 0.49]))
    streamer.live.refresh()
    draft = file.getvalue()
    streamer.put(torch.cat((ids[2:3], ids[4:5])))
    streamer.put(ids[6:])
    streamer.end()
    assert streamer.text() == "w3 w4 w5"
    assert screen(file.getvalue()).rstrip().endswith("w5")
    if is_terminal:
        codes = ("2",) * 4 if no_color else ("2;32", "2;33", "2", "2;31")  # green, yellow, none and red
        pieces = zip(codes, ("w3", MASK, "w4", MASK), strict=True)
        assert "".join(f"\x1b[{code}m{piece}\x1b[0m" for code, piece in pieces) in draft
    else:
        assert draft == "" and file.getvalue() == "w3 w4 w5\n"


def test_long_answers_keep_within_the_screen():
    file, tokenizer = io.StringIO(), word_tokenizer()
    console = Console(file=file, force_terminal=True, width=20, height=6)
    streamer = DraftStreamer(tokenizer, console, skip_prompt=False)
    ids = tokenizer(" ".join(["w1"] * 90), return_tensors="pt").input_ids[0]
    for start in range(0, 90, 10):
        streamer.put(ids[start : start + 10])
        streamer.live.refresh()
    shown = streamer.live.get_renderable().plain.splitlines()
    assert len(shown) <= 4 and all(len(line) <= 20 for line in shown)
    streamer.end()
    assert screen(file.getvalue()).count("w1") >= 90
