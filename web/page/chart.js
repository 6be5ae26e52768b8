// Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
// The measured solve rates by loops and steps as a table of buttons, with a ring where the sliders stand.

export class Chart {
  /** `measured` holds [loops, steps, share solved] rows; `choose(loops, steps)` is called with what is clicked. */
  constructor(table, ring, measured, choose) {
    this.ring = ring;
    this.loops = [...new Set(measured.rows.map(([loops]) => loops))].sort((a, b) => a - b);
    this.steps = [...new Set(measured.rows.map(([, steps]) => steps))].sort((a, b) => a - b);
    const solved = new Map(measured.rows.map(([loops, steps, share]) => [`${loops},${steps}`, share]));
    const head = table.createTHead().insertRow();
    head.append(cellOf("th", "Loops", "col"), ...this.steps.map((n) => cellOf("th", counted(n, "step"), "col")));
    const body = table.createTBody();
    this.cells = this.loops.map((loops) => {
      const row = body.insertRow();
      row.append(cellOf("th", loops, "row"));
      return this.steps.map((steps) => {
        const share = solved.get(`${loops},${steps}`);
        const cell = row.insertCell();
        if (share === undefined) return cell;
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = (share * 100).toFixed(1);
        button.style.setProperty("--share", share);
        button.setAttribute("aria-label", `${counted(loops, "loop")}, ${counted(steps, "step")}: ${button.textContent} % solved`);
        button.addEventListener("click", () => choose(loops, steps));
        cell.append(button);
        return cell;
      });
    });
  }

  /** Moves the ring, between the cells on a logarithmic scale. Returns whether the point lies within the grid. */
  point(loops, steps) {
    const [row, below] = place(this.loops, loops);
    const [column, right] = place(this.steps, steps);
    const [from, to] = [this.cells[row][column], this.cells[Math.ceil(row + below)][Math.ceil(column + right)]];
    const x = from.offsetLeft + (to.offsetLeft - from.offsetLeft) * right;
    const y = from.offsetTop + (to.offsetTop - from.offsetTop) * below;
    this.ring.style.translate = `${x}px ${y}px`;
    this.ring.style.width = `${from.offsetWidth}px`;
    this.ring.style.height = `${from.offsetHeight}px`;
    return loops <= this.loops.at(-1) && steps <= this.steps.at(-1);
  }
}

/** Index of the last value that is not above `wanted`, and how far `wanted` is on the way to the next, 0 to 1. */
function place(values, wanted) {
  const index = Math.max(values.findLastIndex((value) => value <= wanted), 0);
  const next = values[index + 1];
  const share = next === undefined ? 0 : Math.log(wanted / values[index]) / Math.log(next / values[index]);
  return [index, Math.min(Math.max(share, 0), 1)];
}

function cellOf(tag, text, scope) {
  const cell = document.createElement(tag);
  cell.textContent = text;
  cell.scope = scope;
  return cell;
}

export const counted = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;
