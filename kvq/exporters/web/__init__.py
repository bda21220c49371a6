"""Export to a page: a folder for any static file server that runs the tokenizer in the browser, by onnxruntime-web.

The halves are those of the ONNX export and are proven as those are. Beside them lie the page, what it must know of the model, and
the runtime, so that the page asks no other host for anything.
"""

import colorsys
import dataclasses
import importlib.resources
import json
from pathlib import Path
from typing import Any

import numpy as np

from kvq import pages
from kvq.artifact import ArtifactConfig
from kvq.atomic import write_bytes
from kvq.errors import KvqError
from kvq.exporters import onnx
from kvq.exporters.parts import Bundle
from kvq.exporters.web import runtime
from kvq.tokenizer import Tokenizer

# The entry comes last.
PAGE = (
    *("page.js", "ask.js", "outline.js", "picture.js", "tokens.js", "worker.js"),
    *("style.css", "onnxruntime_LICENSE.txt", "index.html"),
)
CHANNELS = (1, 3)
PARTS = ("encoder", "decoder")
# Codes at most, of all levels together, that get a colour of their own by what they mean.
COLOURED = 4096


def _check(config: ArtifactConfig) -> None:
    if config.images.channels not in CHANNELS:
        raise KvqError(f"A page shows images of 1 or 3 channels. Received: a model of {config.images.channels}.")


def _write(folder: Path, tokenizer: Tokenizer, archive: Path, free: bool) -> dict[str, Any]:
    """Writes everything but the parts; the page that uses them last."""
    page = importlib.resources.files("kvq.exporters.web") / "page"
    files = runtime.unpack(archive)
    parts = [folder / f"{name}.{onnx.EXPORTER.extension}" for name in PARTS]
    loaded = {part.name: part.stat().st_size for part in parts}
    loaded |= {name: len(content) for name, content in files.items() if name.endswith(".wasm")}
    described = {**_described(tokenizer, free), "bytes": loaded}
    files["model.json"] = (json.dumps(described) + "\n").encode("utf-8")
    files |= {name: (page / name).read_bytes() for name in PAGE}
    files["style.css"] = pages.style(files["style.css"].decode("utf-8")).encode("utf-8")
    for name, content in files.items():
        write_bytes(folder / name, content)
    return {
        "page": str(folder / PAGE[-1]),
        "runtime": f"{runtime.PACKAGE} {runtime.VERSION}",
        "files": {name: len(content) for name, content in files.items()},
    }


def _described(tokenizer: Tokenizer, free: bool) -> dict[str, Any]:
    """What the page has to know of the model."""
    config = tokenizer.config
    return {
        "channels": config.images.channels,
        "crop": config.images.crop,
        "downsampling": tokenizer.downsampling,
        "free_size": free,
        "vocabulary": tokenizer.vocabulary_size,
        # 0 where indices have no axis of their own for it.
        "depth": tokenizer.depth or 0,
        "colours": code_colours(tokenizer),
        "quantizer": config.quantizer.kind,
        "data": config.data.name,
        "steps": config.trained.steps,
        "kvq_version": config.kvq_version,
        "weights_sha256": config.weights_sha256,
    }


def code_colours(tokenizer: Tokenizer) -> list[list[str]] | None:
    """A colour for every code of every level, alike for codes that are alike; None for more than 4096 codes.

    Hue is the rank of a code along the first principal axis of its level, lightness that along the second.
    """
    if (tokenizer.depth or 1) * tokenizer.vocabulary_size > COLOURED:
        return None
    codebook = tokenizer.codebook
    return [_level_colours(level) for level in codebook.reshape(-1, *codebook.shape[-2:])]


def _level_colours(codes: np.ndarray) -> list[str]:
    centred = codes.astype("float64") - codes.mean(0)
    left, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    # The sign of an axis means nothing: the largest component is made positive, so that colours are the same everywhere.
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])
    places = left * sizes * signs
    hue = _ranks(places[:, 0])
    lightness = _ranks(places[:, 1]) if places.shape[1] > 1 else np.full(len(codes), 0.5)
    return [_hex(0.92 * first, 0.36 + 0.36 * second) for first, second in zip(hue, lightness, strict=True)]


def _ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort(kind="stable").argsort(kind="stable") / max(len(values) - 1, 1)


def _hex(hue: float, lightness: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, 0.58))


EXPORTER = dataclasses.replace(
    onnx.EXPORTER, bundle=Bundle(parts=PARTS, entry=PAGE[-1], check=_check, runtime=runtime.find, write=_write)
)
