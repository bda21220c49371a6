"""A token data set becomes images again."""

import collections
import hashlib
import json
import time
from pathlib import Path, PurePosixPath
from typing import Any

import keras
import numpy as np
from PIL import Image

from kvq.atomic import holds_files, write_text
from kvq.data.token_set import MANIFEST
from kvq.data.token_source import TokenSource
from kvq.errors import TokensError
from kvq.progress import Progress
from kvq.tokenizer import Tokenizer

PLAN = ".decoding.json"  # what is being decoded; there while it is


def decode(
    path: str | Path,
    tokens: str | Path,
    out: str | Path,
    force: bool = False,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the image of every element of a token data set as PNG, named after its source.

    A call that was stopped goes on where it was, and ends with the same files.

    Args:
        path: Run folder or model folder.
        tokens: Folder that `encode` wrote. Every file of it is first compared with its checksum.
        out: Folder to write to, new, empty or begun by the same call. `a/b.jpg` becomes `a/b.png`, or `a/b.jpg.png` if there is
            another `a/b`.
        force: Decode tokens of other weights all the same, if their numbers fit.
        batch_size: How many go through the model at once, at least 1.
        progress: Told `start`, `step` and `stop` on the way, in images; `note`, of what stopped on the way leaves.

    Returns:
        `out`, `images`, `images_per_second`, `same_weights`, `backend`.

    Raises:
        ArtifactError: If the model cannot be had.
        TokensError: If the set is broken, was made by other weights, or does not fit the model; or `out` holds something, or
            cannot be written.
        ValueError: If `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1. Received: {batch_size}.")
    tokenizer = Tokenizer.load(path)
    source, out = TokenSource(tokens, verify=True), Path(out)
    _check_fits(tokenizer, source, force)
    files = png_names([source.name(index) for index in range(len(source))])
    tokens_sha256 = hashlib.sha256((source.folder / MANIFEST).read_bytes()).hexdigest()
    plan = {"tokens_sha256": tokens_sha256, "weights_sha256": tokenizer.config.weights_sha256}
    progress, started = progress or Progress(), time.perf_counter()
    first = done = 0
    try:
        _begin(out, plan)
        done = next((number for number, name in enumerate(files) if not (out / name).exists()), len(files))
        # The last one may be cut. From whole batches on, as the same call without a stop: others may round differently.
        first = max(done - 1, 0) // batch_size * batch_size
        progress.start(len(source), first)
        for start in range(first, len(source), batch_size):
            stop = min(start + batch_size, len(source))
            indices = np.stack([source[index]["tokens"] for index in range(start, stop)])
            for number, image in enumerate(tokenizer.decode(indices, batch_size), start):
                (out / files[number]).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(out / files[number])
                done = max(done, number + 1)
            progress.step(stop)
        (out / PLAN).unlink()
    except BaseException as error:
        if done:
            progress.note(f"{done} of {len(source)} images are in {out}: the same command goes on from them.")
        if isinstance(error, OSError):
            raise TokensError(f"{out} cannot be written: {error.strerror or error}. Make room, or give another --out.") from None
        raise
    progress.stop()
    return {
        "out": str(out),
        "images": len(source),
        "images_per_second": (len(source) - first) / (time.perf_counter() - started),
        "same_weights": source.description.weights_sha256 == tokenizer.config.weights_sha256,
        "backend": keras.backend.backend(),
    }


def _begin(out: Path, plan: dict[str, str]) -> None:
    """Makes the folder, or finds that it was begun with the same tokens and model."""
    if (out / PLAN).exists():
        if json.loads((out / PLAN).read_text("utf-8")) != plan:
            raise TokensError(f"{out} was begun with other tokens or another model. Remove it, or give another --out.")
        return
    if holds_files(out):
        raise TokensError(f"{out} holds files, of which images could replace some. Give another --out, a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / PLAN, json.dumps(plan))


def png_names(names: list[str]) -> list[str]:
    """A file name for each image: its own, with .png for its ending, or after it where another image would get the same."""
    short = [str(PurePosixPath(name).with_suffix(".png")) for name in names]
    count = collections.Counter(short)
    files = [f"{name}.png" if count[candidate] > 1 else candidate for name, candidate in zip(names, short, strict=True)]
    for file, times in collections.Counter(files).most_common(1):
        if times > 1:
            raise TokensError(f"Images must have different names. Received: {times} that would be written as {file}.")
    return files


def _check_fits(tokenizer: Tokenizer, source: TokenSource, force: bool) -> None:
    described = source.description
    if described.depth != tokenizer.depth or described.vocabulary > tokenizer.vocabulary_size or len(described.grid) != 2:
        raise TokensError(
            f"The model decodes {tokenizer.depth or 1} indices a position, below {tokenizer.vocabulary_size}. "
            f"Received: tokens of shape {source.shape}, below {described.vocabulary}."
        )
    if described.weights_sha256 != tokenizer.config.weights_sha256 and not force:
        raise TokensError(
            f"{source.folder} was encoded by other weights than the model's: {described.weights_sha256[:16]}... instead of "
            f"{tokenizer.config.weights_sha256[:16]}... To decode it all the same: --force."
        )
