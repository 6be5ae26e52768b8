# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The file of a study, a JSON list with one line for every arm and seed, and the numbers that the report shows."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from arms import ARMS

from loopmdm.data import write_atomically

LOOPED = ("looped", "late")
MAIN = ("same_size", "deeper", *LOOPED)
Points = list[tuple[float, float]]
Records = dict[str, list[dict]]


# --- the file ---


def read(path: Path) -> list[dict]:
    """The records of a study; none where there is no file yet."""
    return json.loads(path.read_text()) if path.is_file() else []


def find(path: Path, arm: str, seed: int) -> dict[str, Any]:
    """What is known of an arm and seed."""
    return next((record for record in read(path) if (record["arm"], record["seed"]) == (arm, seed)), {})


def add(path: Path, record: dict[str, Any]) -> None:
    """Adds fields to those of the record's arm and seed. One process at a time may write a study."""
    records = {(one["arm"], one["seed"]): one for one in read(path)}
    key = record["arm"], record["seed"]
    records[key] = records.get(key, {}) | rounded(record)
    lines = (json.dumps(one, separators=(",", ":"), allow_nan=False) for one in records.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "[\n" + ",\n".join(lines) + "\n]\n")


def rounded(value: Any) -> Any:
    """Six digits of every number; what is not a number, as NaN, becomes null."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def read_study(path: Path) -> tuple[Records, dict[str, dict]]:
    """The records of every arm, by seed, and its grid averaged over seeds, in the order of `ARMS`."""
    found, grids = read(path), {}
    records = {
        name: sorted((r for r in found if r["arm"] == name and "likelihood" in r), key=lambda record: record["seed"])
        for name in ARMS
    }
    records = {name: runs for name, runs in records.items() if runs}
    if not records:
        raise SystemExit(f"{path} holds no results; make some with benchmarks/claims/run.py.")
    for name in ARMS:
        keyed = [
            {setting_name(entry): entry for entry in r["grid"]} for r in found if r["arm"] == name and "grid" in r
        ]
        if keyed:
            common = [key for key in keyed[0] if all(key in table for table in keyed)]
            entries = [
                {**keyed[0][key], **{n: fmean([table[key][n] for table in keyed]) for n in ("solved", "flops")}}
                for key in common
            ]
            grids[name] = {"seeds": len(keyed), "grid": entries}
    return records, grids


def setting_name(entry: dict) -> str:
    rules = {"confidence_threshold": "threshold", "entropy_bound": "entropy bound"}
    rule = next((f"{name} {entry[key]:g}" for key, name in rules.items() if key in entry), "confidence")
    steps, loops = entry["max_denoising_steps"], entry["num_loops"]
    at_most = "" if rule == "confidence" else "up to "
    loops = f"{loops[0]} loops, then 1," if isinstance(loops, list) else f"{loops} loop{'s' * (loops > 1)}"
    return f"{loops} x {at_most}{steps} step{'s' * (steps > 1)}" + (f", {rule}" if steps > 1 else "")


# --- numbers ---


def deviation(values: list[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def training_loops(run: dict) -> int:
    return run["settings"]["max_loops"]


def nelbo_by_loops(runs: list[dict], held_out: str | None = None) -> dict[int, tuple[float, float]]:
    """NELBO and error bar by number of loops, on the first held-out rows unless others are named."""
    held_out = held_out or next(iter(runs[0]["likelihood"]))
    table = {}
    for loops, entry in runs[0]["likelihood"][held_out].items():
        values = [run["likelihood"][held_out][loops]["nelbo"] for run in runs]
        table[int(loops)] = fmean(values), deviation(values) or entry["error"]
    return table


def solved_by_loops(runs: list[dict]) -> dict[int, tuple[float, float]]:
    """Share of rows solved in one step, and error bar, by number of loops."""
    table = {}
    for loops in runs[0].get("one_step", {"solved": {}})["solved"]:
        values = [run["one_step"]["solved"][loops] for run in runs]
        table[int(loops)] = fmean(values), deviation(values) or math.sqrt(fmean(values) * (1 - fmean(values)) / 1000)
    return table


def adaptive(runs: list[dict]) -> list[tuple[float, float, float]]:
    """Tolerance, mean loops, share solved."""
    groups = zip(*(run["one_step"]["adaptive"] for run in runs), strict=True)
    return [
        (group[0]["tolerance"], *(fmean([one[n] for one in group]) for n in ("loops", "solved"))) for group in groups
    ]


def by_share(runs: list[dict]) -> list[float]:
    """-log p of a masked token in each tenth of the share masked, at S_max loops."""
    loops, held_out = str(training_loops(runs[0])), next(iter(runs[0]["likelihood"]))
    tables = [run["likelihood"][held_out][loops]["by_share"] for run in runs]
    return [fmean(values) for values in zip(*tables, strict=True)]


def attention(runs: list[dict]) -> list[list[float]]:
    """Mid's attention from masked to masked positions: by share masked, by loop."""
    by_run = zip(*(run["dynamics"]["masked_to_masked"] for run in runs), strict=True)
    return [[fmean(values) for values in zip(*rows, strict=True)] for rows in by_run]


def crossing(points: Points, level: float) -> float | None:
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


def final_nelbo(run: dict) -> float:
    return next(iter(run["likelihood"].values()))[str(training_loops(run))]["nelbo"]


def final_unsolved(run: dict) -> float:
    """Share of rows that one step at S_max loops leaves unsolved."""
    return 1 - run["one_step"]["solved"][str(training_loops(run))]


def quantities(runs: list[dict]) -> dict[str, Callable[[dict], float]]:
    found = {"NELBO": final_nelbo}
    return found | ({"one-step accuracy": final_unsolved} if "one_step" in runs[0] else {})


def tokens_per_parameter(run: dict) -> float:
    """Tokens that a run was trained on, for each parameter."""
    return run["training"]["examples"] * run["settings"]["length"] / run["training"]["parameters"]


def by_budget(runs: list[dict], value: Callable[[dict], float]) -> dict[str, dict[int, Points]]:
    """By main arm and seed, (training TFLOP, value) of every run with a schedule of its own, from the smallest."""
    curves: dict[str, dict[int, Points]] = {}
    for base, run in itertools.product(MAIN, runs):
        name, settings = run["arm"], run["settings"]
        if name == base or (name.startswith(f"{base}_") and ARMS[name].budget < 1):
            points = curves.setdefault(base, {}).setdefault(run["seed"], [])
            points.append((settings["tflop"] * settings["budget"], value(run)))
    return {base: {seed: sorted(points) for seed, points in sorted(seeds.items())} for base, seeds in curves.items()}


def fewer_flops(runs: list[dict]) -> list[dict]:
    """
    Claim 1: how many times fewer training FLOPs a looped arm needs, at S_max loops, for what the same-size arm with
    the same seed has at the end of its budget. By budget, arm and quantity: the ratio of each seed, interpolated
    between the budgets that were run, None where the largest is not enough, and whether it is a bound from below,
    because the smallest is.
    """
    found = []
    for quantity, value in quantities(runs).items():
        curves = by_budget(runs, value)
        same = curves.get("same_size", {})
        for flops in sorted({point[0] for points in same.values() for point in points}):
            for base in LOOPED:
                ratios = {}
                for seed, points in same.items():
                    curve = curves.get(base, {}).get(seed)
                    if curve and flops in dict(points):
                        at = crossing(curve, dict(points)[flops])
                        ratios[seed] = {"ratio": None if at is None else flops / at, "is_bound": at == curve[0][0]}
                if ratios:
                    found.append({"quantity": quantity, "tflop": flops, "arm": base, "seeds": ratios})
    return found


def frontier(grid: dict) -> list[dict]:
    """The settings that no other beats at as few inference FLOPs, from the cheapest on."""
    best, kept = -1.0, []
    for entry in sorted(grid["grid"], key=lambda entry: (entry["flops"], -entry["solved"])):
        if entry["solved"] > best:
            best = entry["solved"]
            kept.append(entry)
    return kept
