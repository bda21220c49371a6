/** Sections that show the small files of runs: evaluation.json, config.toml, run.json, skipped.txt and log.txt. */

// What differs between any two runs.
const PASSING = new Set(["started", "ended", "process", "command"]);

function evaluation() {
  const rows = new Set(runs.flatMap((run) => Object.keys(run.evaluation?.values ?? {})));
  const cell = (run, name) => (name.endsWith("sha256") ? exact(run.evaluation?.values[name]).slice(0, 12) : written(run.evaluation?.values[name]));
  const heads = several ? ["", ...runs.map((run) => run.name)] : ["", "value"];
  const shown = rows.size ? table("Evaluation", heads, [...rows].map((name) => ({ head: name, cells: runs.map((run) => cell(run, name)) }))) : null;
  const said = runs.map((run) => {
    const name = several ? `${run.name}: ` : "";
    if (!run.evaluation) return missing(`${name}There is no evaluation.json. This makes it, then report again:`, `kvq evaluate ${run.folder}`);
    if (run.evaluation.outdated) return missing(`${name}The run has other weights by now. This measures them, then report again:`, `kvq evaluate ${run.folder}`);
    return null;
  });
  return [shown, said];
}

function configuration() {
  const broken = runs.filter((run) => run.config && !run.config.values);
  const texts = broken.map((run) => details(`config.toml of ${run.name}, as it stands`, make("p", {}, run.config.error), frame("config.toml", make("pre", {}, run.config.text))));
  const sound = runs.filter((run) => run.config?.values);
  const lost = runs.filter((run) => !run.config).map((run) => missing(`${run.name} has no config.toml that can be read.`));
  if (!sound.length) return [lost, texts];
  const keys = [...new Set(sound.flatMap((run) => Object.keys(run.config.values)))];
  if (several) {
    const row = (key) => ({ head: key, cells: sound.map((run) => exact(run.config.values[key])) });
    const differ = keys.filter((key) => new Set(row(key).cells).size > 1);
    const heads = ["", ...sound.map((run) => run.name)];
    return [
      differ.length ? table("Differences of the configurations", heads, differ.map(row)) : make("p", {}, "The configurations are the same."),
      details(`All ${keys.length} values`, table("Configurations", heads, keys.map(row))),
      lost,
      texts,
    ];
  }
  const { values, shipped, nearest } = sound[0].config;
  const all = [...new Set([...keys, ...Object.keys(shipped)])];
  const row = (key) => ({ head: key, cells: [exact(values[key]), exact(shipped[key])], marked: exact(values[key]) !== exact(shipped[key]) });
  const rows = all.map(row);
  const marked = rows.filter((each) => each.marked);
  const heads = ["", "this run", nearest];
  return [
    make("p", {}, `Of the configurations that come with kvq, ${nearest} is the nearest: ${marked.length || "no"} value${marked.length === 1 ? " differs" : "s differ"}.`),
    marked.length ? table("What differs", heads, marked) : null,
    details(`All ${keys.length} values`, table("Configuration", heads, rows)),
  ];
}

function environment() {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.record)))];
  const rows = keys.map((key) => {
    const cells = runs.map((run) => exact(run.record[key]));
    return { head: key, cells, marked: !PASSING.has(key) && new Set(cells).size > 1 };
  });
  return table("Environment", several ? ["", ...runs.map((run) => run.name)] : ["run.json", ""], rows);
}

function messages() {
  return runs.map((run) => {
    const name = several ? `${run.name}: ` : "";
    const { skipped, log } = run;
    const files = skipped?.first.map(([file, reason]) => ({ head: file, cells: [reason] }));
    const more = skipped && skipped.count > files.length ? `, the first ${files.length}` : "";
    return [
      skipped
        ? details(`${name}${written(skipped.count)} files could not be used${more}`, table("Skipped files", ["file", "reason"], files))
        : make("p", { class: "quiet" }, `${name}No file had to be left out.`),
      log
        ? details(`${name}log.txt${log.cut ? ", its end" : ""}`, frame("log.txt", make("pre", {}, log.text)))
        : make("p", { class: "quiet" }, `${name}No log.txt.`),
    ];
  });
}
