# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What did a study find? Tables and plots, from the file that run.py wrote. The tables of claims.md and text.md in
docs/results are those of `$report --study STUDY`. These draw the pictures language-small.png, sudoku6-long.png and
sudoku6-long-grid.png:

    report="python benchmarks/claims/report.py --results benchmarks/results/claims"
    $report --study language-small --with language-small-long --plots docs/results
    $report --study sudoku6-long --with sudoku6 --plots docs/results

Prints tables in Markdown, and draws `PLOTS/STUDY.png` with one panel for each claim (with `late_s3`, its differences
to the same-size arm by training tokens), and `PLOTS/STUDY-grid.png` where a grid was measured. An error bar is the
standard deviation over seeds where there are several, and otherwise the standard error over held-out rows.
"""

import argparse
import math
from pathlib import Path
from statistics import fmean

import plots
import study
from arms import ARMS
from study import Records

COLUMNS = (1, 2, 3, 4, 6, 8, 12)


def table(title: str, header: list, rows: list[list]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join([title, "", *("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines), ""])


def nelbo_cell(value: tuple[float, float | None] | None) -> str:
    return "" if value is None else f"{value[0]:.4f}" + ("" if value[1] is None else f" ± {value[1]:.4f}")


def percent_cell(value: tuple[float, float | None] | None) -> str:
    return "" if value is None else f"{100 * value[0]:.1f}" + ("" if value[1] is None else f" ± {100 * value[1]:.1f}")


def quality_tables(records: Records) -> list[str]:
    """Every arm by number of loops: the NELBO on each set of held-out rows, and what is solved."""
    first = next(iter(records.values()))[0]
    found = []
    for held_out in first["likelihood"]:
        rows = []
        for name, runs in records.items():
            values = study.nelbo_by_loops(runs, held_out)
            tflop = fmean([run["training"]["training_flops"] for run in runs]) / 1e12
            rows.append([name, len(runs), f"{tflop:.2f}", *(nelbo_cell(values.get(loops)) for loops in COLUMNS)])
        title = f"NELBO on {held_out}, nats per {first['settings']['unit']}, by loops"
        found.append(table(title, ["arm", "seeds", "TFLOP", *COLUMNS], rows))
    if "one_step" in first:
        rows = []
        for name, runs in records.items():
            values = study.solved_by_loops(runs)
            few = [f"{100 * fmean([run['few_steps'][i]['solved'] for run in runs]):.1f}" for i in range(2)]
            rows.append([name, *(percent_cell(values.get(loops)) for loops in COLUMNS), *few])
        found.append(table("Solved in one step, %, by loops", ["arm", *COLUMNS, "2 steps", "4 steps"], rows))
    return found


def difference_tables(records: Records) -> list[str]:
    """Every run by number of loops: its NELBO less that of the same-size arm of its budget and seed, paired by row."""
    found = []
    for held_out in next(iter(records.values()))[0]["likelihood"]:
        rows = []
        for name, runs in records.items():
            for run in runs:
                values = run["likelihood"][held_out]
                pairs = [
                    (value["to_base"], value["to_base_error"]) if "to_base" in value else None
                    for value in (values.get(str(loops), {}) for loops in COLUMNS)
                ]
                if any(pairs):
                    rows.append([name, run["seed"], f"{study.tokens_per_parameter(run):.0f}", *map(nelbo_cell, pairs)])
        if rows:
            header = ["arm", "seed", "tokens a parameter", *COLUMNS]
            found.append(table(f"NELBO on {held_out} less that of the same-size arm, by loops", header, rows))
    return found


def arms_table(records: Records) -> str:
    """Every arm in words, at one loop, at S_max and at its best."""
    header = ["arm", "loops drawn", "seeds", "steps", "NELBO, 1 loop", "at S_max"]
    header += ["solved in one step, %: 1 loop", "at S_max", "at most, at loops"]
    rows = []
    for name, runs in records.items():
        nelbo, solved, most = study.nelbo_by_loops(runs), study.solved_by_loops(runs), study.training_loops(runs[0])
        cells = [nelbo_cell(nelbo[1]), nelbo_cell(nelbo[most])]
        if solved:
            best = max(solved, key=lambda loops: solved[loops][0])
            cells += [percent_cell(solved[1]), percent_cell(solved[most])]
            cells.append(f"{100 * solved[best][0]:.1f} at {best}")
        steps = round(fmean([run["training"]["steps"] for run in runs]))
        rows.append([name, ARMS[name].about, len(runs), steps, *cells])
    return table("The arms", header[: len(rows[0])], rows)


def dynamics_tables(records: Records) -> list[str]:
    """Of the main arms: by the share masked, by tolerance, and attention by loop."""
    main = {name: records[name] for name in study.MAIN if name in records}
    rows = [[name, *(f"{value:.4f}" for value in study.by_share(runs))] for name, runs in main.items()]
    header = ["share masked", *(f"{10 * b}-{10 * b + 10} %" for b in range(10))]
    found = [table("-log p of a masked token by the share masked, at S_max loops", header, rows)]
    for name in study.LOOPED:
        runs = main.get(name)
        if runs and "one_step" in runs[0]:
            rows = [[f"{t:g}", f"{loops:.2f}", f"{100 * solved:.1f}"] for t, loops, solved in study.adaptive(runs)]
            found.append(table(f"{name} in one step, adaptive", ["tolerance", "mean loops", "solved, %"], rows))
        if runs:
            masses, shared = study.attention(runs), runs[0]["dynamics"]
            labels = zip(shared["shares"], shared["uniform"], masses, strict=True)
            rows = [
                [f"{100 * share:.0f} %", f"{uniform:.3f}", *(f"{value:.3f}" for value in mass)]
                for share, uniform, mass in labels
            ]
            header = ["share masked", "uniform", *range(1, len(masses[0]) + 1)]
            found.append(table(f"{name}: attention in mid from masked to masked positions, by loop", header, rows))
    return found


def grid_table(grids: dict[str, dict]) -> str:
    """For each budget of inference FLOPs, 1 to 6 times the cheapest setting, the best setting that fits."""
    if not grids:
        return ""
    everything = [entry["flops"] for grid in grids.values() for entry in grid["grid"]]
    rows = []
    for budget in (min(everything) * factor for factor in (1, 1.5, 1.75, 2, 2.25, 2.5, 3, 4, 6)):
        cells = []
        for grid in grids.values():
            fitting = [entry for entry in study.frontier(grid) if entry["flops"] <= budget * 1.001]
            cells.append(f"{100 * fitting[-1]['solved']:.1f}: {study.setting_name(fitting[-1])}" if fitting else "")
        if budget <= max(everything):
            rows.append([f"{budget / 1e6:.0f}", *cells])
    header = ["MFLOP a row", *(f"{name} ({grid['seeds']} seeds)" for name, grid in grids.items())]
    return table("Best setting within a budget of inference FLOPs, % solved", header, rows)


def scaling_tables(runs: list[dict]) -> list[str]:
    found = []
    for quantity, value in study.quantities(runs).items():
        curves = study.by_budget(runs, value)
        budgets = sorted({flops for seeds in curves.values() for points in seeds.values() for flops, _ in points})
        rows = []
        for base, seeds in curves.items():
            cells = []
            for flops in budgets:
                values = [dict(points)[flops] for points in seeds.values() if flops in dict(points)]
                center = fmean(values) if values else 0.0
                pair = (center if quantity == "NELBO" else 1 - center, study.deviation(values)) if values else None
                cells.append(nelbo_cell(pair) if quantity == "NELBO" else percent_cell(pair))
            rows.append([base, *cells])
        found.append(table(f"{quantity} by training budget, TFLOP", ["arm", *(f"{b:g}" for b in budgets)], rows))
    entries = study.fewer_flops(runs)
    seeds = sorted({seed for entry in entries for seed in entry["seeds"]})
    rows = []
    for entry in entries:
        cells = []
        for seed in seeds:
            one = entry["seeds"].get(seed, {"ratio": math.nan, "is_bound": False})
            text = "not reached" if one["ratio"] is None else f"{'>= ' * one['is_bound']}{one['ratio']:.2f}"
            cells.append(text.replace("nan", ""))
        rows.append([entry["quantity"], f"{entry['tflop']:g}", entry["arm"], *cells])
    header = ["its", "after TFLOP", "arm", *(f"seed {seed}" for seed in seeds)]
    return [*found, table("Times fewer training FLOPs than the same-size arm", header, rows)] if rows else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of the studies' files")
    parser.add_argument("--study", required=True)
    parser.add_argument("--with", dest="others", default="", help="studies of other budgets, separated by commas")
    parser.add_argument("--plots", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    records, grids = study.read_study(args.results / f"{args.study}.json")
    studies = [records]
    studies += [study.read_study(args.results / f"{name}.json")[0] for name in args.others.split(",") if name]
    runs = [run for study in studies for found in study.values() for run in found]
    parts = [
        *quality_tables(records),
        *difference_tables(records),
        arms_table(records),
        *dynamics_tables(records),
        grid_table(grids),
    ]
    print("\n".join([*parts, *scaling_tables(runs)]))
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
        if "late_s3" in records:
            plots.plot_differences(runs, args.plots / f"{args.study}.png")
        else:
            plots.plot_claims(records, runs, args.plots / f"{args.study}.png")
        if grids:
            plots.plot_grid(grids, args.plots / f"{args.study}-grid.png")


if __name__ == "__main__":
    main()
