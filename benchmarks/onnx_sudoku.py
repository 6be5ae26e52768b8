# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Do the ONNX graphs of the bundled model answer puzzles as torch does? Answers, differences of logits, sizes and times.
This makes the table of docs/onnx.md:

    python benchmarks/onnx_sudoku.py --threads 1 --output benchmarks/results/onnx_sudoku.json

Both answer the same puzzles in batches, in turns. Every batch is timed once, and the median is reported.
"""

import statistics
import tempfile
from pathlib import Path

import torch
from common import ROOT, begin, load, make_parser, positive, puzzles, read_pairs, timed, write_result

from loopmdm.convert.onnx_graphs import WEIGHTS, export_onnx
from loopmdm.convert.onnx_runner import OnnxModel

SETTINGS = (
    {"num_loops": 1, "max_denoising_steps": 1},
    {"num_loops": 3, "max_denoising_steps": 2},
    {"num_loops": 6, "max_denoising_steps": 4},
    {"num_loops": 16, "max_denoising_steps": 1},
)


def logit_differences(model, graphs: OnnxModel, ids: torch.Tensor, num_loops: int) -> dict[str, float]:
    """At the blanks of the puzzles: the largest difference of a logit and of a probability."""
    with torch.no_grad():
        wanted = model(ids, num_loops=num_loops).logits
    found, blank = torch.from_numpy(graphs.logits(ids, num_loops=num_loops)), ids == model.config.mask_token_id
    finite = wanted.isfinite() & blank[..., None]
    probability = (wanted.softmax(-1) - found.softmax(-1)).abs()[blank].max().item()
    return {"logit": (wanted - found)[finite].abs().max().item(), "probability": probability}


def compare(model, graphs: dict[str, OnnxModel], ids: torch.Tensor, solutions: torch.Tensor, setting: dict) -> list:
    """For each kind of weights, how many answers and tokens are those of torch, how many are solutions, and times."""
    runs = {"torch": lambda rows: model.generate(rows, max_new_tokens=0, **setting)}
    for name, one in graphs.items():
        runs[name] = lambda rows, one=one: torch.from_numpy(one.generate(rows, max_new_tokens=0, **setting))
    answers, seconds = {name: [] for name in runs}, {name: [] for name in runs}
    for rows in ids.split(20):
        for name, run in runs.items():
            taken, output = timed(lambda run=run, rows=rows: run(rows))
            seconds[name].append(taken / len(rows))
            answers[name].append(output)
    found, blank = {name: torch.cat(parts) for name, parts in answers.items()}, ids == model.config.mask_token_id
    table = []
    for name, output in found.items():
        row = {**setting, "run": name, "ms_per_puzzle": 1000 * statistics.median(seconds[name])}
        row["solved"] = (output == solutions).all(-1).sum().item()
        row["same_answers"] = (output == found["torch"]).all(-1).sum().item()
        row["same_tokens_of_blanks"] = (output == found["torch"])[blank].float().mean().item()
        if name != "torch":
            row["largest_difference"] = logit_differences(model, graphs[name], ids, setting["num_loops"])
        print(row, flush=True)
        table.append(row)
    return table


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--count", type=positive, default=200, help="puzzles")
    args = parser.parse_args()
    begin(args)
    model, tokenizer = load()
    ids, solutions = read_pairs(tokenizer, puzzles.generate_puzzles(args.count, args.seed + 23, 32, 46))
    with tempfile.TemporaryDirectory() as folder:
        about = {name: export_onnx(str(ROOT), Path(folder) / name, name) for name in WEIGHTS}
        graphs = {name: OnnxModel(Path(folder) / name, num_threads=args.threads or 0) for name in WEIGHTS}
        rows, sizes = [], {name: one["bytes"] for name, one in about.items()}
        for setting in SETTINGS:
            rows += compare(model, graphs, ids, solutions, setting)
            write_result(args, bytes=sizes, rows=rows)


if __name__ == "__main__":
    main()
