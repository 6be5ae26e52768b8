# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The pilots that chose the recipe of the bundled model, and its training. A run that was interrupted goes on.

    mkdir -p data
    python examples/sudoku/puzzles.py --minimal --count 300 --seed 2 --output data/validation.txt
    python examples/sudoku/puzzles.py --minimal --count 40000 --unlike data/validation.txt --output data/minimal.txt
    python benchmarks/flagship/pilots.py --data data --work runs --only bundled
    python benchmarks/flagship/pilots.py --data data --work runs --output benchmarks/results/flagship.json

`bundled/model` in the work folder loads like any model. Without `--only` all runs are made, one after the other; the
JSON has their settings and curves.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
START = {"tflop": 40, "loops": 16}
UNTIED = {"tflop": 20, "loops": 8, "mid": 2, "positions": "structured", "position_scale": 1.0}
UNTIED |= {"schedule": "grow", "first_loops": 2, "tied": False, "embed_scale": 1.0}
SHORT, TUNED = UNTIED | {"stop": 10}, UNTIED | {"batch": 16, "lr": 8e-3, "stop": 8}
LOOPED = TUNED | {"stop": 0, "loops": 16, "grow_power": 0.5, "grow_until": 0.5, "decay": 0.4, "ema": 0.998}
PLAIN = TUNED | {"stop": 0, "loops": 1, "schedule": "constant", "decay": 0.4, "ema": 0.998}
RUNS = {
    "one-layer": START,
    "one-layer-growing": START | {"positions": "structured", "schedule": "grow", "first_loops": 2},
    "one-layer-untied": UNTIED | {"mid": 1, "loops": 16},
    "two-layers": UNTIED,
    "rate-1.5e-3": SHORT | {"lr": 1.5e-3},
    "rate-5e-3": SHORT | {"lr": 5e-3},
    "rate-8e-3": SHORT | {"lr": 8e-3},
    "rate-13e-3": SHORT | {"lr": 1.3e-2},
    "own-trajectories": SHORT | {"noise": "policy", "atom": 0.4},
    "tuned": TUNED | {"stop": 10},
    "head-of-one": TUNED | {"head": 1},
    "three-layers-six-loops": TUNED | {"mid": 3, "loops": 6},
    "last-loss": TUNED | {"deep": False},
    "last-loss-uniform-loops": TUNED | {"deep": False, "schedule": "uniform"},
    "uniform-noise": TUNED | {"noise": "uniform"},
    "plain-positions": TUNED | {"positions": "plain", "stop": 5},
    "plain": PLAIN | {"tflop": 100},
    # The plain model goes on, with loops and without; on other batches than before
    "converted": LOOPED | {"init": "plain", "tflop": 50, "seed": 1},
    "converted-first": LOOPED | {"init": "plain", "tflop": 50, "seed": 1, "mid": 1, "tail": 1},
    "converted-first-2": LOOPED | {"init": "plain", "tflop": 50, "seed": 2, "mid": 1, "tail": 1},
    "from-scratch": LOOPED | {"tflop": 50, "seed": 1},
    "plain-longer": PLAIN | {"init": "plain", "tflop": 25, "lr": 2.7e-3, "seed": 1},
    "bundled": LOOPED | {"tflop": 600},
}


def curve(folder: Path, loops: int) -> list[dict]:
    """By TFLOP: cells right in one step and nats per cell at the most loops, boards solved in 16 steps, in percent."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = json.loads((folder / "result.json").read_text())
    entries.append({"tflop": last["training_tflop"], **last["evaluation"]})
    points = {}
    for entry in entries:
        if "one_step" in entry:
            _, right, nats = entry["one_step"][str(loops)]
            points[round(entry["tflop"])] = {
                "cells_right": right,
                "nats": nats,
                "solved_in_16_steps": entry["16_steps"],
            }
    return [{"tflop": tflop, **point} for tflop, point in points.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of minimal.txt and validation.txt")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME")
    parser.add_argument("--output", type=Path, help="JSON of settings and curves")
    args = parser.parse_args()
    record = {}
    for name in args.only:
        settings, folder = {"name": name, **RUNS[name]}, args.work / name
        if "init" in settings:
            settings["init"] = str(args.work / settings["init"] / "model")
        if not (folder / "result.json").is_file():
            command = [sys.executable, str(HERE / "train.py"), "--settings", json.dumps(settings)]
            subprocess.run([*command, "--data", str(args.data), "--output", str(args.work)], check=True)
        record[name] = {"settings": RUNS[name], "curve": curve(folder, RUNS[name]["loops"])}
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
