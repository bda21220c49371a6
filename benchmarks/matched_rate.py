"""Every quantizer at the same rate: one network, one data set, one budget, 8 bits a position.

    python benchmarks/matched_rate.py --steps 2000 --seeds 3 --out runs/matched_rate

Fashion-MNIST at 28x28, `plain`, 7x7 positions of 8 bits: 392 bits an image. Trains each quantizer with each seed through
`kvq.train`, measures it on the test images, and writes docs/matched_rate.md and docs/matched_rate.png. A run that is finished in
`--out` is not repeated, so that a longer budget can be spread over days.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from kvq import backends

DOCS = Path(__file__).parents[1] / "docs"
EMA16 = {"kind": "ema_vector", "codebook_size": 16}
# 256 codes a position, in one index or in several.
QUANTIZERS: dict[str, dict[str, Any]] = {
    "vector": {"kind": "vector", "codebook_size": 256},
    "vector, rotation": {"kind": "vector", "codebook_size": 256, "estimator": "rotation"},
    "ema_vector": {"kind": "ema_vector", "codebook_size": 256},
    "cosine_vector": {"kind": "cosine_vector", "codebook_size": 256},
    "ema_cosine_vector": {"kind": "ema_cosine_vector", "codebook_size": 256},
    "sim_vector": {"kind": "sim_vector", "codebook_size": 256},
    "index_backprop": {"kind": "index_backprop", "codebook_size": 256},
    "gumbel": {"kind": "gumbel", "codebook_size": 256},
    "finite_scalar [8, 8, 4]": {"kind": "projected", "code_dim": 3, "base": {"kind": "finite_scalar", "levels": [8, 8, 4]}},
    "symmetric_finite_scalar [4, 4, 4, 4]": {
        "kind": "projected",
        "code_dim": 4,
        "base": {"kind": "symmetric_finite_scalar", "levels": [4, 4, 4, 4]},
    },
    "lookup_free": {"kind": "projected", "code_dim": 8, "base": {"kind": "lookup_free", "bits": 8}},
    "binary_spherical": {"kind": "projected", "code_dim": 8, "base": {"kind": "binary_spherical", "bits": 8}},
    "residual 2 x 16": {"kind": "residual", "levels": 2, "base": EMA16},
    "shared_residual 2 x 16": {"kind": "shared_residual", "levels": 2, "base": EMA16},
    "product 2 x 16": {"kind": "product", "groups": 2, "base": EMA16},
}


def measure(name: str, seed: int, steps: int, config: str, learning_rate: float, folder: Path) -> dict[str, float]:
    """Trains one quantizer with one seed unless that was done, and measures it."""
    import kvq

    run = folder / f"{name.replace(' ', '_')}-{steps}-{seed}"
    result = run / "matched.json"
    if result.exists():
        return json.loads(result.read_text("utf-8"))
    rare = [f"train.{key}={10**9}" for key in ("sample_every", "validate_every")] + [f"checkpoint.every_steps={10**9}"]
    plan = [f"train.steps={steps}", f"train.seed={seed}", f"train.learning_rate={learning_rate}", "train.schedule=cosine"]
    loaded = kvq.load_config(config, [*rare, *plan, "train.log_every=100", "train.warmup_steps=100"])
    values = {**loaded.model_dump(), "quantizer": QUANTIZERS[name]}
    values["codebook"] = {**values["codebook"], "initialise": "kmeans"}
    trained = kvq.train(kvq.RunConfig.model_validate(values), out=run, overwrite=True)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    speeds = [record["images_per_second"] for record in records if record["split"] == "train" and record["step"] > 1]
    evaluated = kvq.evaluate(trained["run"], images=2000)
    measured = {
        **{key: evaluated[key] for key in ("psnr", "ssim", "usage", "perplexity")},
        "step_ms": 1000 * loaded.train.batch_size / statistics.median(speeds),
    }
    result.write_text(json.dumps(measured), "utf-8")
    return measured


def report(results: dict[str, list[dict[str, float]]], steps: int, data: str, learning_rate: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ordered = sorted(results, key=lambda name: -_mean(results[name], "psnr"))
    seeds = len(next(iter(results.values())))
    lines = [
        "# Quantizers at the same rate",
        "",
        f"`{data}`, `plain`, 7x7 positions of 8 bits (392 bits an image), {steps} steps of 128 images, Adam at",
        f"{learning_rate:g} with a cosine; {seeds} seeds: mean and, in brackets, the smallest and the largest. First 2,000 test",
        "images, or all there are. Made by `python benchmarks/matched_rate.py`. So few steps say which quantizer learns quickly,",
        "not which is best in the end.",
        "",
        "| quantizer | PSNR in dB | SSIM | usage | perplexity | ms a step |",
        "|---|---|---|---|---|---|",
    ]
    for name in ordered:
        runs = results[name]
        psnr = [run["psnr"] for run in runs]
        lines.append(
            f"| {name} | {_mean(runs, 'psnr'):.2f} ({min(psnr):.2f} to {max(psnr):.2f}) | {_mean(runs, 'ssim'):.3f} | "
            f"{_mean(runs, 'usage'):.0%} | {_mean(runs, 'perplexity'):.0f} | {_mean(runs, 'step_ms'):.0f} |"
        )
    lines += ["", "Usage and perplexity of several indices a position are those of each, of 16 values, averaged.", ""]
    (DOCS / "matched_rate.md").write_text("\n".join([*lines, "![PSNR of each quantizer](matched_rate.png)", ""]), "utf-8")

    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    for row, name in enumerate(reversed(ordered)):
        psnr = [run["psnr"] for run in results[name]]
        axis.plot([min(psnr), max(psnr)], [row, row], color="tab:blue", linewidth=3, alpha=0.4)
        axis.plot(_mean(results[name], "psnr"), row, "o", color="tab:blue")
    axis.set_yticks(range(len(ordered)), reversed(ordered))
    axis.set_xlabel("PSNR of test images in dB; line: from the smallest to the largest of the seeds")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(DOCS / "matched_rate.png", dpi=90)


def _mean(runs: list[dict[str, float]], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--config", default="fashion_mnist", help="whose network, images and batch size are taken")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/matched_rate"))
    parser.add_argument("--backend")
    arguments = parser.parse_args()
    backends.choose(arguments.backend)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in QUANTIZERS}
    for seed in range(arguments.seeds):
        for name in QUANTIZERS:
            measured = measure(name, seed, arguments.steps, arguments.config, arguments.learning_rate, arguments.out)
            results[name].append(measured)
            print(f"seed {seed}  {name:38} PSNR {measured['psnr']:.2f}  usage {measured['usage']:.0%}", flush=True)
    report(results, arguments.steps, arguments.config, arguments.learning_rate)


if __name__ == "__main__":
    main()
