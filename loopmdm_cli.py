# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The `loopmdm` command. A module beside the package, whose import brings torch and transformers: here they are imported
when a command runs, so that `--help` and usage errors are quick.
"""

import json
import os
import re
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

evaluation = typer.Typer(help="Measure a model, at any number of loops.", no_args_is_help=True)
app.add_typer(evaluation, name="eval")
Text = Annotated[
    str, typer.Option(help="Text (.txt), JSON lines (.jsonl), or the name of a data set.", show_default=False)
]
Output = Annotated[Path | None, typer.Option(help="Folder for JSON, arrays and pictures; it must not exist.")]
LoopList = Annotated[str | None, typer.Option(help="Numbers of loops to measure, such as 1,2,4.")]
Task = Annotated[
    str, typer.Option(help="Score all of texts, answers given prompts, or what mask tokens stand for (fill).")
]
TextColumn = Annotated[str, typer.Option(help="Where texts are in JSON and data sets.")]
Documents = Annotated[str, typer.Option(help="What separates the texts of a .txt: file (none), blank_line or line.")]
Split = Annotated[str, typer.Option(help="Of a data set.")]
Subset = Annotated[str | None, typer.Option(help="Of a data set: the name of its configuration.")]
TextLimit = Annotated[int | None, typer.Option(help="Read so many texts.")]
NumMasks = Annotated[int, typer.Option(help="Masks of each text or window; even.")]
Options = Annotated[
    list[str] | None,
    typer.Option(help="Arguments of `generate`, such as unmasking=entropy,block_length=32; may be repeated."),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, ... or auto.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")]


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
    loop_schedule: Annotated[
        str | None, typer.Option(help="Loops over the steps: constant, early, middle or late.")
    ] = None,
    loop_tolerance: Annotated[float | None, typer.Option(help="Stop looping below this relative change.")] = None,
    loop_exit: Annotated[str | None, typer.Option(help="What stops looping: a row, or a token on its own.")] = None,
    visible_loops: Annotated[int | None, typer.Option(help="Loops of tokens that are not masked.")] = None,
    cache_implementation: Annotated[
        str | None, typer.Option(help="Approximate caching: prefix or dual, for attention over the whole sequence.")
    ] = None,
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
        "loop_schedule": loop_schedule,
        "loop_tolerance": loop_tolerance,
        "loop_exit": loop_exit,
        "visible_loops": visible_loops,
        "cache_implementation": cache_implementation,
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
            names = ("forward_passes", "loops", "layer_passes", "token_layer_passes", "flops")
            cost = {name: outputs[name][i].item() for name in names}
            print(json.dumps({"prompt": texts[i], "text": text, **cost}))
        else:
            print(text)


@app.command()
def info(
    model: Model,
    length: Annotated[int | None, typer.Option(help="Sequence length of the FLOPs (default: the longest).")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Generate with the model's settings, and show what it took.")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="With --measure: tokens to generate.")] = None,
    batch_size: Annotated[int, typer.Option(help="With --measure: rows.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's layers, loops, parameters and the cost of a forward pass by number of loops."""
    facts = _facts(model, length)
    if measure:
        facts["measured"] = _measure(model, max_new_tokens, batch_size)
    if as_json:
        print(json.dumps(facts, indent=2))
        return

    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, title=model)
    for name, value in facts.items():
        if name not in ("cost", "generation", "measured"):
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
    if measure:
        spent = Table(title="Generation, after a warm-up", show_header=False)
        for name, value in facts["measured"].items():
            spent.add_row(name.replace("_", " "), f"{value:,.6g}" if isinstance(value, float) else str(value))
        console.print(spent)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Folder of a looped model.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            help='JSON lines {"prompt": ..., "answer": ...}; a prompt with mask tokens is filled in.',
            show_default=False,
        ),
    ],
    max_loss: Annotated[float, typer.Option(help="Quality that may be lost, as a share.")] = 0.005,
    quality: Annotated[
        str, typer.Option(help="exact answers, right tokens, or agreement with the most loops.")
    ] = "exact",
    num_loops: Annotated[int | None, typer.Option(help="The most loops (default: the model's).")] = None,
    max_denoising_steps: Annotated[int | None, typer.Option(help="Forward passes per block at most.")] = None,
    block_length: Annotated[int | None, typer.Option(help="Positions denoised together.")] = None,
    confidence_threshold: Annotated[float | None, typer.Option(help="Commit all tokens at least so likely.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first so many examples.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples generated together.")] = 32,
    output: Annotated[Path | None, typer.Option(help="Write all measurements to this JSON file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, and leave the model as it is.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, ... or auto.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")] = None,
) -> None:
    """Find the cheapest loops that keep a model's quality, and make them its default."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from transformers import AutoTokenizer

    from loopmdm.evaluation import calibrate_loops
    from loopmdm.evaluation.loop_budget import describe, read_examples, write_budget
    from loopmdm.evaluation.protocol import write_json

    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model} is no folder of a model; the result is written into it, so download it first.")
    loaded = _load(model, dtype, device)
    examples = read_examples(data, AutoTokenizer.from_pretrained(model), loaded.config.mask_token_id)[:limit]
    options = {
        "max_denoising_steps": max_denoising_steps,
        "block_length": block_length,
        "confidence_threshold": confidence_threshold,
    }
    console, bar = Console(), Progress(console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task("settings", total=None)
        budget = calibrate_loops(
            loaded,
            examples,
            num_loops=num_loops,
            max_loss=max_loss,
            quality=quality,
            batch_size=batch_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **{name: value for name, value in options.items() if value is not None},
        )
    table = Table(title=f"Half of {len(examples)} examples of {data}")
    for column in ("setting", "quality, %", "loss, %", "loops", "passes", "GFLOP"):
        table.add_column(column, justify="left" if column == "setting" else "right", no_wrap=True)

    def add(result, name: str = "") -> None:
        table.add_row(
            name or describe(result.arguments),
            f"{100 * result.quality:.1f} ± {100 * result.standard_error:.1f}",
            f"{100 * result.loss:+.1f} ± {100 * result.loss_standard_error:.1f}",
            f"{result.mean_loops:.2f}",
            f"{result.forward_passes:.2f}",
            f"{result.flops / 1e9:,.3f}",
        )

    for result in sorted(budget.results, key=lambda result: result.flops):
        add(result)
    table.add_section()
    add(budget.check_full, "other half: all loops")
    for check in budget.checks:
        add(check, f"other half: {describe(check.arguments)}")
    console.print(table)
    share = budget.check.flops / budget.check_full.flops
    saved = f"{share:.2f} of the FLOPs, {budget.check.mean_loops:.2f} loops on average"
    console.print(f"Chosen: {describe(budget.best.arguments)} ({saved}).")
    if output is not None:
        write_json(output, {"model": model, "data": str(data), **budget.record()})
    if not dry_run:
        console.print(f"{write_budget(model, budget.best.arguments)} is written.")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder, file of weights or Hub id of a non-looped checkpoint.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", show_default=False)],
    num_loops: Annotated[int, typer.Option(help="Loops of an inference pass that names none.")] = 1,
    loop_start: Annotated[int | None, typer.Option(help="First looped layer (default: by depth).")] = None,
    loop_end: Annotated[int | None, typer.Option(help="Layer behind the last looped one.")] = None,
    loop_update: Annotated[
        str | None,
        typer.Option(help="replace (to be trained) or damped (works untrained; default if --num-loops is above 1)."),
    ] = None,
    max_train_loops: Annotated[int | None, typer.Option(help="S_max of a later training (default: 12).")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Text file: loop the layers that harm its NELBO least.")
    ] = None,
    calibrate_width: Annotated[int | None, typer.Option(help="Layers to loop, with --calibrate.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare with transformers' own class.")] = False,
    verify_against: Annotated[Path | None, typer.Option(help="Compare with reference logits (.npz).")] = None,
    family: Annotated[str | None, typer.Option(help="Format of the source, where its files do not tell.")] = None,
    from_causal: Annotated[bool, typer.Option("--from-causal", help="Start from a causal language model.")] = False,
    shift_logits: Annotated[
        bool | None, typer.Option(help="With --from-causal: position i - 1 goes on predicting token i (default).")
    ] = None,
    mask_token_id: Annotated[int | None, typer.Option(help="Id of the mask token, where it is not found.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Noise level of a time-conditioned source.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the source's).")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, and memory used.")] = "5GB",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights (tensors only).")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
) -> None:
    """Turn a non-looped diffusion model into a looped one that computes the same at one loop."""
    from rich.console import Console
    from rich.progress import Progress
    from transformers.utils import logging

    from loopmdm.convert import convert_checkpoint

    console = Console()

    def on_plan(plan) -> None:
        _show_plan(console, plan.record())
        if dry_run:
            raise typer.Exit

    logging.disable_progress_bar()  # transformers' own
    bar, tasks = Progress(console=Console(stderr=True), transient=True), {}

    def progress(what: str, done: int, total: int) -> None:
        bar.start()
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done)

    try:
        record = convert_checkpoint(
            source,
            output,
            num_loops=num_loops,
            loop_start=loop_start,
            loop_end=loop_end,
            loop_update=loop_update,
            max_train_loops=max_train_loops,
            family=family,
            from_causal=from_causal,
            shift_logits=shift_logits,
            mask_token_id=mask_token_id,
            sigma=sigma,
            dtype=dtype,
            max_shard_size=max_shard_size,
            calibrate_on=calibrate,
            calibration_width=calibrate_width,
            verify=verify,
            verify_against=verify_against,
            revision=revision,
            allow_pickle=allow_pickle,
            on_plan=on_plan,
            progress=progress,
        )
    finally:
        bar.stop()
    _show_result(console, record, output)


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


@evaluation.command("likelihood")
def eval_likelihood(
    model: Model,
    text: Text,
    output: Output = None,
    num_loops: LoopList = None,
    task: Task = "texts",
    text_column: TextColumn = "text",
    documents: Documents = "file",
    split: Split = "train",
    subset: Subset = None,
    limit: TextLimit = None,
    window: Annotated[int | None, typer.Option(help="Tokens seen at once (default: at most 1024).")] = None,
    stride: Annotated[int | None, typer.Option(help="Fresh tokens of a window; the others are context.")] = None,
    windows: Annotated[int | None, typer.Option(help="Score so many windows, evenly spread.")] = None,
    num_samples: NumMasks = 32,
    bins: Annotated[int, typer.Option(help="Bins of timesteps.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Masked texts per forward pass.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the masks.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Bound of the likelihood of texts (NELBO), with error bars, at several numbers of loops and by timestep."""
    from loopmdm.evaluation.commands import likelihood

    likelihood(
        model,
        text,
        output=output,
        num_loops=_integers("--num-loops", num_loops),
        task=task,
        text_column=text_column,
        documents=documents,
        dataset=_dataset(split, subset),
        limit=limit,
        window=window,
        stride=stride,
        max_windows=windows,
        num_samples=num_samples,
        bins=bins,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device=device,
    )


@evaluation.command("generative-perplexity")
def eval_generative_perplexity(
    judge: Annotated[str, typer.Option(help="Folder or Hub id of a causal language model.", show_default=False)],
    model: Annotated[
        str | None, typer.Argument(help="Model that makes samples (or give --samples).", show_default=False)
    ] = None,
    samples: Annotated[
        str | None, typer.Option(help="File of texts to judge (.txt, .jsonl), instead of a model.")
    ] = None,
    output: Output = None,
    num_loops: LoopList = None,
    num_samples: Annotated[int, typer.Option(help="Samples for each number of loops.")] = 64,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a sample (default: the model's positions, at most 256).")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="File of texts to continue; by default from nothing.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens that the judge sees at once.")] = None,
    stride: Annotated[int | None, typer.Option(help="Fresh tokens of a window of a long sample.")] = None,
    text_column: TextColumn = "text",
    documents: Documents = "blank_line",
    generate: Options = None,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Perplexity of samples under a causal language model, and their entropy. Ancestral sampling by default."""
    from loopmdm.evaluation.commands import judged_samples

    judged_samples(
        judge,
        model=model,
        samples=samples,
        output=output,
        num_loops=_integers("--num-loops", num_loops),
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        prompts=prompts,
        window=window,
        stride=stride,
        text_column=text_column,
        documents=documents,
        generation=_settings("--generate", generate),
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device=device,
    )


@evaluation.command("lm-eval")
def eval_lm_eval(
    model: Model,
    tasks: Annotated[
        str, typer.Option(help="Tasks, groups or tags of lm-eval, or files (.yaml), by commas.", show_default=False)
    ],
    output: Output = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with more tasks (.yaml).")] = None,
    data_files: Annotated[
        str | None, typer.Option(help="Read the tasks' data from JSON lines, such as test=a.jsonl,train=b.jsonl.")
    ] = None,
    num_loops: LoopList = None,
    num_samples: NumMasks = 32,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt (default: the task's).")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task.")] = None,
    max_gen_toks: Annotated[int | None, typer.Option(help="Tokens to generate (default: the task's).")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens seen at once (default: the model's).")] = None,
    stride: Annotated[int | None, typer.Option(help="Fresh tokens of a window of a long text.")] = None,
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="Prompts as chats.")] = False,
    generate: Options = None,
    batch_size: Annotated[int, typer.Option(help="Masked texts, or prompts, per forward pass.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of masks, samples and few-shot examples.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Tasks of EleutherAI's lm-eval. (Its own `--model hf` takes a model for causal, and is wrong for this one.)"""
    from loopmdm.evaluation.commands import lm_eval_tasks

    lm_eval_tasks(
        model,
        [task.strip() for task in tasks.split(",") if task.strip()],
        output=output,
        include_path=include_path,
        data_files=_settings("--data-files", [data_files] if data_files else None, values=str),
        num_loops=_integers("--num-loops", num_loops),
        num_samples=num_samples,
        num_fewshot=num_fewshot,
        limit=limit,
        max_gen_toks=max_gen_toks,
        max_length=max_length,
        stride=stride,
        apply_chat_template=apply_chat_template,
        generation=_settings("--generate", generate),
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device=device,
    )


@evaluation.command("dynamics")
def eval_dynamics(
    model: Model,
    text: Text,
    output: Output = None,
    num_loops: Annotated[int | None, typer.Option(help="Loops to follow (default: those of training).")] = None,
    timesteps: Annotated[str, typer.Option(help="Shares of masked tokens.")] = "0.1,0.3,0.5,0.7,0.9",
    task: Task = "texts",
    text_column: TextColumn = "text",
    documents: Documents = "file",
    split: Split = "train",
    subset: Subset = None,
    limit: TextLimit = None,
    window: Annotated[int | None, typer.Option(help="Tokens seen at once (default: at most 256).")] = None,
    windows: Annotated[int, typer.Option(help="Follow so many windows, evenly spread.")] = 16,
    masks: Annotated[int, typer.Option(help="Masks of each window and timestep.")] = 2,
    no_attention: Annotated[bool, typer.Option("--no-attention", help="Leave attention out.")] = False,
    no_lens: Annotated[bool, typer.Option("--no-lens", help="Leave predictions by loop out.")] = False,
    batch_size: Annotated[int, typer.Option(help="Masked texts per forward pass.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the masks.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """What happens in the loop: attention between masked and visible tokens, states, predictions."""
    from loopmdm.evaluation.commands import dynamics

    try:
        shares = [float(part) for part in timesteps.split(",")]
    except ValueError:
        raise ValueError(f"--timesteps is {timesteps!r}; give a list such as 0.1,0.5,0.9.") from None
    dynamics(
        model,
        text,
        output=output,
        num_loops=num_loops,
        timesteps=shares,
        task=task,
        text_column=text_column,
        documents=documents,
        dataset=_dataset(split, subset),
        limit=limit,
        window=window,
        max_windows=windows,
        masks_per_text=masks,
        attention=not no_attention,
        lens=not no_lens,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device=device,
    )


def _integers(name: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} is {text!r}; give an integer, or a list such as 1,2,4.") from None


def _settings(name: str, texts: list[str] | None, values: Any = None) -> dict[str, Any] | None:
    """`key=value` pairs, apart by commas; values are YAML where `values` does not say otherwise."""
    import yaml

    pairs = {}
    for part in ",".join(texts or []).split(","):
        key, equals, value = part.partition("=")
        if part and not equals:
            raise ValueError(f"{name} holds {part!r}, which is no `key=value`.")
        if part:
            pairs[key.strip()] = (values or yaml.safe_load)(value)
    return pairs or None


def _dataset(split: str, subset: str | None) -> dict[str, str]:
    return {"split": split} | ({} if subset is None else {"name": subset})


def _show_plan(console, record: dict[str, Any]) -> None:
    """The plan of a conversion: parameters, loop, special tokens and the mapping, layers summed up."""
    from rich.table import Table

    loop, tokens, parameters = record["loop"], record["special_tokens"], record["parameters"]
    table = Table(show_header=False, title=f"{record['source']} as {record['family']}")
    table.add_row("parameters", f"{parameters['total']:,} ({record['dtype']})")
    bounds = (0, loop["loop_start"], loop["loop_end"], record["layers"])
    for part, start, end in zip(("head", "mid", "tail"), bounds[:-1], bounds[1:], strict=True):
        table.add_row(part, f"layers[{start}:{end}], {parameters[part]:,} parameters")
    table.add_row("loop", f"chosen {loop['chosen']}; {loop['loop_update']}, num_loops {loop['num_loops']}")
    mask = f"{tokens['mask_token_id']} {tokens['mask_token'] or ''} (from {tokens['mask_found']})"
    table.add_row("mask token", mask)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        table.add_row(name, str(tokens[name]))
    console.print(table)

    mapping = Table(title="Tensors")
    for column in ("result", "source", "how", "count"):
        mapping.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
    rows: dict[tuple[str, ...], int] = {}
    same = 0
    for target, recipe in record["tensors"].items():
        if recipe == {"from": [target], "how": "copy"}:
            same += 1
            continue
        extra = f" and {len(recipe['from']) - 1} more" if len(recipe["from"]) > 1 else ""
        names = (re.sub(r"\.\d+\.", ".{i}.", name, count=1) for name in (target, recipe["from"][0]))
        key = (*names, recipe["how"] + extra)
        rows[key] = rows.get(key, 0) + 1
    for key, count in rows.items():
        mapping.add_row(*key, str(count))
    if rows:
        console.print(mapping)
    if same:
        console.print(f"{same} tensors are copied under their own names.")
    if record["ignored"]:
        console.print(f"Not needed: {', '.join(record['ignored'][:5])}{', ...' if len(record['ignored']) > 5 else ''}")


def _show_result(console, record: dict[str, Any], output: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    calibration = record.get("calibration")
    if calibration:
        loops, update = calibration["num_loops"], calibration["loop_update"]
        table = Table(title=f"NELBO at {loops} loops ({update}) on {calibration['text']}")
        for column in ("looped", "nats per token", "change"):
            table.add_column(column, justify="right")
        for score in [calibration["without_loops"], *calibration["windows"]]:
            bounds = [score.get("loop_start"), score.get("loop_end")]
            window = "none" if bounds[0] is None else escape(f"layers[{bounds[0]}:{bounds[1]}]")
            chosen = " (chosen)" if bounds == calibration["best"] else ""
            change = f"{score['change']:+.4f} ± {score['change_standard_error']:.4f}" if "change" in score else ""
            table.add_row(window + chosen, f"{score['nelbo']:.4f} ± {score['standard_error']:.4f}", change)
        console.print(table)
    for name in ("verification", "verification_against_file"):
        if name in record:
            found = record[name]
            console.print(
                f"Verified against {found['against']}: largest difference {found['max_difference']:.2g} in logits up "
                f"to {found['max_logit']:.1f} ({found['dtype']})."
            )
    todo = "train it before you loop it more"
    if record["loop"]["loop_update"] == "damped":
        todo = "damped loops change little, and gain little, untrained"
    console.print(f"{output} is written. It computes what its source does at num_loops=1; {todo}.")


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
    block_size = config.attention_block_size
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
        "attention": "whole sequence" if block_size is None else f"block-causal, blocks of {block_size}",
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


def _measure(model: str, max_new_tokens: int | None, batch_size: int) -> dict[str, Any]:
    """Cost and speed of one `generate` from nothing, with the model's own settings, after another one to warm up."""
    import torch

    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}; it must be at least 1.")
    loaded = _load(model, "auto", None)
    room = loaded.config.max_position_embeddings
    new_tokens = min(room, 128) if max_new_tokens is None else max_new_tokens
    prompt = torch.full((batch_size, 1), loaded.config.mask_token_id, device=loaded.device)
    arguments = {"max_new_tokens": new_tokens - 1, "eos_token_id": [], "return_dict_in_generate": True}
    for _ in range(2):
        output = loaded.generate(prompt, **arguments)
    names = ("forward_passes", "loops", "layer_passes", "token_layer_passes", "flops")
    return {
        "rows": batch_size,
        "new_tokens": new_tokens,
        **{f"{name}_per_row": output[name].double().mean().item() for name in names},
        "seconds": output.seconds,
        "tokens_per_second": output.tokens_per_second,
        "GFLOP_per_second": output.flops.sum().item() / output.seconds / 1e9,
        "threads": torch.get_num_threads(),
        "device": str(loaded.device),
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
