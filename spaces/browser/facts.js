// compare.json: what is compared, and where its files are.

import { Problem } from "./download.js";

const SCHEMA_VERSION = 2;
export const SIDES = ["original", "pruned"];

/** The content of compare.json, checked as far as this page uses it. */
export async function readFacts(url = "compare.json") {
  let answer;
  try {
    answer = await fetch(url, { cache: "no-cache" });
  } catch {
    throw new Problem("compare.json cannot be fetched.");
  }
  if (!answer.ok) throw new Problem("compare.json is missing: it must be next to index.html.");
  try {
    return checked(await answer.json());
  } catch (error) {
    if (error instanceof Problem) throw error;
    throw new Problem(`compare.json cannot be read: ${error.message}`);
  }
}

function checked(facts) {
  if (facts.schema_version !== SCHEMA_VERSION) {
    const given = JSON.stringify(facts.schema_version)?.slice(0, 40);
    throw new Problem(`compare.json has schema version ${given}; this page reads version ${SCHEMA_VERSION}.`);
  }
  if (!facts.browser) {
    throw new Problem("compare.json is not for a browser. Write the Space again with `gradmap-hub space FOLDER`.");
  }
  for (const key of ["layers", "parameters", "bytes"]) {
    for (const side of SIDES) number(facts[key][side], `${key}.${side}`);
  }
  for (const side of SIDES) {
    text(facts[side].name, `${side}.name`);
    for (const entry of facts.precisions) {
      number(entry[side].bytes, `precisions.${side}.bytes`);
      local(entry[side].path);
      local(entry.file);
    }
  }
  const { tokenizer, runtime, text: prompting } = facts.browser;
  for (const { path, bytes } of [tokenizer, ...Object.values(runtime)]) {
    local(path);
    number(bytes, "browser");
  }
  if (!Array.isArray(prompting.end_ids)) throw new Problem("compare.json: browser.text.end_ids must be a list.");
  if (!facts.precisions.some(({ name }) => name === facts.precision)) {
    throw new Problem(`compare.json starts with the precision ${facts.precision}, which it does not list.`);
  }
  return facts;
}

function number(value, where) {
  if (typeof value !== "number" || !Number.isFinite(value) || value < 0) {
    throw new Problem(`compare.json: ${where} must be a number, 0 or more.`);
  }
}

function text(value, where) {
  if (typeof value !== "string") throw new Problem(`compare.json: ${where} must be a string.`);
}

/** A path below this page. */
function local(path) {
  if (typeof path !== "string" || !/^[\w.-]+(\/[\w.-]+)*$/.test(path) || path.split("/").includes("..")) {
    throw new Problem(`compare.json: a path must stay within its folder; got ${JSON.stringify(path)?.slice(0, 60)}.`);
  }
}

export const precisionOf = (facts, name) => facts.precisions.find((entry) => entry.name === name);

/** The file of a model's graph in one precision: {url, version, bytes}. */
export function graphOf(facts, precision, side) {
  const place = precisionOf(facts, precision)[side];
  const base = place.stored === "space" ? place.path : `${repository(facts, side)}/${place.path}`;
  const url = new URL(`${base}/${precisionOf(facts, precision).file}`, document.baseURI).href;
  return { url, version: place.version ?? "", bytes: place.bytes };
}

/** The tokenizer of both models: the pruned one has the original's. */
export function tokenizerOf(facts) {
  return here(facts.browser.tokenizer);
}

/** The program of ONNX Runtime for a backend. */
export function runtimeOf(facts, backend) {
  return here(facts.browser.runtime[backend]);
}

function here({ path, version, bytes }) {
  return { url: new URL(path, document.baseURI).href, version, bytes };
}

/** The address of a model's files on the Hub, at its recorded commit. */
function repository(facts, side) {
  const { repo_id: id, revision } = facts[side];
  if (!id) throw new Problem(`The repository of the ${side} model is unknown.`);
  return `${facts.browser.hub}/${id}/resolve/${encodeURIComponent(revision ?? "main")}`;
}
