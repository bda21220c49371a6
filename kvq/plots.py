"""Pictures of a run: image grids by Pillow, curves by Matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kvq.progress import NOT_TERMS

# Of the loss, and of its terms.
COLOURS = ("black", *(f"tab:{name}" for name in ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")))
SMALLEST_TILE = 64  # pixels; smaller images are enlarged by a whole factor, so that their pixels stay visible


def image_grid(images: np.ndarray, reconstruction: np.ndarray, columns: int = 8) -> Image.Image:
    """Each original above its reconstruction, from left to right and from top to bottom.

    Args:
        images: uint8 (n, h, w, c), of one channel (grey) or three.
        reconstruction: uint8, of the same shape.
        columns: Of the grid.
    """
    count, height, width, channels = images.shape
    columns = min(columns, count)
    gap, rows = 2, -(-count // columns)
    factor = -(-SMALLEST_TILE // min(height, width)) if min(height, width) < SMALLEST_TILE else 1
    tile_height, tile_width = height * factor, width * factor
    grid = np.full((rows * (2 * tile_height + 3 * gap), columns * (tile_width + gap) + gap, channels), 255, np.uint8)
    for index in range(count):
        top = (index // columns) * (2 * tile_height + 3 * gap) + gap
        left = (index % columns) * (tile_width + gap) + gap
        for offset, tile in ((0, images[index]), (tile_height + gap // 2, reconstruction[index])):
            enlarged = tile.repeat(factor, axis=0).repeat(factor, axis=1)
            grid[top + offset : top + offset + tile_height, left : left + tile_width] = enlarged
    return Image.fromarray(grid[:, :, 0] if channels == 1 else grid[:, :, :3])


def loss_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Loss and its terms, and the health of the codebook, against the step, as a PNG.

    The axis of the loss is logarithmic, around zero linear where a term is not above it.

    Args:
        records: Lines of metrics.jsonl.
        path: To write.
    """
    # Not pyplot: it keeps every figure, and may ask for a display.
    from matplotlib.figure import Figure

    splits = {split: [r for r in records if r.get("split") == split] for split in ("train", "validation")}
    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, codes = figure.subplots(1, 2)
    shown = [*splits["train"], *splits["validation"]]
    names = dict.fromkeys(name for record in shown for name in record if name not in NOT_TERMS)
    for name, color in zip(["loss", *names], COLOURS, strict=False):
        _curve(losses, splits["train"], name, color=color, label=name.replace("$", r"\$"))
        _curve(losses, splits["validation"], name, color=color, linestyle="", marker="o", markersize=3)
    positive = all(min(line.get_ydata(), default=1) > 0 for line in losses.lines)
    losses.set(xlabel="step", title="Loss on [-1, 1] images (dots: validation)")
    if positive:
        losses.set_yscale("log")
    else:
        losses.set_yscale("symlog", linthresh=0.01)
    if losses.lines:
        losses.legend()
    _curve(codes, splits["train"], "perplexity", color="tab:purple", label="perplexity (codes)")
    codes.set(xlabel="step", ylabel="codes", ylim=(0, None), title="Codebook")
    share = codes.twinx()
    _curve(share, splits["train"], "usage", color="tab:red", label="usage")
    share.set(ylim=(0, 1.05), ylabel="usage (fraction of codes)")
    codes.legend(handles=[*codes.lines, *share.lines], loc="lower right")
    figure.savefig(path, dpi=100)


def _curve(axes: Any, records: list[dict[str, Any]], name: str, **style: Any) -> None:
    points = [(record["step"], record[name]) for record in records if isinstance(record.get(name), float)]
    if points:
        axes.plot(*zip(*points, strict=True), **style)
