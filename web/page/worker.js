// Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
// Runs the model off the page's thread: loads the three graphs, and denoises boards as they are asked for.

import { RULES, denoise } from "./sampler.js";

const at = (path) => new URL(path, import.meta.url).href;
let model = null;
let wanted = 0; // the number of the run that is asked for; older ones stop

self.onmessage = async ({ data }) => {
  try {
    if (data.type === "load") await load(data.backend, data.description);
    if (data.type === "run") {
      wanted = data.id;
      await run(data);
    }
  } catch (error) {
    self.postMessage({ type: "error", id: data.id, message: String(error?.message ?? error) });
  }
};

async function load(backend, description) {
  const ort = await import(`./runtime/ort.${backend}.min.mjs`);
  ort.env.wasm.wasmPaths = at("./runtime/");
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "error";
  const files = await Promise.all(["prelude", "loop", "readout"].map((name) => read(at(`./model/${name}.onnx`))));
  const sessions = [];
  // One after the other: onnxruntime initialises itself with the first.
  for (const file of files) sessions.push(await ort.InferenceSession.create(file, { executionProviders: [backend] }));
  const [prelude, loop, readout] = sessions;
  const call = async (session, input) => (await session.run({ input })).output;
  model = {
    mask: description.board.blank,
    digits: description.board.digits,
    vocabulary: null,
    prelude: (tokens) => call(prelude, new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length])),
    loop: async (states, loops) => {
      const looped = await call(loop, states);
      if (!description.is_damped || loops === 1) return looped;
      const mixed = states.data.map((value, i) => value + (looped.data[i] - value) / loops);
      return new ort.Tensor("float32", mixed, states.dims);
    },
    readout: async (states) => {
      const logits = await call(readout, states);
      model.vocabulary = logits.dims[2];
      return logits.data;
    },
  };
  // The first pass allocates memory, which is no part of an answer's time.
  await model.readout(await model.loop(await model.prelude(new Array(description.board.side ** 2).fill(model.mask)), 1));
  self.postMessage({ type: "ready", backend });
}

async function read(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} cannot be loaded (${response.status})`);
  return new Uint8Array(await response.arrayBuffer());
}

/** Denoises the same board on several sides, each with its own number of loops, step by step. */
async function run({ id, tokens, sides, steps, rule, every }) {
  const settings = { steps, rule: RULES[rule], every };
  const runs = sides.map((loops) => denoise(model, tokens, { ...settings, loops }));
  const answers = sides.map(() => tokens);
  for (let open = runs.length; open > 0; ) {
    open = 0;
    for (const [side, part] of runs.entries()) {
      for await (const frame of steadily(part)) {
        if (wanted !== id) return;
        if (frame.kind === "commit") answers[side] = frame.canvas;
        self.postMessage({ type: "frame", id, side, ...shown(frame) });
        if (frame.kind === "commit") {
          open++;
          break;
        }
        await breathe();
      }
    }
  }
  self.postMessage({ type: "done", id, answers });
}

/** A generator that is left in the middle, without ending it as `for await` would. */
const steadily = (part) => ({ [Symbol.asyncIterator]: () => ({ next: () => part.next() }) });

/** Lets messages in. */
const breathe = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => (port1.close(), resolve());
    port2.postMessage(0);
  });

const digitOf = (token) => model.digits.indexOf(token) + 1; // 0: not a digit

/** A frame as the page draws it: digits in place of tokens, and of every cell the probability of each digit. */
function shown(frame) {
  const { kind, step, loop, milliseconds, where } = frame;
  if (kind === "commit") return { kind, step, milliseconds, cells: frame.cells, canvas: frame.canvas.map(digitOf) };
  const { tokens, confidence, probability } = frame.prediction;
  const guesses = where.map((cell, i) => ({
    cell,
    digit: digitOf(tokens[i]),
    confidence: confidence[i],
    probabilities: model.digits.map((token) => probability(i, token)),
  }));
  return { kind, step, loop, milliseconds, guesses };
}
