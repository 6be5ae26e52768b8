# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm serve`: a process on the loopback, and clients of the OpenAI API."""

import contextlib
import http.client
import io
import json
import os
import re
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from commands import refusal
from evaluation_models import WORDS, save_judge, save_looped, word_tokenizer
from peft import LoraConfig
from processes import start
from test_snippets import ROOT, examples_of
from transformers.cli.chat import load_generation_config

import loopmdm_cli
from loopmdm import LoopMDMForMaskedLM, LoopMDMGenerationConfig

LENGTH = 1024


def tokenizer():
    return word_tokenizer([*WORDS[:-1], "abcdef"])  # what StopStringCriteria learns from how a tokenizer joins words


@contextlib.contextmanager
def served(folder: str):
    """A client of a server in a process of its own."""
    read, write = os.pipe()
    process = start(loopmdm_cli.main, ["serve", folder, "--port", "0"], stdout=write)
    os.close(write)
    try:
        with open(read) as shown:
            address = re.match(r"http://127\.0\.0\.1:\d+/v1", shown.readline())[0]
            with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
                yield client
    finally:
        process.terminate()
        process.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    place = save_looped(tmp_path_factory.mktemp("model"), max_position_embeddings=LENGTH)
    tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def client(folder):
    with served(folder) as client:
        yield client


@pytest.fixture(scope="module")
def model(folder):
    return LoopMDMForMaskedLM.from_pretrained(folder)


def asks(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ask(client, folder: str, text: str, **options):
    return client.chat.completions.create(model=folder, messages=asks(text), **options)


def direct(model, text: str, **options) -> list[int]:
    """Tokens of the answer by `generate`, up to its end."""
    inputs = tokenizer().apply_chat_template(
        asks(text), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, tokenizer=tokenizer(), return_dict_in_generate=True, **options)
    start = inputs["input_ids"].shape[1]
    return output.sequences[0, start:][output.attention_mask[0, start:] == 1].tolist()


def text_of(tokens: list[int]) -> str:
    return tokenizer().decode(tokens, skip_special_tokens=True)


def seeded(seed: int, **options):
    return {"generator": torch.Generator().manual_seed(seed), "do_sample": True, **options}


def test_an_answer_is_that_of_generate(client, folder, model):
    (entry,) = client.models.list().data
    assert entry.id == folder
    answer = ask(client, folder, "w3 w4 w5", max_tokens=7)
    expected = direct(model, "w3 w4 w5", max_new_tokens=7)
    assert answer.choices[0].message.content == text_of(expected) and answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 7, 12)
    assert answer.model == folder
    # What costs and chooses, in the names of `generate`
    options = {"num_loops": 1, "max_denoising_steps": 2, "block_length": 4, "confidence_threshold": 0.2}
    answer = ask(client, folder, "w3 w4 w5", max_completion_tokens=9, extra_body=options)
    assert answer.choices[0].message.content == text_of(direct(model, "w3 w4 w5", max_new_tokens=9, **options))
    drawn = ask(client, folder, "w8", max_tokens=9, temperature=1.5, top_p=0.9, seed=4)
    expected = direct(model, "w8", **seeded(4, max_new_tokens=9, temperature=1.5, top_p=0.9))
    assert drawn.choices[0].message.content == text_of(expected)
    chance = {"max_tokens": 9, "temperature": 1.5, "extra_body": {"seed": None}}
    assert len({ask(client, folder, "w8", **chance).choices[0].message.content for _ in range(3)}) > 1
    # Settings that ask for nothing
    greedy = ask(client, folder, "w3 w4 w5", max_tokens=7, temperature=0, top_p=1, n=1, presence_penalty=0, user="me")
    assert greedy.choices[0].message.content == text_of(direct(model, "w3 w4 w5", max_new_tokens=7))


def ended(model, length: int, **options) -> tuple[int, list[int]]:
    """A seed whose answer ends at its last token, after `length` tokens of as many, and the answer."""
    for seed in range(400):
        tokens = direct(model, "w6", **seeded(seed, max_new_tokens=length, temperature=3.0, **options))
        if len(tokens) == length and tokens[-1] == 1:
            return seed, tokens
    raise AssertionError("no such seed")


@pytest.mark.parametrize("stream", [False, True])
def test_finish_reasons_and_usage(client, folder, model, stream):
    def finish(**options):
        answer = ask(client, folder, "w6", stream=stream, **options)
        if not stream:
            (choice,) = answer.choices
            return choice.message.content, choice.finish_reason, answer.usage.completion_tokens
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return text, chunks[-1].choices[0].finish_reason, chunks[-1].usage.completion_tokens

    # The end token counts, and nothing behind it; at the very end of the room it is an end too.
    seed, tokens = ended(model, 3)
    drawn = {"temperature": 3.0, "seed": seed}
    assert finish(max_tokens=3, **drawn) == (text_of(tokens), "stop", 3)
    plain = direct(model, "w6", max_new_tokens=12, block_length=4)
    assert finish(max_tokens=12, extra_body={"block_length": 4}) == (text_of(plain), "length", 12)
    stop = text_of(plain[4:5])
    expected = direct(model, "w6", max_new_tokens=12, block_length=4, stop_strings=[stop])
    assert len(expected) == 5
    options = {"stop": stop, "extra_body": {"block_length": 4}}
    assert finish(max_tokens=12, **options) == (text_of(expected), "stop", 5)
    full = direct(model, "w6", max_new_tokens=5, block_length=4)
    assert full[4] not in full[:4]  # it comes at the end of the room
    options["stop"] = text_of(full[4:])
    assert finish(max_tokens=5, **options) == (text_of(full), "stop", 5)


def test_blocks_are_streamed_as_they_are_finished(client, folder, model):
    options = {"max_tokens": 80, "extra_body": {"block_length": 8}}
    started, times, text = time.perf_counter(), [], ""
    for chunk in ask(client, folder, "w3", stream=True, **options):
        times.append(time.perf_counter() - started)
        text += chunk.choices[0].delta.content or ""
    assert text == text_of(direct(model, "w3", max_new_tokens=80, block_length=8))
    assert times[len(times) // 2] < 0.8 * times[-1]


def test_clients_at_once_get_what_they_would_alone(client, folder, model):
    seeds = range(12)
    options = [{"temperature": 2.0, "extra_body": {"num_loops": 1 + seed % 3}} for seed in seeds]

    def content(seed):
        answer = ask(client, folder, f"w{seed + 3}", max_tokens=8, seed=seed, stream=seed % 2 == 0, **options[seed])
        if seed % 2:
            return answer.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    with ThreadPoolExecutor(len(seeds)) as pool:
        together = list(pool.map(content, seeds))
    for seed, text in zip(seeds, together, strict=True):
        loops = {"num_loops": 1 + seed % 3}
        alone = direct(model, f"w{seed + 3}", **seeded(seed, max_new_tokens=8, temperature=2.0, **loops))
        assert text == text_of(alone)


BAD = {
    "loops": ({"extra_body": {"num_loops": 0}}, "`num_loops` is 0; it must be an integer of at least 1"),
    "threshold": ({"extra_body": {"confidence_threshold": 2}}, "`confidence_threshold` is 2; it must be above 0"),
    "combination": ({"extra_body": {"do_sample": False, "temperature": 2.0}}, "has no effect on greedy decoding"),
    "length": ({"max_tokens": LENGTH}, f"{LENGTH} new ones exceed `max_position_embeddings`"),
    "no length": ({"max_tokens": 0}, "`max_tokens` is 0"),
    "kind": ({"extra_body": {"max_tokens": "many"}}, "`max_new_tokens` is 'many'; it must be of type int"),
    "seed": ({"seed": -1}, "`seed` is -1"),
    "stop": ({"stop": ["w1", ""]}, "`stop` is ['w1', '']"),
    "misspelt": ({"extra_body": {"num_loop": 2}}, "did you mean `num_loops`?"),
    "several": ({"n": 2}, "`n` is 2, which this server cannot do"),
    "penalty": ({"frequency_penalty": 0.5}, "`frequency_penalty` is 0.5, which this server cannot do"),
    "format": ({"response_format": {"type": "json_object"}}, "which this server cannot do"),
    "sequences": ({"extra_body": {"num_return_sequences": 2}}, "which this server cannot do"),
    "mask": ({"messages": asks("w1 <mask>")}, "`messages` holds the mask token <mask>"),
    "none": ({"messages": []}, "`messages` is []; give objects"),
    "no role": ({"messages": [{"content": "w1"}]}, "give objects with a `role`"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a text as `content`"),
    "tools": (
        {"tools": [{"type": "function", "function": {"name": "w1"}}]},
        "The request has `tools`, which the chat template leaves out",
    ),
    "no tools": ({"extra_body": {"tools": 5}}, "`tools` is 5; give a list"),
    "no calls": (
        {"messages": [{"role": "assistant", "tool_calls": 5}]},
        "message 1 has `tool_calls` that are 5; give a list of objects",
    ),
    "template": (
        {"extra_body": {"chat_template_kwargs": {"tokenize": False}}},
        "has `tokenize`, which the server sets",
    ),
    "other model": ({"model": "other"}, "requested 'other'"),
    "config": (
        {"extra_body": {"generation_config": "{"}},
        "`generation_config` is '{'; give the text of a JSON object",
    ),
    "config of another kind": ({"extra_body": {"generation_config": [1]}}, "`generation_config` is [1]"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_bad_requests_are_refused(client, folder, options, message, stream):
    request = {"model": folder, "messages": asks("w3"), "stream": stream} | options
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**request)
    assert message in error.value.body["message"]
    assert error.value.body["type"] == "invalid_request_error"


def test_transformers_chat_is_a_client(client, folder, model, tmp_path):
    """What `transformers chat` sends, without its terminal; `--generation-config` names a folder of ours."""
    LoopMDMGenerationConfig(num_loops=1).save_pretrained(tmp_path)
    config = load_generation_config(str(tmp_path))
    config.update(do_sample=False, max_new_tokens=8)
    root = str(client.base_url).removesuffix("v1/")
    assert '"ready"' in client.post(f"{root}load_model", cast_to=str, body={"model": folder})
    answer = ask(client, folder, "w3 w4", extra_body={"generation_config": config.to_json_string()})
    expected = direct(model, "w3 w4", max_new_tokens=8, num_loops=1)
    assert expected != direct(model, "w3 w4", max_new_tokens=8)
    assert answer.choices[0].message.content == text_of(expected)


def test_answers_do_not_wait_for_the_network(client):
    """Small packets are held back for 40 ms, unless a listener's protocol is named."""
    with contextlib.closing(http.client.HTTPConnection(client.base_url.netloc.decode())) as connection:

        def seconds() -> float:
            started = time.perf_counter()
            connection.request("GET", "/health")
            connection.getresponse().read()
            return time.perf_counter() - started

        assert min([seconds() for _ in range(30)][-10:]) < 0.03  # a new connection is acknowledged at once


def test_other_routes_do_not_exist(client):
    for path in ("reset", "v1/responses", "v1/audio/transcriptions"):
        with pytest.raises(openai.NotFoundError) as error:
            client.post(f"{str(client.base_url).removesuffix('v1/')}{path}", cast_to=dict, body={"model": "x"})
        assert error.value.body["message"] == "Not Found"


def test_a_body_that_is_no_object_is_refused(client, folder):
    for body, headers in (
        ([1], {}),
        ("text", {}),
        ({"model": folder, "messages": asks("w3")}, {"Content-Type": "application/x-www-form-urlencoded"}),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            client.post("/chat/completions", cast_to=dict, body=body, options={"headers": headers})
        assert "not a JSON object; send one, with the header `Content-Type" in error.value.body["message"]


@pytest.mark.parametrize("request_", [{"model": "\ud800"}, {"messages": asks("\ud800")}, {"\ud800": 1}])
def test_half_a_character_is_refused(model, request_):
    """In this process: the client of the API cannot send it."""
    from fastapi.testclient import TestClient

    from loopmdm_cli._server import make_app

    body = {"model": "m", "messages": asks("w3")} | request_
    http = TestClient(make_app("m", model, tokenizer()), raise_server_exceptions=False)
    answer = http.post("/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "surrogates not allowed" in answer.json()["error"]["message"]


def test_tools_that_the_template_writes_are_served(model):
    """On request alone, with the arguments of calls as objects, and with the parts of a content as one text."""
    from fastapi.testclient import TestClient

    from loopmdm_cli._server import make_app

    speaker = tokenizer()
    speaker.chat_template = (
        "{% if tools and use_tools %}{{ tools[0].name }} {% endif %}"
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments.values()|join }} {% endfor %}"
        "{{ m.content + ' ' }}{% endfor %}"
    )
    http = TestClient(make_app("m", model, speaker), raise_server_exceptions=False)
    call = {"type": "function", "function": {"name": "w5", "arguments": '{"a": "w6"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "w3"}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "w7"},
    ]
    body = {"model": "m", "messages": messages, "tools": [{"name": "w4"}], "max_tokens": 3}
    answer = http.post("/v1/chat/completions", json={**body, "chat_template_kwargs": {"use_tools": True}})
    assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] == 4
    assert http.post("/v1/chat/completions", json=body).status_code == 400, "these are not written"


def test_stop_strings_that_a_tokenizer_cannot_look_for_are_refused_before_the_answer(model):
    from fastapi.testclient import TestClient

    from loopmdm_cli._server import make_app

    http = TestClient(make_app("m", model, word_tokenizer()), raise_server_exceptions=False)
    for stream in (False, True):
        body = {"model": "m", "messages": asks("w3"), "stop": "w4", "stream": stream}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400 and "cannot look for" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_an_error_of_the_api(model, monkeypatch, stream):
    """In this process, where `generate` can be made to fail."""
    from fastapi.testclient import TestClient

    from loopmdm_cli._server import make_app

    reason = 'no "memory"\nleft {'

    def fail(**arguments):
        raise RuntimeError(reason)

    monkeypatch.setattr(model, "generate", fail)
    http = TestClient(make_app("m", model, tokenizer()), raise_server_exceptions=False)
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)
    with client, pytest.raises(openai.APIError) as error:
        list(ask(client, "m", "w3", stream=stream))
    assert error.value.body["message"] == reason and error.value.body["type"] == "server_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_the_model(client, folder, stream):
    """What it asked for would take minutes, in a single block; others wait behind it."""
    slow = {"model": folder, "messages": asks("w3"), "max_tokens": LENGTH - 8, "stream": stream}
    body = json.dumps(slow).encode()
    host, port = client.base_url.host, client.base_url.port
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(3):  # one runs and two wait
            gone = stack.enter_context(socket.create_connection((host, port)))
            gone.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(1)  # they come first
        waiting = ThreadPoolExecutor(1).submit(ask, client, folder, "w4", max_tokens=3)
        time.sleep(1)
        assert not waiting.done()
    assert waiting.result(timeout=60).usage.completion_tokens == 3


def test_the_example_of_the_docs(client, folder, model):
    page = ROOT / "docs/serving.md"
    (code,) = [example.code for example in examples_of(page) if "import OpenAI" in example.code]
    for old, new in {"http://localhost:8000/v1": str(client.base_url), "my-model": folder, "What": "w3"}.items():
        assert old in code
        code = code.replace(old, new)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert "w" in printed.getvalue()


def test_an_adapter_is_served(tmp_path, folder):
    model = LoopMDMForMaskedLM.from_pretrained(folder)
    model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    with served(str(tmp_path / "adapter")) as client:
        answer = ask(client, str(tmp_path / "adapter"), "w3 w4", max_tokens=6)
    assert answer.choices[0].message.content == text_of(direct(model, "w3 w4", max_new_tokens=6))


def test_what_cannot_be_served_is_named(tmp_path, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port} cannot be listened at" in refusal("serve", folder, "--port", port)
    assert "--port is 70000" in refusal("serve", folder, "--port", 70000)
    assert "cannot be listened at" in refusal("serve", folder, "--host", "192.0.2.1", "--port", 0)
    assert "not a LoopMDM" in refusal("serve", save_judge(tmp_path / "judge"))
    assert "does not hold a model" in refusal("serve", tmp_path)
    bare = save_looped(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    assert "does not have a tokenizer" in refusal("serve", bare)
    plain = save_looped(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    assert "no chat template" in refusal("serve", plain)


def test_missing_packages_are_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "loopmdm_cli._server", raising=False)
    assert 'fastapi; `pip install "loopmdm[serve]"`' in refusal("serve", folder)
