# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
6x6 Sudoku puzzles with exactly one solution: rows, columns and boxes of 2 x 3 cells hold the digits 1-6 once each.

All candidates of a board are one integer of 216 bits, as in examples/sudoku/puzzles.py: bit `36 * (digit - 1) + cell`
says that the digit is still possible in the cell.
"""

import random
from collections.abc import Iterator

SIDE, CELLS = 6, 36
DIGITS = "123456"
BLANK = "."
ALL = (1 << SIDE * CELLS) - 1


def units() -> list[list[int]]:
    """The cells of the 6 rows, 6 columns and 6 boxes."""
    rows = [[SIDE * r + c for c in range(SIDE)] for r in range(SIDE)]
    columns = [[SIDE * r + c for r in range(SIDE)] for c in range(SIDE)]
    boxes = [[SIDE * (r + i) + c + j for i in range(2) for j in range(3)] for r in (0, 2, 4) for c in (0, 3)]
    return rows + columns + boxes


def _bits(indices) -> int:
    return sum(1 << index for index in indices)


def _keep_mask(bit: int) -> int:
    """The candidates that can stay once candidate `bit` is placed."""
    digit, cell = divmod(bit, CELLS)
    excluded = {CELLS * other + cell for other in range(SIDE)}
    excluded |= {CELLS * digit + other for unit in units() if cell in unit for other in unit}
    return ALL & ~_bits(excluded - {bit})


KEEP = [_keep_mask(bit) for bit in range(SIDE * CELLS)]
CELL = [_bits(range(cell, SIDE * CELLS, CELLS)) for cell in range(CELLS)]
# Each rule says "one of these six candidates": the digits of a cell, or the places of a digit in a unit.
RULES = [*CELL, *(_bits(CELLS * digit + cell for cell in unit) for digit in range(SIDE) for unit in units())]


def _propagate(candidates: int) -> int:
    """Places all candidates that are the only one left for a rule, until there is none; 0 at a contradiction."""
    before = None
    while candidates != before:
        before = candidates
        for rule in RULES:
            left = candidates & rule
            if not left:
                return 0
            if left.bit_count() == 1:
                candidates &= KEEP[left.bit_length() - 1]
    return candidates


def _search(candidates: int, rng: random.Random | None = None) -> Iterator[int]:
    """All solutions that the candidates allow, in random order if `rng` is given."""
    candidates = _propagate(candidates)
    if not candidates:
        return
    if candidates.bit_count() == CELLS:
        yield candidates
        return
    _, branch = min((n, cell) for cell in range(CELLS) if (n := (candidates & CELL[cell]).bit_count()) > 1)
    bits = [bit for bit in range(branch, SIDE * CELLS, CELLS) if candidates >> bit & 1]
    if rng is not None:
        rng.shuffle(bits)
    for bit in bits:
        yield from _search(candidates & KEEP[bit], rng)


def _random_grid(rng: random.Random) -> list[int]:
    """The candidate bit of every cell of a random full grid; close to, but not exactly, uniform over all grids."""
    first_row = ALL
    for cell, digit in enumerate(rng.sample(range(SIDE), SIDE)):
        first_row &= KEEP[CELLS * digit + cell]
    solved = next(_search(first_row, rng))
    # The search fills some rows before others: a random symmetry makes all parts alike.
    rows, columns = random_lines(rng, 3, 2), random_lines(rng, 2, 3)
    bits = [(solved & CELL[SIDE * row + column]).bit_length() - 1 for row in rows for column in columns]
    return [CELLS * (bit // CELLS) + cell for cell, bit in enumerate(bits)]


def random_lines(rng: random.Random, bands: int, size: int) -> list[int]:
    """A random order of the six rows (3 bands of 2) or columns (2 of 3) that keeps those of a band together."""
    return [size * band + line for band in rng.sample(range(bands), bands) for line in rng.sample(range(size), size)]


def generate_puzzle(seed: int, index: int, min_clues: int, max_clues: int) -> tuple[str, str]:
    """A puzzle and its only solution, which depend on the arguments alone; the number of clues is uniform."""
    rng = random.Random(f"sudoku6/{seed}/{index}")
    target = rng.randint(min_clues, max_clues)
    while True:  # another grid where the clues cannot be taken away down to the target
        grid = _random_grid(rng)
        clues = set(grid)
        for bit in rng.sample(grid, CELLS):
            if len(clues) == target:
                break
            # Unique still, if no other digit is possible in the cell
            clues.remove(bit)
            candidates = ALL ^ 1 << bit
            for clue in clues:
                candidates &= KEEP[clue]
            if next(_search(candidates), None) is not None:
                clues.add(bit)
        if len(clues) == target:
            solution = "".join(DIGITS[bit // CELLS] for bit in grid)
            return "".join(DIGITS[bit // CELLS] if bit in clues else BLANK for bit in grid), solution


def generate_puzzles(count: int, seed: int, min_clues: int, max_clues: int) -> list[tuple[str, str]]:
    """`(puzzle, solution)` pairs of 36 characters, row by row; a longer list starts with the shorter one."""
    if not 8 <= min_clues <= max_clues <= CELLS:
        raise ValueError(f"clues from {min_clues} to {max_clues}: give 8 <= min_clues <= max_clues <= {CELLS}.")
    return [generate_puzzle(seed, index, min_clues, max_clues) for index in range(count)]
