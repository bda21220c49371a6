"""A picture of codes: each with the patches of images that it stands for."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_TILE = 72  # pixels, about
_GAP = 6


@dataclass(frozen=True)
class CodeRow:
    """What is shown of a code: a label, (image (h, w, c), number of a cell of it) pairs, and an image of the code alone."""

    label: str
    cells: list[tuple[NDArray[np.uint8], int]]
    alone: NDArray[np.uint8] | None


def code_atlas(columns: dict[str, list[CodeRow]], step: int) -> Image.Image:
    """A column of rows for each title. A patch shows a cell, outlined, in the middle of its neighbours.

    Args:
        columns: By title.
        step: Side of a cell in pixels.
    """
    tile = max(1, round(_TILE / (3 * step))) * 3 * step
    tiles = max((len(row.cells) for rows in columns.values() for row in rows), default=0)
    with_alone = any(row.alone is not None for rows in columns.values() for row in rows)
    font = ImageFont.load_default(14)
    label = math.ceil(max((font.getlength(row.label) for rows in columns.values() for row in rows), default=0)) + 2 * _GAP
    width = label + (tiles + with_alone) * (tile + _GAP) + 4 * _GAP
    height = 40 + max(map(len, columns.values()), default=0) * (tile + _GAP) + _GAP
    page = Image.new("RGB", (width * len(columns), height), "white")
    draw = ImageDraw.Draw(page)
    for number, (title, rows) in enumerate(columns.items()):
        left = number * width + _GAP
        draw.text((left, 10), title, "black", font=ImageFont.load_default(18))
        if with_alone:
            draw.text((left + label, 14), "alone", "gray", font=font)
            draw.text((left + label + tile + 3 * _GAP, 14), "in images", "gray", font=font)
        for line, row in enumerate(rows):
            top = 40 + line * (tile + _GAP)
            draw.text((left, top + tile // 2 - 8), row.label, "black", font=font)
            at = left + label
            if row.alone is not None:
                page.paste(_enlarged(row.alone, tile), (at, top))
            at += (tile + 3 * _GAP) * with_alone
            for image, cell in row.cells:
                page.paste(_enlarged(_around(image, cell, step), tile), (at, top))
                third = tile // 3
                draw.rectangle((at + third - 1, top + third - 1, at + 2 * third, top + 2 * third), outline="red")
                at += tile + _GAP
    return page


def _around(image: NDArray[np.uint8], cell: int, step: int) -> NDArray[np.uint8]:
    """A cell of an image with the width of a cell around it; beyond the image, grey."""
    row, column = divmod(cell, image.shape[1] // step)
    framed = np.pad(image, ((step, step), (step, step), (0, 0)), constant_values=128)
    return framed[row * step : (row + 3) * step, column * step : (column + 3) * step]


def _enlarged(image: NDArray[np.uint8], side: int) -> Image.Image:
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image[:, :, :3])
    return picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
