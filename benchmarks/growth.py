"""How the time of a training step and the memory grow with the codebook, the side of the images and the batch.

    python benchmarks/growth.py --backend tensorflow --out docs/growth.json
    python benchmarks/growth.py --draw docs/growth.json docs/growth.png

Each point is `kvq benchmark` in a process of its own, on noise. Memory is the most that the process which takes the steps held at
once, with everything imported. Points are taken one after the other: on a machine that others use, look at the shape of a curve.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BASE = {"codebook": 512, "side": 32, "batch": 32}
AXES = {
    "codebook": [2**6, 2**9, 2**12, 2**15, 2**18],
    "side": [28, 64, 128, 256, 512],
    "batch": [8, 32, 128, 512],
}
LABELS = {"codebook": "codes in the codebook", "side": "side of the images in pixels", "batch": "images in a batch"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="tensorflow")
    parser.add_argument("--out", type=Path, help="a JSON; points of other backends in it stay")
    parser.add_argument("--draw", nargs=2, type=Path, metavar=("JSON", "PNG"))
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads(arguments.draw[0].read_text("utf-8")), arguments.draw[1])
        return
    points = []
    for axis, values in AXES.items():
        for value in values:
            points.append({"axis": axis, "value": value, **measure(arguments.backend, {**BASE, axis: value})})
            print(json.dumps(points[-1]), flush=True)
    if arguments.out:
        known = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
        arguments.out.write_text(json.dumps({**known, arguments.backend: points}, indent=1) + "\n", "utf-8")


def settings(work: dict[str, int]) -> list[str]:
    """What `--set` takes for a point."""
    return [
        f"train.batch_size={work['batch']}",
        f"data.crop={work['side']}",
        f'quantizer={{kind="vector", codebook_size={work["codebook"]}}}',
    ]


def measure(backend: str, work: dict[str, int]) -> dict[str, Any]:
    """Median seconds of a step, and the peak of the process' memory in MiB; or `error`."""
    options = [word for one in settings(work) for word in ("--set", one)]
    command = [sys.executable, "-m", "kvq_cli", "benchmark", "cifar10", "--backend", backend, "--rounds", "3", "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    said, complaint = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)  # with what the worker used, whom the process has waited for
    if status:
        return {"error": complaint.strip().splitlines()[-1]}
    facts = json.loads(said)["backends"][backend]
    return {"step": facts["step"], "peak_mib": usage.ru_maxrss / 1024}


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A column for each axis, seconds above memory, a line for each backend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    for column, axis in enumerate(AXES):
        for row, (what, label) in enumerate((("step", "seconds a step"), ("peak_mib", "peak memory in MiB"))):
            axes = figure.add_subplot(2, 3, 1 + row * 3 + column)
            for backend, points in found.items():
                line = [(point["value"], point[what]) for point in points if point["axis"] == axis and what in point]
                axes.plot(*zip(*line, strict=True), marker="o", label=backend)
            axes.set(xscale="log", yscale="log", xlabel=LABELS[axis], ylabel=label)
            axes.set_xticks(AXES[axis], [f"{value:,}" for value in AXES[axis]], minor=False)
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
