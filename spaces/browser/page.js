// The page: handles the visitor's input and the messages of the worker.

import { findGpu, offer, roomFor, threadCount } from "./device.js";
import { Problem, forget, kept } from "./download.js";
import { SIDES, graphOf, precisionOf, readFacts, runtimeOf, tokenizerOf } from "./facts.js";
import {
  card, h, header, method, notice, precisionLabel, question, shortName, show, size, spoken, stateOf, tiles,
  verdict, voteResult,
} from "./render.js";

const LONGEST_PROMPT = 4000;
const POSITIONS = ["left", "right"];
const BACKENDS = { webgpu: "WebGPU", wasm: "CPU" };

const at = (id) => document.getElementById(id);

/** What the visitor is offered and has chosen; `room`: bytes that the files of both models may take together. */
const choice = { precision: "", sides: SIDES, backend: "wasm", webgpu: false, room: 0 };
let facts = null;
let worker = null;
/** What the worker has loaded: {precision, sides, backend}; null while it has nothing. */
let loaded = null;
/** The bars of the downloads, by part. */
let bars = new Map();
/** The run that is shown: {answers, order, blind}. */
let round = null;
let running = false;
let frame = 0;

// What is shown

function say(message) {
  show("spoken", spoken(message, running));
}

function complain(message) {
  show("notice", ...notice(message));
}

function labelOf({ precision, backend }) {
  return `${precision}, ${BACKENDS[backend]}`;
}

/** The cards in a state without answers. */
function emptyCards(state, blind = false) {
  for (const [index, position] of POSITIONS.entries()) {
    const side = SIDES[index];
    const absent = !choice.sides.includes(side);
    const name = facts ? shortName(facts[side].name) : side;
    const title = blind ? `Model ${"AB"[index]}` : name;
    const tag = blind || !facts ? "" : side === "original" ? "Original" : "Pruned";
    show(position, card(title, tag, absent ? "absent" : state));
  }
}

function showRound() {
  frame = 0;
  const { answers, order, blind } = round;
  for (const [index, position] of POSITIONS.entries()) {
    const side = order[index];
    const answer = answers[side];
    const name = blind ? `Model ${"AB"[index]}` : shortName(facts[side].name);
    const tag = blind ? "" : side === "original" ? "Original" : "Pruned";
    show(position, card(name, tag, answer ? stateOf(answer) : "absent", answer, !blind));
  }
}

/** Show the newest answers with the next frame. */
function updateRound(answers) {
  round.answers = answers;
  frame ||= requestAnimationFrame(() => {
    showRound();
    setTimeout(() => worker?.postMessage({ type: "drawn" }));
  });
}

// The panel that loads the models

/** The files to download for the current choice, {part: {name, file}}. */
function parts() {
  const found = {};
  for (const side of choice.sides) {
    found[side] = { name: shortName(facts[side].name), file: graphOf(facts, choice.precision, side) };
  }
  found.tokenizer = { name: "Tokenizer", file: tokenizerOf(facts) };
  found.runtime = { name: "ONNX Runtime Web", file: runtimeOf(facts, choice.backend) };
  return found;
}

const bytesOf = (files) => files.reduce((sum, { bytes }) => sum + bytes, 0);

async function offerModels() {
  loaded = null;
  at("go").disabled = true;
  show("banner");
  const panel = at("start");
  panel.hidden = false;
  if (!choice.precision) {
    panel.replaceChildren(h("h2", {}, "Too large for this browser"), h("p", {}, tooLarge()));
    return;
  }
  const files = Object.values(parts()).map(({ file }) => file);
  const there = await kept(files);
  const both = choice.sides.length === 2;
  const names = both ? "both models" : "the pruned model";
  const button = h("button", { type: "button", class: "primary", id: "load" });
  button.append(there ? `Load ${names}` : `Download ${size(bytesOf(files))} and load ${names}`);
  button.addEventListener("click", load);
  const buttons = h("div", { class: "buttons" }, button);
  if (there) {
    const drop = h("button", { type: "button", class: "secondary" }, "Delete the downloads");
    drop.addEventListener("click", async () => {
      await forget();
      await offerModels();
    });
    buttons.append(drop);
  }
  panel.replaceChildren(
    h("h2", {}, both ? "Run both models in this browser" : "Run the pruned model in this browser"),
    h("p", {}, both ? "" : `${onlyPruned()} `, "Prompts and answers stay on this device."),
    h("p", { class: "facts" }, downloadWords(files, there)),
    buttons,
  );
}

function downloadWords(files, there) {
  const graphs = choice.sides.map((side) => `${size(graphOf(facts, choice.precision, side).bytes)} ${side}`);
  const other = size(runtimeOf(facts, choice.backend).bytes);
  const store = there ? "Stored in this browser" : "The browser stores them for the next visit";
  return `${labelOf(choice)}: ${graphs.join(", ")}, ${other} ONNX Runtime. ${store}.`;
}

function onlyPruned() {
  const smallest = facts.precisions.map(({ original, pruned }) => original.bytes + pruned.bytes);
  return (
    `Both models together take ${size(Math.min(...smallest))}, and this device can hold about ${size(choice.room)}, ` +
    "so only the pruned one is offered."
  );
}

function tooLarge() {
  const smallest = Math.min(...facts.precisions.map(({ pruned }) => pruned.bytes));
  return (
    `Even the pruned model alone takes ${size(smallest)}, and this device can hold about ${size(choice.room)}. ` +
    "A computer with more memory can run it here."
  );
}

function load() {
  const files = parts();
  complain("");
  worker?.terminate();
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = ({ data }) => handlers[data.type](data);
  worker.onerror = (event) => handlers.failed({ during: "load", message: event.message || "The worker failed." });
  bars = new Map();
  const rows = [...choice.sides, "runtime"].map((part) => {
    const { name, file } = files[part];
    const words = h("span", {}, `0 of ${size(file.bytes)}`);
    const bar = h("progress", { max: file.bytes, value: 0, "aria-label": `Download of ${name}` });
    bars.set(part, { bar, words, bytes: file.bytes });
    return h("div", { class: "download" },
      h("div", { class: "names" }, h("span", { class: "name" }, name), words), bar);
  });
  const cancel = h("button", { type: "button", class: "secondary", id: "cancel" }, "Cancel");
  cancel.addEventListener("click", () => {
    worker.terminate();
    worker = null;
    say("Cancelled.");
    void offerModels().then(() => at("load")?.focus());
  });
  at("start").replaceChildren(
    h("h2", {}, "Loading the models"),
    h("div", { class: "downloads" }, rows),
    h("div", { class: "buttons" }, cancel),
  );
  cancel.focus();
  say("Loading the models.");
  choice.threads = threadCount();
  const { backend, precision, sides, threads } = choice;
  worker.postMessage({
    type: "load",
    backend,
    threads,
    runtime: files.runtime.file,
    tokenizer: files.tokenizer.file,
    text: facts.browser.text,
    contextLength: facts.browser.context_length,
    graphs: sides.map((side) => ({ side, file: files[side].file })),
  });
  worker.wanted = { backend, precision, sides, threads };
}

const handlers = {
  progress({ part, received }) {
    const shown = bars.get(part);
    if (!shown) return;
    shown.bar.value = received;
    shown.words.textContent = received < shown.bytes ? `${size(received)} of ${size(shown.bytes)}` : size(received);
  },

  preparing() {
    at("start").querySelector("h2").textContent = "Preparing the models\u2026";
    say("Preparing the models.");
  },

  loaded({ seconds }) {
    loaded = worker.wanted;
    const threads = loaded.backend === "wasm" ? ` with ${loaded.threads} thread${loaded.threads > 1 ? "s" : ""}` : "";
    const panel = at("start");
    const names = loaded.sides.length === 2 ? "Both models are" : "The pruned model is";
    const words = `${names} loaded: ${labelOf(loaded)}${threads}, in ${seconds.toFixed(1)} s.`;
    panel.hidden = true;
    panel.replaceChildren();
    show("banner", h("p", { class: "loaded" }, words));
    say("The models are loaded.");
    at("go").disabled = false;
    moveFocus("go");
  },

  step({ answers }) {
    updateRound(answers);
  },

  finished({ answers, stopped }) {
    running = false;
    cancelAnimationFrame(frame);
    round.answers = answers;
    if (stopped) round.blind = false; // there are no complete answers to vote on
    showRound();
    show("verdict", round.blind ? question() : verdict(answers, labelOf(loaded)));
    say(`${stopped ? "Stopped." : "Both answers are finished."}${round.blind ? " Vote for A or B." : ""}`);
    moveFocus("go");
  },

  failed({ during, message }) {
    running = false;
    if (during === "load" && worker?.wanted.backend === "webgpu" && !isDownload(message)) {
      // Some graphs and some devices: the CPU computes everything.
      choice.backend = "wasm";
      choice.webgpu = false;
      showBackends();
      load();
      return;
    }
    complain(message);
    say("");
    if (during === "load") {
      worker?.terminate();
      worker = null;
      emptyCards("error");
      void offerModels();
    } else {
      emptyCards("error", round?.blind);
      moveFocus("go");
    }
  },
};

const isDownload = (message) => /could not be downloaded|broke off/.test(message);

/** The button that had the focus is hidden now. */
function moveFocus(target) {
  if (document.activeElement === document.body) at(target).focus({ preventScroll: true });
}

// A run

function problemWith(prompt) {
  if (!prompt.trim()) return "Type a prompt first.";
  if (prompt.length > LONGEST_PROMPT) {
    return `The prompt has ${prompt.length.toLocaleString("en")} characters; the limit is 4,000.`;
  }
  return "";
}

const limited = (id, least, most) => Math.min(most, Math.max(least, Number(at(id).value) || 0));

function compare() {
  if (running || !loaded) return;
  const prompt = at("text").value;
  const problem = problemWith(prompt);
  complain(problem);
  if (problem) return;
  running = true;
  const blind = at("blind").checked && loaded.sides.length === 2;
  round = { answers: {}, order: blind && Math.random() < 0.5 ? [...SIDES].reverse() : SIDES, blind };
  emptyCards("waiting", blind);
  show("verdict");
  say(loaded.sides.length === 2 ? "Both models are generating." : "The model is generating.");
  moveFocus("stop");
  const settings = {
    maxNewTokens: Math.round(limited("length", 1, 256)),
    temperature: limited("temperature", 0, 2),
    topP: limited("top-p", 0.05, 1),
    seed: Math.trunc(limited("seed", 0, 2 ** 32 - 1)),
  };
  worker.postMessage({ type: "run", prompt, settings });
}

function vote(choiceOfVisitor) {
  const preferred = choiceOfVisitor === "Tie" ? "tie" : round.order["AB".indexOf(choiceOfVisitor)];
  round.blind = false;
  showRound();
  show("verdict", voteResult(preferred), verdict(round.answers, labelOf(loaded)));
  say(`A was the ${round.order[0]}, B the ${round.order[1]}.`);
  moveFocus("go");
}

// Settings

function radios(id, entries, chosen, change) {
  const labels = entries.map(({ value, label, disabled, title }) => {
    const input = h("input", { type: "radio", name: id, value, title, ...(disabled ? { disabled: "" } : {}) });
    input.checked = value === chosen;
    input.addEventListener("change", () => change(value));
    return h("label", { title }, input, label);
  });
  at(id).querySelector(".choices").replaceChildren(...labels);
}

function showPrecisions() {
  const entries = facts.precisions.map((entry) => {
    const pair = entry.original.bytes + entry.pruned.bytes;
    const fits = (choice.sides.length === 2 ? pair : entry.pruned.bytes) <= facts.browser.most_bytes;
    const title = fits ? null : "More than a browser can hold";
    return { value: entry.name, label: precisionLabel(entry), disabled: !fits, title };
  });
  radios("precisions", entries, choice.precision, (value) => {
    choice.precision = value;
    changed();
  });
}

function showBackends() {
  const entries = [{ value: "wasm", label: "CPU" }];
  if (choice.webgpu) entries.unshift({ value: "webgpu", label: "GPU, through WebGPU" });
  at("backends").hidden = entries.length < 2;
  radios("backends", entries, choice.backend, (value) => {
    choice.backend = value;
    changed();
  });
}

/** Other models than the loaded ones are wanted. */
function changed() {
  if (running) worker.postMessage({ type: "stop" });
  if (loaded && loaded.precision === choice.precision && loaded.backend === choice.backend) return;
  worker?.terminate();
  worker = null;
  running = false;
  show("verdict");
  say("");
  emptyCards("ready");
  void offerModels();
}

function listen() {
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    compare();
  });
  at("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.shiftKey) {
      event.preventDefault();
      compare();
    }
  });
  at("stop").addEventListener("click", () => worker?.postMessage({ type: "stop" }));
  for (const button of at("votes").children) button.addEventListener("click", () => vote(button.dataset.vote));
  for (const output of document.querySelectorAll("output")) {
    const input = at(output.htmlFor.value);
    input.addEventListener("input", () => {
      output.value = input.value;
    });
  }
}

async function begin() {
  listen();
  emptyCards("ready");
  try {
    facts = await readFacts();
  } catch (error) {
    complain(error instanceof Problem ? error.message : `The page failed: ${error.message}`);
    emptyCards("error");
    return;
  }
  document.title = facts.title;
  show("header", header(facts));
  show("tiles", ...tiles(facts));
  show("method", method(facts));
  for (const example of (facts.examples ?? []).slice(0, 3)) {
    const chip = h("button", { type: "button" }, example);
    chip.addEventListener("click", () => {
      at("text").value = example;
    });
    at("chips").append(chip);
  }
  choice.room = roomFor(facts.browser.most_bytes);
  const offered = offer(facts.precisions, choice.room);
  choice.precision = offered?.precision ?? "";
  choice.sides = offered?.sides ?? [];
  const gpu = await findGpu();
  choice.webgpu = gpu !== "none";
  choice.backend = gpu === "hardware" ? "webgpu" : "wasm";
  emptyCards("ready");
  showPrecisions();
  showBackends();
  await offerModels();
}

void begin();
