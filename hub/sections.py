# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The sections of a card, made from the records of trainings, conversions and calibrations."""

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..configuration_loopmdm import LoopMDMConfig

# The file in a model's folder with the measurements of `loopmdm calibrate`
BUDGET = "loop_budget.json"
# Names of data sets in the `datasets` library that are loaders of files
_LOADERS = {"arrow", "csv", "json", "pandas", "parquet", "sql", "text", "webdataset", "xml"}
_QUALITIES = {
    "exact": "examples with every token right",
    "tokens": "tokens that are right",
    "agreement": "tokens as with the most loops",
}


def is_hub_data(name: str) -> bool:
    """Whether the data of a run are a data set on the Hub, and not files."""
    is_path = name.startswith((".", "/", "~")) or Path(name).exists()
    is_path = is_path or Path(name).suffix in (".txt", ".jsonl", ".parquet")
    return not is_path and name not in _LOADERS


def recorded(data: str | Sequence[str] | None) -> str | list[str] | None:
    """Names of data for a record: those of folders here begin with `./`, so that none is taken for an id elsewhere."""
    if data is None or isinstance(data, str):
        is_relative = data is not None and Path(data).is_dir() and not data.startswith((".", "/", "~"))
        return f"./{data}" if is_relative else data
    return [str(recorded(name)) for name in data]


def data_names(data: str | Sequence[str]) -> str:
    """The names of data in a card: ids on the Hub as they are, and files without their folders."""
    shown = [f"`{name if is_hub_data(name) else Path(name).name}`" for name in _listed(data)]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def _listed(data: str | Sequence[str]) -> list[str]:
    return [data] if isinstance(data, str) else list(data)


def measured(value: float, error: float | None) -> str:
    """A value with its error, both rounded to the second significant digit of the error."""
    if error is None or not 0 < error < math.inf:
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def paragraph(text: str, indent: str = "") -> str:
    """Markdown wrapped into lines of a readable length."""
    wrapper = textwrap.TextWrapper(110, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(text) + "\n"


def _section(title: str, items: Sequence[str]) -> str:
    """Markdown of a heading and a list."""
    return "\n".join([f"## {title}\n", *(paragraph(f"- {item}", "  ").rstrip() for item in items), ""])


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def what_loops_buy(
    records: dict[str, dict[str, Any]], config: LoopMDMConfig, name: str
) -> tuple[str, list[EvalResult]]:
    """The section on loops, in Markdown, and the results for the metadata."""
    parts: list[str] = []
    results: list[EvalResult] = []
    for part, found in (
        _of_training(records["training"], config),
        _of_conversion(records["conversion"]),
        _of_budget(records["budget"]),
    ):
        parts += part
        results += found
    if not parts:
        parts = [
            "Not measured yet. This measures it on your own text:\n",
            f"```bash\nloopmdm eval likelihood {name} --text TEXT.txt --num-loops 1,2,4\n```\n",
        ]
    return "\n".join(["## What loops buy\n", *parts]), results


def _of_training(record: dict[str, Any], config: LoopMDMConfig) -> tuple[list[str], list[EvalResult]]:
    evaluation, run = record.get("evaluation") or {}, record.get("run") or {}
    loops = sorted(int(match[1]) for match in map(re.compile(r"eval_nelbo_(\d+)$").match, evaluation) if match)
    if not loops:
        return [], []
    data = run["eval_data"]
    scores = {n: (evaluation[f"eval_nelbo_{n}"], evaluation[f"eval_nelbo_{n}_standard_error"]) for n in loops}
    rows = [[n, config.num_executed_layers(n), measured(*scores[n])] for n in loops]
    text = [
        paragraph(
            "The NELBO (an upper bound on the negative log-likelihood, in nats per token; lower is better) on at most "
            f"{run['eval_sequences']} rows of {data_names(data)}, on which training evaluated. Standard errors are "
            f"over {run['eval_samples']} masks per row, not over training runs."
        ),
        _table(["`num_loops`", "layers executed", "NELBO"], rows),
        _compare(scores),
    ]
    return text, _nelbo_results(data, scores)


def _compare(scores: dict[int, tuple[float, float]]) -> str:
    """A sentence that compares the best number of loops with one, as far as the errors allow it."""
    best = min(scores, key=lambda n: scores[n][0])
    if 1 not in scores or len(scores) == 1:
        return ""
    (one, one_error), (lowest, lowest_error) = scores[1], scores[best]
    error = math.hypot(one_error, lowest_error)
    if best == 1:
        return "More than one loop did not lower it here.\n"
    if one - lowest <= 2 * error:
        return f"It is lowest at {best} loops, but within the errors it does not differ from that of one loop.\n"
    return f"It is lowest at {best} loops: {measured(one - lowest, error)} below that of one loop.\n"


def _nelbo_results(data: str | Sequence[str], scores: dict[int, tuple[float, float]]) -> list[EvalResult]:
    return [
        _result(data, "nelbo", value, f"NELBO at num_loops={n}, nats per token", num_loops=n, standard_error=error)
        for n, (value, error) in scores.items()
    ]


def _of_conversion(record: dict[str, Any]) -> tuple[list[str], list[EvalResult]]:
    calibration = record.get("calibration")
    if not calibration:
        return [], []
    plain, best = calibration["without_loops"], calibration["best"]
    looped = next(one for one in calibration["windows"] if [one["loop_start"], one["loop_end"]] == best)
    loops, data = calibration["num_loops"], calibration["text"]
    scores = {1: (plain["nelbo"], plain["standard_error"]), loops: (looped["nelbo"], looped["standard_error"])}
    text = [
        paragraph(
            f"The NELBO (an upper bound on the negative log-likelihood, in nats per token; lower is better) on "
            f"{calibration['sequences']} rows of {calibration['length']} tokens of {data_names(data)}, by which the "
            f"looped layers were chosen from {len(calibration['windows'])} candidates:"
        ),
        _table(["`num_loops`", "NELBO"], [[n, measured(*score)] for n, score in scores.items()]),
        f"Untrained, {loops} loops change it by {measured(looped['change'], looped['change_standard_error'])}.\n",
    ]
    return text, _nelbo_results(data, scores)


def _of_budget(record: dict[str, Any]) -> tuple[list[str], list[EvalResult]]:
    if not record:
        return [], []
    settings, data = record["settings"], record["data"]
    quality, half = settings["quality"], settings["examples"] // 2  # the examples that check the choice

    def row(where: str, result: dict[str, Any]) -> list[Any]:
        score = measured(100 * result["quality"], 100 * result["standard_error"])
        mean = result["loops"] / result["forward_passes"]
        return [f"{where}: {_setting(result['arguments'])}", score, f"{mean:.2f}", f"{result['flops'] / 1e9:,.3f}"]

    first, second = "the choice", "the check"
    plain = [one for one in record["results"] if set(one["arguments"]) == {"num_loops"}]
    plain.sort(key=lambda one: one["arguments"]["num_loops"])
    rows = [row(first, one) for one in plain]
    rows += [row(second, record["check_full"]), row(second, record["check"])]
    others = {key: value for key, value in settings.items() if key not in ("quality", "examples", "max_loss", "seed")}
    with_ = "".join(f", `{key}={value}`" for key, value in others.items())
    text = [
        paragraph(
            f"Measured with `generate` on {data_names(data)}{with_}: {_QUALITIES[quality]}, in percent. Half of "
            f"{settings['examples']} examples decided on the setting, and the other half checked it; standard errors "
            "are over examples."
        ),
        _table(["examples, setting", "quality, %", "loops per step", "GFLOPs per example"], rows),
        paragraph(
            f"The defaults of `generate` are {_setting(record['best']['arguments'])}: the cheapest of "
            f"{len(record['results'])} settings that lost at most {100 * settings['max_loss']:g} percentage points "
            "against the most loops, on both halves."
        ),
    ]
    if quality == "agreement":  # it does not tell whether answers are right
        return text, []
    # The chosen setting looks better than it is on the examples that decided, so its result is from the others.
    kept = [(one, settings["examples"] - half) for one in plain if one["arguments"] != record["best"]["arguments"]]
    results = [
        _result(
            data,
            "accuracy",
            100 * one["quality"],
            f"{_QUALITIES[quality]}, % ({_setting(one['arguments']).replace('`', '')})",
            **one["arguments"],
            standard_error=100 * one["standard_error"],
            examples=count,
        )
        for one, count in [*kept, (record["check"], half)]
    ]
    return text, results


def _setting(arguments: dict[str, Any]) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in arguments.items())


def _result(data: str | Sequence[str], metric: str, value: float, name: str, **arguments: Any) -> EvalResult:
    shown = data_names(data).replace("`", "")
    return EvalResult(
        task_type="text-generation",
        dataset_type=shown if all(map(is_hub_data, _listed(data))) else "file",
        dataset_name=shown,
        metric_type=metric,
        metric_value=value,
        metric_name=name,
        metric_args={key: one for key, one in arguments.items() if one is not None and one == one},  # NaN differs
    )


def how_it_was_made(
    records: dict[str, dict[str, Any]], config: LoopMDMConfig, base: str | list[str] | None, has_source_card: bool
) -> str:
    """The section on the origin of a model, in Markdown; empty if nothing is known."""
    items = []
    conversion, training = records["conversion"], records["training"]
    if conversion:
        items.append(
            f"Converted from {_origin(conversion['source'], base, has_source_card)} (format {conversion['family']}, "
            f"{conversion['dtype']}). The looped layers were chosen {conversion['loop']['chosen']}. `conversion.json` "
            "has the mapping of all tensors."
        )
        items += [
            f"At `num_loops=1` its logits were compared with those of {found['against']}: {_difference(found)}"
            for name, found in conversion.items()
            if name.startswith("verification")
        ]
    if training:
        run = training["run"]
        kind = "An adapter was trained" if run["lora"] else "Trained"
        start = "from scratch" if run["model"] is None else f"from {_origin(run['model'], base)}"
        what = "answers to prompts" if run["task"] == "answers" else "texts"
        items.append(
            f"{kind} {start} on {data_names(run['data'])} ({what}): {training['steps']:,} steps, "
            f"{training['training_flops']:.3g} FLOPs, with up to {most_loops(records, config)} loops (schedule "
            f"`{run['loops'].get('schedule', 'uniform')}`). `training.json` has all settings and the log."
        )
    return _section("How it was made", items) if items else ""


def _origin(name: str, base: str | list[str] | None, has_card: bool = False) -> str:
    """The origin of a model: a link, or the name of a local folder and the models that it comes from."""
    card = ", whose card is [README.source.md](README.source.md)" if has_card else ""
    bases = [base] if isinstance(base, str) else base or []
    links = {one: f"[{one}](https://huggingface.co/{one})" for one in bases}
    if name in links:
        return links[name] + card
    made = f" (made from {', '.join(links.values())})" if links else ""
    return f"`{Path(name).name}`, a local folder{made}{card}"


def _difference(found: dict[str, Any]) -> str:
    """What a comparison of logits has found."""
    return (
        f"the largest difference is {found['max_difference']:.2g}, in logits up to {found['max_logit']:.1f} "
        f"({found['dtype']})."
    )


def most_loops(records: dict[str, dict[str, Any]], config: LoopMDMConfig) -> int:
    """S_max of the training."""
    return records["training"].get("run", {}).get("loops", {}).get("max_loops") or config.max_train_loops


def limits(records: dict[str, dict[str, Any]], config: LoopMDMConfig) -> str:
    """The section on limits, in Markdown, from the configuration and the records."""
    training, conversion = records["training"], records["conversion"]
    lines = [f"It takes at most {config.max_position_embeddings:,} tokens, including those to be generated."]
    if training:
        lines.append(f"It was trained with at most {most_loops(records, config)} loops. More loops run, but untested.")
    elif conversion:
        lines.append(
            "It has never been trained with loops: it is an initialisation, to be trained before loops can help."
        )
    if not config.attention_block_size:
        lines.append("Caches (`cache_implementation`) are approximate, as its attention sees the whole sequence.")
    if records["budget"] or (training.get("evaluation") or {}):
        lines.append("The figures above hold for this model on the data named there, not for other data or seeds.")
    lines.append("Nothing else was measured, neither the truth of its texts nor its biases.")
    return _section("Limits", lines)


def unrolled(record: dict[str, Any], config: LoopMDMConfig, has_source_card: bool) -> list[str]:
    """The sections of the card of an exported model, whose loops have become layers, in Markdown."""
    items = [
        f"Exported from {_origin(record['source'], None, has_source_card)}: {record['num_loops']} loops as layers, "
        f"{record['dtype']}. `export.json` says which layer is which (`layers_from`)."
    ]
    items += [
        f"Its logits were compared with those of the looped model at {record['num_loops']} loops through "
        f"{found['against']}: {_difference(found)}"
        for found in record["verification"]
    ]
    rules = [
        f"It takes at most {config.max_position_embeddings:,} tokens, including those to be generated.",
        f"Its mask token is {config.mask_token_id}, which the looped model never writes; engines may.",
    ]
    if config.shift_logits:
        rules.append("The state of position i - 1 predicts token i: the engine has to shift the logits.")
    if config.attention_block_size:
        rules.append(f"Attention is block-causal, in blocks of {config.attention_block_size} positions.")
    else:
        rules.append("Attention is over the whole sequence: the engine must not apply a causal mask.")
    return [
        paragraph(
            f"A masked diffusion language model in the format {record['format']}, with {record['parameters']:,} "
            f"parameters in {record['layers']} layers. It computes the same as a looped model "
            f"([LoopMDM](https://arxiv.org/abs/2605.26106)) with {record['num_loops']} loops, for engines without "
            "loops. The looped layers are stored once for each loop."
        ),
        _section("How it was made", items),
        _section("Limits", rules),
    ]
