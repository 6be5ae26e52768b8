# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Shows what loops buy on the bundled Sudoku model: one puzzle at one loop and at many, then a table.

    python examples/sudoku/demo.py

The row of the model without loops comes from baseline.json, which score.py wrote, since that model's weights are not
shipped; everything else is computed here and now.
"""

import argparse
import json
from pathlib import Path

import puzzles
import score

HERE = Path(__file__).resolve().parent
LOOPS, STEPS = (1, 2, 4, 6, 12), (1, 2, 4)


def side_by_side(*boards: str) -> str:
    return "\n".join("   ".join(lines) for lines in zip(*(board.splitlines() for board in boards), strict=True))


def show_one(model, tokenizer, pairs: list[tuple[str, str]], num_loops: int) -> None:
    """Draws the first puzzle that one loop gets wrong and `num_loops` loops get right, in one denoising step."""
    boards = [puzzle for puzzle, _ in pairs]
    few, _ = score.answer(model, tokenizer, boards, num_loops=1, max_denoising_steps=1)
    many, _ = score.answer(model, tokenizer, boards, num_loops=num_loops, max_denoising_steps=1)
    for (puzzle, solution), wrong, right in zip(pairs, few, many, strict=True):
        if wrong != solution and right == solution:
            errors = sum(a != b for a, b in zip(wrong, solution, strict=True))
            drawn = [puzzles.draw_board(board, solution) for board in (puzzle, wrong, right)]
            titles = (
                f"{f'{81 - puzzle.count(chr(46))} clues':34}"
                f"{f'1 loop: {errors} wrong (x)':34}{f'{num_loops} loops: solved':34}"
            )
            print(f"All blanks filled in one denoising step, by the same weights:\n\n{titles.rstrip()}")
            print(side_by_side(*drawn) + "\n")
            return
    print(f"No puzzle of {len(pairs)} is wrong at one loop and solved at {num_loops}.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE.parents[1]), help="folder of the model (default: the bundled one)")
    parser.add_argument("--count", type=int, default=200, help="puzzles of the table (default: 200)")
    args = parser.parse_args()

    model, tokenizer = score.load(args.model)
    config = model.config
    print(
        f"LoopMDM, {model.num_parameters() / 1e6:.1f}M parameters: {config.num_hidden_layers} layers, of which "
        f"{config.num_mid_layers} are looped, trained with 1 to {config.max_train_loops} loops.\n"
    )
    pairs = puzzles.generate_puzzles(args.count, seed=1, min_clues=32, max_clues=46)
    show_one(model, tokenizer, pairs[:50], config.max_train_loops)

    print(f"Solved puzzles out of {args.count} (32 to 46 clues), by loops and denoising steps.")
    print("Cost is in layer passes per puzzle and in milliseconds per puzzle.\n")
    header = "".join(f"| {f'{n} step' + ('s' if n > 1 else ''):^23}" for n in STEPS)
    print(f"{'':17}{header}\n{'':17}{'| solved layers    ms     ' * len(STEPS)}".rstrip())

    def cell(row: dict, count: int) -> str:
        milliseconds = 1000 * row["seconds"] / count
        return f"| {100 * row['solved']:5.1f}% {row['layer_passes']:6.0f} {milliseconds:6.1f}   "

    for num_loops in LOOPS:
        print(f"{f'{num_loops} loop' + ('s' if num_loops > 1 else ''):17}", end="", flush=True)
        for steps in STEPS:
            print(cell(score.score(model, tokenizer, pairs, num_loops, steps), args.count), end="", flush=True)
        print()
    baseline = json.loads((HERE / "baseline.json").read_text())
    rows = {row["max_denoising_steps"]: row for row in baseline["rows"]}
    count, tflop = baseline["settings"]["count"], baseline["training"]["training_tflop"]
    print(f"{'no loops (*)':17}{''.join(cell(rows[steps], count) for steps in STEPS)}")
    print(
        f"\n(*) A model of the same size trained without loops on as many FLOPs ({tflop:.0f} TFLOP), measured before\n"
        f"    on {count} puzzles (see examples/sudoku/README.md), so its times are another run's."
    )


if __name__ == "__main__":
    main()
