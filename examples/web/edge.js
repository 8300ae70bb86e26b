// Runs what `kernelize export --to onnx` wrote (docs/edge.md): two graphs, and a state of constant size between them.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

const FORMAT = "kernelize-edge 1";
const ARRAYS = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array, bool: Uint8Array };

/** What a person can do something about: one line, shown as it is. */
export class UserError extends Error {}

/** The runtime's own files lie beside it; several threads need a page that is cross-origin isolated. */
export function configure(threads) {
  ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
}

/** Bytes of `url`; `onBytes(loaded, total)` hears how far it is, with total 0 where the server does not say. */
export async function fetchBytes(url, onBytes = () => {}) {
  let response;
  try {
    response = await fetch(url);
  } catch (error) {
    throw new UserError(`cannot reach ${url}: ${error.message}`);
  }
  if (!response.ok) throw new UserError(`${url}: the server answers ${response.status}`);
  const total = Number(response.headers.get("content-length")) || 0;
  const parts = [];
  let loaded = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    onBytes((loaded += value.length), total);
  }
  const bytes = new Uint8Array(loaded);
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

export async function fetchJson(url) {
  const text = new TextDecoder().decode(await fetchBytes(url));
  try {
    return JSON.parse(text);
  } catch {
    throw new UserError(`${url} is no JSON; is the export complete?`);
  }
}

/** One row's state: tensors by name, each with its batch axis of one. */
class State {
  constructor(facts) {
    this.tensors = new Map(facts.state.map((entry) => [entry.name, blank(entry)]));
  }

  get seen() {
    return Number(this.tensors.get("seen").data[0]);
  }

  /** Measured, not computed: what the tensors hold now. */
  get bytes() {
    return [...this.tensors.values()].reduce((sum, tensor) => sum + tensor.data.byteLength, 0);
  }

  feeds(names) {
    return Object.fromEntries(names.filter((n) => this.tensors.has(n)).map((n) => [n, this.tensors.get(n)]));
  }

  takeOver(outputs) {
    for (const [name, tensor] of Object.entries(outputs)) {
      if (name.startsWith("new.")) this.tensors.set(name.slice(4), tensor);
    }
  }
}

function blank({ name, dtype, shape, fill }) {
  const kind = ARRAYS[dtype];
  if (!kind) throw new UserError(`the state's ${name} is of ${dtype}, which this page does not know`);
  const data = new kind(shape.reduce((a, b) => a * b, 1));
  data.fill(dtype === "int64" ? BigInt(fill) : Number(fill));
  return new ort.Tensor(dtype, data, [1, ...shape]);
}

export class EdgeModel {
  /** Loads the exported folder at `base`, a URL that ends in a slash. */
  static async load(base, onProgress = () => {}) {
    const facts = await fetchJson(new URL("kernelize-edge.json", base));
    if (facts.format !== FORMAT) throw new UserError(`the model's format is ${facts.format}, this page reads ${FORMAT}`);
    const weights = await fetchBytes(new URL("weights.bin", base), (loaded, total) => onProgress("weights", loaded, total));
    const model = new EdgeModel(facts);
    onProgress("preparing", 0, 0);
    const external = { externalData: [{ path: "weights.bin", data: weights }] };
    model.sessions = {
      model: await session(base, facts.graphs.model.file, external),
      leave: await session(base, facts.graphs.leave.file, {}),
    };
    return model;
  }

  constructor(facts) {
    this.facts = facts;
  }

  start() {
    return new State(this.facts);
  }

  /** Reads tokens; the logits after the last one. `onChunk()` is awaited between two runs; false there stops. */
  async read(state, ids, onChunk = async () => true) {
    let logits = null;
    for (let done = 0; done < ids.length; ) {
      const count = Math.min(ids.length - done, this.room(state.seen));
      logits = await this.advance(state, ids.slice(done, done + count));
      done += count;
      if (!(await onChunk(done))) break;
    }
    return logits;
  }

  /** Tokens that fit before a block begins. */
  room(seen) {
    return this.facts.blocks.reduce((room, { block }) => Math.min(room, block - (seen % block)), this.facts.max_tokens);
  }

  async advance(state, ids) {
    const { seen } = state;
    if (this.facts.blocks.some(({ block, ring }) => seen % block === 0 && seen >= ring)) {
      state.takeOver(await this.sessions.leave.run(state.feeds(this.facts.graphs.leave.inputs)));
    }
    const feeds = state.feeds(this.facts.graphs.model.inputs);
    feeds.ids = new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
    feeds.count = new ort.Tensor("int64", [BigInt(ids.length)], [1]);
    const outputs = await this.sessions.model.run(feeds);
    state.takeOver(outputs);
    return outputs.logits.data;
  }
}

async function session(base, file, options) {
  const graph = await fetchBytes(new URL(file, base));
  try {
    return await ort.InferenceSession.create(graph, { executionProviders: ["wasm"], ...options });
  } catch (error) {
    throw new UserError(`${file} cannot be loaded: ${error.message ?? error}`);
  }
}

/** The likeliest token, or with a temperature one drawn from the smallest set that holds `topP` of the probability. */
export function pick(logits, temperature, topP = 0.9) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!temperature) return best;
  const weights = Float32Array.from(logits, (x) => Math.exp((x - logits[best]) / temperature));
  const total = weights.reduce((a, b) => a + b, 0);
  const order = [...weights.keys()].filter((i) => weights[i] > total * 1e-6).sort((a, b) => weights[b] - weights[a]);
  let mass = 0;
  let size = 0;
  while (size < order.length && mass < topP * total) mass += weights[order[size++]];
  let left = Math.random() * mass;
  for (const i of order.slice(0, size)) if ((left -= weights[i]) <= 0) return i;
  return best;
}
