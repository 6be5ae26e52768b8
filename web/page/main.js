// Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
// The page: settings, playback, and what is shown where.

import { BoardView } from "./board.js";
import { Chart, counted } from "./chart.js";
import { Run } from "./run.js";
import { RULES } from "./sampler.js";
import { Rules } from "./sudoku.js";

const $ = (id) => document.getElementById(id);
const SIDES = ["once", "many"];
// The smallest module that uses a SIMD instruction
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];

let about; // model.json
let rules;
let chart = null;
let worker = null;
let isReady = false;
let run = null;
let position = 0;
let atEnd = false; // whether to stay with the answer, whatever the settings become
let timer = 0;
const settings = { clues: [], loops: 1, steps: 1, rule: "confidence" };
const boards = {};

start().catch((error) => trouble(error.message));

async function start() {
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(Uint8Array.from(SIMD))) {
    throw new Error("This browser does not run WebAssembly with SIMD, which the model needs; any browser of 2023 or later does.");
  }
  const response = await fetch("model/model.json").catch(() => null);
  if (!response?.ok) throw new Error("There is no model beside this page; build the page with `make web`.");
  about = await response.json();
  rules = new Rules(about.board.side, about.board.box);
  for (const name of SIDES) {
    boards[name] = new BoardView($(name).querySelector(".board"), rules, about.board.box, {
      label: name === "once" ? "One loop" : "Many loops, and the clues to edit",
      edit: name === "many" ? edit : null,
      inspect: (cell) => inspect(name, cell),
    });
  }
  prepareControls();
  prepareChart();
  readAddress(location.hash);
  loadModel("wasm");
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  $("runtime").hidden = !adapter;
}

function trouble(message) {
  $("trouble").textContent = message;
  $("trouble").hidden = false;
  $("status").textContent = "The model cannot run.";
}

// The model

function loadModel(backend) {
  pause();
  worker?.terminate();
  isReady = false;
  enable();
  $("status").textContent = `Loading the model (${(sum(Object.values(about.bytes)) / 1e6).toFixed(1)} MB) and its runtime …`;
  worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  worker.onerror = (event) => trouble(`The model cannot be loaded: ${event.message ?? "its worker failed"}.`);
  worker.onmessage = ({ data }) => {
    if (data.type === "error") return backend === "wasm" ? trouble(data.message) : fallBack(data.message);
    if (data.type === "ready") {
      isReady = true;
      document.documentElement.dataset.ready = data.backend;
      restart({ toEnd: true });
      if (!matchMedia("(prefers-reduced-motion: reduce)").matches && !document.hidden) play();
    } else if (run?.take(data)) {
      if (run.isDone && !run.isRead) {
        run.isRead = true;
        worker.postMessage(run.request());
      }
      schedule();
    }
  };
  worker.postMessage({ type: "load", backend, description: about });
}

function fallBack(message) {
  $("backend").value = "wasm";
  loadModel("wasm");
  $("trouble").textContent = `WebGPU does not work here (${message}); the model runs on WebAssembly.`;
  $("trouble").hidden = false;
}

/** Runs the puzzle anew with the settings as they are. The playhead stays at its step and loop, or at the end. */
function restart({ toEnd = atEnd, toStart = false } = {}) {
  const place = run?.locate(position);
  run = new Run(settings, about);
  document.documentElement.dataset.done = "";
  atEnd = toEnd && !toStart;
  position = toStart ? 0 : atEnd ? run.last : place ? run.positionOf(place) : 0;
  if (isReady) worker.postMessage(run.request());
  writeAddress();
  enable();
  schedule();
}

// Controls

function prepareControls() {
  const { side } = rules;
  $("steps").max = rules.cells;
  $("puzzle").rows = Math.ceil(rules.cells / 31) + 1;
  for (const [name, { label }] of Object.entries(RULES)) $("rule").add(new Option(label, name));
  const { num_loops: loops, max_denoising_steps: steps, unmasking: rule } = about;
  Object.assign(settings, { loops, steps: Math.min(4, steps), rule });
  const samples = Object.entries(about.samples);
  const shares = samples.length ? [] : [["easy", 0.56], ["hard", 0.4]];
  for (const [name, puzzle] of samples) addSample(name, () => rules.parse(puzzle));
  for (const [name, share] of shares) addSample(name, () => rules.generate(Math.round(share * side * side)));
  addSample("random", () => rules.generate(Math.round((0.4 + 0.17 * Math.random()) * side * side)));
  addSample("empty", () => new Array(rules.cells).fill(0));
  $("loops").max = Math.max($("loops").max, loops); // as many as are saved with the model
  for (const name of ["loops", "steps"]) {
    $(name).addEventListener("input", () => set({ [name]: Number($(name).value) }));
  }
  $("rule").addEventListener("change", () => set({ rule: $("rule").value }));
  $("backend").addEventListener("change", () => loadModel($("backend").value));
  $("puzzle").addEventListener("input", () => readText($("puzzle").value));
  $("position").addEventListener("input", () => (pause(), go(Number($("position").value))));
  $("play").addEventListener("click", () => (timer ? pause() : play()));
  $("next-loop").addEventListener("click", () => (pause(), go(position + 1, true)));
  $("next-step").addEventListener("click", () => (pause(), go(run.nextCommit(position), true)));
  $("rewind").addEventListener("click", () => (pause(), go(0, true)));
  document.addEventListener("paste", (event) => {
    if (event.target.closest?.("textarea, input, select")) return;
    const text = event.clipboardData.getData("text");
    $("puzzle").value = text;
    readText(text);
    event.preventDefault();
  });
  // Its own URL: writeAddress may have put the old settings back before this event is heard
  addEventListener("hashchange", (event) => readAddress(new URL(event.newURL).hash));
  addEventListener("resize", showSettings);
}

function addSample(name, make) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = name[0].toUpperCase() + name.slice(1);
  button.addEventListener("click", () => setPuzzle(make()));
  $("samples").append(button);
}

function prepareChart() {
  if (!about.measured) return;
  const section = $("measured");
  section.hidden = false;
  chart = new Chart(section.querySelector("table"), section.querySelector(".ring"), about.measured, (loops, steps) =>
    set({ loops, steps }),
  );
}

function set(changes) {
  Object.assign(settings, changes);
  showSettings();
  restart();
}

function setPuzzle(clues, text = rules.format(clues)) {
  settings.clues = clues;
  $("puzzle").value = text;
  judge();
  showSettings();
  restart({ toStart: !atEnd });
  if (timer) (pause(), play());
}

function edit(cell, digit) {
  const clues = settings.clues.slice();
  clues[cell] = digit;
  pause();
  setPuzzle(clues);
}

function readText(text) {
  try {
    setPuzzle(rules.parse(text), text);
  } catch (error) {
    say(error.message, "bad");
  }
}

function say(text, kind = "") {
  $("about").textContent = text;
  $("about").dataset.kind = kind;
}

/** Says how many solutions the puzzle has. */
function judge() {
  const { clues } = settings;
  const count = clues.filter(Boolean).length;
  const contradiction = rules.contradiction(clues);
  if (contradiction) return say(`${contradiction}, so this puzzle has no solution.`, "bad");
  if (count === rules.cells) return say("The board is full: there is nothing to fill in.");
  const { solutions, complete } = rules.solve(clues);
  const clueText = `${counted(count, "clue")}, `;
  if (solutions.length > 1) return say(`${clueText}and several solutions: the model has to pick one, cell by cell.`, "bad");
  if (!complete) return say(`${clueText}too many ways to go on to tell here whether it has one solution.`);
  if (solutions.length === 0) return say(`${clueText}and no solution: whatever the model fills in breaks a rule.`, "bad");
  say(`${clueText}and exactly one solution.`);
}

function showSettings() {
  const { loops, steps, clues } = settings;
  const { head, mid, tail } = about.layers;
  const blanks = clues.filter((digit) => digit === 0).length;
  $("loops").value = loops;
  $("steps").value = steps;
  $("rule").value = settings.rule;
  $("loops-out").value = loops;
  $("steps-out").value = steps;
  $("many").querySelector("h2").textContent = counted(loops, "loop");
  const beyond = loops > about.max_train_loops ? ` It was trained with at most ${about.max_train_loops}.` : "";
  $("loops-hint").textContent = `${head} + ${loops} × ${mid} + ${tail} = ${head + loops * mid + tail} layers a step.${beyond}`;
  const each = Math.floor(blanks / Math.min(steps, blanks || 1));
  $("steps-hint").textContent = blanks ? `At least ${each} of ${blanks} blanks a step.` : "";
  if (!chart) return;
  const inside = chart.point(loops, steps);
  const where = inside ? "The ring is where the sliders stand." : "The sliders stand beyond what was measured.";
  $("measured-hint").textContent =
    `Of ${about.measured.count.toLocaleString("en")} puzzles the model never saw, most confident cells first. ${where}`;
}

// Playback

function enable() {
  const works = isReady && run !== null && run.last > 0;
  for (const id of ["play", "next-loop", "next-step", "rewind", "position"]) $(id).disabled = !works;
}

function play() {
  if (position >= run.last) position = 0;
  atEnd = false;
  const tick = () => {
    if (run.has(position + 1)) go(position + 1);
    if (position >= run.last) return pause(true);
    timer = setTimeout(tick, Number($("pace").value) * (run.locate(position)?.isCommit ? 2 : 1));
  };
  timer = setTimeout(tick, 200);
  showPlaying();
}

function pause(finished = false) {
  clearTimeout(timer);
  timer = 0;
  showPlaying();
  if (finished) announce();
}

function showPlaying() {
  const [sign, word] = $("play").children;
  sign.textContent = timer ? "❚❚" : "▶";
  word.textContent = timer ? "Pause" : "Play";
}

function go(to, aloud = false) {
  position = Math.min(Math.max(to, 0), run.last);
  atEnd = position === run.last;
  schedule();
  if (aloud) requestAnimationFrame(announce);
}

function announce() {
  $("announcement").textContent = $("status").textContent;
}

let scheduled = 0;
function schedule() {
  scheduled ||= requestAnimationFrame(() => {
    scheduled = 0;
    render();
  });
}

function render() {
  if (atEnd) position = run.last; // a run may end before all its steps
  position = Math.min(position, run.last);
  const views = [run.view(0, position), run.view(1, position)];
  for (const [side, name] of SIDES.entries()) {
    const view = views[side];
    const answer = settings.clues.map((clue, cell) => view.canvas[cell] || view.guesses.get(cell)?.digit || clue);
    view.clashes = rules.clashes(answer);
    view.isFull = answer.every(Boolean);
    boards[name].draw({ clues: settings.clues, ...view });
    const isSolved = view.isFull && view.clashes.size === 0 && view.isFinal;
    const verdict = $(name).querySelector(".verdict");
    verdict.textContent = isSolved ? "Solved ✓" : view.isFinal ? "Not solved" : "";
    verdict.dataset.kind = isSolved ? "good" : "bad";
    const values = [view.clashes.size, view.changed.size, view.layers, `${view.milliseconds.toFixed(0)} ms`];
    $(name).querySelectorAll("dd").forEach((entry, i) => (entry.textContent = values[i]));
  }
  showPosition(views[1]);
  boards.views = views;
  document.documentElement.dataset.done = run.isDone ? run.answers.map((tokens) => tokens.join()).join(" ") : "";
}

function showPosition(view) {
  if (!isReady) return;
  const slider = $("position");
  if (Number(slider.max) !== run.last || $("marks").childElementCount !== run.steps - 1) {
    slider.max = run.last;
    const marks = Array.from({ length: Math.max(run.steps - 1, 0) }, (_, step) => {
      const mark = document.createElement("i");
      mark.style.left = `${(100 * run.positionOf({ step: step + 1, loop: 1 })) / run.last}%`;
      return mark;
    });
    $("marks").replaceChildren(...marks);
  }
  slider.value = position;
  const text = describe(view);
  slider.setAttribute("aria-valuetext", text);
  $("status").textContent = text;
}

function describe(view) {
  const place = run.locate(position);
  if (run.last === 0) return "There is nothing to fill in.";
  if (!place) return `${counted(run.blanks, "blank")} to fill in.`;
  if (!view.isReady) return `Step ${place.step + 1} of ${run.steps}: thinking …`;
  if (view.isFinal) {
    const cost = `${counted(view.steps, "step")}, ${view.layers} layers`;
    if (view.clashes.size === 0 && view.isFull) return `Solved in ${cost}.`;
    return `Done in ${cost}, with ${counted(view.clashes.size, "cell")} against the rules.`;
  }
  const step = `Step ${place.step + 1} of ${run.steps}`;
  if (place.isCommit) return `${step}: ${counted(view.committed.size, "cell")} committed.`;
  const minds = view.changed.size ? `${counted(view.changed.size, "cell")} changed ${view.changed.size === 1 ? "its" : "their"} mind` : "no cell changed its mind";
  return `${step}, loop ${place.loop} of ${settings.loops}: ${place.loop === 1 && place.step === 0 ? "a first guess" : minds}.`;
}

function inspect(name, cell) {
  if (cell < 0 || !boards.views) return;
  const view = boards.views[SIDES.indexOf(name)];
  const { side } = rules;
  const place = `Row ${Math.floor(cell / side) + 1}, column ${(cell % side) + 1}`;
  const guess = view.guesses.get(cell);
  if (settings.clues[cell]) $("inspected").textContent = `${place}: ${settings.clues[cell]}, a clue.`;
  else if (view.canvas[cell]) $("inspected").textContent = `${place}: ${view.canvas[cell]}, committed.`;
  else if (!guess) $("inspected").textContent = `${place}: blank.`;
  else {
    const chances = guess.probabilities.map((share, i) => [i + 1, share]).sort((a, b) => b[1] - a[1]);
    const listed = chances.filter(([, share]) => share >= 0.005).map(([digit, share]) => `${digit} (${(share * 100).toFixed(0)} %)`);
    $("inspected").textContent = `${place}: ${listed.join(", ")}.`;
  }
}

// The address holds the settings, so that a link shows what its sender saw.

function readAddress(hash) {
  const wanted = new URLSearchParams(hash.slice(1));
  const number = (name, most) => {
    const value = Number(wanted.get(name));
    return Number.isInteger(value) && value >= 1 && value <= most ? value : settings[name];
  };
  Object.assign(settings, { loops: number("loops", Number($("loops").max)), steps: number("steps", rules.cells) });
  if (wanted.get("rule") in RULES) settings.rule = wanted.get("rule");
  const [first] = [about.samples.hard, ...Object.values(about.samples)].filter(Boolean);
  const fallback = settings.clues.length ? settings.clues : first ? rules.parse(first) : rules.generate(rules.cells * 0.45);
  try {
    setPuzzle(wanted.has("puzzle") ? rules.parse(wanted.get("puzzle")) : fallback);
  } catch (error) {
    setPuzzle(fallback);
    say(`The puzzle of this page's address: ${error.message}`, "bad");
  }
}

let writing = 0;
function writeAddress() {
  clearTimeout(writing); // browsers allow few changes a second
  writing = setTimeout(() => {
    const { clues, loops, steps, rule } = settings;
    history.replaceState(null, "", `#${new URLSearchParams({ puzzle: rules.format(clues), loops, steps, rule })}`);
  }, 300);
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}
