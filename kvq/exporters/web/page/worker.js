// Runs the encoder and the decoder beside the page, so that it stays alive while they compute.

import * as ort from "./onnxruntime.js";

// More would need a server that isolates the page from other origins.
ort.env.wasm.numThreads = 1;

const sessions = {};

async function load({ bytes }) {
  const total = Object.values(bytes).reduce((sum, size) => sum + size, 0);
  let done = 0;
  const fetched = {};
  for (const name of Object.keys(bytes)) {
    fetched[name] = await download(name, (count) => {
      done += count;
      postMessage({ progress: done / total });
    });
  }
  // Given as bytes, it loads from servers that do not know the type of .wasm.
  ort.env.wasm.wasmBinary = fetched["onnxruntime.wasm"].buffer;
  for (const part of ["encoder", "decoder"]) {
    // Warnings, as of a weight that no node uses, would come as errors on the console.
    const options = { executionProviders: ["wasm"], logSeverityLevel: 3 };
    sessions[part] = await ort.InferenceSession.create(fetched[`${part}.onnx`], options);
  }
}

async function download(name, onBytes) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name} does not load: the server answers ${answer.status}.`);
  const chunks = [];
  const reader = answer.body.getReader();
  for (let part; !(part = await reader.read()).done; ) {
    chunks.push(part.value);
    onBytes(part.value.length);
  }
  return new Uint8Array(await new Blob(chunks).arrayBuffer());
}

async function run({ part, type, data, dims }) {
  const session = sessions[part];
  const start = performance.now();
  const results = await session.run({ [session.inputNames[0]]: new ort.Tensor(type, data, dims) });
  const output = results[session.outputNames[0]];
  return { data: output.data, dims: output.dims, milliseconds: performance.now() - start };
}

onmessage = async ({ data: { id, call, ...rest } }) => {
  try {
    postMessage({ id, result: await { load, run }[call](rest) });
  } catch (error) {
    postMessage({ id, error: error.message ?? String(error) });
  }
};
