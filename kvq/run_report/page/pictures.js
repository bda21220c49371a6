/** Originals above reconstructions, of all runs at the step of one slider. */

function reconstructions(runs) {
  const splits = ["validation", "train"].filter((split) => runs.some((run) => run.samples[split].length));
  if (!splits.length) return missing("There are no pictures in samples yet: the first come after train.sample_every steps.");
  let split = splits[0];
  let steps;
  const slider = make("input", { type: "range", id: "step", min: 0, step: 1 });
  const output = make("output", { for: "step" });
  const real = make("input", { type: "checkbox" });
  const choice = make(
    "fieldset",
    {},
    make("legend", { class: "hidden" }, "Images"),
    splits.map((name) => {
      const radio = make("input", { type: "radio", name: "split", value: name, checked: name === split });
      radio.addEventListener("change", () => choose(name));
      return make("label", {}, radio, ` ${name} images`);
    }),
  );
  const views = runs.map((run) => {
    const image = make("img", { decoding: "sync" });
    const caption = make("figcaption");
    const figure = make("figure", { class: "picture" }, caption, frame(`Pictures of ${run.name}`, image));
    return { run, image, caption, figure };
  });

  function choose(name) {
    split = name;
    steps = [...new Set(runs.flatMap((run) => run.samples[split].map((sample) => sample.step)))].sort((a, b) => a - b);
    slider.max = steps.length - 1;
    slider.value = slider.max;
    show();
  }

  function show() {
    const step = steps[slider.value];
    output.textContent = `step ${written(step)}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    for (const { run, image, caption, figure } of views) {
      const samples = run.samples[split];
      figure.classList.toggle("empty", !samples.length);
      image.hidden = !samples.length;
      caption.textContent = runs.length > 1 ? run.name : "";
      if (!samples.length) {
        caption.append(": no pictures");
        continue;
      }
      const distance = (sample) => Math.abs(sample.step - step);
      const sample = samples.reduce((best, each) => (distance(each) < distance(best) ? each : best));
      if (sample.step !== step) caption.append(`: step ${written(sample.step)}`);
      image.src = sample.address;
      image.alt = `Originals above reconstructions, ${split} images of ${run.name}, step ${sample.step}`;
    }
  }

  slider.addEventListener("input", show);
  real.addEventListener("change", () => {
    for (const { figure } of views) figure.classList.toggle("real", real.checked);
  });
  choose(split);
  return [
    make(
      "div",
      { class: "controls" },
      choice,
      make("label", { class: "slider" }, make("span", { class: "hidden" }, "Step"), slider, output),
      make("label", {}, real, " actual size"),
    ),
    make("p", { class: "quiet" }, "Each original lies above its reconstruction."),
    runs.map((run) => run.remarks.map((remark) => make("p", { class: "quiet" }, runs.length > 1 ? `${run.name}: ` : "", remark))),
    make("div", { class: runs.length > 1 ? "pictures several" : "pictures" }, views.map((view) => view.figure)),
  ];
}
