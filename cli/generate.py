# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm generate`."""

import contextlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from .application import USE, app
from .drafts import DraftStreamer
from .html import check_html, write_trace
from .options import (
    BlockLength,
    ConfidenceThreshold,
    Device,
    Dtype,
    MaxDenoisingSteps,
    Model,
    Split,
    Subset,
    TrustRemoteCode,
    at_least,
    check_idle,
    given,
    integers,
)
from .output import console, progress
from .rows import OF_ROWS, write_rows

# Options that are arguments of `generate` as they stand
ARGUMENTS = (
    *("max_new_tokens", "loop_tolerance", "visible_loops", "cache_implementation", "block_length", "unmasking"),
    *("max_denoising_steps", "confidence_threshold", "entropy_bound", "temperature", "top_p", "num_return_sequences"),
)
# What `generate` says of each answer
COSTS = ("forward_passes", "loops", "flops")


@app.command(rich_help_panel=USE, epilog='Example: loopmdm generate my-model "Once upon a time" --stream')
def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts to continue, or to fill in where they hold mask tokens; without any, lines of a pipe."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to append; 0 only fills in (default: the model's, or 128 where nothing is masked)."),
    ] = None,
    num_loops: Annotated[
        str | None,
        typer.Option(
            help="Applications of the looped block; a list such as 1,2,4 is for the first, second, ... step."
        ),
    ] = None,
    loop_tolerance: Annotated[float | None, typer.Option(help="Stop looping below this relative change.")] = None,
    visible_loops: Annotated[int | None, typer.Option(help="Loops of tokens that are not masked.")] = None,
    cache_implementation: Annotated[
        str | None, typer.Option(help="Approximate caching: prefix or dual, for attention over the whole sequence.")
    ] = None,
    block_length: BlockLength = None,
    max_denoising_steps: MaxDenoisingSteps = None,
    unmasking: Annotated[str | None, typer.Option(help="Commit rule, e.g. confidence or ancestral.")] = None,
    confidence_threshold: ConfidenceThreshold = None,
    entropy_bound: Annotated[
        float | None, typer.Option(help="Commit tokens up to this joint entropy in nats.")
    ] = None,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Draw tokens.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Temperature; needs --do-sample.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling; needs --do-sample.")] = None,
    num_return_sequences: Annotated[
        int | None, typer.Option(help="Answers to each prompt; needs --do-sample.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed; every answer has random numbers of its own.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts generated together; so many lines are read at once (default: 32).")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Answer many rows (.jsonl, .parquet or a data set), on any number of processes.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="With --data: the file to write, as JSON lines.")] = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="With --data: tokens of a batch at most, in place of --batch-size.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="With --data: where texts are (default: prompt, text).")
    ] = None,
    split: Split = None,
    subset: Subset = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Show every step, coloured by confidence (one prompt).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines with the cost of each row.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page that plays every denoising step.")] = None,
    html_columns: Annotated[int | None, typer.Option(help="With --html: show a board with this many columns.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Continue texts, or fill in their mask tokens. What it cost goes to stderr."""
    settings = dict(locals())
    at_least(1, num_return_sequences=num_return_sequences, batch_size=batch_size, max_batch_tokens=max_batch_tokens)
    if data is not None:
        write_rows(settings, _options(settings))
    else:
        check_idle("it is for --data", **{name: settings[name] for name in OF_ROWS})
        _answer_prompts(settings | {"batch_size": batch_size or 32})


def _answer_prompts(settings: dict[str, Any]) -> None:
    """Prints the answers to the prompts. `settings` are the options of the command."""
    names = ("model", "seed", "stream", "as_json", "html", "html_columns", "dtype", "device", "batch_size")
    model, seed, stream, as_json, html, html_columns, dtype, device, batch_size = map(settings.get, names)
    check_idle("a stream shows text", json=stream and as_json)
    (texts, more), options = _texts(settings), _options(settings)
    check_html(html, html_columns, len(texts), batch_size)
    from loopmdm import LoopMDMGenerationConfig
    from loopmdm.evaluation.loading import load_model, load_tokenizer, read_model_config

    # Checks what can be without the model, whose own settings may be what makes it draw.
    LoopMDMGenerationConfig(**options | {"do_sample": True, "return_dict_in_generate": True})
    read_model_config(model)
    tokenizer = load_tokenizer(model, settings["trust_remote_code"])
    rows = [_encode(tokenizer, text, number) for number, text in enumerate(texts)]
    loaded = load_model(model, dtype, device)
    new_tokens = options.pop("max_new_tokens", None)
    _plan(loaded, rows, new_tokens)
    if more is None:
        _check_busy(not all(row.is_idle for row in rows), tokenizer, loaded)
    if html is not None:
        _check_together(rows)
    options["tokenizer"] = tokenizer  # for stop strings of the model's own settings
    options["streamer"] = DraftStreamer(tokenizer, console, skip_prompt=False) if stream else None
    costs, total = _Costs(), len(rows) if more is None else None
    with options["streamer"] or contextlib.nullcontext(), progress("prompts") as bar:
        for batch in _batches(rows, more, batch_size, tokenizer, loaded, new_tokens):
            for row, tokens, cost in _generate(loaded, batch, options, seed, costs):
                if not stream:
                    _show(row.text, tokenizer.decode(tokens, skip_special_tokens=True), cost, as_json)
            if not stream:
                bar(batch[-1].number + 1, total)
    _check_busy(costs.total["forward_passes"] > 0, tokenizer, loaded)
    print(costs.line(), file=sys.stderr)
    if html is not None:
        write_trace(html, costs.output, tokenizer, model, texts, html_columns)


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`, from those of the command."""
    loops = integers("--num-loops", settings["num_loops"])
    return given(
        **{name: settings[name] for name in ARGUMENTS},
        do_sample=settings["do_sample"] or None,
        num_loops=loops[0] if loops and len(loops) == 1 else loops,
        output_trace=settings["html"] is not None or None,
    )


def _texts(settings: dict[str, Any]) -> tuple[list[str], Iterator[str] | None]:
    """
    The prompts, or, where they are `-`, or none and there is a pipe, the first batch of the lines of standard input,
    and what reads further ones if there may be some. A stream or a page needs to know all of them.
    """
    prompts, more, stream = settings["prompts"], None, settings["stream"]
    limit = None if stream or settings["html"] is not None else settings["batch_size"]
    if prompts == ["-"] or (not prompts and sys.stdin is not None and not sys.stdin.isatty()):
        more = _lines()
        prompts = list(itertools.islice(more, limit))
        more = more if len(prompts) == limit else None
    if not prompts:
        raise ValueError(
            f"There is no prompt; give one (loopmdm generate {settings['model']} 'Once upon a time'), or pipe in "
            "lines."
        )
    count = len(prompts) * (settings["num_return_sequences"] or 1)
    if stream and count != 1:
        raise ValueError(f"--stream shows one row, and there are {count}; ask for one.")
    return prompts, more


def _lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"Standard input is not text in {sys.stdin.encoding}: {error}.") from error


@dataclass
class _Row:
    """A prompt: its place among all, its text and tokens, and how many new ones it gets."""

    number: int
    text: str
    tokens: list[int]
    new: int = 0
    is_idle: bool = False  # nothing is masked, and nothing is to be appended


@dataclass
class _Costs:
    """What all answers cost together."""

    count: int = 0
    total: Counter[str] = field(default_factory=Counter)  # COSTS
    seconds: float = 0.0
    tokens: float = 0.0
    output: Any = None  # of the rows that ran last; with --html these are all

    def line(self) -> str:
        passes, loops, flops = (self.total[name] / self.count for name in COSTS)
        per_row = "" if self.count == 1 else f" a text, mean of {self.count}"
        speed = self.tokens / self.seconds if self.seconds > 0 else 0.0
        return (
            f"{passes:g} forward passes, {loops:g} loops, {flops / 1e9:.3g} GFLOP{per_row}; {self.seconds:.2f} s, "
            f"{speed:.1f} tokens/s"
        )


def _encode(tokenizer: Any, text: str, number: int) -> _Row:
    from loopmdm.data import encode_given

    return _Row(number, text, encode_given(tokenizer, text, f"the prompt {text[:40]!r}"))


def _plan(model: Any, rows: list[_Row], asked: int | None) -> None:
    """Sets how many new tokens each prompt gets: as many as are asked for, the model's settings say, or are usual."""
    from loopmdm.evaluation.rows import new_tokens

    for row in rows:
        row.new = new_tokens(model, row.tokens, asked, f"Prompt {row.number + 1}")
        row.is_idle = row.new == 0 and model.config.mask_token_id not in row.tokens


def _check_busy(is_busy: bool, tokenizer: Any, model: Any) -> None:
    """Raises a ValueError where no prompt has anything to generate."""
    if not is_busy:
        mask = tokenizer.convert_ids_to_tokens(model.config.mask_token_id)
        raise ValueError(
            f"There is nothing to generate; give --max-new-tokens, or mask tokens ({mask!r}) in the prompts to fill "
            "in."
        )


def _batches(
    rows: list[_Row], more: Iterator[str] | None, size: int, tokenizer: Any, model: Any, new_tokens: int | None
) -> Iterator[list[_Row]]:
    """Batches of the rows, and then of further lines, of which no more than a batch is held."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
    numbered = enumerate(more or (), start=len(rows))
    while batch := [_encode(tokenizer, text, number) for number, text in itertools.islice(numbered, size)]:
        _plan(model, batch, new_tokens)
        yield batch


def _check_together(rows: list[_Row]) -> None:
    """Raises a ValueError where prompts do not share denoising steps, which a page has one slider for."""
    for row in rows:
        if _kind(row) != _kind(rows[0]):
            one, other = (
                "nothing to denoise" if each.is_idle else f"{each.new} new tokens after {len(each.tokens)} of its own"
                for each in (rows[0], row)
            )
            raise ValueError(
                f"--html shows prompts that are denoised together; prompt 1 has {one}, and prompt {row.number + 1} "
                f"has {other}. Give --max-new-tokens, or one prompt at a time."
            )


def _kind(row: _Row) -> tuple[int, bool, bool]:
    """What prompts that run together share. An empty prompt and one of padding look alike, hence the second."""
    return row.new, not row.tokens, row.is_idle


def _generate(
    model: Any, batch: list[_Row], options: dict[str, Any], seed: int, costs: _Costs
) -> Iterator[tuple[_Row, list[int], dict[str, int]]]:
    """
    For a batch of prompts in order, the tokens of prompt and answer, and their `COSTS`. Prompts that want as many new
    tokens run together.
    """
    from loopmdm.evaluation.rows import generate_answers

    copies = options.get("num_return_sequences", model.generation_config.num_return_sequences)
    free = dict.fromkeys(COSTS, 0)
    answers = {row.number: [(row.tokens, free)] * copies if row.is_idle else [] for row in batch}
    busy = sorted((row for row in batch if not row.is_idle), key=_kind)
    for _, group in itertools.groupby(busy, _kind):
        costs.output, made = generate_answers(model, list(group), seed, **options)
        costs.seconds += costs.output.seconds
        costs.tokens += costs.output.tokens_per_second * costs.output.seconds
        for row, tokens, cost in made:
            answers[row.number].append((tokens, cost))
    for row in batch:
        for tokens, cost in answers[row.number]:
            costs.count += 1
            costs.total.update(cost)
            yield row, tokens, cost


def _show(prompt: str, text: str, cost: dict[str, int], as_json: bool) -> None:
    print(json.dumps({"prompt": prompt, "text": text, **cost}) if as_json else text, flush=True)
