// Runs both models, away from the page, so that it stays responsive. Messages: `load`, `run`, `stop` and `drawn`
// from the page; `progress`, `preparing`, `loaded`, `step`, `finished` and `failed` to it.

import { Problem, download } from "./download.js";
import { Generation, choose } from "./generation.js";
import { Model, runtimeFor } from "./model.js";
import { TextCodec } from "./text.js";

const SECONDS_BETWEEN_STEPS_SHOWN = 0.1;
const LONGEST_DRAWING = 0.1;

// One runtime and one pair of models; for other models, the page starts another worker.
const models = new Map();
const downloads = new AbortController();
let stopped = false;
let whenDrawn = () => {};

const tell = (type, content = {}) => self.postMessage({ type, ...content });

/** Let messages of the page in, such as `stop`. A timer would wait 4 ms. */
const breathe = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });

/** @param wanted {backend, threads, runtime: file, tokenizer: file, text, contextLength, graphs: [{side, file}]} */
async function load(wanted) {
  const began = performance.now();
  const { signal } = downloads;
  const fetched = (part, file, name) =>
    download(file, name, (received) => tell("progress", { part, received }), signal);
  const [wasm, tokenizer, ...graphs] = await Promise.all([
    fetched("runtime", wanted.runtime, "ONNX Runtime"),
    fetched("tokenizer", wanted.tokenizer, "The tokenizer"),
    ...wanted.graphs.map(({ side, file }) => fetched(side, file, `The ${side} model`)),
  ]);
  tell("preparing");
  const text = new TextCodec(JSON.parse(new TextDecoder().decode(tokenizer)), wanted.text);
  const ort = await runtimeFor(wanted.backend, wasm, wanted.threads);
  for (const { side } of wanted.graphs) {
    try {
      const model = await Model.load(ort, wanted.backend, graphs.shift(), text, wanted.contextLength);
      await warmUp(model);
      models.set(side, model);
    } catch (error) {
      throw new Problem(`The ${side} model could not be loaded: ${wordsOf(error)}`);
    }
  }
  tell("loaded", { seconds: (performance.now() - began) / 1000 });
}

/** Two hidden steps, of two tokens and of one: the first run of a session also allocates memory and compiles, which would
    be timed. */
async function warmUp(model) {
  const decoder = model.start();
  const ids = model.text.encode("Hello");
  for (const count of [2, 1]) choose(await decoder.step(ids.slice(-count)), { temperature: 0 });
  decoder.dispose();
}

/** Let the page show the newest answers: its drawing would slow down the step that follows. A hidden page never does. */
async function showStep(answers) {
  const drawn = new Promise((resolve) => {
    whenDrawn = resolve;
    setTimeout(resolve, 1000 * LONGEST_DRAWING);
  });
  tell("step", { answers });
  await drawn;
}

/** Let the models take turns, one token each: each step has the whole machine, and its own time. */
async function run({ prompt, settings }) {
  stopped = false;
  const generations = new Map();
  for (const [side, model] of models) generations.set(side, new Generation(model, prompt, settings));
  const answers = () => Object.fromEntries([...generations].map(([side, { answer }]) => [side, answer]));
  const order = [...generations.values()];
  let shown = performance.now();
  while ([...generations.values()].some(({ finish }) => finish === null)) {
    // The position in a round affects the time: a step follows a pause, or the model's own last step, with its weights
    // still in the cache. The order is random, because a fixed pattern could coincide with that of the pauses.
    if (Math.random() < 0.5) order.reverse();
    for (const generation of order) {
      await breathe();
      if (stopped) {
        for (const each of generations.values()) each.stop();
        break;
      }
      await generation.advance();
    }
    if (performance.now() - shown > 1000 * SECONDS_BETWEEN_STEPS_SHOWN) {
      await showStep(answers());
      shown = performance.now();
    }
  }
  tell("finished", { answers: answers(), stopped });
}

function wordsOf(error) {
  const words = typeof error === "number" ? `ONNX Runtime failed (${error}).` : String(error?.message ?? error);
  const memory = /out of memory|allocation failed|bad_alloc|OOM|memory access out of bounds/i.test(words);
  return memory ? "this device has too little memory for it. Choose a smaller precision in Settings." : words;
}

self.onmessage = async ({ data }) => {
  if (data.type === "stop") stopped = true;
  if (data.type === "drawn") whenDrawn();
  if (data.type === "stop" || data.type === "drawn") return;
  try {
    await { load, run }[data.type](data);
  } catch (error) {
    downloads.abort(); // of the other files
    tell("failed", { during: data.type, message: wordsOf(error) });
  }
};
