# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Shows what loops buy on the bundled Sudoku model: one puzzle loop after loop, then a table.

python examples/sudoku/demo.py
"""

import argparse
from pathlib import Path

import puzzles
import score
from rich.console import Console
from rich.text import Text

from loopmdm_cli.drafts import COLOUR_KEY, colour

HERE = Path(__file__).resolve().parent
LOOPS, STEPS = (1, 4, 8, 16), (1, 2)
console = Console(highlight=False)


def errors(board: str, solution: str) -> int:
    return sum(a != b for a, b in zip(board, solution, strict=True))


def draw(board: str, puzzle: str, solution: str, confidence: list[float]) -> list[Text]:
    """Nine lines of 18 columns. Clues are dim, answers coloured by confidence; an `x` follows what is wrong."""
    cells = []
    for given, clue, right, sure in zip(board, puzzle, solution, confidence, strict=True):
        cells.append((given + (" " if given == right else "x"), "dim" if clue == given else f"bold {colour(sure)}"))
    return [Text.assemble(*cells[start : start + 9]) for start in range(0, 81, 9)]


def confidence(model, tokenizer, puzzle: str, num_loops: int) -> list[float]:
    """The probability that one step gives to each of its answers; NaN for clues."""
    inputs = tokenizer(puzzle, return_tensors="pt").to(model.device)
    settings = {"max_new_tokens": 0, "num_loops": num_loops, "max_denoising_steps": 1}
    output = model.generate(**inputs, **settings, output_trace=True, return_dict_in_generate=True)
    return output.trace[0].confidence[0].tolist()


def show_one(model, tokenizer, pairs: list[tuple[str, str]]) -> None:
    """Draws the puzzle that loops help most: what the model would fill in if it stopped after each number of loops."""
    given = [puzzle for puzzle, _ in pairs]
    answers = zip(*(score.answer(model, tokenizer, given, loops, 1)[0] for loops in LOOPS), strict=True)
    found = [(puzzle, solution, boards) for (puzzle, solution), boards in zip(pairs, answers, strict=True)]
    solved = [one for one in found if one[2][-1] == one[1]]
    if not solved:
        console.print(f"None of {len(pairs)} puzzles is solved at {LOOPS[-1]} loops.\n")
        return
    # The most cells that are wrong at first; of as many, the most that are right soon
    puzzle, solution, boards = max(solved, key=lambda one: [errors(board, one[1]) for board in one[2]])
    clues = 81 - puzzle.count(".")
    console.print(puzzles.draw_board(puzzle))
    console.print(f"\n{clues} clues. All {81 - clues} blanks at once, in a single denoising step, after each loop:\n")
    counts = [errors(board, solution) for board in boards]
    titles = [
        f"loop {loops}: {f'{wrong} wrong' if wrong else 'solved'}" for loops, wrong in zip(LOOPS, counts, strict=True)
    ]
    console.print("  ".join(f"{title:18}" for title in titles).rstrip())
    sure = (confidence(model, tokenizer, puzzle, loops) for loops in LOOPS)
    drawn = (draw(board, puzzle, solution, one) for board, one in zip(boards, sure, strict=True))
    for lines in zip(*drawn, strict=True):
        console.print(Text("  ").join(lines))
    if console.is_terminal and not console.no_color:
        console.print(f"\n{COLOUR_KEY}.")
    console.print("\nThe same weights each time: a loop mends what the one before got wrong (x).\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE.parents[1]), help="folder of the model (default: the bundled one)")
    parser.add_argument("--count", type=int, default=50, help="puzzles of the table (default: 50)")
    args = parser.parse_args()

    model, tokenizer = score.load(args.model)
    config = model.config
    print(
        f"LoopMDM, {model.num_parameters() / 1e6:.1f}M parameters: {config.num_hidden_layers} layers, "
        f"{config.num_mid_layers} of them looped, up to {config.max_train_loops} times.\n"
    )
    pairs = puzzles.generate_puzzles(args.count, seed=1, min_clues=None, max_clues=None)
    show_one(model, tokenizer, pairs[:25])

    print(f"Solved minimal puzzles out of {args.count} (no clue can go), by loops and denoising steps,")
    print("and what one costs in passes through a layer and in milliseconds.\n")
    header = "".join(f"| {f'{n} step' + ('s' if n > 1 else ''):^23}" for n in STEPS)
    print(f"{'':17}{header}\n{'':17}{'| solved layers    ms    ' * len(STEPS)}".rstrip())

    def cell(row: dict, count: int) -> str:
        milliseconds = 1000 * row["seconds"] / count
        return f"| {100 * row['solved']:5.1f}% {row['layer_passes']:6.0f} {milliseconds:6.1f}   "

    for num_loops in LOOPS:
        print(f"{f'{num_loops} loop' + ('s' if num_loops > 1 else ''):17}", end="", flush=True)
        for steps in STEPS:
            print(cell(score.score(model, tokenizer, pairs, num_loops, steps), args.count), end="", flush=True)
        print()


if __name__ == "__main__":
    main()
