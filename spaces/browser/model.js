// A causal language model in ONNX Runtime Web, as in onnx_engine.py: the graph takes the new tokens and the keys and
// values of the earlier ones (past_key_values.*), and returns logits and the keys and values of all tokens (present.*).

import { Problem } from "./download.js";

const PLAIN = new Set(["input_ids", "attention_mask", "position_ids"]);

/** ONNX Runtime Web for this browser: the build with WebGPU is twice as large as the one without. */
export async function runtimeFor(backend, wasmBinary, threads) {
  const ort = await import(backend === "webgpu" ? "./vendor/ort.webgpu.mjs" : "./vendor/ort.wasm.mjs");
  ort.env.logLevel = "error";
  ort.env.wasm.wasmBinary = wasmBinary;
  ort.env.wasm.numThreads = threads;
  return ort;
}

export class Model {
  /**
   * @param ort ONNX Runtime Web.
   * @param {"webgpu" | "wasm"} backend
   * @param {Uint8Array} graph
   * @param {TextCodec} text
   * @param {number | null} contextLength
   */
  static async load(ort, backend, graph, text, contextLength) {
    const options = { executionProviders: [backend], logSeverityLevel: 3, enableMemPattern: false };
    // Keys and values stay where they are computed; only the logits are read.
    if (backend === "webgpu") options.preferredOutputLocation = "gpu-buffer";
    const session = await ort.InferenceSession.create(graph, options);
    return new Model(ort, session, text, contextLength);
  }

  constructor(ort, session, text, contextLength) {
    this.ort = ort;
    this.session = session;
    this.text = text;
    this.contextLength = contextLength;
    this.past = new Map();
    this.plain = [];
    for (const { name, type, shape } of session.inputMetadata) {
      if (!name.startsWith("past_key_values.")) {
        if (!PLAIN.has(name)) throw new Problem(`The graph has an unknown input: ${name}.`);
        this.plain.push(name);
      } else if (type !== "float32" || shape.length !== 4 || ![shape[1], shape[3]].every(Number.isInteger)) {
        throw new Problem(`The graph has a cache of the unsupported type ${type} and shape ${shape}.`);
      } else {
        this.past.set(name, [1, shape[1], 0, shape[3]]);
      }
    }
    if (!this.plain.includes("input_ids") || this.past.size === 0) {
      throw new Problem("The file is not a text generation graph with a cache.");
    }
  }

  start() {
    return new Decoder(this);
  }

  release() {
    return this.session.release();
  }
}

/** The decode loop of one answer. */
class Decoder {
  constructor(model) {
    this.model = model;
    this.length = 0;
    const { Tensor } = model.ort;
    this.cache = new Map();
    for (const [name, shape] of model.past) this.cache.set(name, new Tensor("float32", new Float32Array(0), shape));
  }

  /** Append the tokens; returns the logits of the next token, Float32Array (vocabulary,). */
  async step(ids) {
    const { Tensor } = this.model.ort;
    const end = this.length + ids.length;
    const row = (length, value) => new Tensor("int64", BigInt64Array.from({ length }, value), [1, length]);
    const plain = {
      input_ids: () => row(ids.length, (_, index) => BigInt(ids[index])),
      attention_mask: () => row(end, () => 1n),
      position_ids: () => row(ids.length, (_, index) => BigInt(this.length + index)),
    };
    const feeds = Object.fromEntries([...this.cache, ...this.model.plain.map((name) => [name, plain[name]()])]);
    const outputs = await this.model.session.run(feeds);
    const before = this.cache;
    this.cache = new Map();
    // present.3.key of this step becomes past_key_values.3.key of the next.
    for (const name of before.keys()) this.cache.set(name, outputs[name.replace("past_key_values", "present")]);
    free(before);
    this.length = end;
    const { logits } = outputs;
    const data = await logits.getData(true);
    return data.subarray(data.length - logits.dims[2]);
  }

  dispose() {
    free(this.cache);
    this.cache = new Map();
  }
}

function free(cache) {
  for (const tensor of cache.values()) if (tensor.location === "gpu-buffer") tensor.dispose();
}
