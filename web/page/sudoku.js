// Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
// The rules of Sudoku on boards of any size: reading, clashes, solutions, and new puzzles. A board is an array of
// digits, row by row, with 0 for a blank.

export class Rules {
  /** `side` cells a row, in boxes of `box` = [rows, columns]. */
  constructor(side, box) {
    this.side = side;
    this.cells = side * side;
    const [rows, columns] = box;
    const units = Array.from({ length: 3 * side }, () => []);
    for (let cell = 0; cell < this.cells; cell++) {
      const [row, column] = [Math.floor(cell / side), cell % side];
      const inBox = Math.floor(row / rows) * (side / columns) + Math.floor(column / columns);
      [row, side + column, 2 * side + inBox].forEach((unit) => units[unit].push(cell));
    }
    this.units = units;
    this.unitsOf = Array.from({ length: this.cells }, (_, cell) =>
      units.flatMap((members, unit) => (members.includes(cell) ? [unit] : [])),
    );
  }

  nameOf(unit) {
    return `${["Row", "Column", "Box"][Math.floor(unit / this.side)]} ${(unit % this.side) + 1}`;
  }

  /** The board that a text describes; throws an Error that says what is wrong with it. */
  parse(text) {
    const { side, cells } = this;
    const chars = [...text.replace(/\s/g, "")];
    const needed = `a ${side} × ${side} board takes ${cells}, row by row: 1 to ${side}, and . or 0 for a blank`;
    const wrong = chars.findIndex((char) => !(char === "." || (char >= "0" && char <= String(side))));
    if (wrong >= 0) throw new Error(`Character ${wrong + 1} is “${chars[wrong]}”; ${needed}.`);
    if (chars.length !== cells) throw new Error(`The text has ${chars.length} characters; ${needed}.`);
    return chars.map((char) => (char === "." ? 0 : Number(char)));
  }

  format(board) {
    return board.map((digit) => digit || ".").join("");
  }

  /** The cells that share their digit with another cell of a row, column or box. */
  clashes(board) {
    const clashing = new Set();
    for (const members of this.units) {
      for (const cell of members) {
        if (board[cell] && members.some((other) => other !== cell && board[other] === board[cell])) clashing.add(cell);
      }
    }
    return clashing;
  }

  /** The first contradiction among the clues, in words; null where there is none. */
  contradiction(board) {
    for (const [unit, members] of this.units.entries()) {
      const digits = members.map((cell) => board[cell]).filter((digit) => digit > 0);
      const twice = digits.find((digit, i) => digits.indexOf(digit) !== i);
      if (twice) return `${this.nameOf(unit)} has more than one ${twice}`;
    }
    return null;
  }

  /** Solutions of a board, up to `limit`. `visits` bounds the search; where it does not suffice, `complete` is false. */
  solve(board, limit = 2, visits = 20000, random = null) {
    const { side, cells, unitsOf } = this;
    const full = (1 << side) - 1;
    const used = new Int32Array(3 * side);
    const grid = board.slice();
    const solutions = [];
    let complete = true;
    const place = (cell, digit) => unitsOf[cell].forEach((unit) => (used[unit] ^= 1 << (digit - 1)));
    if (this.contradiction(board)) return { solutions, complete };
    grid.forEach((digit, cell) => digit && place(cell, digit));
    const search = () => {
      if (--visits < 0) return (complete = false);
      let [target, options, fewest] = [-1, 0, side + 1];
      for (let cell = 0; cell < cells && fewest > 1; cell++) {
        if (grid[cell]) continue;
        const free = full & ~unitsOf[cell].reduce((bits, unit) => bits | used[unit], 0);
        const count = bitCount(free);
        if (count < fewest) [target, options, fewest] = [cell, free, count];
      }
      if (target < 0) return solutions.push(grid.slice()) < limit;
      const digits = [];
      for (let digit = 1; digit <= side; digit++) if (options & (1 << (digit - 1))) digits.push(digit);
      if (random) shuffle(digits, random);
      for (const digit of digits) {
        grid[target] = digit;
        place(target, digit);
        const goesOn = search();
        place(target, digit);
        grid[target] = 0;
        if (!goesOn) return false;
      }
      return true;
    };
    search();
    return { solutions, complete };
  }

  /** A puzzle with exactly one solution and about `clues` clues. */
  generate(clues, random = Math.random) {
    const blank = new Array(this.cells).fill(0);
    let [grid] = this.solve(blank, 1, 2000, random).solutions;
    while (!grid) [grid] = this.solve(blank, 1, 2000, random).solutions;
    let left = this.cells;
    for (const cell of shuffle([...grid.keys()], random)) {
      if (left <= clues) break;
      const digit = grid[cell];
      grid[cell] = 0;
      const { solutions, complete } = this.solve(grid, 2, 2000);
      if (complete && solutions.length === 1) left--;
      else grid[cell] = digit;
    }
    return grid;
  }
}

function bitCount(bits) {
  let count = 0;
  for (; bits; bits &= bits - 1) count++;
  return count;
}

function shuffle(values, random) {
  for (let i = values.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [values[i], values[j]] = [values[j], values[i]];
  }
  return values;
}
