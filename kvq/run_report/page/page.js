/** The page from its data: one run, or several side by side. */

const NOT_TERMS = new Set(["loss", "psnr", "ssim", "usage", "perplexity", "images_per_second", "input_wait"]);
const FINAL = [
  ["psnr", "PSNR, dB", written],
  ["ssim", "SSIM", written],
  ["loss", "loss", written],
  ["perplexity", "perplexity, codes", written],
  ["usage", "codes in use", percent],
];

const { runs, kvq, written: day } = JSON.parse(document.getElementById("data").textContent);
const several = runs.length > 1;

/** The split that the figures of a run come from: validation, where there is any. */
function measuredOn(run) {
  return ["validation", "train"].find((split) => run.series[split]?.psnr || run.series[split]?.loss);
}

function lastPoint(run, split, name) {
  return run.series[split]?.[name]?.at(-1);
}

function lastStep(run) {
  const curves = ["train", "validation"].flatMap((split) => Object.values(run.series[split] ?? {}));
  return Math.max(0, ...curves.map((points) => points.at(-1)[0]));
}

function stepsOf(run) {
  return Number.isInteger(run.record.steps) ? run.record.steps : lastStep(run);
}

function duration(run) {
  const { seconds, with_pauses: pauses } = run;
  if (seconds === null) return null;
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor((seconds % 3600) / 60)];
  const long = hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.round(seconds)} s`;
  return pauses ? `${long} from the first start to the end` : long;
}

/** The commands of a run that was resumed by others than it began with, the newest first; else the one that is known, if any. */
function commandsOf(run) {
  if (run.commands.length === 1) return [run.commands[0].command].filter((command) => command !== null);
  return run.commands.map(({ step, command }) => `${step === 0 ? "from the start" : `from step ${written(step)}`}: ${command ?? "a command that run.json does not name"}`);
}

/** Of a run that goes on or has failed, how far it came. */
function progress(run) {
  const planned = run.config?.values?.["train.steps"];
  const of = planned ? ` of ${written(planned)}` : "";
  if (run.status === "running") return `Was running when this was written: step ${written(lastStep(run))}${of} is the last one logged.`;
  if (run.status === "failed") return `Failed after step ${written(lastStep(run))}${of}: ${exact(run.record.error)}`;
  if (run.status === "interrupted") return `Stopped at step ${written(stepsOf(run))}${of}. kvq train ${run.folder} --resume goes on.`;
  return null;
}

function statusOf(run) {
  const known = ["finished", "running", "failed", "interrupted"].includes(run.status);
  return make("span", { class: `status ${known ? run.status : "unknown"}` }, run.status);
}

function heading() {
  if (several) {
    return make(
      "header",
      {},
      make("p", { class: "quiet" }, "kvq report"),
      make("h1", {}, `${runs.length} runs compared`),
      runs.flatMap((run) => commandsOf(run).map((command) => make("p", { class: "quiet" }, `${run.name}: ${command}`))),
    );
  }
  const [run] = runs;
  const commands = commandsOf(run);
  const { backend, devices, seed } = run.record;
  const facts = [backend, devices && exact(devices).replaceAll(/[[\]"]/g, ""), `seed ${exact(seed)}`, duration(run)];
  return make(
    "header",
    {},
    make("p", { class: "quiet" }, "kvq report"),
    make("h1", {}, run.name, " ", statusOf(run)),
    make("p", { class: "quiet" }, [...facts, ...(commands.length > 1 ? [] : commands)].filter(Boolean).map(exact).join(" · ")),
    commands.length > 1 ? commands.map((command) => make("p", { class: "quiet" }, command)) : null,
  );
}

function alerts() {
  return runs.flatMap((run) => {
    const name = several ? `${run.name}: ` : "";
    const sentences = [progress(run), ...run.notes].filter(Boolean);
    return sentences.map((sentence, at) =>
      make("p", { class: at === 0 && run.status === "failed" ? "alert failed" : "alert" }, name, sentence),
    );
  });
}

function figures() {
  if (several) return comparison();
  const [run] = runs;
  const split = measuredOn(run);
  if (!split) return missing("There are no metrics yet: metrics.jsonl begins with the first step.");
  const shown = FINAL.filter(([name]) => lastPoint(run, split, name));
  const tile = (value, label) => make("div", { class: "tile" }, make("strong", {}, value), make("span", {}, label));
  const step = Math.max(...shown.map(([name]) => lastPoint(run, split, name)[0]));
  return [
    make(
      "div",
      { class: "tiles" },
      tile(written(stepsOf(run)), "steps"),
      shown.map(([name, label, format]) => tile(format(lastPoint(run, split, name)[1]), label)),
    ),
    make("p", { class: "quiet" }, `Measured on ${split} images at step ${written(step)}.`),
  ];
}

/** The final figures of several runs, a row each. */
function comparison() {
  const cell = (run, name, format) => {
    const point = lastPoint(run, measuredOn(run), name);
    return point ? format(point[1]) : "–";
  };
  const speed = (run) => {
    const points = run.series.train?.images_per_second;
    return points ? written(points.map(([, value]) => value).sort((a, b) => a - b)[points.length >> 1]) : "–";
  };
  const rows = [
    { head: "status", cells: runs.map(statusOf) },
    { head: "steps", cells: runs.map((run) => written(stepsOf(run))) },
    ...FINAL.map(([name, label, format]) => ({ head: label, cells: runs.map((run) => cell(run, name, format)) })),
    { head: "measured on", cells: runs.map((run) => measuredOn(run) ?? "nothing yet") },
    { head: "images/s, median", cells: runs.map(speed) },
    { head: "time", cells: runs.map((run) => duration(run) ?? "–") },
  ];
  return section("Final figures", incomparable(), table("Final figures", ["", ...runs.map((run) => run.name)], rows));
}

/** A sentence on what makes the final figures of runs say different things; null where nothing does. */
function incomparable() {
  // What a run does not say, as one of an older kvq, is no difference.
  const differ = (value) => new Set(runs.map(value).filter((each) => each !== undefined)).size > 1;
  const others = (keys) => keys.filter((key) => differ((run) => run.config?.values && exact(run.config.values[key]))).map((key) => `other ${key}`);
  const images = ["images", "sha256", "some_sha256"].some((name) => differ((run) => run.record[`data.validation.${name}`]));
  const number = (run) => {
    const [most, there] = [run.config?.values?.["data.validation_images"], run.record["data.validation.images"]];
    return most && there && Math.min(most, there);
  };
  const measured = [
    differ(measuredOn) && "another split",
    images ? "other validation images" : differ(number) && "fewer validation images",
    ...others(["data.crop", "data.pad", "data.resize", "data.small"]),
  ];
  const weights = new Set(runs.flatMap((run) => Object.keys(run.config?.values ?? {}).filter((key) => /^loss\.|^quantizer\..*weight$/.test(key))));
  const terms = (run) => measuredOn(run) && Object.keys(run.series[measuredOn(run)]).filter((name) => !NOT_TERMS.has(name)).sort().join();
  const parts = [
    ["all figures", measured.filter(Boolean)],
    ["the loss", [differ(terms) && "other terms", ...others([...weights])].filter(Boolean)],
  ];
  const said = parts.filter(([, reasons]) => reasons.length).map(([what, reasons]) => `${what} (${reasons.join(", ")})`);
  return said.length ? make("p", { class: "alert" }, `Not comparable: ${said.join(" and ")}.`) : null;
}

/** One chart for a name of all runs, or none where no run has it. */
function metric(name, title, options = {}) {
  const curves = runs.map((run, at) => ({
    label: several ? run.name : name.replaceAll("_", " "),
    colour: at,
    train: run.series.train?.[name] ?? [],
    validation: options.training ? [] : (run.series.validation?.[name] ?? []),
  }));
  const drawn = curves.filter((curve) => curve.train.length || curve.validation.length);
  if (!drawn.length) return null;
  const positive = drawn.every((curve) => [...curve.train, ...curve.validation].every(([, value]) => value > 0));
  return chart({ title, curves: drawn, ...options, log: options.log && positive });
}

/** The loss and its terms: in one chart of one run, in a chart each of several. */
function losses() {
  const names = new Set(runs.flatMap((run) => ["train", "validation"].flatMap((split) => Object.keys(run.series[split] ?? {}))));
  const terms = [...names].filter((name) => !NOT_TERMS.has(name));
  const all = names.has("loss") ? ["loss", ...terms] : terms;
  if (several) return all.map((name) => metric(name, name === "loss" ? "loss" : `loss: ${name}`, { log: true }));
  const curves = all.map((name, at) => ({
    label: name,
    colour: at % 8,
    train: runs[0].series.train?.[name] ?? [],
    validation: runs[0].series.validation?.[name] ?? [],
  }));
  const positive = ({ train, validation }) => [...train, ...validation].every(([, value]) => value > 0);
  const rest = curves.filter((curve) => !positive(curve));
  const main = curves.filter(positive);
  return [
    main.length ? chart({ title: "Loss and its terms", curves: main, log: true }) : null,
    rest.length ? chart({ title: main.length ? "Terms that are not above zero" : "Loss and its terms", curves: rest }) : null,
  ];
}

function curves(title, charts, ...others) {
  const drawn = charts.flat().filter(Boolean);
  if (!drawn.length && !others.length) return null;
  return section(title, make("div", { class: "charts" }, drawn), others);
}

function atlas() {
  return runs.map((run) => {
    const name = several ? make("h3", {}, run.name) : null;
    if (!run.atlas) return [name, missing("There is no picture of the codes. This makes it, then report again:", `kvq codebook ${run.folder}`)];
    const image = make("img", { src: run.atlas, alt: `The most and the least used codes of ${run.name}, with patches of images that they stand for` });
    return [name, make("div", { class: "atlas" }, frame(`Code atlas of ${run.name}`, image))];
  });
}

document.body.append(
  heading(),
  make(
    "main",
    {},
    alerts(),
    figures(),
    curves("Curves", [losses(), metric("psnr", "PSNR, dB", { span: 0.5 }), metric("ssim", "SSIM", { span: 0.05 })]),
    section("Reconstructions", reconstructions(runs)),
    curves(
      "Codebook",
      [metric("perplexity", "Perplexity, codes", { zero: true }), metric("usage", "Codes in use", { zero: true, format: percent })],
      make("h3", {}, "Code atlas"),
      atlas(),
    ),
    section("Evaluation", evaluation()),
    curves("Speed", [
      metric("images_per_second", "Images per second", { zero: true, training: true }),
      metric("input_wait", "Time spent waiting for images", { zero: true, training: true, format: percent }),
    ]),
    section("Configuration", configuration()),
    section("Environment", environment()),
    section("Messages", messages()),
  ),
  make("footer", { class: "quiet" }, `Written ${day} by kvq ${kvq} report. Nothing on this page comes from the network.`),
);
