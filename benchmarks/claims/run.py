# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What do loops gain for the same training FLOPs? Trains arms of one task from scratch, on the same data in the same
order and with the same training FLOPs, and measures each. docs/results/studies.md has all its commands; one of them is

    python benchmarks/claims/run.py --fast --threads 1 --work /tmp/claims --results benchmarks/results/claims \\
        --task sudoku6 --learning-rate 1e-3 --tflop 3 --seeds 0,1,2,3,4,5 --arms same_size,looped,late,deeper

Adds every arm to `RESULTS/STUDY.json` when it is done; an arm that is there is not run again, and one that was
interrupted goes on from its last checkpoint in `--work`. `--grid` measures loops x denoising steps x commit rules of
trained arms instead. benchmarks/claims/report.py makes tables and plots of the file.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import arms
import measure
import study
import tasks
import torch
import transformers

from loopmdm import LoopMDMForMaskedLM
from loopmdm.data import ExampleStream, write_json
from loopmdm.evaluation.protocol import hash_files, protocol
from loopmdm.training import MaskedDiffusionCollator

TOLERANCES = [0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01]
# Besides a fixed number of steps: commit whatever is certain enough, in 8 steps at most
RULES = [{"confidence_threshold": threshold} for threshold in (0.7, 0.9, 0.97, 0.99, 0.997)]
RULES += [{"entropy_bound": bound} for bound in (0.3, 0.03, 0.01, 0.003)]
GRID_LOOPS, GRID_STEPS = (1, 2, 3, 4, 6, 8), (1, 2, 3, 4)  # the first two of each with --quick


def data_order(task: tasks.Task, seed: int) -> str:
    """A hash of the first masked batch of a seed: the same for every arm."""
    stream = ExampleStream(task.examples, task.batch_size, seed, transform=task.transform)
    batch = MaskedDiffusionCollator(tasks.MASK, tasks.PAD, seed=seed)([stream[i] for i in range(task.batch_size)])
    content = torch.stack([batch["input_ids"], batch["labels"]]).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def loops_to_measure(max_loops: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... to twice S_max, which is among them; one for an arm without loops."""
    if max_loops == 1:
        return [1]
    usual = {1, 2, 3, 4, 6, 8, 12, 16, 24, max_loops, 2 * max_loops}
    return sorted(loops for loops in usual if loops <= 2 * max_loops)


def measure_arm(
    model: LoopMDMForMaskedLM, task: tasks.Task, max_loops: int, quick: bool, base: LoopMDMForMaskedLM | None
) -> dict[str, Any]:
    """Everything that the report needs of one arm; `base` is what it is compared with row by row."""
    loops = loops_to_measure(max_loops)
    likelihood = {
        name: measure.likelihood(model, rows[: 16 if quick else 1000], loops, base=base)
        for name, rows in task.held_out.items()
    }
    result: dict[str, Any] = {"likelihood": likelihood}
    rows = task.rows
    if max_loops > 1:
        result["dynamics"] = measure.dynamics(model, rows[: 8 if quick else 100], 2 * max_loops)
    if rows.scored is not None:
        every_loop = list(range(1, 2 * max_loops + 1)) if max_loops > 1 else [1]
        result["one_step"] = measure.one_step(model, rows, every_loop, TOLERANCES)
        result["few_steps"] = [measure.generations(model, rows, max_loops, steps) for steps in (2, 4)]
    return result


def run_arm(name: str, seed: int, task: tasks.Task, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one arm."""
    arm, clock = arms.ARMS[name], Clock()
    folder = args.work / args.study / f"{name}-{seed}"
    finished = folder / "training.json"
    if not finished.is_file():
        training = arms.train(arm, task, seed, args.tflop * 1e12, folder, fast=args.fast)
        write_json(finished, {**training, **clock.read()})
    clock, training = Clock(), json.loads(finished.read_text())
    model = LoopMDMForMaskedLM.from_pretrained(folder / "model").eval()
    # The same-size arm of that budget and seed, if it was trained before
    other = "same_size" if arm.budget == 1 else f"same_size_{round(100 * arm.budget)}"
    path = folder.with_name(f"{other}-{seed}") / "model"
    base = LoopMDMForMaskedLM.from_pretrained(path).eval() if other != name and path.is_dir() else None
    measured = measure_arm(model, task, arm.max_loops, args.quick, base)
    return {
        "task": task.name,
        "arm": name,
        "seed": seed,
        "settings": {
            **{key: value for key, value in vars(arm).items() if key not in ("about", "mid")},
            "layers": model.config.num_hidden_layers,
            "loop_start": model.config.loop_start,
            "loop_end": model.config.loop_end,
            "tflop": args.tflop,
            "quick": args.quick,
            "fast": args.fast,
            "batch_size": task.batch_size,
            "learning_rate": task.learning_rate,
            "shape": task.shape,
            "length": task.length,
            "unit": task.unit,
        },
        "data_order": data_order(task, seed),
        "training": training,
        **measured,
        "protocol": protocol_of(clock, args),
    }


class Clock:
    """Wall time and CPU time of this process since it was made, in seconds; on a shared machine they differ."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


def protocol_of(clock: Clock, args: argparse.Namespace) -> dict[str, Any]:
    """Versions, machine, texts, and the time of the process that measured."""
    record = {name: entry for name, entry in protocol({}).items() if name in ("versions", "machine", "date")}
    if args.task.startswith("language"):
        hashes = [hash_files(Path(text)) for text in args.texts.values()]
        record["texts"] = {name: digest for one in hashes for name, digest in one.items()}
    return {**record, **clock.read()}


def run_grid(name: str, seed: int, task: tasks.Task, args: argparse.Namespace) -> dict[str, Any]:
    """Solve rate over loops x denoising steps x commit rules of a trained arm."""
    arm, clock = arms.ARMS[name], Clock()
    folder = args.work / args.study / f"{name}-{seed}" / "model"
    if not (folder / "config.json").is_file():
        raise SystemExit(f"{folder} holds no trained arm; run it without --grid first.")
    if task.rows.scored is None:
        raise SystemExit(f"The task {task.name} has no answers to be right or wrong, so there is no grid.")
    model = LoopMDMForMaskedLM.from_pretrained(folder).eval()
    found, count = [], 2 if args.quick else None
    for loops in GRID_LOOPS[:count]:
        if loops > (2 * arm.max_loops if arm.max_loops > 1 else 1):
            continue
        settings: list[tuple[int | list[int], int, dict]] = [(loops, steps, {}) for steps in GRID_STEPS[:count]]
        settings += [(loops, 8, rule) for rule in RULES]
        if loops > 1:  # loops in the first step alone
            settings += [([loops] + [1] * (steps - 1), steps, {}) for steps in GRID_STEPS[1:count]]
            settings += [([loops] + [1] * 7, 8, rule) for rule in RULES]
        for num_loops, steps, rule in settings:
            found.append(measure.generations(model, task.rows, num_loops, steps, **rule))
            print(f"{name} {seed} {json.dumps(study.rounded(found[-1]))}", flush=True)
    return {"task": task.name, "arm": name, "seed": seed, "grid": found, "grid_protocol": protocol_of(clock, args)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(tasks.TASKS), default="sudoku6")
    parser.add_argument("--study", help="name in --work and --results, one for each budget (default: the task)")
    parser.add_argument("--arms", default="same_size,looped,deeper", help=f"of: {', '.join(arms.ARMS)}")
    parser.add_argument("--seeds", default="0", help="separated by commas; each runs all arms (default: 0)")
    parser.add_argument("--tflop", type=float, default=3.0, help="training budget of an arm in 10^12 (default: 3)")
    parser.add_argument("--learning-rate", type=float, help="of Muon and AdamW (default: the task's)")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, checkpoints and models")
    parser.add_argument("--results", type=Path, required=True, help="folder for the results, one JSON file a study")
    parser.add_argument("--train-text", help="language: text file to train on, in UTF-8")
    parser.add_argument("--eval-text", help="language: another text file to evaluate, in UTF-8")
    parser.add_argument("--grid", action="store_true", help="measure loops x steps x rules of trained arms")
    parser.add_argument("--fast", action="store_true", help="train in bfloat16 with compiled layers")
    parser.add_argument("--quick", action="store_true", help="tiny data, models and budgets: a test of the machinery")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args()
    args.study = args.study or args.task
    if args.threads:
        torch.set_num_threads(args.threads)
    names = args.arms.split(",")
    unknown = [name for name in names if name not in arms.ARMS]
    if unknown:
        parser.error(f"no such arm: {', '.join(unknown)}; choose of {', '.join(arms.ARMS)}")
    if not args.tflop > 0:
        parser.error(f"--tflop is {args.tflop}; give a budget above 0")
    if args.learning_rate is not None and not args.learning_rate > 0:
        parser.error(f"--learning-rate is {args.learning_rate}; give a rate above 0")
    if args.quick:
        args.tflop = min(args.tflop, 0.002)
    args.texts = {name: path for name, path in (("train", args.train_text), ("eval", args.eval_text)) if path}
    transformers.utils.logging.disable_progress_bar()
    try:
        task = tasks.make_task(args.task, args.work / "data", args.quick, args.texts)
    except ValueError as error:
        parser.error(str(error))
    task.learning_rate = args.learning_rate or task.learning_rate
    path = args.results / f"{args.study}.json"
    # A study has one budget and one rate, so that its arms can be compared.
    own = {"tflop": args.tflop, "learning_rate": task.learning_rate}
    kept = args.work / args.study / "study.json"
    found = [record["settings"] for record in study.read(path) if "settings" in record]
    found += [json.loads(kept.read_text())] if kept.is_file() else []
    for name, value in own.items():
        if any(settings[name] != value for settings in found):
            parser.error(f"the study {args.study} has another {name} than {value:g}; name another --study")
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, own)
    for seed in map(int, args.seeds.split(",")):
        for name in names:
            if ("grid" if args.grid else "likelihood") in study.find(path, name, seed):
                print(f"{name} {seed} is in {path}", flush=True)
                continue
            study.add(path, (run_grid if args.grid else run_arm)(name, seed, task, args))
            print(f"{name} {seed} added to {path}", flush=True)


if __name__ == "__main__":
    main()
