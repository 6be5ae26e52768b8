# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm eval likelihood`."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from .application import evaluation
from .inputs import loop_numbers, measured_texts, start
from .options import (
    Device,
    Documents,
    Dtype,
    LoopList,
    Model,
    NumMasks,
    Output,
    Split,
    Subset,
    Task,
    Text,
    TextColumn,
    TextLimit,
    TrustRemoteCode,
    at_least,
    check_idle,
)
from .output import draw, picture, plus_minus, progress, results_folder, show_table


@evaluation.command(epilog="Example: loopmdm eval likelihood my-model --text test.txt --num-loops 1,2,4")
def likelihood(
    model: Model,
    text: Text,
    output: Output = None,
    num_loops: LoopList = None,
    task: Task = "texts",
    text_column: TextColumn = None,
    documents: Documents = None,
    split: Split = None,
    subset: Subset = None,
    limit: TextLimit = None,
    window: Annotated[int | None, typer.Option(help="Tokens seen at once (default: at most 1024).")] = None,
    stride: Annotated[int | None, typer.Option(help="Fresh tokens of a window; the others are context.")] = None,
    windows: Annotated[int | None, typer.Option(help="Number of windows to score, evenly spread.")] = None,
    num_samples: NumMasks = 32,
    bins: Annotated[int, typer.Option(help="Bins of timesteps.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Masked texts per forward pass.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the masks.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Bound the likelihood of texts (NELBO), with error bars, at several numbers of loops and by timestep."""
    settings = dict(locals())
    from loopmdm.evaluation import make_windows, text_likelihood
    from loopmdm.evaluation.loading import load_model, load_tokenizer
    from loopmdm.evaluation.protocol import Stopwatch, protocol
    from loopmdm.objective import check_settings, input_device

    config = start(model, output)
    several = {1, 2, 4, config.num_loops} | ({config.max_train_loops} if config.loop_update == "replace" else set())
    most = max(config.num_loops, config.max_train_loops)
    loops = loop_numbers(num_loops, sorted(number for number in several if number <= most))
    check_settings(loops, num_samples)
    at_least(1, bins=bins, window=window, stride=stride, windows=windows, batch_size=batch_size)
    longest = config.max_position_embeddings
    length = window or longest
    if length > longest:
        raise ValueError(f"The window is {length} tokens long; the model takes 1 to {longest} positions.")
    make_windows([], window or min(1024, longest), stride)  # checks
    if task == "fill":
        check_idle("a text to fill in is one window", stride=stride)
        window = length
    texts = measured_texts(settings, load_tokenizer(model, trust_remote_code), config, length)
    loaded = load_model(model, dtype, device)
    with progress("NELBO") as bar, Stopwatch(input_device(loaded)) as watch:
        result = text_likelihood(loaded, texts, loops, window, stride, windows, num_samples, batch_size, seed, bar)
    rows = _rows(result)
    means, errors, counts = result.estimate.by_timestep(bins)
    edges = [i / bins for i in range(bins + 1)]
    record = {
        "command": "likelihood",
        "protocol": protocol(settings, loaded, model, data=text),
        "seconds": watch.seconds,
        "texts": len({part.text for part in result.windows}),
        "windows": len(result.windows),
        "tokens": result.num_tokens,
        "bytes": result.num_bytes,
        "results": rows,
        "by_timestep": {"edges": edges, "nats_per_masked_token": means, "standard_error": errors, "masks": counts},
        "by_text": result.by_text(),
    }
    with results_folder(output, record) as folder:
        if folder is not None:
            import numpy

            arrays = {"num_loops": result.estimate.num_loops, **result.by_token()}
            numpy.savez_compressed(
                folder / "tokens.npz", **{name: numpy.asarray(value) for name, value in arrays.items()}
            )
            _plot(folder / "likelihood.png", rows, means, errors, edges)
    _show(f"NELBO of {text}: {record['texts']} texts, {result.num_tokens} tokens, {watch.seconds:.1f} s", rows)


def _rows(result: Any) -> list[dict[str, Any]]:
    """Results by number of loops."""
    (nats, error), (change, change_error) = result.per_token(), result.estimate.change()
    (bound, bound_error), between = result.perplexity_bound(), result.error_between_texts()
    bits = result.bits_per_byte()
    return [
        {
            "num_loops": number,
            "nats_per_token": nats[i].item(),
            "standard_error": error[i].item(),
            "error_between_texts": between[i].item(),
            "change": change[i].item(),
            "change_error": change_error[i].item(),
            "perplexity_bound": bound[i].item(),
            "perplexity_bound_error": bound_error[i].item(),
            "bits_per_byte": None if bits is None else bits[0][i].item(),
            "bits_per_byte_error": None if bits is None else bits[1][i].item(),
        }
        for i, number in enumerate(result.estimate.num_loops)
    ]


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    cells = []
    for i, row in enumerate(rows):
        bits = row["bits_per_byte"]
        cells.append(
            [
                row["num_loops"],
                plus_minus(row["nats_per_token"], row["standard_error"]),
                plus_minus(row["perplexity_bound"], row["perplexity_bound_error"]),
                "" if bits is None else plus_minus(bits, row["bits_per_byte_error"]),
                "" if i == 0 else plus_minus(row["change"], row["change_error"]),
            ]
        )
    show_table(title, ["num_loops", "nats/token", "perplexity at most", "bits/byte", "change"], cells)


def _plot(path: Path, rows: list[dict[str, Any]], means: Any, errors: Any, edges: list[float]) -> None:
    with picture(path, 2) as (left, right):
        draw(left, rows, "nats_per_token")
        left.set(xlabel="num_loops", ylabel="NELBO, nats per token (± 2 standard errors)")
        middles = [(a + b) / 2 for a, b in pairwise(edges)]
        for i, row in enumerate(rows):
            name = f"{row['num_loops']} loop{'' if row['num_loops'] == 1 else 's'}"
            error = (2 * errors[i]).tolist()
            right.errorbar(middles, means[i].tolist(), yerr=error, marker="o", markersize=3, label=name)
        right.set(xlabel="timestep (share of masked tokens)", ylabel="nats per masked token (± 2 standard errors)")
        right.legend(fontsize=8)
