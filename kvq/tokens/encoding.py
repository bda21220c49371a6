"""A collection of images becomes a token data set, on this machine; several processes may share the work."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kvq import __version__, artifact
from kvq.artifact import ArtifactConfig
from kvq.data import evaluation_batches, evaluation_transforms, iterate
from kvq.data.contract import Source
from kvq.data.sources import ArraySource, fingerprint
from kvq.data.token_set import DTYPES, Preprocessing, TokenPlan, TokenSetSource, smallest_dtype
from kvq.errors import TokensError
from kvq.evaluation import images_for
from kvq.progress import Progress
from kvq.tokenizer import Tokenizer
from kvq.tokens import shards
from kvq.tokens.shards import Note

SHARD_SIZE = 4096


def encode(
    path: str | Path,
    data: str | Path,
    out: str | Path,
    split: str = "train",
    batch_size: int = 64,
    shard_size: int = SHARD_SIZE,
    shard: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the tokens of every image of a collection, prepared as for evaluation, as a token data set.

    A call that was stopped goes on with the first shard that is missing, and ends with the same bytes. Calls with
    `shard=(0, n)` to `(n - 1, n)` share the work, in any order, at once or not, on any machines that see the folder: whichever
    ends last completes the set. Images that cannot be used are left out, and named in skipped.txt.

    Args:
        path: Run folder or model folder.
        data: Known name, file or folder.
        out: Folder to write, new or begun by the same call.
        split: Of the data: train, test or all.
        batch_size: How many go through the model at once, at least 1.
        shard_size: Images to a file, at least 1.
        shard: (i, n) encodes every n-th file only, from number i on.
        progress: Told `start`, `step`, `log` and `stop` on the way, in images of this call's share.

    Returns:
        `out`, `complete` (whether all shards are there), `images`, `skipped`, `shards` and `bytes` (of the whole set; while it is
        not complete, of this call's share), `encoded` (images encoded by this call), `images_per_second` (of these, None if there
        were none), and what describes them: `data`, `split`, `crop`, `vocabulary`, `shape` (of an image's tokens), `dtype`,
        `backend`, `weights_sha256`.

    Raises:
        ArtifactError, DataError: If the model or the images cannot be had.
        TokensError: If `out` holds something else, was begun with another model or other data, or cannot be written.
        ValueError: If a number is out of its range.
    """
    part, parts = shard
    if not 0 <= part < parts or min(batch_size, shard_size) < 1:
        raise ValueError(
            "`shard` must be (i, n) with 0 <= i < n, `batch_size` and `shard_size` at least 1. "
            f"Received: {shard}, {batch_size}, {shard_size}."
        )
    config, out = artifact.check(artifact.model_folder(path)), Path(out)
    source = images_for(path, config, data, split)
    plan = plan_of(config, source, batch_size, shard_size)
    try:
        described = shards.begin(out, plan)
        share = shards.numbers(plan)[part::parts] if described is None else range(0)
        mine, encoded, seconds = _encode_share(path, source, out, plan, share, progress)
        described = described or shards.join(out, plan)
    except OSError as error:
        raise TokensError(
            f"{out} cannot be written: {error.strerror or error}. What is encoded already is kept; run it again."
        ) from error
    written = described.shards if described else [note.shard for note in mine if note.shard]
    return {
        "out": str(out),
        "complete": described is not None,
        "images": sum(each.images for each in written),
        "skipped": described.skipped if described else sum(len(note.skipped) for note in mine),
        "shards": len(written),
        "bytes": sum(file.bytes for each in written for file in (each.tokens, each.names, each.labels) if file),
        "encoded": encoded,
        "images_per_second": encoded / seconds if encoded else None,
        "data": source.name,
        "split": split,
        "crop": plan.preprocessing.crop,
        "vocabulary": plan.vocabulary,
        "shape": list(plan.shape),
        "dtype": plan.dtype,
        "backend": plan.backend,
        "weights_sha256": plan.weights_sha256,
    }


def plan_of(config: ArtifactConfig, source: Source, batch_size: int, shard_size: int) -> TokenPlan:
    """Everything that decides the bytes of a set."""
    (grid,) = config.grids
    return TokenPlan(
        kvq_version=__version__,
        weights_sha256=config.weights_sha256,
        backend=keras.backend.backend(),
        quantizer=config.quantizer.model_dump(mode="json"),
        vocabulary=grid.vocabulary,
        grid=grid.shape,
        depth=config.quantizer.depth,
        dtype=smallest_dtype(grid.vocabulary),
        preprocessing=Preprocessing(**dict(config.images)),
        source=TokenSetSource(name=source.name, split=source.split, **fingerprint(source)),
        batch_size=batch_size,
        shard_size=shard_size,
    )


def encode_shard(
    tokenizer: Tokenizer, source: Source, out: Path, plan: TokenPlan, number: int, on_batch: Callable[[int], None]
) -> Note:
    """Encodes and writes one shard. Its bytes depend on the plan and its number alone: batches begin where the shard does.

    Args:
        on_batch: Told how many images of the source each batch stood for, bad ones included.
    """
    prepare = plan.preprocessing
    transforms = evaluation_transforms(prepare.pad, prepare.crop, prepare.resize)
    first = number * plan.shard_size
    tokens, labels = [np.zeros((0, *plan.shape), DTYPES[plan.dtype])], [np.zeros(0, np.int64)]
    names: list[str] = []
    skipped: list[tuple[str, str]] = []
    for batch in iterate(evaluation_batches(source, transforms, plan.batch_size, limit=plan.shard_size, first=first)):
        if count := len(batch["images"]):
            # Filled up, so that a shape is compiled once, and rounding does not depend on which images were bad.
            filled = np.concatenate([batch["images"], np.repeat(batch["images"][-1:], plan.batch_size - count, axis=0)])
            tokens.append(tokenizer.encode(filled, plan.batch_size)[:count].astype(DTYPES[plan.dtype]))
        labels.append(batch["labels"])
        names += batch["names"]
        skipped += batch["skipped"]
        on_batch(count + len(batch["skipped"]))
    kept = None if isinstance(source, ArraySource) else names
    return shards.write_shard(out, plan, number, np.concatenate(tokens), np.concatenate(labels), kept, skipped)


def _encode_share(
    path: str | Path, source: Source, out: Path, plan: TokenPlan, share: range, progress: Progress | None
) -> tuple[list[Note], int, float]:
    """Encodes those shards of a share that are missing: the notes of all, how many images that were, and in how many seconds."""
    sizes = {number: min(plan.shard_size, plan.source.images - number * plan.shard_size) for number in share}
    notes = {number: note for number in share if (note := shards.note_of(out, number))}
    if len(notes) == len(share):
        return list(notes.values()), 0, 0.0
    tokenizer = Tokenizer.load(path)
    found = done = sum(sizes[number] for number in notes)
    progress, started, encoded = progress or Progress(), time.perf_counter(), 0
    progress.start(sum(sizes.values()), done)

    def count(images: int) -> None:
        nonlocal done
        done += images
        progress.step(done)

    for number in share:
        if number in notes:
            continue
        notes[number] = note = encode_shard(tokenizer, source, out, plan, number, count)
        encoded += note.shard.images if note.shard else 0
        rate = (done - found) / (time.perf_counter() - started)
        progress.log({"step": done, "split": source.split, "images_per_second": rate})
    progress.stop()
    return [notes[number] for number in share], encoded, time.perf_counter() - started
