# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What do settings of `generate` cost and save on a Sudoku model? These make the tables of docs/generation.md, on caches,
on fewer loops and on committing in parallel, with the model of examples/sudoku/train.py:

    study="python benchmarks/sudoku_generation.py --model sudoku-loopmdm"
    $study --study caches --count 300 --loops 6 --output benchmarks/results/sudoku_caches.json
    $study --study loops --count 1568 --output benchmarks/results/sudoku_loops.json
    $study --study commit --count 400 --loops 6 2 --visible-loops 2 --output benchmarks/results/sudoku_commit.json

`commit` compares rules of commitment: a fixed share of the blanks in every step, whatever is at least so likely, or
whatever stays within a joint entropy, besides what keeps the board on schedule. `caches` compares the approximate
caches where the board is filled in three blocks of three rows. `loops` compares numbers of loops, in one step and in
as many as a threshold takes. Every setting solves the same puzzles; differences are to the first setting of the same
base (number of loops, or rule), and their standard errors are paired.
"""

import json
import math

import torch
from common import ROOT, begin, load, make_parser, positive, puzzles, read_pairs, write_result

CACHES = [
    {"cache_implementation": implementation, **refresh}
    for implementation in ("prefix", "dual")
    for refresh in ({}, {"cache_refresh_interval": 2})
]
RULES = [
    *({"max_denoising_steps": steps} for steps in (8, 4, 2, 1)),
    *(
        {"max_denoising_steps": steps, "confidence_threshold": threshold}
        for steps in (2, 8)
        for threshold in (0.99, 0.9, 0.7, 0.5)
    ),
    *({"max_denoising_steps": steps, "entropy_bound": bound} for steps in (2, 8) for bound in (0.03, 0.1, 0.3, 1.0)),
]
FEWER_LOOPS = [
    *({"num_loops": loops} for loops in (6, 5, 4, 3, 2)),
    *({"num_loops": 6, "visible_loops": visible} for visible in (2, 1)),
    *({"num_loops": loops, "loop_tolerance": tolerance} for loops, tolerance in ((6, 0.14), (12, 0.1))),
    {"num_loops": 12},
]


def settings_of(study: str, loops: list[int], visible_loops: int | None) -> list[list[dict]]:
    """Arguments of `generate`, in groups whose first is what the others are compared with."""
    if study == "loops":
        bases = ({"max_denoising_steps": 1}, {"max_denoising_steps": 8, "confidence_threshold": 0.9})
        return [[{**fewer, **base} for fewer in FEWER_LOOPS] for base in bases]
    groups = []
    for num_loops in loops:
        base = {"num_loops": num_loops}
        if visible_loops is not None and visible_loops < num_loops:
            base["visible_loops"] = visible_loops
        if study == "caches":
            base |= {"block_length": 27, "max_denoising_steps": 4}
        groups.append([{**base, **other} for other in (RULES if study == "commit" else [{}, *CACHES])])
    return groups


def solve(model, boards: torch.Tensor, solutions: torch.Tensor, setting: dict) -> tuple[torch.Tensor, dict]:
    """Which puzzles are solved, `(count,)` bool, with mean forward passes, loops, tokens per pass and FLOPs."""
    options = {"max_new_tokens": 0, "return_dict_in_generate": True, **setting}
    outputs = [model.generate(part, **options) for part in boards.split(50)]
    passes, loops, flops = (
        sum(getattr(output, name).sum().item() for output in outputs) for name in ("forward_passes", "loops", "flops")
    )
    cost = {
        "forward_passes": passes / len(boards),
        "loops": loops / len(boards),
        "tokens_per_forward": (boards == model.config.mask_token_id).sum().item() / passes,
        "gflop": flops / len(boards) / 1e9,
    }
    return (torch.cat([output.sequences for output in outputs]) == solutions).all(-1), cost


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(seed=1)
    parser.add_argument("--study", choices=("commit", "caches", "loops"), default="commit")
    parser.add_argument("--model", default=str(ROOT), help="folder of the model (default: the bundled one)")
    parser.add_argument("--count", type=positive, default=1000, help="number of puzzles (default: 1000)")
    parser.add_argument("--loops", type=int, nargs="+", default=[2, 6], help="num_loops of commit and caches")
    parser.add_argument("--visible-loops", type=int, help="loops of visible tokens where there are more")
    args = parser.parse_args()
    begin(args)
    model, tokenizer = load(args.model)
    boards, solutions = read_pairs(tokenizer, puzzles.generate_puzzles(args.count, args.seed, 32, 46))

    results = []
    for group in settings_of(args.study, args.loops, args.visible_loops):
        reference = None
        for setting in group:
            solved, cost = solve(model, boards, solutions, setting)
            reference = solved if reference is None else reference
            difference = solved.double() - reference.double()
            row = {
                **setting,
                "solved": solved.double().mean().item(),
                "difference": difference.mean().item(),
                "difference_standard_error": difference.std().item() / math.sqrt(args.count),
                **cost,
            }
            results.append(row)
            print(json.dumps(row), flush=True)
    write_result(args, results=results)


if __name__ == "__main__":
    main()
