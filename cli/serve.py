# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm serve`."""

import socket
from typing import Annotated

import typer

from .application import USE, app
from .options import Device, Dtype, Model, TrustRemoteCode


@app.command(rich_help_panel=USE, epilog="Example: loopmdm serve my-model --port 8000")
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Serve a model to clients of the OpenAI API: POST /v1/chat/completions, GET /v1/models and /health."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}; it must be from 0 to 65535.")
    from loopmdm.evaluation.loading import load_model, load_tokenizer, read_model_config

    try:
        import uvicorn
        from transformers.utils import logging

        from ._server import make_app
    except ImportError as error:
        raise ValueError(f'The server needs {error.name}; `pip install "loopmdm[serve]"`.') from error
    read_model_config(model)
    tokenizer = load_tokenizer(model, trust_remote_code)
    if not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {model} has no chat template, which a conversation needs; give it one.")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(
            f"--host {host} and --port {port} cannot be listened at ({error.strerror}); give others; 0 is a free port."
        ) from error
    # `create_server` leaves the protocol out, and asyncio turns Nagle's algorithm, 40 ms an answer, off for TCP alone.
    listener = socket.socket(listener.family, listener.type, socket.IPPROTO_TCP, listener.detach())
    with listener:
        logging.set_verbosity_error()  # a line for every request
        site = make_app(model, load_model(model, dtype, device), tokenizer)
        server = uvicorn.Server(uvicorn.Config(site, log_level="warning", timeout_graceful_shutdown=5))
        address = f"[{host}]" if ":" in host else host
        print(f"http://{address}:{listener.getsockname()[1]}/v1 serves {model} (Ctrl-C ends it)", flush=True)
        server.run(sockets=[listener])
