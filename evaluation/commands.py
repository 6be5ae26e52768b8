# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What `loopmdm eval` does: each function checks its arguments, measures, prints a table, and writes a folder with
`results.json` (protocol, results), arrays and pictures. The folder is complete or absent.
"""

import contextlib
import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..configuration_loopmdm import check_num_loops
from ..generation_utils import LoopMDMGenerationConfig
from ..modeling_loopmdm import LoopMDMForMaskedLM
from ..objective import check_settings, seeded_generator
from .dynamics import measure_dynamics
from .perplexity import check_judge, generative_perplexity, text_likelihood
from .protocol import Stopwatch, check_output, output_folder, protocol, write_json
from .texts import make_windows, pad_windows, read_texts

console = Console()


def likelihood(
    model: str,
    text: str,
    output: str | Path | None = None,
    num_loops: Sequence[int] | None = None,
    task: str = "texts",
    text_column: str = "text",
    documents: str = "file",
    dataset: dict[str, Any] | None = None,
    limit: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    num_samples: int = 32,
    bins: int = 10,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
) -> dict[str, Any]:
    """NELBO of texts at several numbers of loops; see [`~loopmdm.evaluation.text_likelihood`] and [`read_texts`]."""
    settings = dict(locals())
    config = _start(model, output)
    several = {1, 2, 4, config.num_loops} | ({config.max_train_loops} if config.loop_update == "replace" else set())
    loops = _loops(num_loops, sorted(n for n in several if n <= max(config.num_loops, config.max_train_loops)))
    check_settings(loops, num_samples)
    if bins < 1:
        raise ValueError(f"There are {bins} bins of timesteps; there must be at least 1.")
    tokenizer = _load_tokenizer(model)
    texts = read_texts(text, tokenizer, config, task, text_column, documents, dataset, limit)
    if task == "fill":  # what is given stands on both sides, so nothing can be cut off
        _must_fit(texts, window or config.max_position_embeddings)
    loaded = load_model(model, dtype, device)
    with _progress("NELBO") as progress, Stopwatch(loaded.device) as watch:
        result = text_likelihood(
            loaded, texts, loops, window, stride, max_windows, num_samples, batch_size, seed, progress
        )
    (nats, error), (change, change_error) = result.per_token(), result.estimate.change()
    (bound, bound_error), between = result.perplexity_bound(), result.error_between_texts()
    bits = result.bits_per_byte()
    rows = [
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
    _table(
        f"NELBO of {text}: {record['texts']} texts, {result.num_tokens} tokens, {watch.seconds:.1f} s",
        ["num_loops", "nats/token", "perplexity at most", "bits/byte", "change"],
        [
            [
                row["num_loops"],
                _pm(row["nats_per_token"], row["standard_error"]),
                _pm(row["perplexity_bound"], row["perplexity_bound_error"]),
                "" if bits is None else _pm(row["bits_per_byte"], row["bits_per_byte_error"]),
                "" if i == 0 else _pm(row["change"], row["change_error"]),
            ]
            for i, row in enumerate(rows)
        ],
    )
    if output is not None:
        with output_folder(output) as folder:
            write_json(folder / "results.json", record)
            _save_arrays(folder / "tokens.npz", {"num_loops": result.estimate.num_loops, **result.by_token()})
            _plot_likelihood(folder / "likelihood.png", rows, means, errors, edges)
        console.print(f"Written to {output}.")
    return record


def judged_samples(
    judge: str,
    model: str | None = None,
    samples: str | None = None,
    output: str | Path | None = None,
    num_loops: Sequence[int] | None = None,
    num_samples: int = 64,
    max_new_tokens: int | None = None,
    prompts: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    text_column: str = "text",
    documents: str = "blank_line",
    batch_size: int = 8,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    generation: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Generative perplexity of a model's samples at several numbers of loops, or of the texts of a file."""
    settings = dict(locals())
    if (model is None) == (samples is None):
        raise ValueError("Give either a model that makes samples, or --samples, a file that holds them.")
    for name, value in (("--num-samples", num_samples), ("--batch-size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if output is not None:
        check_output(output)
    generation = {"unmasking": "ancestral"} | (generation or {})
    if model is not None:
        config = _start(model, None)
        loops = _loops(num_loops, [config.num_loops])
        length = min(256, config.max_position_embeddings) if max_new_tokens is None else max_new_tokens
        LoopMDMGenerationConfig(max_new_tokens=length, **generation)  # checks
        tokenizer = _load_tokenizer(model)
        starts = _prompts(prompts, tokenizer, config, num_samples, length, text_column)
    else:
        texts = _sample_texts(samples, text_column, documents)
    judge_model, judge_tokenizer = load_judge(judge, dtype, device)

    rows, kept, loaded, seconds = [], {}, None, 0.0
    if model is not None:
        loaded = load_model(model, dtype, device)
        for number in loops:
            with _progress(f"{number} loops: samples") as progress, Stopwatch(loaded.device) as watch:
                made = _generate(loaded, starts, number, length, batch_size, seed, generation, progress)
            kept[number] = tokenizer.batch_decode(made, skip_special_tokens=True)
            rows.append({"num_loops": number, "generation_seconds": watch.seconds})
            seconds += watch.seconds
    else:
        kept[0] = texts
        rows.append({})
    for row, texts in zip(rows, kept.values(), strict=True):
        with _progress("Judge") as progress, Stopwatch(judge_model.device) as watch:
            score = generative_perplexity(texts, judge_model, judge_tokenizer, window, stride, batch_size, progress)
        row |= score.summary()
        row["by_sample"] = {
            "nats": score.nats,
            "tokens": score.num_tokens,
            "entropy": score.entropy,
            "repetition": score.repetition,
        }
        seconds += watch.seconds
    record = {
        "command": "generative-perplexity",
        "protocol": protocol(settings, loaded, model, judge=judge, data=samples, prompts=prompts),
        "seconds": seconds,
        "results": rows,
    }
    _table(
        f"Generative perplexity of {model or samples} under {judge}: {len(texts)} samples, {seconds:.1f} s",
        ["num_loops", "perplexity", "entropy", "repeated 4-grams", "distinct 1-, 2-, 3-grams"],
        [
            [
                row.get("num_loops", ""),
                _pm(row["perplexity"], row["standard_error"]),
                f"{row['entropy']:.3f}",
                f"{row['repetition']:.1%}",
                ", ".join(f"{row[f'distinct_{n}']:.1%}" for n in (1, 2, 3)),
            ]
            for row in rows
        ],
    )
    if output is not None:
        with output_folder(output) as folder:
            write_json(folder / "results.json", record)
            if model is not None:
                lines = [{"num_loops": number, "text": text} for number, texts in kept.items() for text in texts]
                _write_jsonl(folder / "samples.jsonl", lines)
                _plot_samples(folder / "generative_perplexity.png", rows)
        console.print(f"Written to {output}.")
    return record


def lm_eval_tasks(
    model: str,
    tasks: Sequence[str],
    output: str | Path | None = None,
    include_path: str | Path | None = None,
    data_files: dict[str, str] | None = None,
    num_loops: Sequence[int] | None = None,
    num_samples: int = 32,
    num_fewshot: int | None = None,
    limit: int | None = None,
    max_gen_toks: int | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    apply_chat_template: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    generation: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """lm-eval's tasks at several numbers of loops. None on all processes but the first."""
    settings = dict(locals())
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError('lm-eval is missing; `pip install "loopmdm[eval]"`.') from error
    from .lm_eval_model import LoopMDMEvalModel

    config = _start(model, output)
    loops = _loops(num_loops, [config.num_loops])
    for number in loops:
        check_settings([number], num_samples)
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit} documents; it must be at least 1.")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include-path {include_path} is no folder.")
    for name, path in (data_files or {}).items():
        if not Path(path).is_file():
            raise ValueError(f"--data-files {name}={path}: there is no such file.")
    manager, names = _find_tasks(TaskManager, tasks, include_path)
    if data_files is None:
        specs = names
    else:
        source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": dict(data_files)}}
        # A group of them is how lm-eval takes its own tasks with other settings.
        group = {"group": "local", "task": [{"task": name, **source} for name in names]}
        specs = list(manager.load([group])["tasks"].values())
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
        **(generation or {}),
    )
    # What is asked for here wins over what the tasks say.
    asked = (generation or {}) | ({} if max_gen_toks is None else {"max_gen_toks": max_gen_toks})
    lm.generation_plan(asked)  # checks
    runs, rows, seconds = [], [], 0.0
    for number in loops:
        lm.num_loops = number
        with Stopwatch(lm.device) as watch:
            try:
                run = simple_evaluate(
                    model=lm,
                    tasks=specs,
                    task_manager=manager,
                    num_fewshot=num_fewshot,
                    limit=limit,
                    gen_kwargs=dict(asked) or None,
                    apply_chat_template=apply_chat_template,
                    fewshot_as_multiturn=apply_chat_template,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                    bootstrap_iters=1000,
                )
            except KeyError as error:
                raise ValueError(f"The data of {', '.join(names)} has no {error}.") from error
        seconds += watch.seconds
        if run is None:
            continue
        runs.append(run)
        for task, values in run["results"].items():
            for name, value in values.items():
                metric, _, kind = name.partition(",")
                error = values.get(f"{metric}_stderr,{kind}")
                if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                    error = error if isinstance(error, int | float) else None
                    row = {"task": task, "metric": metric, "filter": kind, "num_loops": number}
                    rows.append(row | {"value": value, "standard_error": error})
    if not runs:
        return None
    kept = {str(number): run.pop("samples", {}) for number, run in zip(loops, runs, strict=True)}
    record = {
        "command": "lm-eval",
        "protocol": protocol(settings, lm.model, model),
        "seconds": seconds,
        "results": rows,
        "lm_eval": {str(number): run for number, run in zip(loops, runs, strict=True)},
    }
    for name, path in (data_files or {}).items():
        record["protocol"] |= {f"data_{name}": protocol({}, data=path)["data"]}
    _table(
        f"lm-eval: {', '.join(names)}, {seconds:.1f} s",
        ["task", "metric", "filter", "num_loops", "value"],
        [
            [row["task"], row["metric"], row["filter"], row["num_loops"], _pm(row["value"], row["standard_error"])]
            for row in rows
        ],
    )
    if output is not None:
        with output_folder(output) as folder:
            write_json(folder / "results.json", record)
            lines = [
                {"num_loops": int(number), "task": task, **sample}
                for number, by_task in kept.items()
                for task, members in by_task.items()
                for sample in members
            ]
            _write_jsonl(folder / "samples.jsonl", lines)
            _plot_tasks(folder / "lm_eval.png", rows)
        console.print(f"Written to {output}.")
    return record


def dynamics(
    model: str,
    text: str,
    output: str | Path | None = None,
    num_loops: int | None = None,
    timesteps: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    task: str = "texts",
    text_column: str = "text",
    documents: str = "file",
    dataset: dict[str, Any] | None = None,
    limit: int | None = None,
    window: int | None = None,
    max_windows: int = 16,
    masks_per_text: int = 2,
    attention: bool = True,
    lens: bool = True,
    batch_size: int = 4,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
) -> dict[str, Any]:
    """Attention, states and predictions by loop; see [`~loopmdm.evaluation.measure_dynamics`]."""
    settings = dict(locals())
    config = _start(model, output)
    if num_loops is not None:
        check_num_loops(num_loops)
    if max_windows < 1:
        raise ValueError(f"--windows is {max_windows}; it must be at least 1.")
    longest = config.max_position_embeddings
    length = min(256, longest) if window is None and task != "fill" else window or longest
    if length > longest:
        raise ValueError(f"--window is {length} tokens; the model takes 1 to {longest} positions.")
    tokenizer = _load_tokenizer(model)
    texts = read_texts(text, tokenizer, config, task, text_column, documents, dataset, limit)
    if task == "fill":
        _must_fit(texts, length)
    windows = make_windows(texts, length)
    count = min(max_windows, len(windows))
    windows = [windows[i * len(windows) // count] for i in range(count)]
    loaded = load_model(model, dtype, device)
    with _progress("Dynamics") as progress, Stopwatch(loaded.device) as watch:
        result = measure_dynamics(
            loaded,
            *pad_windows(windows),
            num_loops=num_loops,
            timesteps=timesteps,
            masks_per_text=masks_per_text,
            attention=attention,
            lens=lens,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    rows = result.summary()
    record = {
        "command": "dynamics",
        "protocol": protocol(settings, loaded, model, data=text),
        "seconds": watch.seconds,
        "windows": count,
        "tokens": sum(len(part.input_ids) for part in windows),
        "results": rows,
    }
    names = ("change", "distance", "masked_to_masked", "visible_to_masked", "loss", "accuracy", "changed")
    names = [name for name in names if name in rows[0]]
    _table(
        f"Loops of {model} on {count} texts, mean of t = {', '.join(f'{t:g}' for t in timesteps)}, "
        f"{watch.seconds:.1f} s",
        ["loop", *(name.replace("_", " ") for name in names)],
        [[row["loop"], *("" if row[name] != row[name] else f"{row[name]:.3g}" for name in names)] for row in rows],
    )
    if output is not None:
        with output_folder(output) as folder:
            write_json(folder / "results.json", record)
            result.save(folder / "dynamics.npz")
            result.plot(folder / "dynamics.png")
        console.print(f"Written to {output}.")
    return record


# Models and data


def _start(model: str, output: str | Path | None) -> Any:
    """The configuration of a LoopMDM, after what can be checked without it."""
    logging.disable_progress_bar()  # transformers' own
    if output is not None:
        check_output(output)
    if model.startswith((".", "/", "~")) and not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model} holds no model; there is no config.json in it.")
    config = AutoConfig.from_pretrained(model)
    if config.model_type != "loopmdm":
        raise ValueError(
            f"{model} is a {config.model_type!r} model, not a LoopMDM; `loopmdm convert` makes one of a masked "
            "diffusion model."
        )
    return config


def load_model(model: str, dtype: str = "auto", device: str | None = None) -> LoopMDMForMaskedLM:
    """A LoopMDM in eval mode, on a GPU if there is one and no `device` is named."""
    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return LoopMDMForMaskedLM.from_pretrained(model, dtype=_dtype(dtype)).to(device).eval()


def load_judge(judge: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A causal language model in eval mode, from safetensors files alone, and its tokenizer. Both are checked."""
    logging.disable_progress_bar()
    if judge.startswith((".", "/", "~")) and not (Path(judge) / "config.json").is_file():
        raise ValueError(f"{judge} holds no model; there is no config.json in it.")
    kind = AutoConfig.from_pretrained(judge).model_type
    if kind == "loopmdm":
        raise ValueError(f"The judge {judge} is a LoopMDM; it must be a causal language model, such as GPT-2.")
    tokenizer = _load_tokenizer(judge)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(judge, dtype=_dtype(dtype), use_safetensors=True).to(device).eval()
    check_judge(model, tokenizer)
    return model, tokenizer


def _load_tokenizer(model: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises many kinds, and speaks of backends
        raise ValueError(f"{model} has no tokenizer that loads; put one's files beside the weights.") from error


def _dtype(name: str) -> Any:
    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"--dtype is {name!r}; use float32, bfloat16, float16 or auto.")
    return name


def _find_tasks(manager_class: Any, tasks: Sequence[str], include_path: str | Path | None) -> tuple[Any, list[str]]:
    """lm-eval's task manager and the names of the tasks. Its own tasks, thousands of files, are read if needed."""
    if not tasks:
        raise ValueError("There are no tasks; name some with --tasks.")
    folder = None if include_path is None else str(include_path)
    for with_own in (False, True):
        manager = manager_class(include_path=folder, include_defaults=with_own)
        names, unknown = [], []
        for task in tasks:
            is_file = Path(task).suffix == ".yaml" and Path(task).is_file()
            matches = [task] if is_file else manager.match_tasks([task])
            names += matches
            unknown += [] if matches else [task]
        if not unknown:
            return manager, names
    close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
    hint = f" ({', '.join(close)}?)" if close else ""
    raise ValueError(f"lm-eval knows no task {unknown[0]!r}{hint}; --include-path names a folder with your own.")


def _loops(num_loops: Sequence[int] | None, default: list[int]) -> list[int]:
    loops = default if num_loops is None else list(num_loops)
    for number in loops:
        check_num_loops(number)
    if len(set(loops)) != len(loops):
        raise ValueError(f"--num-loops is {','.join(map(str, loops))}; name each number once.")
    return loops


def _must_fit(texts: Sequence[Any], length: int) -> None:
    for text in texts:
        if len(text.input_ids) > length:
            raise ValueError(
                f"{text.name} has {len(text.input_ids)} tokens, more than the {length} that the model sees at once."
            )


def _prompts(
    path: str | None, tokenizer: Any, config: Any, count: int, length: int, text_column: str
) -> list[list[int]]:
    """Tokens to start samples from: those of a file's lines or objects, over and over, or none."""
    if path is None:
        starts = [[]]
    else:
        starts = [text.input_ids for text in read_texts(path, tokenizer, config, "texts", text_column, "line")]
    longest = max(map(len, starts))
    if longest + length > config.max_position_embeddings:
        raise ValueError(
            f"Prompts of up to {longest} tokens and {length} new ones (--max-new-tokens) are more than the "
            f"{config.max_position_embeddings} positions of the model."
        )
    return [starts[i % len(starts)] for i in range(count)]


def _sample_texts(path: str, text_column: str, documents: str) -> list[str]:
    """The texts of a `.txt` or `.jsonl` file. Token ids are refused: the judge has a tokenizer of its own."""
    from ..data import SEPARATORS, read_documents, read_jsonl

    if not Path(path).is_file() or Path(path).suffix not in (".txt", ".jsonl"):
        raise ValueError(f"--samples {path} is no .txt or .jsonl file.")
    if Path(path).suffix == ".txt":
        if documents not in SEPARATORS:
            raise ValueError(f"--documents is {documents!r}; choose one of {', '.join(SEPARATORS)}.")
        return list(read_documents(path, SEPARATORS[documents]))
    texts = []
    for number, row in enumerate(read_jsonl(path), start=1):
        value = row.get(text_column)
        if isinstance(value, list):
            raise ValueError(
                f"{path}, example {number}: {text_column!r} holds token ids, which mean something else to the judge; "
                "decode them with the tokenizer of the model that made them."
            )
        if not isinstance(value, str):
            raise ValueError(f"{path}, example {number} has no text in {text_column!r}; it has {', '.join(row)}.")
        texts.append(value)
    return texts


def _generate(
    model: LoopMDMForMaskedLM,
    starts: list[list[int]],
    num_loops: int,
    length: int,
    batch_size: int,
    seed: int,
    generation: dict[str, Any],
    progress: Callable[[int, int], None],
) -> list[list[int]]:
    """New tokens of each sample; each has a generator of its own, so that batches make no difference."""
    made = []
    for first in range(0, len(starts), batch_size):
        batch = starts[first : first + batch_size]
        width = max(map(len, batch))
        input_ids, attention_mask = torch.zeros(2, len(batch), width, dtype=torch.long)
        for row, start in enumerate(batch):
            input_ids[row, width - len(start) :] = torch.tensor(start, dtype=torch.long)
            attention_mask[row, width - len(start) :] = 1
        sequences = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=length,
            num_loops=num_loops,
            generator=[seeded_generator(seed, "sample", first + row) for row in range(len(batch))],
            **generation,
        )
        made += sequences[:, width:].tolist()
        progress(len(made), len(starts))
    return made


# Output


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Columns of text on the left, of numbers on the right; those without an entry are left out."""
    table = Table(title=title)
    used = [i for i in range(len(columns)) if any(str(row[i]) for row in rows)]
    for i in used:
        is_number = str(rows[-1][i])[:1] in "-.0123456789"
        table.add_column(columns[i], justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(str(row[i]) for i in used))
    console.print(table)


def _pm(value: float, error: float | None) -> str:
    """A value with its error, both to the second digit of the error."""
    if error is None or not 0 < error < math.inf:
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    import numpy

    numpy.savez_compressed(path, **{name: numpy.asarray(value) for name, value in arrays.items()})


def _write_jsonl(path: Path, lines: list[dict[str, Any]]) -> None:
    import json

    text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def _figure(columns: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 3.8), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, axes


def _plot_likelihood(path: Path, rows: list[dict], means: torch.Tensor, errors: torch.Tensor, edges: list[float]):
    figure, (left, right) = _figure(2)
    loops = [row["num_loops"] for row in rows]
    left.errorbar(
        loops,
        [row["nats_per_token"] for row in rows],
        yerr=[2 * row["standard_error"] for row in rows],
        marker="o",
        capsize=3,
    )
    left.set(xlabel="num_loops", ylabel="NELBO, nats per token (± 2 standard errors)")
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    for i, number in enumerate(loops):
        name = f"{number} loop{'' if number == 1 else 's'}"
        error = (2 * errors[i]).tolist()
        right.errorbar(middles, means[i].tolist(), yerr=error, marker="o", markersize=3, label=name)
    right.set(xlabel="timestep (share of masked tokens)", ylabel="nats per masked token (± 2 standard errors)")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _plot_samples(path: Path, rows: list[dict]) -> None:
    figure, (left, right) = _figure(2)
    loops = [row["num_loops"] for row in rows]
    errors = [2 * row["standard_error"] for row in rows]
    left.errorbar(loops, [row["perplexity"] for row in rows], yerr=errors, marker="o", capsize=3)
    left.set(xlabel="num_loops", ylabel="generative perplexity (± 2 standard errors)")
    right.plot(loops, [row["entropy"] for row in rows], marker="o")
    right.set(xlabel="num_loops", ylabel="unigram entropy, nats per token")
    figure.savefig(path, dpi=110)


def _plot_tasks(path: Path, rows: list[dict]) -> None:
    figure, (axis,) = _figure(1)
    for key in dict.fromkeys((row["task"], row["metric"], row["filter"]) for row in rows):
        members = [row for row in rows if (row["task"], row["metric"], row["filter"]) == key]
        axis.errorbar(
            [row["num_loops"] for row in members],
            [row["value"] for row in members],
            yerr=[2 * (row["standard_error"] or 0) for row in members],
            marker="o",
            capsize=3,
            label=" ".join(part for part in key if part != "none"),
        )
    axis.set(xlabel="num_loops", ylabel="value (± 2 standard errors)")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
