# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What does looping do to a model that was trained without loops? NELBO of Sudoku solutions given their clues, for every
window of layers, plain ("replace") and damped loops, at several numbers of loops. These make the table and the picture
of docs/convert.md:

    python examples/sudoku/puzzles.py --count 60000 --seed 0 --output train.txt
    python examples/sudoku/train.py --puzzles train.txt --output plain --max-train-loops 1 --tflop 90
    python benchmarks/training_free.py --model plain --output benchmarks/results/training_free.json \\
        --plot docs/training_free.png
"""

import json
from pathlib import Path

from common import begin, load, make_parser, puzzles, read_pairs, write_result

from loopmdm.convert.loop_window import candidate_windows
from loopmdm.evaluation import nelbo

PUZZLES, SAMPLES = 100, 16  # and masks of each puzzle
WIDTHS, LOOPS = (1, 2), [2, 3, 4]  # layers of a window, and how often they run


def measure(model, input_ids, maskable, seed: int) -> list[dict]:
    """One row for each window, update and number of loops."""
    config, rows = model.config, []  # changed in place, as no weight depends on it
    settings = {"maskable": maskable, "num_samples": SAMPLES, "batch_size": 64, "seed": seed}

    def record(loops: list[int]) -> None:
        mean, error = nelbo(model, input_ids, num_loops=loops, **settings).per_token()
        for i, num_loops in enumerate(loops):
            rows.append(
                {
                    "loop_start": config.loop_start,
                    "loop_end": config.loop_end,
                    "loop_update": config.loop_update,
                    "num_loops": num_loops,
                    "nelbo": mean[i].item(),
                    "standard_error": error[i].item(),
                }
            )

    record([1])
    for width in WIDTHS:
        for start, end in candidate_windows(config.num_hidden_layers, width):
            config.loop_start, config.loop_end = start, end
            for config.loop_update in ("damped", "replace"):
                record(LOOPS)
                found = "".join(f"  {row['num_loops']}: {row['nelbo']:.4f}" for row in rows[-len(LOOPS) :])
                print(f"layers {start}:{end}  {config.loop_update:8s}{found}", flush=True)
    return rows


def plot(rows: list[dict], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    plain = rows[0]["nelbo"]
    for update, panel in zip(("damped", "replace"), axes, strict=True):
        windows = sorted({(row["loop_start"], row["loop_end"]) for row in rows[1:]}, key=lambda w: (w[1] - w[0], w[0]))
        for start, end in windows:
            line = [row for row in rows[1:] if (row["loop_start"], row["loop_end"]) == (start, end)]
            line = [row for row in line if row["loop_update"] == update]
            panel.plot(
                [1, *(row["num_loops"] for row in line)],
                [plain, *(row["nelbo"] for row in line)],
                marker="o",
                linestyle="-" if end - start == 1 else "--",
                label=f"layers {start} to {end - 1}" if end - start > 1 else f"layer {start}",
            )
        panel.set_title(update)
        panel.set_xlabel("num_loops")
        panel.set_yscale("log")
    axes[0].set_ylabel("NELBO, nats per blank")
    axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="folder of a Sudoku model trained with --max-train-loops 1")
    parser.add_argument("--plot", help="picture to write")
    parser.set_defaults(seed=1)
    args = parser.parse_args()
    begin(args)

    model, tokenizer = load(args.model)
    if model.config.max_train_loops != 1:
        raise SystemExit(f"{args.model} was trained with loops; this study is about models that were not.")
    boards, solutions = read_pairs(tokenizer, puzzles.generate_puzzles(PUZZLES, args.seed, 32, 46))
    rows = measure(model, solutions, boards == model.config.mask_token_id, args.seed)
    print(f"without loops: {rows[0]['nelbo']:.4f} +- {rows[0]['standard_error']:.4f} nats per blank")
    if args.output:
        write_result(args, training=json.loads((Path(args.model) / "training.json").read_text()), rows=rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
