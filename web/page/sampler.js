// Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
// What a denoising step commits, as in commit_rules.py: the same tokens in the same order.

const TIE = 1e-5; // difference of scores, relative to them and to the probabilities they come from, that is none

// The ways to commit that the page offers, by the arguments of `generate`.
export const RULES = {
  confidence: { label: "Most confident first", unmasking: "confidence" },
  margin: { label: "Largest margin first", unmasking: "margin" },
  entropy: { label: "Lowest entropy first", unmasking: "entropy" },
  left_to_right: { label: "Left to right", unmasking: "left_to_right" },
  threshold: { label: "All that are 90 % sure", unmasking: "confidence", confidence_threshold: 0.9 },
  bound: { label: "As many as are sure together", unmasking: "confidence", entropy_bound: 0.1 },
};

/**
 * Reads logits (Float32Array, length x vocabulary) at the positions `where`: of each the most likely token, its
 * probability, the margin over the second, and the entropy in nats. `probability(i, token)` is that of any token.
 */
export function readLogits(logits, where, vocabulary) {
  const count = where.length;
  const tokens = new Int32Array(count);
  const normalizers = new Float64Array(count);
  const [confidence, margin, entropy] = [0, 1, 2].map(() => new Float32Array(count));
  for (let i = 0; i < count; i++) {
    const row = logits.subarray(where[i] * vocabulary, (where[i] + 1) * vocabulary);
    let [first, second] = [-Infinity, -Infinity];
    for (let token = 0; token < vocabulary; token++) {
      if (row[token] > first) [second, first, tokens[i]] = [first, row[token], token];
      else if (row[token] > second) second = row[token];
    }
    let sum = 0;
    for (const value of row) sum += Math.exp(value - first);
    normalizers[i] = first + Math.log(sum);
    confidence[i] = Math.exp(first - normalizers[i]);
    margin[i] = confidence[i] - Math.exp(second - normalizers[i]);
    for (const value of row) {
      const logProbability = value - normalizers[i];
      if (logProbability > -1e4) entropy[i] -= Math.exp(logProbability) * logProbability;
    }
  }
  const probability = (i, token) => Math.exp(logits[where[i] * vocabulary + token] - normalizers[i]);
  return { tokens, confidence, margin, entropy, probability };
}

/** Of `left` positions that are still blank, how many step `index` has to commit to stay on schedule. */
export function quota(size, left, index, steps) {
  const due = Math.floor(size / steps) * (index + 1) + Math.min(size % steps, index + 1);
  return Math.min(Math.max(due - (size - left), 1), left);
}

/**
 * The indices of the `count` highest scores, which come from probabilities of the size of `confidence`. Scores that
 * differ by rounding from the last one tie with it, and the leftmost come first.
 */
function best(scores, confidence, count) {
  const order = Array.from(scores, (_, i) => i).sort((a, b) => scores[b] - scores[a] || a - b);
  const last = order[Math.max(count, 1) - 1];
  const tie = TIE * (confidence[last] + Math.abs(scores[last]));
  const group = (i) => (scores[i] > scores[last] + tie ? 0 : scores[i] >= scores[last] - tie ? 1 : 2);
  return order.sort((a, b) => group(a) - group(b) || a - b).slice(0, count);
}

/** The indices that a rule commits, of a prediction as `readLogits` gives it. */
export function choose(rule, prediction, count) {
  const { confidence, margin, entropy } = prediction;
  const scores = {
    confidence: () => confidence,
    margin: () => margin,
    entropy: () => entropy.map((value) => -value),
    left_to_right: () => entropy.map((_, i) => -i),
  }[rule.unmasking]();
  const chosen = new Set(best(scores, confidence, count));
  if (rule.confidence_threshold !== undefined) {
    confidence.forEach((value, i) => value >= rule.confidence_threshold && chosen.add(i));
  }
  if (rule.entropy_bound !== undefined) {
    // All of lowest entropy whose sum, less the largest, stays within the bound.
    let [within, sum] = [0, 0];
    for (const value of Float32Array.from(entropy).sort()) {
      if (sum > rule.entropy_bound) break;
      within++;
      sum += value;
    }
    best(entropy.map((value) => -value), confidence, within).forEach((i) => chosen.add(i));
  }
  return [...chosen].sort((a, b) => a - b);
}

/**
 * Denoises a row of tokens, and yields after every loop what the model would answer there, and after every step what
 * was committed. `model` has `prelude(tokens)`, `loop(states, loops)` and `readout(states)`, all async, and `mask`,
 * `vocabulary`. With `every` false the prediction is read after a step's last loop alone, as `generate` does.
 */
export async function* denoise(model, tokens, { loops, steps, rule, every = true }) {
  const canvas = tokens.slice();
  const blanks = () => Array.from(canvas.keys()).filter((i) => canvas[i] === model.mask);
  const size = blanks().length;
  const limit = Math.min(steps, size);
  for (let index = 0; index < limit; index++) {
    const where = blanks();
    if (where.length === 0) return;
    let started = performance.now();
    let milliseconds = 0;
    let prediction = null;
    let states = await model.prelude(canvas);
    for (let loop = 1; loop <= loops; loop++) {
      states = await model.loop(states, loops);
      if (!every && loop < loops) continue;
      milliseconds += performance.now() - started;
      started = performance.now();
      prediction = readLogits(await model.readout(states), where, model.vocabulary);
      // Readings between the loops are for the eye, and not a part of what `generate` computes.
      if (loop === loops) milliseconds += performance.now() - started;
      yield { kind: "loop", step: index, loop, where, prediction, milliseconds };
      started = performance.now();
    }
    const chosen = choose(rule, prediction, quota(size, where.length, index, limit));
    for (const i of chosen) canvas[where[i]] = prediction.tokens[i];
    yield { kind: "commit", step: index, cells: chosen.map((i) => where[i]), canvas: canvas.slice(), milliseconds };
  }
}
