"use strict";
// Plays the trace that stands in the page as JSON. Places are numbered: 0 is before the first step, t after step t.

const KINDS = ["given", "waiting", "guessed", "kept", "committed", "remasked"];
const [GIVEN, WAITING, , KEPT, COMMITTED, REMASKED] = KINDS.keys();
const NOT_KNOWN = 255;
const BLANK = "□";
const PRINTED_STEPS = 8;
const { steps, columns, tokens, rows } = JSON.parse(document.getElementById("data").textContent);
let place = 0;
let timer = 0;

async function unpack(row) {
  const bytes = Uint8Array.from(atob(row.packed), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = await new Response(stream).arrayBuffer();
  const count = steps.length * row.length;
  // int32 must begin at a multiple of four
  const shown = new Int32Array(data.slice(count, 5 * count));
  return { ...row, kinds: new Uint8Array(data, 0, count), shown, sure: new Uint8Array(data, 5 * count) };
}

/** Kind, token and percentage of a position at a place. */
function look(row, at, column) {
  const index = Math.max(at - 1, 0) * row.length + column;
  const kind = row.kinds[index];
  if (at > 0) return { kind, token: row.shown[index], sure: row.sure[index] };
  return kind === GIVEN ? { kind, token: row.shown[index], sure: NOT_KNOWN } : { kind: WAITING, token: -1, sure: NOT_KNOWN };
}

const textOf = (token) => (token < 0 ? BLANK : tokens[token]);
// A line break is shown, and made only where there is no board.
const shownText = (token) => (columns ? textOf(token).trim() || "·" : textOf(token).replaceAll("\n", "↵\n") || "·");

function drawToken(span, row, at, column) {
  const { kind, token, sure } = look(row, at, column);
  const key = `${kind},${token},${sure}`;
  if (span.dataset.key === key) return;
  span.dataset.key = key;
  span.dataset.kind = KINDS[kind];
  const text = shownText(token);
  const start = text.length - text.trimStart().length; // the space before a word is not a part of its mark
  span.firstChild.data = text.slice(0, start);
  span.lastChild.textContent = text.slice(start);
  if (sure !== NOT_KNOWN) span.style.setProperty("--sure", (sure / 100) ** 2);
}

function drawRow(element, row, at) {
  for (let column = 0; column < row.length; column++) drawToken(element.children[column], row, at, column);
}

function makeTokens(row, element) {
  element.classList.toggle("board", columns !== null);
  if (columns) element.style.gridTemplateColumns = `repeat(${columns}, auto)`;
  const spans = Array.from({ length: row.length }, (_, column) => {
    const span = document.createElement("span");
    const block = row.blocks[column];
    span.append("", document.createElement("b"));
    span.classList.toggle("behind", column >= row.end);
    span.classList.toggle("block", !columns && block > 0 && block !== row.blocks[column - 1]);
    return span;
  });
  element.replaceChildren(...spans);
  return element;
}

/** Bars of what a step committed, downwards of what it sent back, and a line of its loops. */
function makeChart(row, deepest) {
  const count = (step, kind) => {
    let found = 0;
    for (let i = step * row.length; i < (step + 1) * row.length; i++) found += row.kinds[i] === kind;
    return found;
  };
  row.committed = steps.map((_, step) => count(step, COMMITTED));
  row.remasked = steps.map((_, step) => count(step, REMASKED));
  const most = Math.max(...row.committed, ...row.remasked, 1);
  const bars = (values, sign) =>
    values.map((value, i) => (value ? `M${i + 0.1} 26h.8v${(-sign * value * 24) / most}h-.8z` : "")).join("");
  const loops = row.loops.map((value, i) => `${i ? "L" : "M"}${i} ${26 - (value * 24) / deepest}h1`).join("");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "chart");
  svg.setAttribute("viewBox", `0 0 ${steps.length} 40`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute(
    "aria-label",
    `Tokens committed in each step, at most ${Math.max(...row.committed)}, and loops, at most ${Math.max(...row.loops)}`,
  );
  const paths = { committed: bars(row.committed, 1), remasked: bars(row.remasked.map((n) => n * 0.5), -1), loops, now: "" };
  for (const [name, path] of Object.entries(paths)) {
    const element = document.createElementNS(svg.namespaceURI, "path");
    element.setAttribute("class", name);
    element.setAttribute("d", path);
    svg.append(element);
    if (name === "now") row.now = element;
  }
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    show(Math.ceil(((event.clientX - box.left) / box.width) * steps.length));
  });
  return svg;
}

function makePlayer() {
  const player = document.createElement("section");
  player.className = "player";
  player.setAttribute("aria-label", "Playback");
  player.innerHTML = `<div><p id="step" aria-live="off"></p><div class="buttons">
    <button id="play">Play</button><button id="back" aria-label="One step back">‹</button>
    <button id="on" aria-label="One step on">›</button>
    <input id="place" type="range" min="0" max="${steps.length}" value="0" aria-label="Denoising step"></div>
    <p id="token">Point at a token to see its history.</p></div>`;
  document.body.append(player);
  for (const id of ["play", "back", "on", "place", "step", "token"]) player[id] = player.querySelector(`#${id}`);
  player.play.addEventListener("click", () => (timer ? pause() : play()));
  player.back.addEventListener("click", () => (pause(), show(place - 1)));
  player.on.addEventListener("click", () => (pause(), show(place + 1)));
  player.place.addEventListener("input", () => (pause(), show(Number(player.place.value))));
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, button") || event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: steps.length };
    if (event.key === " ") timer ? pause() : play();
    else if (event.key in moves) (pause(), show(moves[event.key]));
    else return;
    event.preventDefault();
  });
  return player;
}

function play() {
  if (place === steps.length) show(0);
  // Short traces at a pace to follow, long ones within half a minute
  const pace = Math.min(Math.max(24000 / steps.length, 60), 900);
  timer = setInterval(() => (place < steps.length ? show(place + 1) : pause()), pace);
  player.play.textContent = "Pause";
}

function pause() {
  clearInterval(timer);
  timer = 0;
  player.play.textContent = "Play";
}

const counted = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;

function describe(at) {
  if (at === 0) return `Before the first of ${counted(steps.length, "step")}`;
  const total = (name) => rows.reduce((sum, row) => sum + row[name][at - 1], 0);
  const loops = [...new Set(rows.map((row) => row.loops[at - 1]))].sort((a, b) => a - b);
  const { block, step } = steps[at - 1];
  const several = steps.at(-1).block > 0 ? `, block ${block + 1}, its step ${step + 1}` : "";
  const back = total("remasked") ? `, ${total("remasked")} sent back` : "";
  const range = loops.length > 1 ? `${loops[0]} to ${counted(loops.at(-1), "loop")}` : counted(loops[0], "loop");
  return `Step ${at} of ${steps.length}${several}: ${counted(total("committed"), "token")} committed${back}, ${range}`;
}

function show(to) {
  place = Math.min(Math.max(to, 0), steps.length);
  for (const row of rows) {
    drawRow(row.element, row, place);
    row.now.setAttribute("d", `M${place} 0V40`);
    const here = (values) => (place ? values[place - 1] : 0);
    row.here.textContent = `${counted(here(row.committed), "token")} committed, ${counted(here(row.loops), "loop")}`;
  }
  player.place.value = place;
  player.step.textContent = describe(place);
  player.place.setAttribute("aria-valuetext", player.step.textContent);
  document.documentElement.dataset.place = place;
}

/** What a position was, over all steps. */
function history(row, column) {
  const parts = [];
  for (let at = 1; at <= steps.length; at++) {
    const { kind, token, sure } = look(row, at, column);
    if (kind === GIVEN) return "given";
    const percent = sure === NOT_KNOWN ? "" : ` ${sure} %`;
    if (kind === COMMITTED) parts.push(`committed in step ${at} as ${quoted(token)}${percent}`);
    else if (kind === REMASKED) parts.push(`sent back in step ${at}`);
    else if (kind !== KEPT && token >= 0 && token !== parts.token) parts.push(`step ${at} ${quoted(token)}${percent}`);
    if (token >= 0) parts.token = token;
  }
  return parts.length > 7 ? [...parts.slice(0, 3), "…", ...parts.slice(-3)].join(", ") : parts.join(", ");
}

const quoted = (token) => `“${textOf(token).replaceAll("\n", "↵")}”`;

function pick(event) {
  const span = event.target.closest(".tokens > span");
  if (!span) return;
  document.querySelector(".picked")?.classList.remove("picked");
  span.classList.add("picked");
  const row = rows.find(({ element }) => element === span.parentElement);
  if (!row) return;
  const column = [...row.element.children].indexOf(span);
  player.token.textContent = `Position ${column + 1}: ${history(row, column)}`;
}

/** On paper: some steps, from the first to the last. */
function makeFilm() {
  const count = Math.min(PRINTED_STEPS, steps.length);
  const places = Array.from({ length: count }, (_, i) => Math.round(((i + 1) * steps.length) / count));
  for (const row of rows) {
    const film = document.createElement("div");
    film.className = "film";
    for (const at of places) {
      const heading = document.createElement("h3");
      heading.textContent = describe(at);
      const text = makeTokens(row, document.createElement("div"));
      text.className += " tokens";
      drawRow(text, row, at);
      film.append(heading, text);
    }
    row.element.parentElement.querySelector(".film")?.remove();
    row.element.after(film);
  }
}

function makeLegend() {
  const samples = [
    ["given", "given"],
    ["guessed", "a guess: the deeper the shade, the surer"],
    ["committed", "committed in this step"],
    ["kept", "committed before"],
    ...(rows.some((row) => row.end < row.length) ? [["behind", "behind the end of the text"]] : []),
    ...(rows.some((row) => row.remasked.some(Boolean)) ? [["remasked", "sent back to be denoised again"]] : []),
  ];
  const legend = document.createElement("p");
  legend.className = "legend";
  for (const [kind, meaning] of samples) {
    const item = document.createElement("span");
    const swatch = document.createElement("span");
    swatch.dataset.kind = kind;
    swatch.className = kind;
    swatch.setAttribute("aria-hidden", "true");
    swatch.append(Object.assign(document.createElement("b"), { textContent: "token" }));
    item.append(swatch, ` ${meaning}`);
    legend.append(item);
  }
  const bars = document.createElement("span");
  bars.textContent = "Bars: tokens committed in each step; line: loops of each step";
  legend.append(bars);
  document.querySelector("header").append(legend);
}

let player;
(async () => {
  const elements = document.querySelectorAll(".tokens");
  document.querySelector("main").classList.toggle("boards", columns !== null);
  for (const [i, row] of rows.entries()) {
    Object.assign(row, await unpack(row));
    row.element = makeTokens(row, elements[i]);
  }
  const deepest = Math.max(...rows.flatMap((row) => [...row.loops]), 1);
  for (const row of rows) {
    row.here = document.createElement("p");
    row.here.className = "here";
    row.here.hidden = rows.length === 1; // the line below the slider says it
    row.element.before(makeChart(row, deepest), row.here);
  }
  makeLegend();
  player = makePlayer();
  document.querySelector("main").addEventListener("pointerover", pick);
  document.querySelector("main").addEventListener("click", pick);
  addEventListener("beforeprint", makeFilm);
  show(steps.length);
  for (const { element } of rows) element.style.minHeight = `${element.offsetHeight}px`; // nothing jumps while it plays
  document.documentElement.dataset.ready = "";
})().catch((error) => {
  const notice = document.createElement("p");
  notice.textContent = `This browser cannot play the steps (${error.message}); below are the final texts.`;
  document.querySelector("main").prepend(notice);
});
