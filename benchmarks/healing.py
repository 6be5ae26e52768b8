# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
When does turning a trained model into a looped one pay? A 6x6 Sudoku model is trained without loops, `loopmdm convert`
makes a looped one of it, and both are trained further with the same FLOPs, given in per cent of the first training.
This makes the tables on 6x6 puzzles of docs/results/conversion.md:

    study="python benchmarks/healing.py --fast --threads 1 --work /tmp/healing"
    study="$study --output benchmarks/results/healing.json"
    $study --pilots
    $study --seeds 0,1,2
    $study --seeds 0,1,2 --windows

`--pilots` compares ways to convert and to go on, on other puzzles than the study's. `--windows` measures on each base
what `loopmdm convert --calibrate` compares, for all layers (its candidates leave the first and the last one alone, if
they can). A run that is in `--output` is not repeated, and an interrupted one goes on from its checkpoint in `--work`.
Prints a table of the file in the end.
"""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers.utils import logging

from loopmdm import LoopMDMForMaskedLM
from loopmdm.convert import convert_checkpoint
from loopmdm.evaluation import nelbo
from loopmdm.evaluation.protocol import protocol

sys.path.insert(0, str(Path(__file__).parent / "claims"))
import arms
import measure
import report
import study
import tasks

LOOPS = (1, 2, 3, 4, 6, 8)
SHARES = (5, 10, 25, 50, 100)  # per cent of the first training; 25 alone with --quick


@dataclasses.dataclass(frozen=True)
class Way:
    """
    A way to go on from a base of three layers.

    Args:
        about: In words.
        loops: S_max; 1 goes on without loops.
        schedule, options: Of the loops, see `make_loop_schedule`.
        mid: The looped layers, from and to.
        update: `loop_update`.
        lora: Arguments of an adapter that is trained instead of all weights.
        rate: Peak learning rate; the base's is 3e-3.
    """

    about: str
    loops: int = 6
    schedule: str = "late"
    options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"start": 0.0})
    mid: tuple[int, int] = (1, 2)
    update: str = "replace"
    lora: dict[str, Any] | None = None
    rate: float = 3e-3


PLAIN = Way("no loops", loops=1, schedule="uniform", options={})
MIDDLE = Way("the middle layer, S = 1 in a quarter of the steps, Uniform{3..6} else")
FIRST = dataclasses.replace(MIDDLE, about="the first layer", mid=(0, 1))
UNIFORM, GROWING, FIXED = ({"schedule": name, "options": {}} for name in ("uniform", "growing", "fixed"))
PILOTS = {
    "plain": PLAIN,
    "plain_slow": dataclasses.replace(PLAIN, about="no loops, rate 1e-3", rate=1e-3),
    "late": MIDDLE,
    "late_slow": dataclasses.replace(MIDDLE, about="the middle layer, rate 1e-3", rate=1e-3),
    "uniform": dataclasses.replace(MIDDLE, about="the middle layer, Uniform{1..6}", **UNIFORM),
    "growing": dataclasses.replace(MIDDLE, about="the middle layer, growing to Uniform{1..6}", **GROWING),
    "fixed": dataclasses.replace(MIDDLE, about="the middle layer, S = 6 always", **FIXED),
    "fixed3": dataclasses.replace(MIDDLE, about="the middle layer, S = 3 always", loops=3, **FIXED),
    "damped": dataclasses.replace(MIDDLE, about="the middle layer, damped", update="damped"),
    "lora": dataclasses.replace(
        MIDDLE, about="the middle layer, LoRA (rank 16) on it alone", lora={"layers": "mid", "r": 16, "lora_alpha": 32}
    ),
    "last": dataclasses.replace(MIDDLE, about="the last layer", mid=(2, 3)),
    "first_two": dataclasses.replace(MIDDLE, about="the first two layers, up to 4 loops", mid=(0, 2), loops=4),
    "all": dataclasses.replace(MIDDLE, about="all layers, up to 4 loops", mid=(0, 3), loops=4),
    "first": FIRST,
    "first_slow": dataclasses.replace(FIRST, about="the first layer, rate 1e-3", rate=1e-3),
    "first_uniform": dataclasses.replace(FIRST, about="the first layer, Uniform{1..6}", **UNIFORM),
    "first_growing": dataclasses.replace(FIRST, about="the first layer, growing to Uniform{1..6}", **GROWING),
    "first_damped": dataclasses.replace(FIRST, about="the first layer, damped", update="damped"),
}
STUDY = {"plain": PILOTS["plain_slow"], "looped": FIRST}
QUICK = ("damped", "lora")


def measured(model: LoopMDMForMaskedLM, rows: tasks.Rows, loops: list[int]) -> dict[str, Any]:
    """NELBO by loops, and share solved and FLOPs by loops and denoising steps."""
    settings = [(n, steps) for n in loops for steps in (1, 2, 3, 4) if steps == 1 or n in (1, 2, 3)]
    grid = [measure.generations(model, rows, n, steps) for n, steps in settings]
    likelihood = measure.likelihood(model, rows, loops).items()
    found = {n: {name: entry[name] for name in ("nelbo", "error")} for n, entry in likelihood}
    solved = {entry["num_loops"]: entry["solved"] for entry in grid if entry["max_denoising_steps"] == 1}
    return {"likelihood": found, "solved": solved, "grid": grid}


class Study:
    """Runs of one `--output`, on top of the base of each seed."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.task = tasks.make_task("sudoku6", args.work / "data", args.quick)

    def base(self, seed: int, rows: tasks.Rows, name: str = "base") -> Path:
        """The model without loops; it is trained where it does not exist, and measured without further training."""
        folder = self.args.work / f"base-{seed}"
        if not (folder / "model" / "config.json").is_file():
            arms.train(arms.ARMS["same_size"], self.task, seed, self.args.tflop * 1e12, folder, fast=self.args.fast)
        if not study.find(self.args.output, name, seed):
            model = LoopMDMForMaskedLM.from_pretrained(folder / "model").eval()
            model.config.loop_start, model.config.loop_end = FIRST.mid
            self.add(name, seed, {"training": {}, **measured(model, rows, list(LOOPS))})
        return folder / "model"

    def windows(self, seed: int) -> None:
        """Nats per token of whole boards at one and two loops, without further training, by looped layers."""
        if study.find(self.args.output, "windows", seed):
            return
        model = LoopMDMForMaskedLM.from_pretrained(self.base(seed, self.task.rows)).eval()
        boards = tasks.sudoku6_rows(self.args.work / "data", 100, seed=2).input_ids
        layers, found = model.config.num_hidden_layers, {}
        for start, end in itertools.combinations(range(layers + 1), 2):
            model.config.loop_start, model.config.loop_end = start, end
            found[f"{start}:{end}"] = nelbo(model, boards, num_loops=[1, 2]).per_token()[0].tolist()
        self.add("windows", seed, {"windows": found})

    def run(self, name: str, seed: int, way: Way, share: int, base: Path, rows: tasks.Rows) -> None:
        """Converts the base, trains it on `share` per cent of its FLOPs, and measures it."""
        if study.find(self.args.output, name, seed):
            return
        folder, start = self.args.work / f"{name}-{seed}", base
        if way.loops > 1:
            start = folder / "converted"
            if not start.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                window = {"loop_start": way.mid[0], "loop_end": way.mid[1], "loop_update": way.update}
                convert_checkpoint(base, start, max_train_loops=way.loops, **window)
        arm = arms.Arm(way.about, max_loops=way.loops, schedule=way.schedule, options=way.options, budget=share / 100)
        task = dataclasses.replace(self.task, learning_rate=way.rate)
        training = arms.train(
            arm, task, seed + 100, self.args.tflop * 1e12, folder, self.args.fast, start=start, lora=way.lora
        )
        model = LoopMDMForMaskedLM.from_pretrained(folder / "model").eval()
        loops = [n for n in LOOPS if n <= 2 * way.loops] if way.loops > 1 else [1]
        found = {"way": dataclasses.asdict(way), "share": share, "training": training}
        self.add(name, seed, {**found, **measured(model, rows, loops)})

    def add(self, name: str, seed: int, record: dict[str, Any]) -> None:
        settings = {key: vars(self.args)[key] for key in ("tflop", "quick", "fast")}
        kept = {key: value for key, value in protocol({}).items() if key in ("versions", "machine", "date")}
        study.add(self.args.output, {"arm": name, "seed": seed, **record, "settings": settings, "protocol": kept})
        print(f"{name} {seed} added to {self.args.output}", flush=True)


def table(path: Path) -> str:
    """Every run by loops, means and standard deviations over seeds, in Markdown."""
    records, rows = [record for record in study.read(path) if "solved" in record], []
    for name in dict.fromkeys(record["arm"] for record in records):
        runs = [record for record in records if record["arm"] == name]
        for loops in runs[0]["solved"]:
            columns = [run["likelihood"][loops]["nelbo"] for run in runs], [run["solved"][loops] for run in runs]
            nelbo, solved = ((fmean(values), study.deviation(values)) for values in columns)
            rows.append([name, len(runs), loops, report.nelbo_cell(nelbo), report.percent_cell(solved)])
    return report.table(str(path), ["run", "seeds", "loops", "NELBO", "solved in one step, %"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0", help="separated by commas (default: 0)")
    parser.add_argument("--pilots", action="store_true", help="compare ways, on 25 %% and the first seed")
    parser.add_argument("--windows", action="store_true", help="measure where untrained loops harm least")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, checkpoints and models")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--fast", action="store_true", help="train in bfloat16 with compiled layers")
    parser.add_argument("--quick", action="store_true", help="tiny data, model and budget: a test of the machinery")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args()
    args.tflop = 0.004 if args.quick else 3.0  # of the first training
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    runs, seeds = Study(args), [int(seed) for seed in args.seeds.split(",")]
    if args.pilots:
        rows = tasks.sudoku6_rows(args.work / "data", 16 if args.quick else 500, seed=2)  # to choose by
        base = runs.base(seeds[0], rows, "pilot-base")
        for name in QUICK if args.quick else PILOTS:
            runs.run(f"pilot-{name}", seeds[0], PILOTS[name], 25, base, rows)
    elif args.windows:
        for seed in seeds:
            runs.windows(seed)
    else:
        for seed in seeds:
            base = runs.base(seed, runs.task.rows)
            for share in (25,) if args.quick else SHARES:
                for name, way in STUDY.items():
                    runs.run(f"{name}-{share}", seed, way, share, base, runs.task.rows)
    print(table(args.output))


if __name__ == "__main__":
    main()
