# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
transformers' OpenAI-compatible server (`transformers serve`) with a LoopMDM in it. Only these parts differ: how the
model is loaded, what a request may ask of `generate`, and that an answer is given up when its client has gone. Only
`loopmdm serve` imports this module, as it imports torch.
"""

import asyncio
import inspect
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    GenerationState,
    _GenerationCancelled,
    _StreamError,
)

from loopmdm import LoopMDMGenerationConfig
from loopmdm.data.chat import read_question
from loopmdm.generation_utils import SAMPLING, check_argument, reject_unknown, stop_criterion

# Of transformers' server; `transformers chat` begins with the last.
ROUTES = ("/v1/models", "/health", "/load_model")
FAILURE = 'data: {"error": "'  # what the last chunk of a stream that fails begins with, before the bare message
NEW_TOKENS = 256  # at most, where neither the request nor the model's settings say

# Arguments of `generate` that a request may give: those of JSON that concern one text
OPTIONS = LoopMDMGenerationConfig.FIELDS.keys() - {
    *("max_length", "num_return_sequences", "return_dict_in_generate", "output_scores", "output_trace", "loop_policy")
}
# What the OpenAI API calls them; of two, the first counts.
OPENAI_NAMES = {"max_completion_tokens": "max_new_tokens", "max_tokens": "max_new_tokens", "stop": "stop_strings"}
TAKEN = {"model", "messages", "stream", "seed", "tools", "chat_template_kwargs", *OPENAI_NAMES, *OPTIONS}
# What does not bear on the answer. The last chunk of a stream has the usage, with or without `stream_options`.
INERT = {"metadata", "parallel_tool_calls", "prediction", "safety_identifier", "service_tier", "store"}
INERT |= {"prompt_cache_key", "stream_options", "user"}
# What the server cannot do is accepted where it asks for nothing.
NEUTRAL = {"n": 1, "num_return_sequences": 1, "response_format": {"type": "text"}, "modalities": ["text"]}
NEUTRAL |= {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "logprobs": False, "top_logprobs": 0}
NEUTRAL |= {"tool_choice": "auto", "reasoning_effort": "none"}


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """What is checked of a message: transformers' handler would leave out, or misread, what is not text."""

    role: str
    content: str | list[Part] | None = None


MESSAGES = TypeAdapter(Annotated[list[Message], Field(min_length=1)])


@dataclass
class Wishes:
    """What a request asks of `generate`. transformers' handler reads `max_new_tokens`, for the finish reason."""

    options: dict[str, Any]
    seed: int
    max_new_tokens: int | None = None


class Models(ModelManager):
    """Has one model, loaded as by the other commands."""

    def __init__(self, name: str, model: Any, tokenizer: Any):
        self.model, self.tokenizer, self.created = model, tokenizer, int(time.time())
        super().__init__(force_model=name)

    @staticmethod
    def process_model_name(model_id):
        return model_id

    def _load_processor(self, *args, **kwargs):
        return self.tokenizer

    def _load_model(self, *args, **kwargs):
        return self.model

    async def load_model_streaming(self, *args, **kwargs):
        yield 'data: {"status": "ready", "cached": true}\n\n'

    def get_gen_models(self, cache_dir=None):
        return [{"id": self.force_model, "object": "model", "created": self.created, "owned_by": "loopmdm"}]


class Chat(ChatCompletionHandler):
    """Reads requests: the OpenAI API's, and arguments of `generate` beside them."""

    def _validate_request(self, body):
        json.dumps(body, ensure_ascii=False).encode()  # a ValueError for half a character (a lone surrogate)
        if "generation_config" in body:
            body.update({**_unpacked(body.pop("generation_config")), **body})
        if not body.get("tools") and body.get("tool_choice") == "none":  # the API's default
            del body["tool_choice"]
        for name in [name for name, value in body.items() if value is None]:
            del body[name]
        for name, value in body.items():
            if name in TAKEN | INERT or (name in NEUTRAL and value == NEUTRAL[name]):
                continue
            if name in NEUTRAL.keys() | LoopMDMGenerationConfig.FIELDS | self._unused_fields:
                raise ValueError(f"`{name}` is {value!r}, which this server cannot do; leave it out.")
            reject_unknown({name: value})
        try:
            MESSAGES.validate_python(body.get("messages"))
        except ValidationError:
            shown = str(body.get("messages"))[:200]
            raise ValueError(f"`messages` is {shown}; give objects with a `role` and a text as `content`.") from None
        options = body.get("chat_template_kwargs", {})
        if not isinstance(options, dict):
            raise ValueError(f"`chat_template_kwargs` is {options!r}; give an object.")
        own = inspect.signature(self.model_manager.tokenizer.apply_chat_template).parameters.keys() - {"documents"}
        for name in options.keys() & own:
            raise ValueError(f"`chat_template_kwargs` has `{name}`, which the server sets itself; leave it out.")
        if not isinstance(body.get("tools", []), list):
            raise ValueError(f"`tools` is {body['tools']!r}; give a list of objects.")
        if not isinstance(body.get("stream", False), bool):
            raise ValueError(f"`stream` is {body['stream']!r}; give true or false.")
        for message in body["messages"]:
            if isinstance(message.get("content"), list):
                message["content"] = " ".join(part["text"] for part in message["content"])
            elif not message.get("tool_calls"):
                message["content"] = message.get("content") or ""
        tokenizer, tools = self.model_manager.tokenizer, body.get("tools") or None
        body["messages"] = read_question(tokenizer, body["messages"], "The request", tools, options)[0]

    @staticmethod
    def get_processor_inputs_from_messages(messages, modality):
        return messages  # which `_validate_request` has read; transformers' own leaves out fields

    def _streaming(self, *args, **kwargs):
        response = super()._streaming(*args, **kwargs)
        response.body_iterator = _chunks(response.body_iterator)
        return response

    def _build_generation_config(self, body, model_generation_config, use_cb=False):
        options = {name: body[name] for name in OPTIONS if name in body}
        for name, own in reversed(OPENAI_NAMES.items()):
            if name in body:
                options[own] = body[name]
        stops = options.get("stop_strings", [])
        if not all(isinstance(stop, str) and stop for stop in (stops if isinstance(stops, list) else [stops])):
            raise ValueError(f"`stop` is {stops!r}; give a text, or a list of texts.")
        if options.get("temperature") == 0:  # the API's way to ask for the most likely tokens
            options = {name: value for name, value in options.items() if name not in SAMPLING} | {"do_sample": False}
        elif options.keys() & SAMPLING:
            options.setdefault("do_sample", True)
        seed = body.get("seed", secrets.randbits(63))
        check_argument("seed", seed, int, 0, 2**63 - 1)
        return Wishes(options, seed)


class Streamer(DirectStreamer):
    """
    transformers' streamer, which also gives up between denoising steps, and tells an answer that ends from one that is
    cut off.
    """

    def __init__(self, wishes: Wishes, config: LoopMDMGenerationConfig, tokenizer: Any, *args: Any):
        super().__init__(tokenizer._tokenizer, *args)
        self.wishes, self.config, self.tokenizer = wishes, config, tokenizer
        self.tokens: list[int] = []  # of prompt and answer

    def put(self, value):
        self.tokens += value.tolist()
        super().put(value)

    def put_draft(self, tokens):
        if self._cancelled.is_set():
            raise _GenerationCancelled

    def end(self):
        # transformers takes an answer of full length for one that was cut off. Without a limit it is not.
        ends, stops = self.config.eos_token_id, self.config.stop_strings
        has_ended = self.tokens[-1] in (ends if isinstance(ends, list | tuple) else [ends])
        if not has_ended and stops:
            stops = (stops,) if isinstance(stops, str) else tuple(stops)
            criterion = stop_criterion(self.tokenizer, stops, len(self.tokenizer))
            has_ended = bool(criterion(torch.tensor([self.tokens]), None)[0])
        if has_ended:
            self.wishes.max_new_tokens = None
        super().end()


class Generations(GenerateManager):
    """Runs `generate` for one request after another. The random numbers of a request are its own."""

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        config = _prepare(model, processor, inputs, gen_config)
        generator = torch.Generator().manual_seed(gen_config.seed)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        streamer = Streamer(gen_config, config, processor, loop, queue, response_parser)
        inputs |= {"generation_config": config, "streamer": streamer, "tokenizer": processor, "generator": generator}

        def run() -> None:
            end = None
            try:
                return model.generate(**inputs)
            except _GenerationCancelled:
                pass
            except Exception as error:
                end = _StreamError(str(error))
            loop.call_soon_threadsafe(queue.put_nowait, end)

        self.submit(run)
        return queue, streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        queue, streamer = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, _StreamError):
                    raise RuntimeError(item.msg)
        except asyncio.CancelledError:
            streamer.cancel()
            raise
        length = inputs["input_ids"].shape[-1]
        tokens = streamer.tokens[length:]
        return processor.decode(tokens, skip_special_tokens=True), length, tokens


def _prepare(model: Any, tokenizer: Any, inputs: dict[str, Any], wishes: Wishes) -> LoopMDMGenerationConfig:
    """The arguments of `generate`. Raises the ValueErrors that it would, before an answer begins."""
    config = model._prepare_generation_config(None, **wishes.options)[0]
    input_ids, mask_token_id = inputs["input_ids"], model.config.mask_token_id
    if bool((input_ids == mask_token_id).any()):
        mask = tokenizer.convert_ids_to_tokens(mask_token_id)
        raise ValueError(f"`messages` holds the mask token {mask}, which stands for what is to be generated.")
    if config.max_new_tokens is None:
        room = (config.max_length or model.config.max_position_embeddings) - input_ids.shape[1]
        config.max_new_tokens = max(1, min(NEW_TOKENS, room))
    elif config.max_new_tokens == 0:
        raise ValueError("`max_tokens` is 0; it must be at least 1.")
    model._prepare_canvas(config, input_ids, inputs.get("attention_mask"), None, None)
    model._prepare_lists(config, None, None, tokenizer)
    wishes.max_new_tokens = config.max_new_tokens
    return config


def _error(status: int, message: str) -> dict[str, Any]:
    """An error as in the OpenAI API, whose clients show the message."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def _chunks(parts: AsyncIterator[str]) -> AsyncIterator[str]:
    """The chunks of a stream, with its error in the API's form. Quotes in texts are escaped, so none holds FAILURE."""
    async for part in parts:
        texts, failure, message = part.partition(FAILURE)
        error = json.dumps(_error(500, message.removesuffix('"}\n\n')))
        yield f"{texts}data: {error}\n\n" if failure else texts


async def _disconnection(request: Request) -> None:
    # Not `request.is_disconnected()`, which is always False behind the middleware of transformers' server.
    while (await request.receive())["type"] != "http.disconnect":
        pass


class State(GenerationState):
    """Has one manager, as there is one model."""

    def __init__(self):
        super().__init__()
        self.manager = Generations()

    def get_manager(self, model_id, use_cb=False):
        return self.manager


def _unpacked(text: Any) -> dict[str, Any]:
    """The arguments in a whole generation config, which `transformers chat` sends as the text of a JSON object."""
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"`generation_config` is {text!r}; give the text of a JSON object.")
    defaults = {name: default for name, (default, *_) in LoopMDMGenerationConfig.FIELDS.items() if name not in OPTIONS}
    idle = {name for name, default in defaults.items() if config.get(name) == default} | {"transformers_version"}
    return {name: value for name, value in config.items() if name not in idle}


def make_app(name: str, model: Any, tokenizer: Any) -> FastAPI:
    """The server of a model that is called `name`, without the routes of other kinds of models."""
    models, state = Models(name, model, tokenizer), State()
    chat = Chat(models, state)
    parameters = inspect.signature(build_server).parameters
    others = {key: None for key in parameters if key.endswith("_handler") and key != "chat_handler"}
    app = build_server(models, chat, generation_state=state, **others)
    app.router.routes[:] = [route for route in app.router.routes if route.path in ROUTES]

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException):
        return JSONResponse(_error(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError):
        wrong = "The request's body is not a JSON object; send one, with the header `Content-Type: application/json`."
        return JSONResponse(_error(400, wrong), 400)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception):
        return JSONResponse(_error(500, str(error) or type(error).__name__), 500)

    @app.post("/v1/chat/completions")
    async def complete(request: Request, body: dict):
        answer = asyncio.ensure_future(chat.handle_request(body, request.state.request_id))
        gone = asyncio.ensure_future(_disconnection(request))
        await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not answer.done():
            answer.cancel()
            return Response(status_code=499)  # to nobody
        try:
            return answer.result()
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        except KeyError as error:
            raise HTTPException(400, f"{error} is missing.") from error

    return app
