# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Tables and plots of the studies, from the JSON files that run.py wrote.

    python benchmarks/claims/report.py --results docs/results/claims --study sudoku6 --plots docs/results

Prints tables in Markdown, and writes `REPORT.json` beside the results, `PLOTS/STUDY.png` with one panel for each
claim, `PLOTS/STUDY-grid.png` where a grid was measured, and with `--summary` `PLOTS/summary.png`. An error bar is the
standard deviation over seeds where there are several, and otherwise the standard error over held-out rows.
"""

import argparse
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arms import ARMS

from loopmdm.evaluation.protocol import write_json

LOOPED = ("looped", "late")
MAIN = ("same_size", "deeper", *LOOPED)
COLORS = {"same_size": "tab:gray", "deeper": "tab:brown", "looped": "tab:blue", "late": "tab:red"}
ABOUT = {
    "same_size": "same size, no loops",
    "deeper": "deeper, no loops",
    "looped": "LoopMDM, the paper's S ~ Uniform{1..6}",
    "late": "LoopMDM, late loops",
}


def read_results(folder: Path) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """The records of every arm, by seed, and its grid averaged over seeds, in the order of `ARMS`."""
    records, grids = {}, {}
    for name in ARMS:
        paths = sorted(folder.glob(f"{name}-*.json"))
        found = [json.loads(path.read_text()) for path in paths if path.stem.removeprefix(f"{name}-").isdigit()]
        if found:
            records[name] = sorted(found, key=lambda record: record["seed"])
        measured = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-[0-9]*-grid.json"))]
        if measured:
            # The settings that all seeds have
            keyed = [{setting_name(entry): entry for entry in grid["grid"]} for grid in measured]
            common = [key for key in keyed[0] if all(key in table for table in keyed)]
            numbers = ("solved", "forward_passes", "loops", "flops")
            grids[name] = {
                "seeds": len(measured),
                "grid": [
                    {**keyed[0][key], **{n: sum(table[key][n] for table in keyed) / len(keyed) for n in numbers}}
                    for key in common
                ],
            }
    if not records:
        raise SystemExit(f"{folder} holds no results; make some with benchmarks/claims/run.py.")
    return records, grids


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def held_out_names(records: dict[str, list[dict]]) -> list[str]:
    return list(next(iter(records.values()))[0]["likelihood"])


def nelbo_by_loops(runs: list[dict], held_out: str) -> dict[int, tuple[float, float]]:
    """NELBO and error bar by number of loops."""
    table = {}
    for loops, entry in runs[0]["likelihood"][held_out].items():
        mean, deviation = mean_and_deviation([run["likelihood"][held_out][loops]["nelbo"] for run in runs])
        table[int(loops)] = mean, entry["error"] if deviation is None else deviation
    return table


def solved_by_loops(runs: list[dict]) -> dict[int, tuple[float, float]]:
    """Share of rows solved in one step, and error bar, by number of loops."""
    table = {}
    for loops in runs[0]["one_step"]["solved"]:
        values = [run["one_step"]["solved"][loops] for run in runs]
        mean, deviation = mean_and_deviation(values)
        table[int(loops)] = mean, math.sqrt(mean * (1 - mean) / 1000) if deviation is None else deviation
    return table


def training_loops(run: dict) -> int:
    return run["settings"]["max_loops"]


def crossing(points: list[tuple[float, float]], level: float) -> float | None:
    """
    The FLOPs at which a falling curve of (FLOPs, value) first reaches `level`, linear in both logarithms; None where
    it does not, and the first FLOPs, a bound, where it starts there.
    """
    if points and points[0][1] <= level:
        return points[0][0]
    for (left, high), (right, low) in itertools.pairwise(points):
        if low <= level < high:
            return left * (right / left) ** (math.log(high / level) / math.log(high / low))
    return None


def flops_within(records: dict[str, list[dict]]) -> list[dict[str, Any]]:
    """
    Claim 1 within one run, by arm and seed: the share of the same-size arm's training FLOPs after which a looped arm
    of the same budget has its final NELBO at S_max loops, None where it never has. Pessimistic: the learning rate is
    still high at the crossing.
    """
    found = []
    same = {run["seed"]: run for run in records.get("same_size", [])}
    for name, runs in records.items():
        for run in runs:
            seed, loops = run["seed"], str(training_loops(run))
            if loops == "1" or seed not in same or run["settings"]["budget"] < 1:
                continue
            level = same[seed]["marks"][-1]["likelihood"]["1"]["nelbo"]
            flops = crossing([(mark["flops"], mark["likelihood"][loops]["nelbo"]) for mark in run["marks"]], level)
            share = None if flops is None else flops / same[seed]["training"]["training_flops"]
            found.append({"arm": name, "seed": seed, "share": share})
    return found


def final_nelbo(run: dict) -> float:
    return next(iter(run["likelihood"].values()))[str(training_loops(run))]["nelbo"]


def final_unsolved(run: dict) -> float:
    """Share of rows that one step at S_max loops leaves unsolved."""
    return 1 - run["one_step"]["solved"][str(training_loops(run))]


def quantities(runs: list[dict]) -> dict[str, Callable[[dict], float]]:
    found = {"NELBO": final_nelbo}
    return found | ({"one-step accuracy": final_unsolved} if "one_step" in runs[0] else {})


def budget_of(run: dict) -> float:
    """Training TFLOP that the run was given."""
    return run["settings"]["tflop"] * run["settings"]["budget"]


def by_budget(runs: list[dict], value: Callable[[dict], float]) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """By main arm and seed, (training TFLOP, value) of every run with a schedule of its own, from the smallest."""
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for base in MAIN:
        for run in runs:
            if is_of(run["arm"], base):
                curves.setdefault(base, {}).setdefault(run["seed"], []).append((budget_of(run), value(run)))
    return {base: {seed: sorted(points) for seed, points in sorted(seeds.items())} for base, seeds in curves.items()}


def fewer_flops(runs: list[dict]) -> list[dict[str, Any]]:
    """
    Claim 1 by whole runs: how many times fewer training FLOPs a looped arm needs, at S_max loops, for what the
    same-size arm with the same seed has at the end of its budget. By budget, arm and quantity: the ratio of each seed,
    interpolated between the budgets that were run, None where the largest is not enough, and whether it is a bound
    from below, because the smallest is.
    """
    found = []
    for quantity, value in quantities(runs).items():
        curves = by_budget(runs, value)
        for flops in sorted({point[0] for points in curves.get("same_size", {}).values() for point in points}):
            for base in LOOPED:
                ratios = {}
                for seed, points in curves.get("same_size", {}).items():
                    curve = curves.get(base, {}).get(seed)
                    if not curve or flops not in dict(points):
                        continue
                    at = crossing(curve, dict(points)[flops])
                    ratio = None if at is None else flops / at
                    ratios[seed] = {"ratio": ratio, "is_bound": at == curve[0][0]}
                if ratios:
                    found.append({"quantity": quantity, "tflop": flops, "arm": base, "seeds": ratios})
    return found


def is_of(name: str, base: str) -> bool:
    """Whether an arm is `base` itself, or `base` on a part of the FLOPs."""
    return name == base or (name.startswith(f"{base}_") and ARMS[name].budget < 1)


def frontier(grids: dict[str, dict]) -> dict[str, list[dict]]:
    """Of every arm, the settings that no other beats at as few inference FLOPs, from the cheapest on."""
    result = {}
    for name, grid in grids.items():
        best, kept = -1.0, []
        for entry in sorted(grid["grid"], key=lambda entry: (entry["flops"], -entry["solved"])):
            if entry["solved"] > best:
                best = entry["solved"]
                kept.append(entry)
        result[name] = kept
    return result


def best_per_budget(grids: dict[str, dict], budgets: list[float]) -> list[dict[str, Any]]:
    """For each budget of inference FLOPs the best setting of every arm that fits."""
    rows = []
    for budget in budgets:
        row: dict[str, Any] = {"flops": budget}
        for name, grid in grids.items():
            fitting = [entry for entry in grid["grid"] if entry["flops"] <= budget * 1.001]
            row[name] = max(fitting, key=lambda entry: (entry["solved"], -entry["flops"])) if fitting else None
        rows.append(row)
    return rows


def rule_name(entry: dict) -> str:
    for rule, name in (("confidence_threshold", "threshold"), ("entropy_bound", "entropy bound")):
        if rule in entry:
            return f"{name} {entry[rule]:g}"
    return "confidence"


def setting_name(entry: dict) -> str:
    steps = entry["max_denoising_steps"]
    at_most = "" if rule_name(entry) == "confidence" else "up to "
    rule = f", {rule_name(entry)}" if steps > 1 else ""
    loops = entry["num_loops"]
    loops = f"{loops[0]} loops, then 1," if isinstance(loops, list) else f"{loops} loop{'s' * (loops > 1)}"
    return f"{loops} x {at_most}{steps} step{'s' * (steps > 1)}{rule}"


def tables(records: dict[str, list[dict]], grids: dict[str, dict]) -> str:
    """Everything in Markdown."""
    parts = [likelihood_table(records, held_out) for held_out in held_out_names(records)]
    if "one_step" in next(iter(records.values()))[0]:
        parts.append(answers_table(records))
    parts.append(within_table(records))
    parts.append(timestep_table(records))
    for name in LOOPED:
        if name in records:
            parts.append(adaptive_table(name, records[name]) if "one_step" in records[name][0] else "")
            parts.append(dynamics_table(name, records[name]))
    parts.append(grid_table(grids))
    return "\n".join(part for part in parts if part)


COLUMNS = (1, 2, 3, 4, 6, 8, 12)


def likelihood_table(records: dict[str, list[dict]], held_out: str) -> str:
    lines = [f"NELBO on {held_out}, nats per {next(iter(records.values()))[0]['settings']['unit']}", ""]
    lines += _header(["arm", "seeds", "steps", "TFLOP", *(f"{loops} loops" for loops in COLUMNS)])
    for name, runs in records.items():
        table = nelbo_by_loops(runs, held_out)
        cells = [f"{table[n][0]:.4f} ± {table[n][1]:.4f}" if n in table else "" for n in COLUMNS]
        steps = round(sum(run["training"]["steps"] for run in runs) / len(runs))
        flops = sum(run["training"]["training_flops"] for run in runs) / len(runs) / 1e12
        lines.append(_row([name, len(runs), steps, f"{flops:.2f}", *cells]))
    return _joined(lines)


def answers_table(records: dict[str, list[dict]]) -> str:
    lines = ["Solved in one step, %; and in 2 and 4 steps at S_max loops", ""]
    lines += _header(["arm", "seeds", *(f"{loops} loops" for loops in COLUMNS), "2 steps", "4 steps"])
    for name, runs in records.items():
        table = solved_by_loops(runs)
        cells = [f"{100 * table[n][0]:.1f} ± {100 * table[n][1]:.1f}" if n in table else "" for n in COLUMNS]
        for i in range(2):
            mean, deviation = mean_and_deviation([run["few_steps"][i]["solved"] for run in runs])
            cells.append(f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}"))
        lines.append(_row([name, len(runs), *cells]))
    return _joined(lines)


def within_table(records: dict[str, list[dict]]) -> str:
    within = flops_within(records)
    if not within:
        return ""
    lines = ["Share of the FLOPs after which an arm has the same-size arm's final NELBO, within one run", ""]
    seeds = sorted({entry["seed"] for entry in within})
    lines += _header(["arm", *(f"seed {seed}" for seed in seeds)])
    shares = {(entry["arm"], entry["seed"]): entry["share"] for entry in within}
    for name in dict.fromkeys(entry["arm"] for entry in within):
        row = [shares.get((name, seed), math.nan) for seed in seeds]
        lines.append(_row([name, *("never" if x is None else "" if math.isnan(x) else f"{x:.2f}" for x in row)]))
    return _joined(lines)


def timestep_table(records: dict[str, list[dict]]) -> str:
    held_out = held_out_names(records)[0]
    lines = ["-log p of a masked token by the share masked", ""]
    lines += _header(["share masked", *(f"{10 * b}-{10 * b + 10} %" for b in range(10))])
    for name in _main(records):
        loops = training_loops(records[name][0])
        lines.append(_row([name, *(f"{value:.4f}" for value in by_share(records[name], held_out, loops))]))
    return _joined(lines)


def adaptive_table(name: str, runs: list[dict]) -> str:
    lines = [f"Adaptive loops of {name}, one step, up to twice S_max", ""]
    lines += _header(["tolerance", "mean loops", "solved, %"])
    for i, entry in enumerate(runs[0]["one_step"]["adaptive"]):
        loops, _ = mean_and_deviation([run["one_step"]["adaptive"][i]["loops"] for run in runs])
        solved, _ = mean_and_deviation([run["one_step"]["adaptive"][i]["solved"] for run in runs])
        lines.append(_row([f"{entry['tolerance']:g}", f"{loops:.2f}", f"{100 * solved:.1f}"]))
    return _joined(lines)


def dynamics_table(name: str, runs: list[dict]) -> str:
    """By loop, at every share masked: attention, and the logit lens."""
    shares = runs[0]["dynamics"]["shares"]
    lines = []
    for title, quantity in (
        ("attention in mid from masked to masked positions", "masked_to_masked"),
        ("change of the state", "change"),
        ("-log p of a masked token if mid stops here", "loss"),
        ("predictions that become right, %", "corrected"),
        ("predictions that cease to be right, %", "spoiled"),
    ):
        lines += [f"{name} by loop: {title}", ""]
        rows = [mean_table([run["dynamics"][quantity][i] for run in runs]) for i in range(len(shares))]
        lines += _header(["share masked", *range(1, len(rows[0]) + 1)])
        scale, digits = (100, 2) if title.endswith("%") else (1, 4 if quantity == "loss" else 3)
        for share, row in zip(shares, rows, strict=True):
            cells = ["" if value is None else f"{scale * value:.{digits}f}" for value in row]
            lines.append(_row([f"{100 * share:.0f} %", *cells]))
        if quantity == "masked_to_masked":
            uniform = ", ".join(f"{value:.3f}" for value in runs[0]["dynamics"]["uniform"])
            lines += ["", f"(uniform attention would give {uniform})"]
        lines.append("")
    return _joined(lines)


def grid_table(grids: dict[str, dict]) -> str:
    if not grids:
        return ""
    lines = ["Best setting within a budget of inference FLOPs", ""]
    names = list(grids)
    lines += _header(["MFLOP a row", *(f"{name} ({grids[name]['seeds']} seeds)" for name in names)])
    for row in best_per_budget(grids, budgets_of(grids)):
        cells = [f"{100 * row[n]['solved']:.1f}: {setting_name(row[n])}" if row[n] else "" for n in names]
        lines.append(_row([f"{row['flops'] / 1e6:.0f}", *cells]))
    return _joined(lines)


def mean_table(rows: list[list[float | None]]) -> list[float | None]:
    """The mean of the rows, entry by entry; None (no number) stays none."""
    return [None if None in values else sum(values) / len(values) for values in zip(*rows, strict=True)]


def _joined(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"


def scaling_tables(runs: list[dict]) -> str:
    lines = []
    for quantity, value in quantities(runs).items():
        curves = by_budget(runs, value)
        budgets = sorted({flops for seeds in curves.values() for points in seeds.values() for flops, _ in points})
        lines += [f"{quantity} by training budget (TFLOP)", ""]
        lines += _header(["arm", *(f"{flops:g}" for flops in budgets)])
        for base, seeds in curves.items():
            cells = []
            for flops in budgets:
                values = [dict(points)[flops] for points in seeds.values() if flops in dict(points)]
                cells.append(_value_cell(quantity, values) if values else "")
            lines.append(_row([base, *cells]))
        lines.append("")
    found = fewer_flops(runs)
    if found:
        lines += ["Times fewer training FLOPs than the same-size arm, by seed", ""]
        seeds = sorted({seed for entry in found for seed in entry["seeds"]})
        lines += _header(["its", "after TFLOP", "arm", *(f"seed {seed}" for seed in seeds)])
        for entry in found:
            cells = []
            for seed in seeds:
                one = entry["seeds"].get(seed)
                if one is None or one["ratio"] is None:
                    cells.append("not reached" if one else "")
                else:
                    cells.append(f"{'>= ' * one['is_bound']}{one['ratio']:.2f}")
            lines.append(_row([entry["quantity"], f"{entry['tflop']:g}", entry["arm"], *cells]))
        lines.append("")
    return "\n".join(lines)


def _value_cell(quantity: str, values: list[float]) -> str:
    mean, deviation = mean_and_deviation(values)
    if quantity == "NELBO":
        return f"{mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")
    return f"{100 - 100 * mean:.1f} %" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def budgets_of(grids: dict[str, dict]) -> list[float]:
    """1 to 6 times the cheapest setting of the arms: beyond, little is left to gain."""
    least = min(entry["flops"] for grid in grids.values() for entry in grid["grid"])
    most = max(entry["flops"] for grid in grids.values() for entry in grid["grid"])
    return [least * factor for factor in (1, 1.5, 1.75, 2, 2.25, 2.5, 3, 4, 6) if least * factor <= most]


def _header(cells: list) -> list[str]:
    return [_row(cells), _row(["---", *["---:"] * (len(cells) - 1)])]


def _row(cells: list) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def by_share(runs: list[dict], held_out: str, loops: int) -> list[float]:
    """-log p of a masked token in each tenth of the share masked, averaged over seeds."""
    tables = [run["likelihood"][held_out][str(loops)]["by_share"] for run in runs]
    return [value for value in mean_table(tables) if value is not None]


def attention_by_loop(runs: list[dict]) -> list[dict[str, Any]]:
    """By share masked, the mean over seeds of mid's attention from masked to masked positions, by loop."""
    shared = runs[0]["dynamics"]
    masses = zip(*(run["dynamics"]["masked_to_masked"] for run in runs), strict=True)
    return [
        {"share": share, "uniform": uniform, "mass": mean_table(mass)}
        for share, uniform, mass in zip(shared["shares"], shared["uniform"], masses, strict=True)
    ]


# Plots


def plot_claims(records: dict[str, list[dict]], path: Path) -> None:
    """One panel for each claim."""
    from matplotlib.figure import Figure

    has_answers = "one_step" in next(iter(records.values()))[0]
    panels = [_plot_training, _plot_nelbo_by_loops, _plot_by_share, _plot_attention]
    if has_answers:
        panels = [_plot_training, _plot_nelbo_by_loops, _plot_solved_by_loops]
        panels += [_plot_adaptive, _plot_by_share, _plot_attention]
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(13, 3.8 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).flatten()
    for panel, axis in zip(panels, axes, strict=False):
        panel(records, axis)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    _save(figure, path)


def _legend(axis, fontsize: str = "small") -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=fontsize)


def _main(records: dict[str, list[dict]]) -> list[str]:
    return [name for name in MAIN if name in records]


def _plot_training(records, axis) -> None:
    for name in _main(records):
        runs = records[name]
        loops = str(training_loops(runs[0]))
        for i, run in enumerate(runs):
            flops = [mark["flops"] / 1e12 for mark in run["marks"]]
            values = [mark["likelihood"][loops]["nelbo"] for mark in run["marks"]]
            axis.plot(flops, values, color=COLORS[name], marker=".", label=ABOUT[name] if i == 0 else None)
    axis.set_xlabel("training TFLOP")
    axis.set_ylabel(f"NELBO, nats per {next(iter(records.values()))[0]['settings']['unit']}")
    axis.set_yscale("log")
    axis.set_title("Training")
    _legend(axis)


def _plot_nelbo_by_loops(records, axis) -> None:
    held_out = held_out_names(records)[0]
    for name in records:
        if ARMS[name].budget < 1:
            continue
        table = nelbo_by_loops(records[name], held_out)
        means, errors = zip(*table.values(), strict=True)
        if len(table) == 1:
            axis.axhline(means[0], color=COLORS.get(name), linestyle="--", label=ABOUT.get(name, name))
        else:
            style = {"color": COLORS[name], "linewidth": 2.5} if name in COLORS else {"alpha": 0.7}
            axis.errorbar(list(table), means, errors, marker=".", label=ABOUT.get(name, name), **style)
    axis.set_yscale("log")
    axis.set_xlabel("num_loops")
    axis.set_ylabel("NELBO")
    axis.set_title("Likelihood by loops")
    _legend(axis, fontsize="x-small")


def _plot_solved_by_loops(records, axis) -> None:
    for name in records:
        if ARMS[name].budget < 1:
            continue
        table = solved_by_loops(records[name])
        means = [100 * mean for mean, _ in table.values()]
        if len(table) == 1:
            axis.axhline(means[0], color=COLORS.get(name), linestyle="--", label=ABOUT.get(name, name))
        else:
            style = {"color": COLORS[name], "linewidth": 2.5} if name in COLORS else {"alpha": 0.7}
            errors = [100 * error for _, error in table.values()]
            axis.errorbar(list(table), means, errors if name in MAIN else None, label=ABOUT.get(name, name), **style)
    axis.set_xlabel("num_loops")
    axis.set_ylabel("solved in one step, %")
    axis.set_title("Answers by loops")


def _plot_adaptive(records, axis) -> None:
    for name in _main(records):
        runs = records[name]
        if training_loops(runs[0]) == 1:
            continue
        table = solved_by_loops(runs)
        axis.plot(list(table), [100 * mean for mean, _ in table.values()], color=COLORS[name], label="fixed num_loops")
        entries = list(zip(*(run["one_step"]["adaptive"] for run in runs), strict=True))
        loops = [sum(entry["loops"] for entry in group) / len(group) for group in entries]
        solved = [100 * sum(entry["solved"] for entry in group) / len(group) for group in entries]
        axis.plot(loops, solved, color=COLORS[name], marker="o", linestyle=":", label="loop_tolerance")
    axis.set_xlabel("mean loops")
    axis.set_ylabel("solved in one step, %")
    axis.set_title("Adaptive loops")
    _legend(axis)


def _plot_by_share(records, axis) -> None:
    held_out = held_out_names(records)[0]
    for name in _main(records):
        values = by_share(records[name], held_out, training_loops(records[name][0]))
        axis.plot([b / len(values) + 0.5 / len(values) for b in range(len(values))], values, color=COLORS[name])
        axis.lines[-1].set_label(ABOUT[name])
    axis.set_yscale("log")
    axis.set_xlabel("share masked (timestep)")
    axis.set_ylabel("-log p of a masked token")
    axis.set_title("Gain by timestep")
    _legend(axis)


def _plot_attention(records, axis) -> None:
    if "looped" in records:
        for entry in attention_by_loop(records["looped"]):
            loops = range(1, len(entry["mass"]) + 1)
            (line,) = axis.plot(loops, entry["mass"], marker=".", label=f"{100 * entry['share']:.0f} % masked")
            axis.axhline(entry["uniform"], color=line.get_color(), linestyle=":", linewidth=1)
        axis.axvline(training_loops(records["looped"][0]), color="black", linewidth=0.5)
    axis.set_xlabel("loop")
    axis.set_ylabel("attention, masked to masked")
    axis.set_title("Attention by loop (dotted: uniform)")
    _legend(axis)


def plot_grid(grids: dict[str, dict], path: Path) -> None:
    """Solve rate against inference FLOPs, every setting and the frontier of every arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    _plot_frontiers(grids, figure.subplots(), True)
    _save(figure, path)


def _plot_frontiers(grids, axis, with_settings: bool) -> None:
    def unsolved(entries) -> list[float]:
        return [max(100 * (1 - entry["solved"]), 0.05) for entry in entries]  # none of 1,000 is no zero

    for i, (name, kept) in enumerate(frontier(grids).items()):
        color = COLORS.get(name, f"C{i + 1}")
        if with_settings:
            entries = grids[name]["grid"]
            axis.scatter([entry["flops"] / 1e6 for entry in entries], unsolved(entries), color=color, s=8, alpha=0.4)
        flops, left = [entry["flops"] / 1e6 for entry in kept], unsolved(kept)
        axis.step([*flops, 1e9], [*left, left[-1]], where="post", color=color, label=ABOUT.get(name, name))
    everything = [entry["flops"] / 1e6 for grid in grids.values() for entry in grid["grid"]]
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.xaxis.set_minor_formatter(lambda x, _: f"{x:.0f}" if f"{x:.0e}"[0] in "235" else "")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlim(min(everything) * 0.9, max(everything) * 1.1)
    axis.set_xlabel("inference MFLOP a puzzle")
    axis.set_ylabel("not solved, %")
    axis.set_title("Loops and steps: best per budget")
    _legend(axis)


def plot_summary(records: dict[str, list[dict]], grids: dict[str, dict], runs: list[dict], path: Path) -> None:
    """Of the main arms: what every training budget gives, quality by loops, and by inference FLOPs."""
    from matplotlib.figure import Figure

    main = {name: records[name] for name in _main(records)}
    has_answers = "one_step" in runs[0]
    figure = Figure(figsize=(4.6 * (2 + bool(grids)), 3.7), layout="constrained")
    axes = figure.subplots(1, 2 + bool(grids))
    _plot_budgets(runs, axes[0])
    (_plot_solved_by_loops if has_answers else _plot_nelbo_by_loops)(main, axes[1])
    _legend(axes[1])
    if grids:
        _plot_frontiers({name: grids[name] for name in grids if name in MAIN}, axes[2], False)
    _save(figure, path)


def _plot_budgets(runs: list[dict], axis) -> None:
    """Final NELBO of whole runs by training budget, and how much further the best looped arm's FLOPs go."""
    curves = by_budget(runs, final_nelbo)
    means = {}
    for base, seeds in curves.items():
        points = sorted(point for seed in seeds.values() for point in seed)
        axis.scatter(*zip(*points, strict=True), color=COLORS[base], s=8, alpha=0.5)
        groups = {flops: list(group) for flops, group in itertools.groupby(points, key=lambda point: point[0])}
        means[base] = [  # of the budgets that all seeds were run on
            (flops, mean_and_deviation([value for _, value in group])[0])
            for flops, group in groups.items()
            if len(group) == len(seeds)
        ]
        axis.plot(*zip(*means[base], strict=True), color=COLORS[base], marker="o", label=ABOUT[base])
    if "same_size" in means and "late" in means:
        flops, level = means["same_size"][-1]
        at = crossing(means["late"], level)
        if at is not None and at < flops:
            arrow = {"arrowstyle": "->", "color": "black"}
            axis.annotate("", (at, level), (flops, level), arrowprops=arrow)
            middle = ((at * flops) ** 0.5, level)
            axis.annotate(f"{flops / at:.1f}x fewer", middle, (0, -12), ha="center", textcoords="offset points")
    axis.set_xscale("log")
    axis.set_yscale("log")
    ticks = sorted({flops for points in means.values() for flops, _ in points})
    axis.set_xticks(ticks, [f"{flops:g}" for flops in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("training TFLOP, each point a run of its own")
    axis.set_ylabel(f"NELBO, nats per {runs[0]['settings']['unit']}")
    axis.set_title("What a training budget buys")
    _legend(axis)


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, dpi=130, format="png")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", required=True, help="folder that run.py wrote to")
    parser.add_argument("--study", default="sudoku6", help="folder in --results")
    parser.add_argument("--with", dest="others", default="", help="studies of other budgets, separated by commas")
    parser.add_argument("--plots", help="folder for the pictures")
    parser.add_argument("--summary", action="store_true", help="draw summary.png of this study too")
    args = parser.parse_args()
    folder = Path(args.results) / args.study
    records, grids = read_results(folder)
    print(tables(records, grids))
    studies = [records, *(read_results(Path(args.results) / name)[0] for name in args.others.split(",") if name)]
    runs = [run for study in studies for found in study.values() for run in found]
    print(scaling_tables(runs))
    report = {
        "flops_within_one_run": flops_within(records),
        "fewer_flops": fewer_flops(runs),
        "frontier": frontier(grids),
        "best_per_budget": best_per_budget(grids, budgets_of(grids)) if grids else [],
    }
    write_json(folder / "REPORT.json", report)
    if args.plots:
        plot_claims(records, Path(args.plots) / f"{args.study}.png")
        if grids:
            plot_grid(grids, Path(args.plots) / f"{args.study}-grid.png")
        if args.summary:
            plot_summary(records, grids, runs, Path(args.plots) / "summary.png")


if __name__ == "__main__":
    main()
