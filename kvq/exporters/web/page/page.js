// The page: an image becomes tokens, tokens become a picture, and both follow whoever changes a token.

import { ask, listen } from "./ask.js";
import { outline, placeUnder } from "./outline.js";
import { draw, LARGEST, psnr, read } from "./picture.js";
import { colourOf, drawTokens, explain, inkOn, palette } from "./tokens.js";

const find = (id) => document.getElementById(id);
const frames = [...document.querySelectorAll(".frame")];
const mark = (name, place) => outline(frames, name, place, shown.rows, shown.columns);

let model;
let file;
// What is shown: {image, indices (Int32Array), encoded (as they first were), rows, columns, depth, reconstruction, times}.
let shown;
let level = 0;
let selected = null;
let changes = [];

function say(text, state) {
  find("status").textContent = text;
  document.body.dataset.state = state;
}

function fail(error) {
  find("progress").hidden = true;
  say(error.message, "error");
}

async function start() {
  listen((done) => (find("progress").value = done), fail);
  say("Loading the model and the runtime …", "loading");
  find("progress").hidden = false;
  const answer = await fetch("model.json");
  if (!answer.ok) throw new Error(`model.json does not load: the server answers ${answer.status}.`);
  model = await answer.json();
  const levels = model.depth ? `, ${model.depth} a position` : "";
  find("model").textContent =
    `${model.quantizer.replaceAll("_", " ")} quantizer, ${model.vocabulary.toLocaleString("en")} codes${levels}, ` +
    `a token for every ${model.downsampling} × ${model.downsampling} pixels; ` +
    `trained on ${model.data} for ${model.steps.toLocaleString("en")} steps`;
  find("model-size").textContent = `Model’s size, ${model.crop} × ${model.crop}`;
  find("own-size").textContent = `Own size, at most ${LARGEST} × ${LARGEST}`;
  find("sizes").hidden = !model.free_size;
  find("colours").textContent = explain(model);
  find("code").max = model.vocabulary - 1;
  offerLevels();
  await ask("load", { bytes: model.bytes });
  find("progress").hidden = true;
  find("file").disabled = false;
  say("Ready. Give it an image.", "ready");
}

// From a file to everything shown of it. Of several asked for at once the last one counts.
let latest = 0;
async function open() {
  const mine = ++latest;
  say("Encoding …", "busy");
  const own = document.querySelector("[name=size]:checked").value === "own";
  const image = await read(file, model, own);
  const dims = [1, image.height, image.width, model.channels];
  const tokens = await ask("run", { part: "encoder", type: "uint8", data: image.pixels, dims });
  if (mine !== latest) return;
  const [, rows, columns, depth = 1] = tokens.dims;
  shown = { image, indices: tokens.data, encoded: tokens.data.slice(), rows, columns, depth, encoding: tokens.milliseconds };
  [selected, changes] = [null, []];
  for (const frame of frames) frame.style.aspectRatio = `${columns} / ${rows}`;
  draw(find("image"), image);
  find("image-note").textContent = image.note;
  await decode();
  if (mine !== latest) return;
  find("panels").hidden = find("editor").hidden = false;
  showLevel();
}

let decodings = 0;
async function decode() {
  const mine = ++decodings;
  const { indices, rows, columns, depth, image } = shown;
  const dims = model.depth ? [1, rows, columns, depth] : [1, rows, columns];
  document.body.dataset.state = "busy";
  const picture = await ask("run", { part: "decoder", type: "int32", data: indices, dims });
  if (mine !== decodings) return;
  shown.reconstruction = { width: image.width, height: image.height, pixels: picture.data };
  shown.decoding = picture.milliseconds;
  draw(find("reconstruction"), shown.reconstruction);
  const decibels = psnr(image.pixels, picture.data);
  find("reconstruction-note").textContent = `PSNR ${decibels === Infinity ? "∞" : decibels.toFixed(2)} dB`;
  const bits = rows * columns * depth * Math.log2(model.vocabulary);
  const share = (8 * image.pixels.length) / bits;
  const count = shown.indices.filter((code, place) => code !== shown.encoded[place]).length;
  say(
    `${(rows * columns * depth).toLocaleString("en")} tokens, ${Math.ceil(bits).toLocaleString("en")} bits: 1/${share.toFixed(1)} of the pixels. ` +
      `Encoded in ${shown.encoding.toFixed(0)} ms, decoded in ${shown.decoding.toFixed(0)} ms.` +
      (count ? ` ${count} ${count === 1 ? "token" : "tokens"} changed.` : ""),
    "ready",
  );
}

const ofLevel = (indices) => indices.filter((_, place) => place % shown.depth === level);

// The palette stays while tokens change, so that nobody's button moves.
function showLevel() {
  const offered = palette(model, ofLevel(shown.encoded));
  find("palette-note").textContent = `${offered.note}:`;
  find("palette").replaceChildren(...offered.codes.map(swatch));
  find("tokens-note").textContent = `${shown.rows} × ${shown.columns}` + (shown.depth > 1 ? `, level ${level + 1} of ${shown.depth}` : "");
  showTokens();
}

function showTokens() {
  drawTokens(find("tokens"), model, level, ofLevel(shown.indices), shown.rows, shown.columns);
  showSelected();
}

function swatch(code) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = button.dataset.code = code;
  button.style.background = colourOf(model, level, code);
  button.style.color = inkOn(colourOf(model, level, code));
  button.title = `code ${code}`;
  button.onclick = () => change(code);
  return button;
}

function showSelected() {
  mark("selected", selected);
  const chosen = selected !== null;
  find("code").disabled = find("random").disabled = !chosen;
  find("undo").disabled = find("reset").disabled = !changes.length;
  const code = chosen ? shown.indices[selected * shown.depth + level] : null;
  find("code").value = chosen ? code : "";
  find("place").textContent = chosen ? describe(selected) : "Click a token to change it.";
  for (const button of find("palette").children) {
    button.disabled = !chosen;
    button.setAttribute("aria-pressed", Number(button.dataset.code) === code);
  }
}

function describe(place) {
  const code = shown.indices[place * shown.depth + level];
  return `Row ${Math.floor(place / shown.columns) + 1}, column ${(place % shown.columns) + 1}: code ${code}`;
}

function select(place) {
  selected = place;
  showSelected();
}

function set(index, code) {
  shown.indices[index] = code;
  showTokens();
  decode().catch(fail);
}

function change(code) {
  if (selected === null) return;
  const index = selected * shown.depth + level;
  if (!Number.isInteger(code) || code < 0 || code >= model.vocabulary) {
    showSelected();
    return say(`A code is a whole number from 0 to ${model.vocabulary - 1}.`, "error");
  }
  if (code === shown.indices[index]) return;
  changes.push([index, shown.indices[index]]);
  set(index, code);
}

function undo() {
  const [index, code] = changes.pop();
  selected = Math.floor(index / shown.depth);
  turnTo(index % shown.depth);
  set(index, code);
}

function reset() {
  shown.indices.set(shown.encoded);
  changes = [];
  showTokens();
  decode().catch(fail);
}

function offerLevels() {
  find("levels").hidden = model.depth < 2;
  for (let number = 0; number < model.depth; number++) {
    const [label, input] = [document.createElement("label"), document.createElement("input")];
    Object.assign(input, { type: "radio", name: "level", value: number, checked: number === level });
    input.onchange = () => turnTo(number);
    label.append(input, ` ${number + 1}`);
    find("levels").append(label);
  }
}

function turnTo(number) {
  if (number === level) return;
  level = number;
  document.querySelector(`[name=level][value="${number}"]`).checked = true;
  showLevel();
}

for (const frame of frames) {
  frame.onpointermove = (event) => {
    const place = placeUnder(event, frame, shown.rows, shown.columns);
    mark("hovered", place);
    frame.title = describe(place);
  };
  frame.onpointerleave = () => mark("hovered", null);
  frame.onclick = (event) => select(placeUnder(event, frame, shown.rows, shown.columns));
}

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
find("grid").onkeydown = (event) => {
  if (event.key === "Enter" && selected !== null) {
    event.preventDefault();
    find("code").select();
  } else if (event.key in STEPS) {
    event.preventDefault();
    const [down, right] = selected === null ? [0, 0] : STEPS[event.key];
    const row = Math.min(shown.rows - 1, Math.max(0, Math.floor((selected ?? 0) / shown.columns) + down));
    const column = Math.min(shown.columns - 1, Math.max(0, ((selected ?? 0) % shown.columns) + right));
    select(row * shown.columns + column);
  }
};
find("code").onchange = () => (find("code").value === "" ? showSelected() : change(Number(find("code").value)));
find("random").onclick = () => change(Math.floor(Math.random() * model.vocabulary));
find("undo").onclick = undo;
find("reset").onclick = reset;
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z" && changes.length && event.target !== find("code")) undo();
});

function take(files) {
  // Before the model is there, nothing can be made of it.
  if (!files.length || find("file").disabled) return;
  file = files[0];
  open().catch(fail);
}

find("file").onchange = () => take(find("file").files);
find("sizes").onchange = () => file && open().catch(fail);
document.addEventListener("paste", (event) => take(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dragging"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  take(event.dataTransfer.files);
});

// For the console: plain arrays, row by row.
globalThis.kvq = {
  get images() {
    return shown?.image.pixels;
  },
  get indices() {
    return shown?.indices;
  },
  get reconstruction() {
    return shown?.reconstruction?.pixels;
  },
};

start().catch(fail);
