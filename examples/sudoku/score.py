# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Solve rate of a Sudoku model over a grid of loops and denoising steps.

    python examples/sudoku/score.py --model . --count 1000 --output scores.json

The puzzles are generated from `--seed`, which training does not use. A puzzle counts as solved when every blank is
right. Seconds are wall time of all puzzles together, layer passes are per puzzle.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import puzzles
import torch
import transformers
from transformers import AutoModel, AutoTokenizer


def load(folder: str):
    """The model, in eval mode, and its tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def answer(model, tokenizer, boards: list[str], num_loops: int, max_denoising_steps: int, batch_size: int = 100):
    """The model's answers to puzzles, as strings, and the layer passes spent on each."""
    answers, layer_passes = [], []
    for start in range(0, len(boards), batch_size):
        inputs = tokenizer(boards[start : start + batch_size], return_tensors="pt").to(model.device)
        outputs = model.generate(
            **inputs,
            max_new_tokens=0,
            num_loops=num_loops,
            max_denoising_steps=max_denoising_steps,
            return_dict_in_generate=True,
        )
        answers += tokenizer.batch_decode(outputs.sequences)
        config = model.config
        once = outputs.forward_passes * (config.num_hidden_layers - config.num_mid_layers)
        layer_passes += (once + outputs.loops * config.num_mid_layers).tolist()
    return answers, layer_passes


def score(model, tokenizer, pairs: list[tuple[str, str]], num_loops: int, max_denoising_steps: int) -> dict:
    """Solve rate, wall time in seconds and mean layer passes per puzzle."""
    start = time.perf_counter()
    answers, layer_passes = answer(model, tokenizer, [puzzle for puzzle, _ in pairs], num_loops, max_denoising_steps)
    seconds = time.perf_counter() - start
    solved = sum(given == solution for given, (_, solution) in zip(answers, pairs, strict=True))
    return {
        "num_loops": num_loops,
        "max_denoising_steps": max_denoising_steps,
        "solved": solved / len(pairs),
        "seconds": seconds,
        "layer_passes": sum(layer_passes) / len(pairs),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--count", type=int, default=1000, help="number of puzzles (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the puzzles (default: 1)")
    parser.add_argument("--minimal", action="store_true", help="puzzles of which no clue can be taken away")
    parser.add_argument("--min-clues", type=int, help="default: 32")
    parser.add_argument("--max-clues", type=int, help="default: 46")
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 2, 4, 6, 8, 12])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--output", help="write the results as JSON")
    args = parser.parse_args()

    try:
        fewest, most = puzzles.clue_range(args)
        pairs = puzzles.generate_puzzles(args.count, args.seed, fewest, most)
    except ValueError as error:
        parser.error(str(error))
    model, tokenizer = load(args.model)
    print("loops  steps  solved %  layer passes  seconds")
    rows = []
    for num_loops in args.loops:
        for steps in args.steps:
            row = score(model, tokenizer, pairs, num_loops, steps)
            rows.append(row)
            print(
                f"{num_loops:5d}  {steps:5d}  {100 * row['solved']:8.1f}  {row['layer_passes']:12.1f}"
                f"  {row['seconds']:7.1f}",
                flush=True,
            )
    if args.output:
        recipe = Path(args.model) / "training.json"  # written by train.py
        record = {
            "settings": {name: value for name, value in vars(args).items() if name not in ("model", "output")},
            "training": json.loads(recipe.read_text()) if recipe.is_file() else None,
            "machine": {
                "processor": _processor(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "rows": rows,
        }
        Path(args.output).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
