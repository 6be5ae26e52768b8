# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm eval lm-eval`."""

import difflib
import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from .application import evaluation
from .inputs import loop_numbers, start
from .options import (
    Device,
    Dtype,
    GenerateArguments,
    LoopList,
    Model,
    NumMasks,
    Output,
    TrustRemoteCode,
    at_least,
    generate_arguments,
    pairs,
)
from .output import draw, picture, plus_minus, results_folder, show_table, write_lines


@evaluation.command(epilog="Example: loopmdm eval lm-eval my-model --tasks hellaswag --num-loops 1,4")
def lm_eval(
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
    generate: GenerateArguments = None,
    batch_size: Annotated[int, typer.Option(help="Masked texts, or prompts, per forward pass.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of masks, samples and few-shot examples.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Run tasks of EleutherAI's lm-eval, whose own `--model hf` is wrong here, as it takes every model for causal."""
    settings = dict(locals())
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise ValueError('lm-eval is missing; `pip install "loopmdm[eval]"`.') from error
    from loopmdm.evaluation.lm_eval_model import LoopMDMEvalModel
    from loopmdm.objective import check_settings

    config = start(model, output)
    loops = loop_numbers(num_loops, [config.num_loops])
    check_settings(loops, num_samples)
    at_least(1, limit=limit, max_gen_toks=max_gen_toks, max_length=max_length, stride=stride, batch_size=batch_size)
    at_least(0, num_fewshot=num_fewshot)
    files = pairs("--data-files", [data_files] if data_files else None, read=str)
    manager, names = _find_tasks([task.strip() for task in tasks.split(",") if task.strip()], include_path, files)
    arguments = generate_arguments(generate, "--max-gen-toks")
    with_data = _with_data(manager, names, files)
    lm = LoopMDMEvalModel(
        model,
        num_loops=loops[0],
        num_samples=num_samples,
        seed=seed,
        batch_size=batch_size,
        max_length=max_length,
        stride=stride,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        **arguments,
    )
    # What is asked for here wins over what the tasks say.
    asked = arguments | ({} if max_gen_toks is None else {"max_gen_toks": max_gen_toks})
    lm.generation_plan(asked)  # checks
    options = {
        "tasks": with_data,
        "task_manager": manager,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "gen_kwargs": asked or None,
        "apply_chat_template": apply_chat_template,
        "fewshot_as_multiturn": apply_chat_template,
    }
    runs, seconds = _run(lm, loops, names, seed, options)
    if runs:  # on the first of several processes
        _report(lm, names, files, runs, seconds, settings)


def _find_tasks(tasks: list[str], include_path: Path | None, files: dict[str, str]) -> tuple[Any, list[str]]:
    """lm-eval's task manager and the names of the tasks. Its own tasks, thousands of files, are read if needed."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include-path {include_path} is not a folder.")
    for name, path in files.items():
        if not Path(path).is_file():
            raise ValueError(f"--data-files {name}={path}: there is no such file.")
    if not tasks:
        raise ValueError("There are no tasks; name some with --tasks.")
    for task in tasks:
        if Path(task).suffix == ".yaml" and not Path(task).is_file():
            raise ValueError(f"--tasks names {task}, which is not a file.")
    for with_own in (False, True):
        manager = TaskManager(
            include_path=None if include_path is None else str(include_path), include_defaults=with_own
        )
        names, unknown = [], []
        for task in tasks:
            matches = [task] if Path(task).suffix == ".yaml" else manager.match_tasks([task])
            names += matches
            unknown += [] if matches else [task]
        if not unknown:
            return manager, names
    close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
    hint = f" ({', '.join(close)}?)" if close else ""
    raise ValueError(f"lm-eval knows no task {unknown[0]!r}{hint}; --include-path names a folder with your own.")


def _with_data(manager: Any, names: list[str], files: dict[str, str]) -> list[Any]:
    """The tasks, with their data read from local files where there are some."""
    if not files:
        return names
    from lm_eval.tasks.manager import TaskIndex

    source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    # A group of them is how lm-eval takes its own tasks with other settings; those of a file by name alone.
    entries = [TaskIndex.entry_from_path(Path(name)) if name.endswith(".yaml") else None for name in names]
    manager.task_index.update({entry.name: entry for entry in entries if entry is not None})
    known = [name if entry is None else entry.name for name, entry in zip(names, entries, strict=True)]
    group = {"group": "local", "task": [{"task": name, **source} for name in known]}
    try:
        return list(manager.load([group])["tasks"].values())
    except KeyError as error:
        raise ValueError(
            f"{', '.join(names)} needs {error}, which is neither a split that --data-files names ({', '.join(files)}) "
            "nor a field of its rows; add it."
        ) from error


def _run(
    lm: Any, loops: list[int], names: list[str], seed: int, options: dict[str, Any]
) -> tuple[dict[int, dict[str, Any]], float]:
    """lm-eval's results by number of loops, on the first process alone, and the seconds that they took."""
    from lm_eval import simple_evaluate

    from loopmdm.evaluation.protocol import Stopwatch

    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    runs, seconds = {}, 0.0
    for number in loops:
        lm.num_loops = number
        with Stopwatch(lm.device) as watch:
            try:
                run = simple_evaluate(model=lm, bootstrap_iters=1000, **dict.fromkeys(seeds, seed), **options)
            except KeyError as error:
                raise ValueError(f"The data of {', '.join(names)} has no {error}.") from error
        seconds += watch.seconds
        if run is not None:
            runs[number] = run
    return runs, seconds


def _report(
    lm: Any,
    names: list[str],
    files: dict[str, str],
    runs: dict[int, dict[str, Any]],
    seconds: float,
    settings: dict[str, Any],
) -> None:
    from loopmdm.evaluation.protocol import protocol

    kept = {number: run.pop("samples", {}) for number, run in runs.items()}
    data = {f"data_{name}": path for name, path in files.items()}
    rows = [row for number, run in runs.items() for row in _rows(number, run["results"])]
    record = {
        "command": "lm-eval",
        "protocol": protocol(settings, lm.model, lm.pretrained, **data),
        "seconds": seconds,
        "results": rows,
        "lm_eval": {str(number): run for number, run in runs.items()},
    }
    shown = ("task", "metric", "filter", "num_loops")
    with results_folder(settings["output"], record) as folder:
        if folder is not None:
            lines = [
                {"num_loops": number, "task": task, **sample}
                for number, by_task in kept.items()
                for task, members in by_task.items()
                for sample in members
            ]
            write_lines(folder / "samples.jsonl", lines)
            _plot(folder / "lm_eval.png", rows)
    show_table(
        f"lm-eval: {', '.join(names)}, {seconds:.1f} s",
        [*shown, "value"],
        [[*(row[name] for name in shown), plus_minus(row["value"], row["standard_error"])] for row in rows],
    )


def _rows(number: int, results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """lm-eval's `{"metric,filter": value}` of every task as rows."""
    rows = []
    for task, values in results.items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            error = values.get(f"{metric}_stderr,{kind}")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = error if isinstance(error, int | float) else None
                row = {"task": task, "metric": metric, "filter": kind, "num_loops": number}
                rows.append(row | {"value": value, "standard_error": error})
    return rows


def _plot(path: Path, rows: list[dict[str, Any]]) -> None:
    with picture(path, 1) as (axis,):
        for key in dict.fromkeys((row["task"], row["metric"], row["filter"]) for row in rows):
            members = [row for row in rows if (row["task"], row["metric"], row["filter"]) == key]
            draw(axis, members, "value", label=" ".join(part for part in key if part != "none"))
        axis.set(xlabel="num_loops", ylabel="value (± 2 standard errors)")
        axis.legend(fontsize=8)
