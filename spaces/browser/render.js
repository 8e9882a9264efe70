// The parts of the page, as render.py writes them for the Gradio app. All text goes in as text, never as HTML.

const ARROW = "\u2192";
const MINUS = "\u2212";
const TIMES = "\u00d7";
const NONE_YET = "\u2013";
const FEWEST_STEPS_FOR_A_RATIO = 4;

/** Create an element: h("p", {class: "note"}, "text", child). Attributes that are null are left out. */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

export const show = (id, ...children) => document.getElementById(id).replaceChildren(...children);

/** A count with three significant digits: 135M, 1.24B. */
function count(value) {
  for (const [unit, size] of [["B", 1e9], ["M", 1e6], ["K", 1e3]]) if (value >= size) return digits(value / size) + unit;
  return String(value);
}

export function size(bytes) {
  for (const [unit, amount] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (bytes >= amount) return `${digits(bytes / amount)} ${unit}`;
  }
  return `${bytes} B`;
}

const digits = (value) => String(Number(value.toPrecision(3)));

/** Without the unit of the first size if both have the same: 539 MB, 497 MB gives "539", "497 MB". */
function withoutUnit(before, after) {
  const [number, unit] = before.split(" ");
  return [after.endsWith(` ${unit}`) ? number : before, after];
}

/** The signed difference in percent. */
function change(original, pruned, fraction = 0) {
  if (!original) return "";
  const percent = (pruned / original - 1) * 100;
  const shown = percent.toFixed(Math.round(percent) === 0 && percent !== 0 ? 1 : fraction);
  return `${Number(shown) < 0 ? MINUS : "+"}${shown.replace("-", "")}%`;
}

export const shortName = (name) => name.slice(name.lastIndexOf("/") + 1);

const thousands = (value) => value.toLocaleString("en");

function modelName({ name, repo_id: id, revision }, hub) {
  if (!id || id.split("/").length !== 2) return h("b", {}, name);
  const address = `${hub}/${id}${revision ? `/tree/${revision}` : ""}`;
  return h("a", { href: address, target: "_blank", rel: "noopener" }, name);
}

export function header(facts) {
  const healed = facts.healed?.tokens;
  const training = healed
    ? ` The pruned one was trained on ${thousands(healed)} tokens to predict what the original predicts.`
    : "";
  return h(
    "header", { class: "top" },
    h("h1", {}, facts.title),
    h("p", {}, `Type a prompt. Both models answer it in this browser, with the same settings.${training}`),
    h(
      "p", { class: "models" },
      modelName(facts.original, facts.browser.hub), " ", h("span", { "aria-hidden": "true" }, ARROW),
      h("span", { class: "sr" }, " pruned to "), " ", modelName(facts.pruned, facts.browser.hub),
    ),
  );
}

function tile(label, [before, after], difference, tone, below) {
  return h(
    "div", { class: "tile" },
    h("dt", {}, `${label} `, h("span", { class: `change ${tone}` }, difference)),
    h(
      "dd", {},
      h(
        "span", { class: "pair" },
        h("span", {}, before), " ", h("span", { class: "arrow", "aria-hidden": "true" }, ARROW),
        h("span", { class: "sr" }, "to"), " ", h("b", {}, after),
      ),
    ),
    h("dd", {}, below),
  );
}

export function tiles(facts) {
  const pair = (label, { original, pruned }, words) => {
    const bar = h("span");
    bar.style.width = `${original ? Math.min(100, (100 * pruned) / original).toFixed(1) : 100}%`;
    return tile(label, words, change(original, pruned), "less", h("div", { class: "bar", "aria-hidden": "true" }, bar));
  };
  const { parameters, bytes, layers } = facts;
  const parts = [
    pair("Parameters", parameters, [count(parameters.original), count(parameters.pruned)]),
    pair("Weights", bytes, withoutUnit(size(bytes.original), size(bytes.pruned))),
    pair("Layers", layers, [String(layers.original), String(layers.pruned)]),
  ];
  const measured = facts.perplexity.find(({ original, pruned }) => original && pruned);
  if (measured) {
    const { original, pruned, text } = measured;
    const tone = pruned > original ? "worse" : "less";
    const note = h("span", { class: "note" }, `${text}; lower is better`);
    parts.push(tile("Perplexity", [original.toFixed(1), pruned.toFixed(1)], change(original, pruned), tone, note));
  }
  return [h("dl", { class: "tiles" }, parts), layersOf(facts)];
}

/** Indices as ranges: 14, 15, 16, 20 become "14-16, 20". */
function ranges(indices) {
  const groups = [];
  for (const index of [...new Set(indices)].sort((a, b) => a - b)) {
    const last = groups.at(-1);
    if (last && index === last.at(-1) + 1) last.push(index);
    else groups.push([index]);
  }
  return groups.map((group) => (group.length === 1 ? `${group[0]}` : `${group[0]}\u2013${group.at(-1)}`)).join(", ");
}

/** The removed layers, as a sentence and as a strip with gaps. */
function layersOf(facts) {
  const { original, pruned, removed = [] } = facts.layers;
  const gone = new Set(removed);
  const corrected = facts.compensation?.matrices ?? Number(Boolean(facts.compensation?.applied));
  const matrices = corrected === 1 ? "one weight matrix" : `${corrected} weight matrices`;
  const healed = facts.healed?.tokens;
  const words =
    `${gone.size || original - pruned} of ${original} layers removed${corrected ? `, ${matrices} corrected` : ""}, ` +
    `${healed ? `healed on ${thousands(healed)} tokens` : "no retraining"}.`;
  const strip = Array.from({ length: Math.min(original, 1000) }, (_, index) =>
    h("i", { class: gone.has(index) ? "gone" : "kept" }),
  );
  return h(
    "div", { class: "layers" },
    h("p", {}, words, gone.size ? h("span", { class: "which" }, ` Removed: ${ranges(removed)}.`) : ""),
    h("div", { class: "strip", "aria-hidden": "true" }, strip),
  );
}

export const notice = (message, kind = "error") => (message ? [h("p", { class: `notice ${kind}` }, message)] : []);

/** The status of the run for screen readers. During a run, style.css shows Stop instead of Compare. */
export const spoken = (message, running = false) => h("p", { class: running ? "running" : "resting" }, message);

const STATES = {
  ready: "Ready",
  waiting: "Waiting",
  writing: "Generating",
  done: "Done",
  length: "Stopped at the length limit",
  stopped: "Stopped",
  error: "Error",
  absent: "Not loaded",
};

export function stateOf({ finish, seconds }) {
  if (finish === null) return seconds.length ? "writing" : "waiting";
  return { stop: "done", length: "length", stopped: "stopped" }[finish];
}

function emptyWords(state) {
  if (state === "waiting" || state === "writing") return "Reading the prompt\u2026";
  if (state === "done" || state === "length") return "The answer is empty.";
  if (state === "stopped" || state === "error") return "No answer.";
  if (state === "absent") return "This model is not loaded here.";
  return "The answer appears here.";
}

function meanLater(seconds) {
  const later = seconds.slice(1);
  return later.length ? later.reduce((sum, value) => sum + value, 0) / later.length : 0;
}

/** One answer. `numbers` is false during a blind vote: the speed would reveal the model. */
export function card(title, tag, state, answer = null, numbers = true) {
  const text = answer?.text.trim();
  const caret = state === "writing" ? h("span", { class: "caret", "aria-hidden": "true" }) : "";
  const body = text ? h("div", { class: "answer" }, text, caret) : h("div", { class: "answer none" }, emptyWords(state));
  let values = [NONE_YET, NONE_YET, NONE_YET];
  if (answer && numbers) {
    const each = meanLater(answer.seconds);
    const first = answer.seconds[0];
    values = [
      each ? `${(1 / each).toFixed(1)} tok/s` : NONE_YET,
      first === undefined ? NONE_YET : first < 10 ? `${(first * 1000).toFixed(0)} ms` : `${first.toFixed(1)} s`,
      String(answer.tokens),
    ];
  }
  const figures = ["Speed", "First token", "Tokens"].map((name, index) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, values[index])),
  );
  return h(
    "section", { class: `card ${state}`, "aria-label": `Answer: ${title}` },
    h(
      "header", {},
      h("h2", {}, title),
      tag ? h("span", { class: `tag ${tag.toLowerCase()}` }, tag) : "",
      h("span", { class: "state" }, STATES[state]),
    ),
    body,
    h("dl", { class: "figures" }, figures),
  );
}

/** The decode speed of the pruned model relative to the original: the median over pairs of steps that both took, without
    the first, which processes the prompt. Pairs, because the order within a round is random. null if there are too few. */
export function speedRatio({ original, pruned }) {
  const steps = Math.max(0, Math.min(original.seconds.length, pruned.seconds.length) - 1);
  if (steps < FEWEST_STEPS_FOR_A_RATIO) return null;
  const pairs = Math.floor(steps / 2);
  const both = ({ seconds }, pair) => seconds[2 * pair + 1] + seconds[2 * pair + 2];
  const ratios = Array.from({ length: pairs }, (_, pair) => both(original, pair) / both(pruned, pair));
  ratios.sort((a, b) => a - b);
  const ratio = (ratios[Math.floor((pairs - 1) / 2)] + ratios[Math.floor(pairs / 2)]) / 2;
  return { ratio, steps: 2 * pairs };
}

export function verdict(answers, label) {
  const named = h("span", { class: "label" }, `This run, ${label}`);
  if (!answers.original) return h("p", { class: "verdict" }, named, " The pruned model ran alone.");
  const found = speedRatio(answers);
  if (found === null) {
    return h("p", { class: "verdict" }, named, " The answers are too short to compare the speed.");
  }
  return h(
    "p", { class: "verdict" },
    named, " The pruned model wrote ", h("b", {}, `${found.ratio.toFixed(2)}${TIMES}`),
    " as many tokens per second as the original ",
    h("span", { class: "basis" }, `(median over ${found.steps} shared steps)`), ".",
  );
}

/** The open vote. While it is shown, style.css shows the vote buttons. */
export const question = () => h("p", { class: "voting" }, "Which answer is better?");

export function voteResult(choice) {
  const words = {
    original: ["You preferred the ", h("b", {}, "original"), "."],
    pruned: ["You preferred the ", h("b", {}, "pruned"), " model."],
    tie: ["You found them ", h("b", {}, "equal"), "."],
  }[choice];
  return h("p", { class: "verdict vote" }, h("span", { class: "label" }, "Your vote"), " ", words);
}

/** The label of a precision: int8 (131 -> 107 MB). */
export function precisionLabel({ name, original, pruned }) {
  const [before, after] = withoutUnit(size(original.bytes), size(pruned.bytes));
  return `${name} (${before} ${ARROW} ${after})`;
}

function table(label, heads, rows) {
  return h(
    "div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    h(
      "table", {},
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
      h(
        "tbody", {},
        rows.map(([name, ...cells]) =>
          h("tr", {}, h("th", { scope: "row" }, name), cells.map((cell) => h("td", {}, cell))),
        ),
      ),
    ),
  );
}

export function method(facts) {
  const figure = (value) => (value ? value.toFixed(2) : NONE_YET);
  const perplexities = facts.perplexity.map(({ text, tokens, original, pruned }) => [
    text, thousands(tokens), figure(original), figure(pruned), original && pruned ? change(original, pruned) : NONE_YET,
  ]);
  const cost = ({ quality }) =>
    quality ? change(quality.checkpoint_perplexity, quality.perplexity, 1) : NONE_YET;
  const precisions = facts.precisions.map(({ name, original, pruned }) => [
    name, size(original.bytes), size(pruned.bytes), cost(original), cost(pruned),
  ]);
  const measured = facts.precisions.flatMap(({ original, pruned }) => [pruned.quality, original.quality]).find(Boolean);
  const basis = measured ? ` Measured on ${thousands(measured.tokens)} tokens of ${measured.text}, against float32.` : "";
  const p = (...words) => h("p", {}, ...words);
  return h(
    "div", { class: "method" },
    perplexities.length
      ? table("Perplexity per text", ["Perplexity on", "Tokens", "Original", "Pruned", "Change"], perplexities)
      : p("No perplexity was measured when this page was made."),
    p(
      "Perplexity, parameters and weights were measured when this page was made. Lower perplexity is better. It ",
      "measures how well a model predicts a text, not how useful its answers are.",
    ),
    ...(measured
      ? [
          table("Precisions", ["Precision", "Original", "Pruned", "Perplexity, original", "Perplexity, pruned"], precisions),
          p(`The change in perplexity is the cost of quantization.${basis}`),
        ]
      : []),
    p(
      "The models run in this browser, in ONNX Runtime Web, always both in the same precision. They take turns, one ",
      "token each, and each step is timed separately, so neither slows the other down. Who goes first is drawn by ",
      "lot, and the ratio is the median over pairs of steps that both took, without the first, which processes the ",
      "prompt. One prompt on one device is not a benchmark.",
    ),
    p(
      "With temperature 0, each model always picks its top-1 token. No repetition penalty is applied. Each model uses ",
      "its own chat template, if it has one. Prompts and answers stay on this device.",
    ),
    facts.license ? p(`Licence of the original: ${facts.license}.`) : "",
  );
}
