# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm eval dynamics`."""

from typing import Annotated, Any

import typer

from .application import evaluation
from .inputs import measured_texts, start
from .options import (
    Device,
    Documents,
    Dtype,
    Model,
    Output,
    Split,
    Subset,
    Task,
    Text,
    TextColumn,
    TextLimit,
    TrustRemoteCode,
    at_least,
)
from .output import progress, results_folder, show_table


@evaluation.command(epilog="Example: loopmdm eval dynamics my-model --text test.txt --output dynamics")
def dynamics(
    model: Model,
    text: Text,
    output: Output = None,
    num_loops: Annotated[int | None, typer.Option(help="Loops to follow (default: those of training).")] = None,
    timesteps: Annotated[str, typer.Option(help="Shares of masked tokens.")] = "0.1,0.3,0.5,0.7,0.9",
    task: Task = "texts",
    text_column: TextColumn = None,
    documents: Documents = None,
    split: Split = None,
    subset: Subset = None,
    limit: TextLimit = None,
    window: Annotated[int | None, typer.Option(help="Tokens seen at once (default: at most 256).")] = None,
    windows: Annotated[int, typer.Option(help="Number of windows to follow, evenly spread.")] = 16,
    masks: Annotated[int, typer.Option(help="Masks of each window and timestep.")] = 2,
    no_attention: Annotated[bool, typer.Option("--no-attention", help="Leave attention out.")] = False,
    no_lens: Annotated[bool, typer.Option("--no-lens", help="Leave predictions by loop out.")] = False,
    batch_size: Annotated[int, typer.Option(help="Masked texts per forward pass.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the masks.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Show what happens in the loop: attention between masked and visible tokens, states, predictions."""
    settings = dict(locals())
    from loopmdm.evaluation import make_windows, measure_dynamics
    from loopmdm.evaluation.dynamics import check_settings
    from loopmdm.evaluation.loading import load_model, load_tokenizer
    from loopmdm.evaluation.protocol import Stopwatch, protocol
    from loopmdm.evaluation.texts import pad_windows
    from loopmdm.objective import input_device

    try:
        shares = [float(part) for part in timesteps.split(",")]
    except ValueError:
        raise ValueError(f"--timesteps is {timesteps!r}; give a list such as 0.1,0.5,0.9.") from None
    config = start(model, output)
    check_settings(config, num_loops, shares, masks, batch_size, not no_lens)
    at_least(1, window=window, windows=windows)
    longest = config.max_position_embeddings
    length = min(256, longest) if window is None and task != "fill" else window or longest
    if length > longest:
        raise ValueError(f"--window is {length} tokens; the model takes 1 to {longest} positions.")
    texts = measured_texts(settings, load_tokenizer(model, trust_remote_code), config, length)
    parts = make_windows(texts, length, max_windows=windows)
    loaded = load_model(model, dtype, device)
    with progress("Dynamics") as bar, Stopwatch(input_device(loaded)) as watch:
        result = measure_dynamics(
            loaded,
            *pad_windows(parts),
            num_loops=num_loops,
            timesteps=shares,
            masks_per_text=masks,
            attention=not no_attention,
            lens=not no_lens,
            batch_size=batch_size,
            seed=seed,
            progress=bar,
        )
    record = {
        "command": "dynamics",
        "protocol": protocol(settings, loaded, model, data=text),
        "seconds": watch.seconds,
        "windows": len(parts),
        "tokens": sum(len(part.input_ids) for part in parts),
        "results": result.summary(),
    }
    with results_folder(output, record) as folder:
        if folder is not None:
            result.save(folder / "dynamics.npz")
            result.plot(folder / "dynamics.png")
    title = f"Loops of {model} on {len(parts)} windows, mean of t = {timesteps}, {watch.seconds:.1f} s"
    _show(title, record["results"])


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    known = ("change", "distance", "masked_to_masked", "visible_to_masked", "loss", "accuracy", "changed")
    names = [name for name in known if name in rows[0]]
    columns = ["loop", *(name.replace("_", " ") for name in names)]
    # NaN: a quantity that the first loop does not have
    cells = [[row["loop"], *("" if row[name] != row[name] else f"{row[name]:.3g}" for name in names)] for row in rows]
    show_table(title, columns, cells)
