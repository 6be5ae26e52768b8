# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Settings of `generate` against quality and cost, on a Sudoku model.

    python benchmarks/sudoku_generation.py --study commit --count 400 --output commit.json

`commit` compares rules of commitment: a fixed share of the blanks in every step, whatever is at least so likely, or
whatever stays within a joint entropy, besides what keeps the board on schedule. `caches` compares the approximate
caches where the board is filled in three blocks of three rows. `loops` compares numbers of loops, in one step and in
as many as a threshold takes. Every setting solves the same puzzles; differences are to the first setting of the same
base (number of loops, or rule), and their standard errors are paired.
"""

import json
import math
import sys
from pathlib import Path

import torch
from common import begin, make_parser, write_result
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "sudoku"))

import puzzles  # noqa: E402

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


def solve(model, tokenizer, pairs, batch_size, **arguments):
    """Which puzzles are solved, `(count,)` bool, with mean forward passes, loops, tokens per pass and FLOPs."""
    solved, passes, loops, flops, blanks = [], [], [], [], []
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        inputs = tokenizer([puzzle for puzzle, _ in part], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=0, return_dict_in_generate=True, **arguments)
        answers = tokenizer.batch_decode(output.sequences)
        solved += [answer == solution for answer, (_, solution) in zip(answers, part, strict=True)]
        passes += output.forward_passes.tolist()
        loops += output.loops.tolist()
        flops += output.flops.tolist()
        blanks += (inputs["input_ids"] == model.config.mask_token_id).sum(-1).tolist()
    count = len(pairs)
    cost = {
        "forward_passes": sum(passes) / count,
        "loops": sum(loops) / count,
        "tokens_per_forward": sum(blanks) / sum(passes),
        "gflop": sum(flops) / count / 1e9,
    }
    return torch.tensor(solved), cost


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(seed=1)
    parser.add_argument("--study", choices=("commit", "caches", "loops"), default="commit")
    parser.add_argument("--model", default=str(ROOT), help="folder of the model (default: the bundled one)")
    parser.add_argument("--count", type=int, default=1000, help="number of puzzles (default: 1000)")
    parser.add_argument("--loops", type=int, nargs="+", default=[2, 6], help="num_loops of commit and caches")
    parser.add_argument("--visible-loops", type=int, help="loops of visible tokens where there are more")
    parser.add_argument("--batch-size", type=int, default=50)
    args = parser.parse_args()
    begin(args)
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    pairs = puzzles.generate_puzzles(args.count, args.seed, 32, 46)

    results = []
    for group in settings_of(args.study, args.loops, args.visible_loops):
        reference = None
        for setting in group:
            solved, cost = solve(model, tokenizer, pairs, args.batch_size, **setting)
            reference = solved if reference is None else reference
            difference = solved.double() - reference.double()
            row = {
                **setting,
                "solved": solved.double().mean().item(),
                "difference": difference.mean().item(),
                "difference_standard_error": difference.std().item() / math.sqrt(len(pairs)),
                **cost,
            }
            results.append(row)
            print(json.dumps(row), flush=True)
    write_result(args, results=results)


if __name__ == "__main__":
    main()
