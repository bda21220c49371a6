/** Curves against the step: training as a line, validation as dots. Pointer and arrow keys read them. */

const HEIGHT = 220;
const MARGIN = { left: 56, right: 12, top: 10, bottom: 26 };

/** Round numbers between two, about as many as asked for. */
function linearTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let at = Math.ceil(low / step); at * step <= high * (1 + 1e-9) && ticks.length < 50; at++) ticks.push(Number((at * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  for (const factors of [[1, 2, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      ticks.push(...factors.map((factor) => Number((factor * 10 ** power).toPrecision(3))));
    }
    const inside = ticks.filter((tick) => tick >= low && tick <= high);
    if (inside.length > 8) return inside.filter((tick) => /^[1-9]?1?0*\.?0*1?(e.*)?$/.test(String(tick)) || inside.length < 12);
    if (inside.length > 2) return inside;
  }
  return linearTicks(low, high, 4);
}

/** The point whose step is nearest. */
function nearest(points, step) {
  let [low, high] = [0, points.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - points[low - 1][0] <= points[low][0] - step ? points[low - 1] : points[low];
}

/**
 * A chart of curves: {label, colour, train, validation}, the last two lists of [step, value], which may be empty.
 * `log` for a logarithmic axis; `zero` for one that begins at nothing; `span`, the least that a linear one reaches over, so that
 * what hardly changes looks like it; `format` writes a value.
 */
function chart({ title, curves, log = false, zero = false, span, format = written }) {
  const splits = ["train", "validation"].filter((split) => curves.some((curve) => curve[split].length));
  const all = curves.flatMap((curve) => splits.flatMap((split) => curve[split]));
  const steps = [...new Set(all.map(([step]) => step))].sort((a, b) => a - b);
  const first = 0;
  const last = Math.max(steps.at(-1), 1);
  const values = all.map(([, value]) => value);
  let low = zero ? 0 : values.reduce((a, b) => Math.min(a, b));
  let high = values.reduce((a, b) => Math.max(a, b));
  const middle = (low + high) / 2;
  const reach = Math.max(high - low, span ?? Math.abs(middle) / 20) || 1;
  if (log) [low, high] = [low / 1.1, high * 1.1];
  else if (zero) high = 1.05 * high || 0.5;
  else [low, high] = [middle - 0.55 * reach, middle + 0.55 * reach];

  const plot = make("div", {
    class: "plot",
    tabindex: 0,
    role: "slider",
    "aria-label": `${title}, read at a step`,
    "aria-valuemin": steps[0],
    "aria-valuemax": steps.at(-1),
  });
  const cells = curves.map((curve) => splits.map((split) => make("td", {}, curve[split].length ? "" : "–")));
  const at = make("th", { scope: "col" });
  const legend = make(
    "table",
    { class: "legend" },
    make("thead", {}, make("tr", {}, at, splits.map((split) => make("th", { scope: "col", class: split }, split)))),
    make(
      "tbody",
      {},
      curves.map((curve, row) => {
        const swatch = make("span", { class: `swatch colour${curve.colour}` });
        return make("tr", {}, make("th", { scope: "row" }, swatch, curve.label), cells[row]);
      }),
    ),
  );
  let [width, chosen] = [0, null];
  let [cursor, read] = [];

  const x = (step) => MARGIN.left + ((step - first) / (last - first)) * (width - MARGIN.left - MARGIN.right);
  const y = (value) => {
    const part = log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
    return HEIGHT - MARGIN.bottom - part * (HEIGHT - MARGIN.top - MARGIN.bottom);
  };

  function redraw() {
    const svg = draw("svg", { width, height: HEIGHT, "aria-hidden": "true" });
    for (const tick of log ? logTicks(low, high) : linearTicks(low, high, 4)) {
      const height = y(tick);
      svg.append(
        draw("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: height, y2: height }),
        draw("text", { x: MARGIN.left - 6, y: height + 4, "text-anchor": "end" }, format(tick)),
      );
    }
    for (const tick of linearTicks(first, last, Math.max(3, Math.min(6, width / 110)))) {
      const anchor = x(tick) > width - 40 ? "end" : "middle";
      const place = anchor === "end" ? width - MARGIN.right : x(tick);
      svg.append(draw("text", { x: place, y: HEIGHT - 8, "text-anchor": anchor }, written(tick)));
    }
    cursor = draw("line", { class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
    svg.append(cursor);
    for (const curve of [...curves].reverse()) {
      const path = (points) => points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
      svg.append(draw("polyline", { class: `line colour${curve.colour}`, points: path(curve.train) }));
      if (!curve.validation.length) continue;
      svg.append(draw("polyline", { class: `line dashed colour${curve.colour}`, points: path(curve.validation) }));
      if (curve.validation.length > 60) continue;
      for (const [step, value] of curve.validation) {
        svg.append(draw("circle", { class: `dot colour${curve.colour}`, cx: x(step), cy: y(value), r: 3 }));
      }
    }
    // The points that the table tells, which lie beside the cursor where a curve has none there.
    read = draw("g");
    svg.append(read);
    plot.replaceChildren(svg);
    show(chosen);
  }

  /** Reads the curves at a step; at the last one where that is null. */
  function show(step) {
    chosen = step;
    const place = step ?? steps.at(-1);
    const said = [];
    read.replaceChildren();
    curves.forEach((curve, row) =>
      splits.forEach((split, column) => {
        if (!curve[split].length) return;
        const [found, value] = nearest(curve[split], place);
        cells[row][column].textContent = format(value);
        said.push(`${curve.label} ${split} ${format(value)}${found === place ? "" : ` at step ${found}`}`);
        if (step !== null) read.append(draw("circle", { class: `read colour${curve.colour}`, cx: x(found), cy: y(value), r: 4.5 }));
      }),
    );
    at.textContent = step === null ? "at the end" : `step ${written(step)}`;
    cursor.setAttribute("x1", x(place));
    cursor.setAttribute("x2", x(place));
    cursor.classList.toggle("shown", step !== null);
    plot.setAttribute("aria-valuenow", place);
    plot.setAttribute("aria-valuetext", `step ${place}: ${said.join(", ")}`);
  }

  function point(event) {
    const share = (event.clientX - plot.getBoundingClientRect().left - MARGIN.left) / (width - MARGIN.left - MARGIN.right);
    const step = first + Math.min(1, Math.max(0, share)) * (last - first);
    show(nearest(steps.map((each) => [each]), step)[0]);
  }

  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", () => show(null));
  plot.addEventListener("blur", () => show(null));
  plot.addEventListener("keydown", (event) => {
    const here = steps.indexOf(chosen ?? steps.at(-1));
    const page = Math.max(1, Math.round(steps.length / 10));
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -page, PageUp: page, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(steps[Math.min(steps.length - 1, Math.max(0, here + moves[event.key]))]);
  });
  new ResizeObserver(() => {
    if (plot.clientWidth && plot.clientWidth !== width) {
      width = plot.clientWidth;
      redraw();
    }
  }).observe(plot);
  return make("figure", { class: "chart" }, make("figcaption", {}, title, log ? make("small", {}, " logarithmic") : null), plot, legend);
}
