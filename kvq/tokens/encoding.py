"""A collection of images becomes a token data set; several processes, on several machines, may share the work."""

import time
from pathlib import Path
from typing import Any

from kvq import artifact
from kvq.data.token_set import MOST_SHARDS, PLAN
from kvq.errors import TokensError
from kvq.evaluation import images_for
from kvq.progress import Progress
from kvq.tokens import shards
from kvq.tokens.engines import Engine, Job, LocalEngine
from kvq.tokens.plan import plan_of
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
    engine: Engine | None = None,
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
        shard_size: Images to a file, at least 1; a set has at most 30,000 files of tokens.
        shard: (i, n) encodes every n-th file only, from number i on.
        progress: Told `start`, `step`, `log` and `stop` on the way, in images of this call's share.
        engine: What encodes. Default: `LocalEngine()`, this process. `RayEngine()`: the workers of a Ray cluster.

    Returns:
        `out`, `complete` (whether all shards are there), `images`, `skipped`, `shards` and `bytes` (of the whole set; while it is
        not complete, of this call's share), `encoded` (images encoded by this call), `images_per_second` (of these, None if there
        were none), and what describes them: `data`, `split`, `crop`, `vocabulary`, `shape` (of an image's tokens), `dtype`,
        `backend`, `weights_sha256`.

    Raises:
        ArtifactError, DataError: If the model or the images cannot be had.
        TokensError: If `out` holds something else, was begun with another model or other data, or cannot be written; or if
            `shard_size` is too small for so many images.
        WorkerError: If another process that encoded failed.
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
    # Found out now: tokens.json, which comes last, could not be read again.
    if (count := len(shards.numbers(plan))) > MOST_SHARDS:
        raise TokensError(
            f"A set has at most {MOST_SHARDS} shards. Received: {count}, of {shard_size} images each. "
            f"Give a --shard-size of {-(-len(source) // MOST_SHARDS)} or more."
        )
    job = Job(Path(path), str(data), source, out, plan)
    try:
        described = shards.begin(out, plan)
        share = shards.numbers(plan)[part::parts] if described is None else range(0)
        mine, encoded, seconds = _encode_share(engine or LocalEngine(), job, share, progress)
        described = described or shards.join(out, plan)
    except OSError as error:
        way_out = "What is encoded already is kept; run it again." if (out / PLAN).exists() else "Give another --out."
        raise TokensError(f"{out} cannot be written: {error.strerror or error}. {way_out}") from error
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


def _encode_share(engine: Engine, job: Job, share: range, progress: Progress | None) -> tuple[list[Note], int, float]:
    """Encodes those shards of a share that are missing: the notes of all, how many images that were, and in how many seconds."""
    plan = job.plan
    sizes = {number: min(plan.shard_size, plan.source.images - number * plan.shard_size) for number in share}
    notes = {number: note for number in share if (note := shards.note_of(job.out, number))}
    missing = [number for number in share if number not in notes]
    if not missing:
        return list(notes.values()), 0, 0.0
    found = done = sum(sizes[number] for number in notes)
    progress = progress or Progress()

    def count(images: int) -> None:
        nonlocal done
        done += images
        progress.step(done)

    with engine.start(job) as encode_shards:
        started, encoded = time.perf_counter(), 0
        progress.start(sum(sizes.values()), done)
        for number, note in encode_shards(missing, count):
            notes[number] = note
            encoded += note.shard.images if note.shard else 0
            rate = (done - found) / (time.perf_counter() - started)
            progress.log({"step": done, "split": plan.source.split, "images_per_second": rate})
        seconds = time.perf_counter() - started
    progress.stop()
    return [notes[number] for number in share], encoded, seconds
