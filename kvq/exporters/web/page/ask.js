// The worker, as a function that promises its answer.

const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map();
let calls = 0;

export function ask(call, rest) {
  return new Promise((resolve, reject) => {
    waiting.set(++calls, { resolve, reject });
    worker.postMessage({ id: calls, call, ...rest });
  });
}

// `onProgress` gets the part of the loading that is done, from 0 to 1.
export function listen(onProgress, onFailure) {
  worker.onmessage = ({ data: { id, result, error, progress } }) => {
    if (progress !== undefined) return onProgress(progress);
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    if (error) reject(new Error(error));
    else resolve(result);
  };
  worker.onerror = () => onFailure(new Error("The runtime does not start: it needs a browser with module workers and WebAssembly SIMD."));
}
