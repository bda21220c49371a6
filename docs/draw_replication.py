"""Draws docs/replication.png: the loss curves of runs beside each other.

python docs/draw_replication.py runs/mscoco runs/mscoco_resnet runs/mscoco_paper
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from kvq.run import Run


def main() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    for number, folder in enumerate(sys.argv[1:]):
        records = Run(folder).read_metrics()
        for axis, name in zip(axes, ("loss", "reconstruction"), strict=True):
            for split, style in (("train", "-"), ("validation", "--")):
                chosen = [record for record in records if record["split"] == split and record["step"] > 1]
                label = f"{Path(folder).name}, {split}"
                axis.plot([r["step"] for r in chosen], [r.get(name) for r in chosen], style, color=f"C{number}", label=label)
            axis.set_title({"loss": "total loss", "reconstruction": "reconstruction (MSE in [-1, 1])"}[name])
            axis.set_xlabel("step")
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(Path(__file__).parent / "replication.png", dpi=90)


if __name__ == "__main__":
    main()
