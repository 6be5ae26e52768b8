# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm train`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from .application import app


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file that describes the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, such as trainer.max_steps=100.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
) -> None:
    """Pretrain, fine-tune or adapt a model. Under torchrun it runs on all processes."""
    from loopmdm.training.run import read_config
    from loopmdm.training.run import train as run

    record = run(read_config(config, overrides or []), resume=resume)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{record['run']['output']}: {record['steps']} steps, {record['training_flops']:.3g} FLOPs")
        for name, value in record["evaluation"].items():
            if "nelbo" in name and "error" not in name:
                print(f"{name}: {value:.4f} nats per token")
