# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The `loopmdm` command. A module beside the package, whose import brings torch and transformers: here they are imported
when a command runs, so that `--help` and usage errors are quick.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Looped masked diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Model = Annotated[
    str, typer.Argument(help="Folder of a model, or its id on the Hugging Face Hub.", show_default=False)
]
Loops = Annotated[
    str | None, typer.Option(help="Applications of the looped block; a list such as 1,2,4 is spread over the steps.")
]


def main() -> None:
    """Entry point: runs a command and turns what is wrong with its input into one line and exit status 2."""
    try:
        app()
    except Exception as error:
        from huggingface_hub.errors import StrictDataclassError

        if not isinstance(error, ValueError | OSError | StrictDataclassError):
            raise
        message = " ".join(str(error).split())
        print(f"loopmdm: error: {message}", file=sys.stderr)
        sys.exit(2)


@app.command()
def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to continue, or to fill in where they hold mask tokens; `-` reads them as lines."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to append; 0 only fills in.")] = None,
    num_loops: Loops = None,
    loop_tolerance: Annotated[float | None, typer.Option(help="Stop looping below this relative change.")] = None,
    block_length: Annotated[int | None, typer.Option(help="Positions denoised together.")] = None,
    max_denoising_steps: Annotated[int | None, typer.Option(help="Forward passes per block at most.")] = None,
    unmasking: Annotated[str | None, typer.Option(help="Commit rule, e.g. confidence or ancestral.")] = None,
    confidence_threshold: Annotated[float | None, typer.Option(help="Commit all tokens at least so likely.")] = None,
    entropy_bound: Annotated[
        float | None, typer.Option(help="Commit tokens up to this joint entropy in nats.")
    ] = None,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Draw tokens.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Temperature; needs --do-sample.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling; needs --do-sample.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of each row's random numbers.")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Show every denoising step (one prompt).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines with the cost of each row.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, ... or auto.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")] = None,
) -> None:
    """Continue texts, or fill in their mask tokens."""
    texts = sys.stdin.read().splitlines() if prompts == ["-"] else prompts
    if not texts:
        raise ValueError("There is no prompt; give texts as arguments, or `-` to read lines from standard input.")
    if stream and len(texts) != 1:
        raise ValueError(f"--stream shows one prompt, and there are {len(texts)}; give one.")

    import torch
    from transformers import AutoTokenizer, TextDiffusionStreamer

    loaded = _load(model, dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token_id is None and len(texts) > 1:
        raise ValueError("The tokenizer has no padding token; give one prompt at a time.")
    try:
        inputs = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, padding_side="left").to(loaded.device)
    except Exception as error:  # tokenizers raises nothing more specific for a character that it does not know
        raise ValueError(f"The tokenizer of {model} cannot read the prompt: {error}") from error
    options = {
        "max_new_tokens": max_new_tokens,
        "num_loops": _parse_loops(num_loops),
        "loop_tolerance": loop_tolerance,
        "block_length": block_length,
        "max_denoising_steps": max_denoising_steps,
        "unmasking": unmasking,
        "confidence_threshold": confidence_threshold,
        "entropy_bound": entropy_bound,
        "do_sample": do_sample or None,
        "temperature": temperature,
        "top_p": top_p,
    }
    outputs = loaded.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generator=[torch.Generator().manual_seed(seed) for _ in texts],
        streamer=TextDiffusionStreamer(tokenizer, skip_special_tokens=False) if stream else None,
        return_dict_in_generate=True,
        **{name: value for name, value in options.items() if value is not None},
    )
    if stream:
        return
    for i, text in enumerate(tokenizer.batch_decode(outputs.sequences, skip_special_tokens=True)):
        if as_json:
            cost = {name: outputs[name][i].item() for name in ("forward_passes", "loops", "layer_passes")}
            print(json.dumps({"prompt": texts[i], "text": text, **cost}))
        else:
            print(text)


@app.command()
def info(
    model: Model,
    length: Annotated[int | None, typer.Option(help="Sequence length of the FLOPs (default: the longest).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's layers, loops, parameters and the cost of a forward pass by number of loops."""
    facts = _facts(model, length)
    if as_json:
        print(json.dumps(facts, indent=2))
        return

    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, title=model)
    for name, value in facts.items():
        if name not in ("cost", "generation"):
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    for name, value in facts["generation"].items():
        table.add_row(f"generate: {name}", str(value))
    console.print(table)
    cost = Table(title=f"One forward pass over {facts['cost'][0]['length']} positions")
    for column in ("num_loops", "layers executed", "GFLOP", "of one loop"):
        cost.add_column(column, justify="right")
    for row in facts["cost"]:
        ratio = row["flops"] / facts["cost"][0]["flops"]
        cost.add_row(str(row["num_loops"]), str(row["layers"]), f"{row['flops'] / 1e9:,.3f}", f"{ratio:.2f}x")
    console.print(cost)


def _facts(model: str, length: int | None) -> dict[str, Any]:
    """What `info` shows. The model is built without weights, so this is quick at any size."""
    import torch
    from transformers import AutoConfig

    from loopmdm import LoopMDMForMaskedLM, LoopMDMGenerationConfig

    _check_folder(model)
    config = AutoConfig.from_pretrained(model)
    if config.model_type != "loopmdm":
        raise ValueError(f"{model} holds a {config.model_type!r} model, not a LoopMDM.")
    length = config.max_position_embeddings if length is None else length
    if not 1 <= length <= config.max_position_embeddings:
        raise ValueError(f"--length is {length}; the model takes 1 to {config.max_position_embeddings} positions.")
    with torch.device("meta"):
        empty = LoopMDMForMaskedLM(config)
    try:
        defaults = LoopMDMGenerationConfig.from_pretrained(model)
    except OSError:
        defaults = LoopMDMGenerationConfig()
    loops = sorted({1, 2, 4, 8, config.num_loops, config.max_train_loops, 2 * config.max_train_loops})
    return {
        "parameters": empty.num_parameters(),
        "dtype": str(config.dtype).removeprefix("torch."),
        "layers": config.num_hidden_layers,
        "head": f"layers[0:{config.loop_start}]",
        "mid": f"layers[{config.loop_start}:{config.loop_end}]",
        "tail": f"layers[{config.loop_end}:{config.num_hidden_layers}]",
        "num_loops": config.num_loops,
        "max_train_loops": config.max_train_loops,
        "loop_update": config.loop_update,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "mask_token_id": config.mask_token_id,
        "max_position_embeddings": config.max_position_embeddings,
        "generation": {
            name: getattr(defaults, name)
            for name, default in LoopMDMGenerationConfig.DEFAULTS.items()
            if getattr(defaults, name) != default
        },
        "cost": [
            {
                "num_loops": num_loops,
                "layers": config.num_executed_layers(num_loops),
                "length": length,
                "flops": empty.flops(1, length, num_loops),
            }
            for num_loops in loops
        ],
    }


def _check_folder(model: str) -> None:
    """Names a missing folder as such, where transformers would take its path for a misspelt Hub id."""
    if model.startswith((".", "/", "~")) and not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model} holds no model; there is no config.json in it.")


def _load(model: str, dtype: str, device: str | None):
    """The model in eval mode, without transformers' progress bars."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    import loopmdm  # noqa: F401  (registers the classes, so that no remote code is needed)

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype is {dtype!r}; use float32, bfloat16, float16 or auto.")
    _check_folder(model)
    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return AutoModel.from_pretrained(model, dtype=dtype).to(device).eval()


def _parse_loops(text: str | None) -> int | list[int] | None:
    if text is None:
        return None
    try:
        loops = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--num-loops is {text!r}; give an integer, or a list such as 1,2,4.") from None
    return loops[0] if len(loops) == 1 else loops


if __name__ == "__main__":
    main()
