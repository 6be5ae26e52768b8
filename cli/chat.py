# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm chat`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .application import USE, app
from .drafts import COLOUR_KEY, DraftStreamer
from .options import (
    BlockLength,
    ConfidenceThreshold,
    Device,
    Dtype,
    MaxDenoisingSteps,
    Model,
    TrustRemoteCode,
    at_least,
    given,
)
from .output import console

HELP = f"""\
/loops K     applications of the looped block from now on
/steps N     denoising steps per block from now on
/system TEXT a new conversation under these instructions
/undo        forget the last question and its answer
/save FILE   add the conversation to a file of JSON lines for `loopmdm train`
/help        this text
/quit        leave (as does Ctrl-D); Ctrl-C stops an answer
Dim text may still change, and ░ is yet to be filled in.
{COLOUR_KEY}."""


@app.command(rich_help_panel=USE, epilog="Example: loopmdm chat my-model --block-length 32")
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="Instructions that the conversation begins with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    num_loops: Annotated[int | None, typer.Option(help="Applications of the looped block.")] = None,
    block_length: BlockLength = None,
    max_denoising_steps: MaxDenoisingSteps = None,
    confidence_threshold: ConfidenceThreshold = None,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Draw tokens.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Temperature; needs --do-sample.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the answers' random numbers.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Talk to a model and watch its answers form. Questions are lines of the terminal or a pipe; /help says more."""
    at_least(1, max_new_tokens=max_new_tokens)
    options = given(
        max_new_tokens=max_new_tokens,
        num_loops=num_loops,
        block_length=block_length,
        max_denoising_steps=max_denoising_steps,
        confidence_threshold=confidence_threshold,
        do_sample=do_sample or None,
        temperature=temperature,
    )
    from loopmdm import LoopMDMGenerationConfig
    from loopmdm.evaluation.loading import load_model, load_tokenizer, read_model_config

    LoopMDMGenerationConfig(**options | {"do_sample": True})  # the model's own settings may draw
    read_model_config(model)
    tokenizer = load_tokenizer(model, trust_remote_code)
    if not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {model} has no chat template; use `loopmdm generate`, or give it one.")
    conversation = Conversation(load_model(model, dtype, device), tokenizer, options, seed, system)
    if sys.stdin.isatty():
        console.print(f"{model}. /help lists commands.", style="dim")
    while True:
        try:
            line = console.input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        except KeyboardInterrupt:  # takes back what was typed
            console.print()
            continue
        try:
            if not conversation.take(line.strip()):
                return
        except (ValueError, OSError) as error:  # of one question or command; the conversation goes on
            if not sys.stdin.isatty():
                raise
            console.print(str(error), style="red")


class Conversation:
    """Turns of a conversation, and the settings of the next answer."""

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any], seed: int, system: str | None):
        self.model, self.tokenizer, self.options, self.seed = model, tokenizer, options, seed
        self.messages = [{"role": "system", "content": system}] if system else []
        self.cache: Any = None

    def take(self, line: str) -> bool:
        """Answers a question or obeys a command. Returns False at the end of the conversation."""
        if line.startswith("/"):
            name, _, value = line[1:].partition(" ")
            return self._command(name, value.strip())
        if line:
            self.messages.append({"role": "user", "content": line})
            try:
                answer = self._answer()
            except BaseException as error:
                self.messages.pop()
                if not isinstance(error, KeyboardInterrupt):
                    raise
                console.print("stopped; the question is taken back", style="dim")
            else:
                self.messages.append({"role": "assistant", "content": answer})
        return True

    def _command(self, name: str, value: str) -> bool:
        commands: dict[str, Callable[[str], None]] = {
            "loops": lambda text: self._set("num_loops", text),
            "steps": lambda text: self._set("max_denoising_steps", text),
            "system": self._begin,
            "undo": lambda text: self._undo(),
            "save": self._save,
            "help": lambda text: console.print(HELP, style="dim"),
        }
        if name == "quit":
            return False
        if name not in commands:
            raise ValueError(f"/{name} is not a command; /help lists them.")
        commands[name](value)
        return True

    def _set(self, name: str, text: str) -> None:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{text!r} is not a number of at least 1.")
        self.options[name] = int(text)

    def _begin(self, text: str) -> None:
        self.messages = [{"role": "system", "content": text}] if text else []

    def _undo(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError("There is nothing to undo.")
        del self.messages[-2:]

    def _save(self, path: str) -> None:
        if not path:
            raise ValueError("Name the file: /save FILE.")
        with Path(path).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        console.print(f"Added to {path}.", style="dim")

    def _answer(self) -> str:
        """Shows and returns the answer to the last message."""
        import torch

        from loopmdm.data.chat import encode_question
        from loopmdm.objective import input_device, seeded_generator

        prompt = torch.tensor([encode_question(self.tokenizer, self.messages, "The conversation")])
        room = self.model.config.max_position_embeddings - prompt.shape[1]
        if room < 1:
            raise ValueError(
                f"The conversation has {prompt.shape[1]} tokens, and the model sees {prompt.shape[1] + room}; "
                "/undo, or begin anew with /system."
            )
        prompt = prompt.to(input_device(self.model))
        options = self.options | {"max_new_tokens": min(self.options["max_new_tokens"], room)}
        past_key_values, self.cache = self._matching_cache(prompt), None  # a call that fails loses its cache
        with DraftStreamer(self.tokenizer, console) as streamer:
            output = self.model.generate(
                prompt,
                **options,
                past_key_values=past_key_values,
                generator=seeded_generator(self.seed, "chat", len(self.messages)),
                streamer=streamer,
                tokenizer=self.tokenizer,
                return_dict_in_generate=True,
            )
        self.cache = output.cache
        if console.is_terminal:
            passes, loops = int(output.forward_passes), int(output.loops)
            console.print(f"{passes} forward passes, {loops} loops, {output.seconds:.1f} s", style="dim")
        return streamer.text()

    def _matching_cache(self, prompt: Any) -> Any:
        """The last answer's cache as far as it holds what the conversation begins with, or None."""
        cache, default = self.cache, self.model.generation_config.num_loops or self.model.config.num_loops
        if cache is None or cache.num_loops != self.options.get("num_loops", default):
            return None
        length = min(cache.length, prompt.shape[1])
        same = (cache.tokens[0, :length] == prompt[0, :length].to(cache.tokens.device)).long()
        cache.crop(int(same.cumprod(0).sum()))
        return cache if cache.length > 0 else None
