// Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
// One run of a puzzle on both sides: what the worker has computed so far, and what it looks like at any place.
//
// Places are numbered. 0 is the bare puzzle; then come, for every step, a place for each loop and one for the commit.

// A run of more loops is computed twice: first the answers alone, then what the model would say after every loop.
const LOOPS_READ_AT_ONCE = 60;
let lastId = 0;

export class Run {
  constructor({ clues, loops, steps, rule }, about) {
    this.id = ++lastId;
    Object.assign(this, { clues, loops, rule, about });
    this.sideLoops = [1, loops];
    this.blanks = clues.filter((digit) => digit === 0).length;
    this.wantedSteps = steps;
    this.steps = Math.min(steps, this.blanks); // fewer where a rule commits more
    this.sides = [[], []]; // of each side a list of steps: { frames, commit }
    this.isDone = false; // whether the answers are known
    this.isRead = loops * this.steps <= LOOPS_READ_AT_ONCE; // whether the loops between are read, or asked for
    this.answers = null;
  }

  get last() {
    return this.steps * (this.loops + 1);
  }

  /** What the worker is to compute: the answers, and the loops between where they are few, or asked for. */
  request() {
    const { digits, blank } = this.about.board;
    const tokens = this.clues.map((digit) => (digit ? digits[digit - 1] : blank));
    const { id, sideLoops: sides, wantedSteps: steps, rule } = this;
    return { type: "run", id, tokens, sides, steps, rule, every: this.isRead };
  }

  /** Takes what the worker sends, and tells whether it was of this run. */
  take(data) {
    if (data.id !== this.id) return false;
    if (data.type === "done") {
      const steps = Math.max(...this.sides.map((side) => side.length));
      Object.assign(this, { isDone: true, answers: data.answers, steps });
    } else {
      const step = (this.sides[data.side][data.step] ??= { frames: [], commit: null });
      if (data.kind === "commit") step.commit = data;
      else step.frames[data.loop - 1] = { ...data, guesses: new Map(data.guesses.map((guess) => [guess.cell, guess])) };
    }
    return true;
  }

  /** Step (from 0), loop (from 1) and whether it is the commit, of a place; null at the bare puzzle. */
  locate(position) {
    if (position === 0) return null;
    const step = Math.floor((position - 1) / (this.loops + 1));
    const loop = ((position - 1) % (this.loops + 1)) + 1;
    return { step, loop: Math.min(loop, this.loops), isCommit: loop > this.loops };
  }

  /** The place of a step and loop, as near as this run has it. */
  positionOf({ step, loop, isCommit = false }) {
    if (this.steps === 0) return 0;
    const start = Math.min(step, this.steps - 1) * (this.loops + 1);
    return start + (isCommit ? this.loops + 1 : Math.min(loop, this.loops));
  }

  nextCommit(position) {
    return (Math.floor(position / (this.loops + 1)) + 1) * (this.loops + 1);
  }

  /** Whether a side has committed everything. */
  isFull(side) {
    return this.sides[side].at(-1)?.commit?.canvas.every(Boolean) ?? false;
  }

  /** Whether a place is computed: the many loops, or where they needed fewer steps, the one loop. */
  has(position) {
    const place = this.locate(position);
    if (!place) return true;
    const step = this.sides[1][place.step];
    if (!step) return this.isFull(1) && Boolean(this.sides[0][place.step]?.commit);
    return Boolean(place.isCommit ? step.commit : step.frames[place.loop - 1]);
  }

  /** What one side looks like at a place; where it is not computed yet, as far as it is. */
  view(side, position) {
    const steps = this.sides[side];
    const none = { canvas: this.clues, guesses: new Map(), changed: new Set(), committed: new Set() };
    const cost = { layers: 0, milliseconds: 0, isFinal: false, isReady: true };
    const place = this.locate(position);
    if (!place || steps.length === 0) return { ...none, ...cost, isReady: !place };
    const known = steps.length - 1;
    const isOver = place.step > known && this.isFull(side); // in an earlier step
    const index = Math.min(place.step, known);
    const { frames, commit } = steps[index];
    const showsCommit = (place.isCommit || isOver) && commit !== null;
    const loop = Math.min(place.step > known ? Infinity : place.loop, this.sideLoops[side], frames.length);
    const frame = frames[loop - 1] ?? frames.at(-1);
    const before = index > 0 ? steps[index - 1] : null;
    const earlier = frames[loop - 2] ?? before?.frames.at(-1);
    // With one loop the mind changes between steps only.
    const isNew = place.loop <= this.sideLoops[side] && !showsCommit;
    const changed = [...(isNew && frame && earlier ? frame.guesses.values() : [])].filter(
      ({ cell, digit }) => earlier.guesses.has(cell) && earlier.guesses.get(cell).digit !== digit,
    );
    return {
      canvas: showsCommit ? commit.canvas : (before?.commit.canvas ?? this.clues),
      guesses: frame?.guesses ?? new Map(),
      changed: new Set(changed.map(({ cell }) => cell)),
      committed: new Set(showsCommit && !isOver ? commit.cells : []),
      layers: this.layers(side, index, loop),
      milliseconds:
        steps.slice(0, index).reduce((total, { commit: { milliseconds } }) => total + milliseconds, 0) +
        (frame?.milliseconds ?? 0),
      isFinal: showsCommit && commit.canvas.every(Boolean),
      steps: index + 1,
      isReady: isOver || this.has(position),
    };
  }

  /** Layers that an answer takes after `loop` loops of step `index`. */
  layers(side, index, loop) {
    const { head, mid, tail } = this.about.layers;
    return index * (head + this.sideLoops[side] * mid + tail) + head + loop * mid + tail;
  }
}
