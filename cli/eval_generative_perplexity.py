# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm eval generative-perplexity`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .application import evaluation
from .inputs import check_text_options, loop_numbers
from .options import (
    Device,
    Dtype,
    GenerateArguments,
    LoopList,
    Output,
    TextColumn,
    TrustRemoteCode,
    at_least,
    check_idle,
    generate_arguments,
)
from .output import draw, picture, plus_minus, progress, results_folder, show_table, write_lines


@evaluation.command(epilog="Example: loopmdm eval generative-perplexity my-model --judge gpt2")
def generative_perplexity(
    judge: Annotated[str, typer.Option(help="Folder or Hub id of a causal language model.", show_default=False)],
    model: Annotated[
        str | None, typer.Argument(help="Model that makes samples (or give --samples).", show_default=False)
    ] = None,
    samples: Annotated[
        str | None, typer.Option(help="File of texts to judge (.txt, .jsonl), instead of a model.")
    ] = None,
    output: Output = None,
    num_loops: LoopList = None,
    num_samples: Annotated[int | None, typer.Option(help="Samples for each number of loops (default: 64).")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a sample (default: the model's positions, at most 256).")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="File of texts to continue; by default from nothing.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens that the judge sees at once.")] = None,
    stride: Annotated[int | None, typer.Option(help="Fresh tokens of a window of a long sample.")] = None,
    text_column: TextColumn = None,
    documents: Annotated[
        str | None, typer.Option(help="What separates samples in a .txt: file (none), blank_line (default) or line.")
    ] = None,
    generate: GenerateArguments = None,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Measure samples (ancestral by default): their perplexity under a causal language model, and their entropy."""
    settings = dict(locals())
    from loopmdm.evaluation.loading import load_judge, load_model, load_tokenizer, read_model_config
    from loopmdm.evaluation.perplexity import check_window
    from loopmdm.evaluation.protocol import check_output, protocol

    if (model is None) == (samples is None):
        raise ValueError("Give either a model that makes samples, or --samples, a file that holds them.")
    at_least(1, num_samples=num_samples, batch_size=batch_size, max_new_tokens=max_new_tokens, stride=stride)
    at_least(2, window=window)
    _check_options(settings)
    if output is not None:
        check_output(output)
    arguments = {"unmasking": "ancestral"} | generate_arguments(generate, "--max-new-tokens")
    if model is None:
        rows, kept = [{}], [_read_samples(samples, text_column or "text", documents or "blank_line")]
    else:
        config, model_tokenizer = read_model_config(model), load_tokenizer(model, trust_remote_code)
        plan = _plan(config, model_tokenizer, settings, arguments)
    judge_model, tokenizer = load_judge(judge, dtype, device, trust_remote_code)
    check_window(judge_model, window, stride)
    loaded = None
    if model is not None:
        loaded = load_model(model, dtype, device)
        rows, kept = _make_samples(loaded, model_tokenizer, *plan, arguments, settings)
    seconds = sum(row.get("generation_seconds", 0.0) for row in rows)
    seconds += _judge(rows, kept, judge_model, tokenizer, settings)
    record = {
        "command": "generative-perplexity",
        "protocol": protocol(settings, loaded, model, judge=judge, data=samples, prompts=prompts),
        "seconds": seconds,
        "results": rows,
    }
    with results_folder(output, record) as folder:
        if folder is not None and model is not None:
            found = zip(rows, kept, strict=True)
            lines = [{"num_loops": row["num_loops"], "text": text} for row, texts in found for text in texts]
            write_lines(folder / "samples.jsonl", lines)
            _plot(folder / "generative_perplexity.png", rows)
    _show(f"Generative perplexity of {model or samples} under {judge}: {len(kept[0])} samples, {seconds:.1f} s", rows)


def _check_options(settings: dict[str, Any]) -> None:
    """Raises a ValueError for options that have no effect beside the others."""
    prompts, text_column, documents = (settings[name] for name in ("prompts", "text_column", "documents"))
    if settings["model"] is None:
        of_model = ("num_loops", "num_samples", "max_new_tokens", "generate", "prompts")
        check_idle("--samples are judged as they are", **{name: settings[name] for name in of_model})
        check_text_options(settings["samples"], text_column=text_column, documents=documents)
    else:
        check_idle("it is for --samples", documents=documents)
        check_idle("it is for --samples and --prompts", text_column=None if prompts else text_column)
        if prompts is not None:
            check_text_options(prompts, text_column=text_column)


def _plan(
    config: Any, tokenizer: Any, settings: dict[str, Any], arguments: dict[str, Any]
) -> tuple[list[int], list[list[int]], int]:
    """The numbers of loops, the tokens that each sample starts with, and how many new ones it has, all checked."""
    from loopmdm import LoopMDMGenerationConfig
    from loopmdm.evaluation import read_texts

    loops = loop_numbers(settings["num_loops"], [config.num_loops])
    room, length = config.max_position_embeddings, settings["max_new_tokens"]
    length = min(256, room) if length is None else length
    LoopMDMGenerationConfig(max_new_tokens=length, **arguments)  # checks
    starts: list[list[int]] = [[]]
    if settings["prompts"] is not None:
        column = settings["text_column"] or "text"
        texts = read_texts(settings["prompts"], tokenizer, config, "texts", column, "line")
        starts = [text.input_ids for text in texts]
    longest = max(map(len, starts))
    if longest + length > room:
        raise ValueError(
            f"Prompts of up to {longest} tokens and {length} new ones (--max-new-tokens) are more than the {room} "
            "positions of the model."
        )
    return loops, [starts[i % len(starts)] for i in range(settings["num_samples"] or 64)], length


def _read_samples(path: str, text_column: str, documents: str) -> list[str]:
    """The texts of a `.txt` or `.jsonl` file. Token ids are refused: the judge has a tokenizer of its own."""
    from loopmdm.data import read_rows, text_of

    if Path(path).suffix not in (".txt", ".jsonl"):
        raise ValueError(f"--samples {path} is not a .txt or .jsonl file.")
    texts = []
    for where, row in read_rows(path, documents):
        if isinstance(row, dict) and isinstance(row.get(text_column), list):
            raise ValueError(
                f"{where}: {text_column!r} holds token ids, which mean something else to the judge; decode them with "
                "the tokenizer of the model that made them."
            )
        texts.append(text_of(row, text_column, where))
    return texts


def _make_samples(
    model: Any,
    tokenizer: Any,
    loops: list[int],
    starts: list[list[int]],
    length: int,
    arguments: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """For each number of loops, its time and its samples."""
    from loopmdm.evaluation.protocol import Stopwatch
    from loopmdm.evaluation.rows import generate_together
    from loopmdm.objective import input_device, seeded_generator

    rows, kept, batch_size = [], [], settings["batch_size"]
    for number in loops:
        with progress(f"{number} loops: samples") as bar, Stopwatch(input_device(model)) as watch:
            made = []
            for first in range(0, len(starts), batch_size):
                batch = starts[first : first + batch_size]
                # A generator per sample, so that batches make no difference
                generators = [seeded_generator(settings["seed"], "sample", first + row) for row in range(len(batch))]
                options = {"max_new_tokens": length, "num_loops": number, "generator": generators, **arguments}
                output, start = generate_together(model, batch, **options)
                made += output.sequences[:, start:].tolist()
                bar(len(made), len(starts))
        kept.append(tokenizer.batch_decode(made, skip_special_tokens=True))
        rows.append({"num_loops": number, "generation_seconds": watch.seconds})
    return rows, kept


def _judge(
    rows: list[dict[str, Any]], kept: list[list[str]], judge: Any, tokenizer: Any, settings: dict[str, Any]
) -> float:
    """Adds the judge's scores to the rows. Returns the seconds that it took."""
    from loopmdm.evaluation import generative_perplexity
    from loopmdm.evaluation.protocol import Stopwatch
    from loopmdm.objective import input_device

    seconds, sizes = 0.0, [settings[name] for name in ("window", "stride", "batch_size")]
    for row, texts in zip(rows, kept, strict=True):
        with progress("Judge") as bar, Stopwatch(input_device(judge)) as watch:
            score = generative_perplexity(texts, judge, tokenizer, *sizes, bar)
        seconds += watch.seconds
        row |= score.summary()
        row["by_sample"] = {
            "nats": score.nats,
            "tokens": score.num_tokens,
            "entropy": score.entropy,
            "repetition": score.repetition,
        }
    return seconds


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    cells = [
        [
            row.get("num_loops", ""),
            plus_minus(row["perplexity"], row["standard_error"]),
            f"{row['entropy']:.3f}",
            f"{row['repetition']:.1%}",
            ", ".join(f"{row[f'distinct_{n}']:.1%}" for n in (1, 2, 3)),
        ]
        for row in rows
    ]
    columns = ["num_loops", "perplexity", "entropy", "repeated 4-grams", "distinct 1-, 2-, 3-grams"]
    show_table(title, columns, cells)


def _plot(path: Path, rows: list[dict[str, Any]]) -> None:
    with picture(path, 2) as (left, right):
        draw(left, rows, "perplexity")
        left.set(xlabel="num_loops", ylabel="generative perplexity (± 2 standard errors)")
        right.plot([row["num_loops"] for row in rows], [row["entropy"] for row in rows], marker="o")
        right.set(xlabel="num_loops", ylabel="unigram entropy, nats per token")
