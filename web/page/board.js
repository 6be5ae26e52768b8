// Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
// Draws a board, and where it may be edited takes digits from the keyboard.

const MOST_CANDIDATES = 3;
const LEAST_CANDIDATE = 0.03; // probability from which a digit counts as a candidate

export class BoardView {
  /**
   * Draws into `element`. `edit(cell, digit)` is called with what a person types (null: read only), `inspect(cell)`
   * with the cell that is pointed at or focused.
   */
  constructor(element, rules, box, { label, edit = null, inspect }) {
    Object.assign(this, { element, rules, edit, inspect });
    element.setAttribute("role", "grid");
    element.setAttribute("aria-label", label);
    if (!edit) element.setAttribute("aria-readonly", "true");
    element.style.setProperty("--side", rules.side);
    this.cells = [];
    for (let row = 0; row < rules.side; row++) {
      const line = document.createElement("div");
      line.className = "row";
      line.setAttribute("role", "row");
      for (let column = 0; column < rules.side; column++) {
        const cell = document.createElement("div");
        cell.setAttribute("role", "gridcell");
        cell.tabIndex = -1;
        cell.className = "cell";
        cell.classList.toggle("edge-right", (column + 1) % box[1] === 0 && column + 1 < rules.side);
        cell.classList.toggle("edge-below", (row + 1) % box[0] === 0 && row + 1 < rules.side);
        const [digit, candidates] = [document.createElement("span"), document.createElement("span")];
        digit.className = "digit";
        candidates.className = "candidates";
        cell.append(digit, candidates);
        line.append(cell);
        this.cells.push({ cell, digit, candidates, shown: "" });
      }
      element.append(line);
    }
    this.cells[0].cell.tabIndex = 0;
    element.addEventListener("keydown", (event) => this.onKey(event));
    element.addEventListener("pointerdown", (event) => this.focus(this.indexOf(event.target)));
    for (const type of ["focusin", "pointermove"]) {
      element.addEventListener(type, (event) => this.inspect(this.indexOf(event.target)));
    }
  }

  indexOf(target) {
    return this.cells.findIndex(({ cell }) => cell.contains(target));
  }

  focus(index) {
    if (index < 0) return;
    for (const { cell } of this.cells) cell.tabIndex = -1;
    this.cells[index].cell.tabIndex = 0;
    this.cells[index].cell.focus();
  }

  onKey(event) {
    const { side } = this.rules;
    const index = this.indexOf(event.target);
    const [row, column] = [Math.floor(index / side), index % side];
    const moves = {
      ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1],
      ArrowUp: [row - 1, column],
      ArrowDown: [row + 1, column],
      Home: [row, 0],
      End: [row, side - 1],
    };
    if (index < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves) {
      const [y, x] = moves[event.key].map((place) => Math.min(Math.max(place, 0), side - 1));
      this.focus(y * side + x);
    } else if (this.edit && event.key >= "1" && event.key <= String(side) && event.key.length === 1) {
      this.edit(index, Number(event.key));
    } else if (this.edit && ["Backspace", "Delete", "0", "."].includes(event.key)) {
      this.edit(index, 0);
    } else {
      return;
    }
    event.preventDefault();
  }

  /**
   * Shows a state: `clues` and `canvas` (digits by cell), the `guesses` of blanks by cell, the cells that `changed`
   * their mind or were just `committed`, and those that `clash`, all sets.
   */
  draw({ clues, canvas, guesses, changed, committed, clashes }) {
    for (const [index, view] of this.cells.entries()) {
      const guess = canvas[index] ? null : guesses.get(index);
      const digit = canvas[index] || guess?.digit || 0;
      const kind = clues[index] ? "given" : canvas[index] ? "committed" : guess ? "guess" : "blank";
      const others = guess ? candidatesOf(guess) : [];
      const states = [
        kind,
        changed.has(index) && "changed",
        committed.has(index) && "fresh",
        clashes.has(index) && "clash",
      ].filter(Boolean);
      const confidence = guess ? Math.round(guess.confidence * 20) / 20 : 0;
      const shown = [digit, others.join(""), confidence, ...states].join();
      if (shown === view.shown) continue;
      view.shown = shown;
      view.digit.textContent = digit || "";
      view.candidates.dataset.digits = others.join(" "); // drawn by the style sheet: the label says them better
      view.cell.style.setProperty("--sure", confidence);
      view.cell.dataset.state = states.join(" ");
      const says = digit ? `${digit}, ${describe(kind, guess, others)}` : "blank";
      const place = `Row ${Math.floor(index / this.rules.side) + 1}, column ${(index % this.rules.side) + 1}`;
      view.cell.setAttribute("aria-label", `${place}: ${says}${clashes.has(index) ? ", against the rules" : ""}`);
    }
  }
}

/** Digits other than the chosen one that have a chance, the likeliest first. */
function candidatesOf({ digit, probabilities }) {
  return [...probabilities.entries()]
    .map(([i, probability]) => [i + 1, probability])
    .filter(([other, probability]) => other !== digit && probability >= LEAST_CANDIDATE)
    .sort((a, b) => b[1] - a[1])
    .slice(0, MOST_CANDIDATES)
    .map(([other]) => other);
}

function describe(kind, guess, others) {
  if (kind !== "guess") return kind;
  const doubt = others.length ? `, else ${others.join(" or ")}` : "";
  return `guessed, ${Math.round(guess.confidence * 100)} % sure${doubt}`;
}
