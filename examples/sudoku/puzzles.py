# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Sudoku puzzles with exactly one solution: a seeded generator, an exact solver and a few helpers.

    python examples/sudoku/puzzles.py --count 60000 --seed 0 --processes 2 --output train.txt
    python examples/sudoku/puzzles.py --minimal --count 40000 --unlike held_out.txt --output minimal.txt

A puzzle is a string of 81 characters, row by row: the digits 1-9, and `.` (or `0`) for a blank cell.

The solver keeps all candidates of a board in one integer of 729 bits: bit `81 * (digit - 1) + 9 * row + column` says
that the digit is still possible in the cell. An integer operation then acts on all cells, rows, columns and boxes at
once, so that plain Python generates more than a thousand puzzles per second and core.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

BLANKS = ".0"
DIGITS = "123456789"
BOX_OFFSETS = (0, 1, 2, 9, 10, 11, 18, 19, 20)
# Blanking cells in random order leaves 24.4 clues on average when no other can go, and hardly ever less than 22 (no
# puzzle has less than 17).
FEWEST_CLUES = 22


def _bits(indices) -> int:
    return sum(1 << index for index in indices)


def _keep_mask(bit: int) -> int:
    """The candidates that can stay once candidate `bit` is placed: itself, and all that it does not exclude."""
    digit, cell = divmod(bit, 81)
    row, column = divmod(cell, 9)
    excluded = {81 * other + cell for other in range(9)}
    for other in range(81):
        r, c = divmod(other, 9)
        if r == row or c == column or (r // 3 == row // 3 and c // 3 == column // 3):
            excluded.add(81 * digit + other)
    return ALL & ~_bits(excluded - {bit})


ALL = (1 << 729) - 1
KEEP = [_keep_mask(bit) for bit in range(729)]
CELL = [_bits(81 * digit + cell for digit in range(9)) for cell in range(81)]
# The cells of every row, column and box.
UNITS = [
    _bits(unit)
    for i in range(9)
    for unit in (range(9 * i, 9 * i + 9), range(i, 81, 9), [27 * (i // 3) + 3 * (i % 3) + j for j in BOX_OFFSETS])
]

# Every rule of Sudoku says "one of these nine candidates": the nine columns of a (digit, row), the nine rows of a
# (digit, column), the nine cells of a (digit, box), the nine digits of a cell. Each kind of rule has 81 instances. Its
# HEADS are the first candidates of the instances; a head times its SPREAD gives the nine candidates.
ROW_HEADS = _bits(bit for bit in range(729) if bit % 9 == 0)
ROW_SPREAD = _bits(range(9))
COLUMN_HEADS = _bits(bit for bit in range(729) if bit % 81 < 9)
COLUMN_SPREAD = _bits(range(0, 81, 9))
BOX_HEADS = _bits(bit for bit in range(729) if bit % 3 == 0 and bit % 81 // 9 % 3 == 0)
BOX_SPREAD = _bits(BOX_OFFSETS)
CELL_HEADS = _bits(range(81))
CELL_SPREAD = _bits(range(0, 729, 81))


def _fold(some: int, many: int, stride: int) -> tuple[int, int]:
    """Counts three groups of candidates into the first: is there one candidate in them, and is there more than one."""
    some1, some2 = some >> stride, some >> 2 * stride
    two = some | some1
    many |= many >> stride | many >> 2 * stride | some & some1 | two & some2
    return two | some2, many


def _propagate(candidates: int) -> int:
    """Places naked and hidden singles until there are none left; 0 if the candidates contradict a rule."""
    while True:
        # Count 9 = 3 x 3 candidates of each rule. Only the bits of the heads are meaningful in the end.
        some3 = candidates >> 1
        two = candidates | some3
        last = candidates >> 2
        many3 = candidates & some3 | two & last
        some3 = two | last
        some, many_row = _fold(some3, many3, 3)
        if some & ROW_HEADS != ROW_HEADS:
            return 0
        some, many_box = _fold(some3, many3, 9)
        if some & BOX_HEADS != BOX_HEADS:
            return 0
        some, many_column = _fold(*_fold(candidates, 0, 9), 27)
        if some & COLUMN_HEADS != COLUMN_HEADS:
            return 0
        some, many_cell = _fold(*_fold(candidates, 0, 81), 243)
        if some & CELL_HEADS != CELL_HEADS:
            return 0
        # All candidates that are the only one left for a rule of each kind.
        row = (ROW_HEADS & ~many_row) * ROW_SPREAD
        box = (BOX_HEADS & ~many_box) * BOX_SPREAD
        column = (COLUMN_HEADS & ~many_column) * COLUMN_SPREAD
        cell = (CELL_HEADS & ~many_cell) * CELL_SPREAD
        # A single for all four kinds of rule excludes nothing any more: it has been placed already.
        singles = candidates & (row | box | column | cell) & ~(row & box & column & cell)
        if not singles:
            return candidates
        while singles:
            bit = singles.bit_length() - 1
            candidates &= KEEP[bit]
            singles ^= 1 << bit


def _search(candidates: int, rng: random.Random | None = None) -> Iterator[int]:
    """Yields all solutions that the candidates allow, in random order if `rng` is given."""
    candidates = _propagate(candidates)
    if not candidates:
        return
    if candidates.bit_count() == 81:
        yield candidates
        return
    fewest = 10
    for cell in range(81):
        count = (candidates & CELL[cell]).bit_count()
        if 1 < count < fewest:
            fewest, branch = count, cell
        if fewest == 2:
            break
    bits = [bit for bit in range(branch, 729, 81) if candidates >> bit & 1]
    if rng is not None:
        rng.shuffle(bits)
    for bit in bits:
        yield from _search(candidates & KEEP[bit], rng)


def _check(puzzle: str) -> None:
    if not isinstance(puzzle, str) or len(puzzle) != 81 or not set(puzzle) <= set(DIGITS + BLANKS):
        raise ValueError(
            f"puzzle is {puzzle!r}: give 81 characters, row by row: digits 1-9, and '.' or '0' for a blank"
        )


def _parse(puzzle: str) -> int:
    """The candidates that the clues of a puzzle leave."""
    _check(puzzle)
    candidates = ALL
    for cell, char in enumerate(puzzle):
        if char not in BLANKS:
            candidates &= KEEP[81 * (int(char) - 1) + cell]
    return candidates


def _format(solved: int) -> str:
    """The string of a board with one candidate in each cell."""
    return "".join(DIGITS[(solved >> cell & CELL[0]).bit_length() // 81] for cell in range(81))


def solve(puzzle: str) -> str | None:
    """Returns a solution of the puzzle (the only one, if it is a proper puzzle), or None if there is none."""
    return next(map(_format, _search(_parse(puzzle))), None)


def count_solutions(puzzle: str, limit: int = 2) -> int:
    """Counts the solutions of the puzzle, up to `limit`."""
    if limit < 1:
        raise ValueError(f"limit is {limit}: give a number of at least 1")
    return sum(1 for _ in itertools.islice(_search(_parse(puzzle)), limit))


def solved_by_singles(puzzle: str) -> bool:
    """Whether naked and hidden singles alone, without any guess, solve the puzzle."""
    return _propagate(_parse(puzzle)).bit_count() == 81


def technique(puzzle: str) -> str:
    """
    What deduction without guesses needs for a puzzle with one solution: "singles" (naked and hidden ones), "pairs"
    (naked and hidden pairs, pointing and claiming too), or "beyond". Raises a ValueError if it has no solution.
    """
    candidates, before = _propagate(_parse(puzzle)), None
    level = "singles" if candidates.bit_count() == 81 else "pairs"
    while candidates not in (0, before):
        before, candidates = candidates, _propagate(_without_pairs(candidates))
    if not candidates:
        raise ValueError(f"puzzle is {puzzle!r}: its clues contradict each other; give a puzzle with one solution")
    return level if candidates.bit_count() == 81 else "beyond"


def _without_pairs(candidates: int) -> int:
    """Takes away what pairs, pointing and claiming exclude; singles have been placed."""
    for unit in UNITS:
        places = [candidates >> 81 * digit & unit for digit in range(9)]
        for digit, place in enumerate(places):
            for other in UNITS:  # all places of the digit are in another unit too
                if other != unit and not place & ~other:
                    candidates &= ~((other & ~unit) << 81 * digit)
            if place.bit_count() == 2 and place in places[:digit]:  # two digits share their two places
                pair = (digit, places.index(place))
                candidates &= ~sum(place << 81 * third for third in range(9) if third not in pair)
        cells = [cell for cell in range(81) if unit >> cell & 1]
        options = [(candidates & CELL[cell]) >> cell for cell in cells]
        for index, option in enumerate(options):
            if option.bit_count() == 2 and option in options[:index]:  # two cells share their two digits
                pair = (cells[index], cells[options.index(option)])
                for cell in cells:
                    candidates &= ~(option << cell if cell not in pair else 0)
    return candidates


def _random_lines(rng: random.Random) -> list[int]:
    """A random order of the nine rows (or columns) that keeps the three of a band together."""
    return [3 * band + line for band in rng.sample(range(3), 3) for line in rng.sample(range(3), 3)]


def _random_grid(rng: random.Random) -> list[int]:
    """A random full grid, as the candidate bit of each cell; close to, but not exactly, uniform over all grids."""
    candidates = ALL
    for corner in (0, 30, 60):  # the boxes on the diagonal do not constrain each other
        for offset, digit in zip(BOX_OFFSETS, rng.sample(range(9), 9), strict=True):
            candidates &= KEEP[81 * digit + corner + offset]
    solution = _format(next(_search(candidates, rng)))
    # The search fills some parts of the board before others: a random symmetry makes all parts alike.
    rows, columns = _random_lines(rng), _random_lines(rng)
    row_step, column_step = rng.choice(((9, 1), (1, 9)))
    cells = [row_step * row + column_step * column for row in rows for column in columns]
    return [81 * DIGITS.index(solution[source]) + cell for cell, source in enumerate(cells)]


def _dig(grid: list[int], target: int | None, rng: random.Random) -> set[int] | None:
    """
    Blanks cells in random order while the solution stays unique. Returns the bits of `target` clues, or None if so few
    are not reached. Without a target the puzzle is minimal: a clue that was needed once is needed for good.
    """
    clues = set(grid)
    for bit in rng.sample(grid, 81):
        if len(clues) == target:
            break
        # The solution stays unique if no digit but the removed one is possible in the cell. Propagation alone
        # settles most cells, after a single round for many.
        clues.remove(bit)
        candidates = ALL ^ 1 << bit
        for clue in clues:
            candidates &= KEEP[clue]
        if next(_search(candidates), None) is not None:
            clues.add(bit)
    return clues if target in (None, len(clues)) else None


def _generate(index: int, seed: int, min_clues: int | None, max_clues: int | None) -> tuple[str, str]:
    # Seeding with a string goes through SHA-512, so neighbouring seeds and indices are unrelated.
    rng = random.Random(f"minimal/{seed}/{index}" if min_clues is None else f"{seed}/{index}")
    target = None if min_clues is None else rng.randint(min_clues, max_clues)
    clues = None
    while clues is None:  # a new grid, for the same target: the number of clues stays uniform
        grid = _random_grid(rng)
        clues = _dig(grid, target, rng)
    solution = "".join(DIGITS[bit // 81] for bit in grid)
    return "".join(DIGITS[bit // 81] if bit in clues else "." for bit in grid), solution


def _stream(
    count: int, seed: int, min_clues: int | None, max_clues: int | None, processes: int
) -> Iterator[tuple[str, str]]:
    """Checks the arguments of `generate_puzzles` and returns an iterator over its puzzles; minimal ones for None."""
    for name, value, least in (("count", count, 0), ("processes", processes, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}: give a number of at least {least}")
    if min_clues is not None and not FEWEST_CLUES <= min_clues <= max_clues <= 81:
        raise ValueError(
            f"min_clues is {min_clues} and max_clues is {max_clues}: "
            f"give {FEWEST_CLUES} <= min_clues <= max_clues <= 81 (fewer clues are too rare to find by random digging)"
        )
    generate = functools.partial(_generate, seed=seed, min_clues=min_clues, max_clues=max_clues)
    return map(generate, range(count)) if processes == 1 else _parallel(generate, count, processes)


def _parallel(generate: Callable[[int], tuple[str, str]], count: int, processes: int) -> Iterator[tuple[str, str]]:
    with multiprocessing.Pool(processes) as pool:
        yield from pool.imap(generate, range(count), chunksize=100)


def generate_puzzles(
    count: int, seed: int, min_clues: int | None, max_clues: int | None, processes: int = 1
) -> list[tuple[str, str]]:
    """
    Generates `(puzzle, solution)` pairs; each puzzle has one solution.

    The number of clues is uniform in `[min_clues, max_clues]`. With None for both the puzzles are minimal: no clue can
    be taken away; 20 to 30 are left, 24.4 on average. A puzzle depends only on the seed, its index and the
    range of clues: any number of processes gives the same list, and a longer list starts with the shorter one.
    """
    return list(_stream(count, seed, min_clues, max_clues, processes))


def fingerprint(puzzle: str, solution: str) -> tuple:
    """
    The same for all puzzles that relabelling, transposition and permutations of bands, of stacks and of the rows and
    columns in them turn into each other: puzzles of different fingerprints are different up to symmetry.
    """
    transposed = ["".join(board[9 * i + j] for j in range(9) for i in range(9)) for board in (puzzle, solution)]
    return tuple(sorted((_fingerprint(puzzle, solution), _fingerprint(*transposed))))


def _fingerprint(puzzle: str, solution: str) -> tuple:
    rows = [solution[9 * row : 9 * row + 9] for row in range(9)]
    clues = [sum(cell not in BLANKS for cell in puzzle[9 * row : 9 * row + 9]) for row in range(9)]
    bands = []
    for band in (range(3), range(3, 6), range(6, 9)):
        pairs = [_cycles(rows[i], rows[j]) for i in band for j in band if i < j]
        bands.append((tuple(sorted(clues[row] for row in band)), tuple(sorted(pairs))))
    others = [_cycles(rows[i], rows[j]) for i in range(9) for j in range(9) if i // 3 < j // 3]
    return tuple(sorted(bands)), tuple(sorted(others))


def _cycles(first: str, second: str) -> tuple[int, ...]:
    """Cycle lengths, sorted, of the permutation of the digits that turns one row into another (or back)."""
    successor, lengths = dict(zip(first, second, strict=True)), []
    while successor:
        start, digit = next(iter(successor.items()))
        del successor[start]
        lengths.append(1)
        while digit != start:
            digit = successor.pop(digit)
            lengths[-1] += 1
    return tuple(sorted(lengths))


def is_valid_solution(puzzle: str, answer: str) -> bool:
    """Whether the answer is a full board that keeps the clues and has each digit once per row, column and box."""
    _check(puzzle)
    if len(answer) != 81:
        return False
    if any(clue not in BLANKS and clue != digit for clue, digit in zip(puzzle, answer, strict=True)):
        return False
    rows = [answer[9 * i : 9 * i + 9] for i in range(9)]
    columns = [answer[i::9] for i in range(9)]
    boxes = ["".join(answer[27 * (i // 3) + 3 * (i % 3) + j] for j in BOX_OFFSETS) for i in range(9)]
    return all(set(unit) == set(DIGITS) for unit in rows + columns + boxes)


def draw_board(puzzle: str) -> str:
    """Draws a board as plain text."""
    _check(puzzle)
    line = "+---------+---------+---------+"
    lines = [line]
    for row in range(9):
        cells = [f" {'.' if cell in BLANKS else cell} " for cell in puzzle[9 * row : 9 * row + 9]]
        lines.append("|".join(["", *("".join(cells[box : box + 3]) for box in (0, 3, 6)), ""]))
        if row % 3 == 2:
            lines.append(line)
    return "\n".join(lines)


def read_puzzles(path: str | os.PathLike) -> list[tuple[str, str]]:
    """Reads a file of `puzzle solution` lines, as the command line writes it."""
    pairs = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            fields = line.split()
            try:
                if len(fields) != 2:
                    raise ValueError(f"{len(fields)} fields: a line has two, a puzzle and its solution")
                if not is_valid_solution(*fields):
                    raise ValueError(f"{fields[1]!r} is not a solution of the puzzle: correct or remove the line")
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            pairs.append((fields[0], fields[1]))
    return pairs


def _write(path: Path, pairs: Iterator[tuple[str, str]], count: int) -> None:
    """Writes the file in one step, so that no other program ever sees a part of it; progress goes to stderr."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the path of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder: create it, or give a path in another folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for done, (puzzle, solution) in enumerate(pairs, start=1):
                file.write(f"{puzzle} {solution}\n")
                if done % 1000 == 0 or done == count:
                    print(f"\r{done}/{count} puzzles", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def clue_range(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """The fewest and the most clues that `--minimal`, `--min-clues` and `--max-clues` ask for; None if minimal."""
    given = (args.min_clues, args.max_clues)
    if args.minimal and given != (None, None):
        raise ValueError("--minimal leaves as many clues as are needed: leave --min-clues and --max-clues out")
    return given if args.minimal else tuple(32 + 14 * i if n is None else n for i, n in enumerate(given))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main() -> None:
    parser = _Parser(description="Generate Sudoku puzzles that have exactly one solution.")
    parser.add_argument("--count", type=int, required=True, help="number of puzzles")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other puzzles (default: 0)")
    parser.add_argument("--min-clues", type=int, help="fewest clues of a puzzle (default: 32)")
    parser.add_argument("--max-clues", type=int, help="most clues of a puzzle (default: 46)")
    parser.add_argument("--minimal", action="store_true", help="no clue can be taken away")
    parser.add_argument("--unlike", type=Path, help="leave out what may be a puzzle of this file up to symmetry")
    parser.add_argument("--processes", type=int, default=1, help="does not change the puzzles (default: 1)")
    parser.add_argument("--output", type=Path, required=True, help="file to write, one `puzzle solution` per line")
    args = parser.parse_args()
    try:
        clues = clue_range(args)
        pairs = _stream(args.count, args.seed, *clues, args.processes)
        if args.unlike is not None:
            known = {fingerprint(*pair) for pair in read_puzzles(args.unlike)}
            pairs = (pair for pair in pairs if fingerprint(*pair) not in known)
        _write(args.output, pairs, args.count)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
