# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Settings of `generate` against quality and cost, on the bundled Sudoku model.

    python benchmarks/sudoku_generation.py --study commit --count 1000 --output commit.json
    python benchmarks/sudoku_generation.py --study caches --count 1000 --output caches.json

`commit` compares rules of commitment: a fixed share of the blanks in every step, whatever is at least so likely, or
whatever stays within a joint entropy, besides what keeps the board on schedule. `caches` compares the approximate
caches where the board is filled in three blocks of three rows. Every setting solves the same puzzles; differences are
to the study's first setting with as many loops, and their standard errors are paired.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "sudoku"))

import puzzles  # noqa: E402

BLOCKS = {"block_length": 27, "max_denoising_steps": 4}
CACHES = [
    BLOCKS,
    *(
        {**BLOCKS, "cache_implementation": implementation, "cache_loops": loops, **refresh}
        for implementation in ("prefix", "dual")
        for loops in ("last", "each")
        for refresh in ({}, {"cache_refresh_interval": 2})
    ),
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


def solve(model, tokenizer, pairs, batch_size, **arguments):
    """Which puzzles are solved, `(count,)` bool, with mean forward passes, tokens per pass and FLOPs."""
    solved, passes, flops, blanks = [], [], [], []
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        inputs = tokenizer([puzzle for puzzle, _ in part], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=0, return_dict_in_generate=True, **arguments)
        answers = tokenizer.batch_decode(output.sequences)
        solved += [answer == solution for answer, (_, solution) in zip(answers, part, strict=True)]
        passes += output.forward_passes.tolist()
        flops += output.flops.tolist()
        blanks += (inputs["input_ids"] == model.config.mask_token_id).sum(-1).tolist()
    count = len(pairs)
    cost = {
        "forward_passes": sum(passes) / count,
        "tokens_per_forward": sum(blanks) / sum(passes),
        "gflop": sum(flops) / count / 1e9,
    }
    return torch.tensor(solved), cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=("commit", "caches"), default="commit")
    parser.add_argument("--model", default=str(ROOT), help="folder of the model (default: the bundled one)")
    parser.add_argument("--count", type=int, default=1000, help="number of puzzles (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the puzzles (default: 1)")
    parser.add_argument("--loops", type=int, nargs="+", default=[2, 6], help="num_loops (default: 2 6)")
    parser.add_argument("--visible-loops", type=int, help="loops of visible tokens where there are more")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--output", help="write the results as JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    pairs = puzzles.generate_puzzles(args.count, args.seed, 32, 46)

    results = []
    for num_loops in args.loops:
        loops = {"num_loops": num_loops}
        if args.visible_loops is not None and args.visible_loops < num_loops:
            loops["visible_loops"] = args.visible_loops
        reference = None
        for rule in {"commit": RULES, "caches": CACHES}[args.study]:
            solved, cost = solve(model, tokenizer, pairs, args.batch_size, **loops, **rule)
            reference = solved if reference is None else reference
            difference = solved.double() - reference.double()
            row = {
                **loops,
                **rule,
                "solved": solved.double().mean().item(),
                "difference": difference.mean().item(),
                "difference_standard_error": difference.std().item() / math.sqrt(len(pairs)),
                **cost,
            }
            results.append(row)
            print(json.dumps(row), flush=True)
    if args.output:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        record = {"study": args.study, "count": args.count, "seed": args.seed, **versions, "results": results}
        Path(args.output).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
