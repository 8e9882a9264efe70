// Token-by-token generation, as in generation.py.

import { Problem } from "./download.js";

// The least weight of a token that can be sampled, relative to the top-1 token.
const LEAST_WEIGHT = 1e-8;

/** A small generator of numbers in [0, 1) with a seed (mulberry32). */
export function randomOf(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let value = Math.imul(state ^ (state >>> 15), 1 | state);
    value = (value + Math.imul(value ^ (value >>> 7), 61 | value)) ^ value;
    return ((value ^ (value >>> 14)) >>> 0) / 4294967296;
  };
}

/** The next token: top-1, or sampled from the smallest set with a probability mass of topP. */
export function choose(logits, { temperature, topP }, random) {
  let best = 0;
  for (let index = 1; index < logits.length; index += 1) if (logits[index] > logits[best]) best = index;
  if (!Number.isFinite(logits[best])) throw new Problem("The model computed no number for the next token.");
  if (temperature <= 0) return best;
  const weights = Float64Array.from(logits, (value) => Math.exp((value - logits[best]) / temperature));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  // Sorting a whole vocabulary would take longer than the model; the tokens left out have a negligible probability.
  const order = [];
  for (let index = 0; index < weights.length; index += 1) if (weights[index] > LEAST_WEIGHT) order.push(index);
  order.sort((a, b) => weights[b] - weights[a] || a - b);
  let mass = 0;
  let count = 0;
  // The token that crosses topP is included, so the set is never empty.
  while (count < order.length && (count === 0 || mass < topP * total)) mass += weights[order[count++]];
  let left = random() * mass;
  for (const token of order.slice(0, count)) {
    left -= weights[token];
    if (left < 0) return token;
  }
  return order[count - 1];
}

export class Generation {
  /** @param model {text: TextCodec, contextLength, start()} */
  constructor(model, prompt, settings) {
    this.promptIds = model.text.encode(prompt);
    this.limit = settings.maxNewTokens;
    if (model.contextLength !== null) {
      const room = model.contextLength - this.promptIds.length;
      if (room < 1) {
        throw new Problem(
          `The prompt is ${this.promptIds.length} tokens long; the model's limit is ${model.contextLength}.`,
        );
      }
      this.limit = Math.min(this.limit, room);
    }
    this.model = model;
    this.settings = settings;
    this.decoder = model.start();
    this.random = randomOf(settings.seed);
    this.ids = [];
    this.seconds = [];
    this.text = "";
    this.finish = null;
  }

  /** Add at most one token and record the time of the step. */
  async advance() {
    if (this.finish !== null) return;
    const began = performance.now();
    const logits = await this.decoder.step(this.ids.length ? this.ids.slice(-1) : this.promptIds);
    const token = choose(logits, this.settings, this.random);
    if (this.model.text.ends.has(token)) {
      this.finish = "stop";
    } else {
      this.ids.push(token);
      this.text = this.model.text.decode(this.ids, this.text);
      if (this.ids.length >= this.limit) this.finish = "length";
    }
    // The step that produces the end token is timed like the others.
    this.seconds.push((performance.now() - began) / 1000);
    if (this.finish !== null) this.decoder.dispose();
  }

  stop() {
    if (this.finish !== null) return;
    this.finish = "stopped";
    this.decoder.dispose();
  }

  /** What the page shows of this generation. */
  get answer() {
    return { text: this.text, tokens: this.ids.length, seconds: this.seconds, finish: this.finish };
  }
}
