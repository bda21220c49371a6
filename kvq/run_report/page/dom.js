"use strict";

/** An element with attributes and children. Strings become text, whatever they say. */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same in SVG. */
function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A value for people: four significant digits, thousands apart. */
function written(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return Math.abs(value) < 1e15 ? value.toLocaleString("en-US") : String(value);
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

/** A value as a configuration has it: no digit is lost. */
function exact(value) {
  return value === null || value === undefined ? "–" : String(value);
}

function percent(value) {
  return `${Number((100 * value).toPrecision(3))}%`;
}

function section(title, ...children) {
  const id = title.toLowerCase().replaceAll(/[^a-z]+/g, "-");
  return make("section", { "aria-labelledby": id }, make("h2", { id }, title), children);
}

/** What is wider than a phone scrolls in its own frame, by the keyboard too. */
function frame(label, child) {
  return make("div", { class: "frame", tabindex: 0, role: "region", "aria-label": label }, child);
}

/** A name that may be broken where its parts meet. */
function breakable(name) {
  return name.split(/(?<=[._/])/).flatMap((part, at) => (at ? [make("wbr"), part] : [part]));
}

/** A table. A row is {head, cells, marked}. */
function table(label, headings, rows) {
  const head = make("tr", {}, headings.map((heading) => make("th", { scope: "col" }, breakable(heading))));
  const body = rows.map((row) =>
    make(
      "tr",
      { class: row.marked ? "marked" : undefined },
      make("th", { scope: "row" }, breakable(row.head)),
      row.cells.map((cell) => make("td", {}, cell)),
    ),
  );
  return frame(label, make("table", {}, make("thead", {}, head), make("tbody", {}, body)));
}

function details(summary, ...children) {
  return make("details", {}, make("summary", {}, summary), children);
}

/** A sentence on what is not there, with the command that makes it. */
function missing(sentence, command) {
  return make("p", { class: "missing" }, sentence, command ? [" ", make("code", {}, command), "."] : null);
}
