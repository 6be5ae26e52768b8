# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm generate`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .application import app
from .html import check_html, write_trace
from .options import (
    BlockLength,
    ConfidenceThreshold,
    Device,
    Dtype,
    MaxDenoisingSteps,
    MaxNewTokens,
    Model,
    given,
    integers,
)


@app.command()
def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to continue, or to fill in where they hold mask tokens; `-` reads them as lines."),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
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
    seed: Annotated[int, typer.Option(help="Seed of each row's random numbers.")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Show every denoising step (one prompt).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines with the cost of each row.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page that plays every denoising step.")] = None,
    html_columns: Annotated[int | None, typer.Option(help="With --html: show a board of so many columns.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Continue texts, or fill in their mask tokens. What it cost goes to stderr."""
    texts = sys.stdin.read().splitlines() if prompts == ["-"] else prompts
    if not texts:
        raise ValueError("There is no prompt; give texts as arguments, or `-` to read lines from standard input.")
    if stream and len(texts) != 1:
        raise ValueError(f"--stream shows one prompt, and there are {len(texts)}; give one.")
    check_html(html, html_columns)
    loops = integers("--num-loops", num_loops)
    options = given(
        max_new_tokens=max_new_tokens,
        num_loops=loops[0] if loops and len(loops) == 1 else loops,
        loop_tolerance=loop_tolerance,
        visible_loops=visible_loops,
        cache_implementation=cache_implementation,
        block_length=block_length,
        max_denoising_steps=max_denoising_steps,
        unmasking=unmasking,
        confidence_threshold=confidence_threshold,
        entropy_bound=entropy_bound,
        do_sample=do_sample or None,
        temperature=temperature,
        top_p=top_p,
        output_trace=html is not None or None,
    )
    tokenizer, output = _run(model, texts, options, seed, stream, dtype, device)
    _show(texts, tokenizer, output, stream, as_json)
    if html is not None:
        write_trace(html, output, tokenizer, model, texts, html_columns)


def _run(
    model: str, texts: list[str], options: dict[str, Any], seed: int, stream: bool, dtype: str, device: str | None
) -> tuple[Any, Any]:
    """The tokenizer, and what `generate` returns for the texts as one batch."""
    import torch
    from transformers import TextDiffusionStreamer

    from loopmdm.evaluation.loading import load_model, load_tokenizer

    loaded, tokenizer = load_model(model, dtype, device), load_tokenizer(model)
    if tokenizer.pad_token_id is None and len(texts) > 1:
        raise ValueError("The tokenizer has no padding token; give one prompt at a time.")
    try:
        inputs = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, padding_side="left").to(loaded.device)
    except Exception as error:  # tokenizers raises nothing more specific for a character that it does not know
        raise ValueError(f"The tokenizer of {model} cannot read the prompt: {error}") from error
    output = loaded.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generator=[torch.Generator().manual_seed(seed) for _ in texts],
        streamer=TextDiffusionStreamer(tokenizer, skip_special_tokens=False) if stream else None,
        return_dict_in_generate=True,
        **options,
    )
    return tokenizer, output


def _show(texts: list[str], tokenizer: Any, output: Any, stream: bool, as_json: bool) -> None:
    """The texts, unless they were streamed, and a line on what they cost."""
    costs = [
        {name: output[name][i].item() for name in ("forward_passes", "loops", "flops")} for i in range(len(texts))
    ]
    if not stream:
        made = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        for prompt, text, cost in zip(texts, made, costs, strict=True):
            print(json.dumps({"prompt": prompt, "text": text, **cost}) if as_json else text)
    passes, loops, flops = (sum(cost[name] for cost in costs) / len(costs) for name in costs[0])
    per_row = "" if len(texts) == 1 else f" a text, mean of {len(texts)}"
    print(
        f"{passes:g} forward passes, {loops:g} loops, {flops / 1e9:.3g} GFLOP{per_row}; {output.seconds:.2f} s, "
        f"{output.tokens_per_second:.1f} tokens/s",
        file=sys.stderr,
    )
