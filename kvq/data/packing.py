"""A folder of images becomes ArrayRecord shards, whole files one by one, so that packing goes on where it was stopped."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from kvq.atomic import flush, write_bytes
from kvq.data.decoding import decode, read_bytes
from kvq.data.places import list_split, locate, recognise, splits_of
from kvq.data.shards import INDEX, SUFFIX, Index, Shard, to_record
from kvq.data.skipped import to_lines
from kvq.data.transforms import ResizeShorterSide
from kvq.errors import BadImageError, DataError

QUALITY = 92  # of the JPEGs that resized images become: 13% less to decode than 95, at 1 dB
PLAN = ".packing.json"  # what is being packed; there while it is
SKIPPED = "skipped.txt"


def pack(
    path: str | Path,
    out: str | Path,
    shard_size: int = 5000,
    size: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes the images of a folder as shards that train like the folder, image for image.

    Files keep their bytes, unless `size` is given: then each is scaled so that its shorter side has that many pixels (never
    enlarged, antialiased) and written as JPEG of quality 92. Files that cannot be decoded are left out, and named in skipped.txt.
    A call that was stopped goes on with the first shard that is not there yet.

    Args:
        path: Folder of images, or a known name of one.
        out: Folder to write, new or begun by the same call.
        shard_size: Files to a shard, at least 1.
        size: Shorter side in pixels, at least 4; None keeps the files as they are.
        on_progress: Told how many files are done, and of how many.

    Returns:
        `out`, `images`, `skipped`, `shards`, `bytes`.

    Raises:
        DataError: If there is nothing to pack, no image can be decoded, or `out` holds something else or cannot be written.
        ValueError: If a number is out of its range.
    """
    if shard_size < 1 or (size is not None and size < 4):
        raise ValueError(f"`shard_size` must be at least 1 and `size` at least 4. Received: {shard_size} and {size}.")
    folder, out = locate(str(path)), Path(out)
    if recognise(folder) != "images":
        raise DataError(
            f"{folder} must be a folder of image files to be packed. It holds arrays or shards, which load quickly already."
        )
    splits = splits_of(folder, "images")
    listings = {split: list_split(folder, split, splits) for split in splits}
    names_sha256 = hashlib.sha256(b"".join(listing.to_bytes() for listing in listings.values())).hexdigest()
    plan = {"folder": str(folder.resolve()), "names_sha256": names_sha256, "shard_size": shard_size, "size": size}
    try:
        _begin(out, plan)
        total, done = sum(len(listing) for listing in listings.values()), 0
        shards: dict[Any, list[Shard]] = {split: [] for split in splits}
        skipped: list[list[str]] = []
        for split, listing in listings.items():
            for first in range(0, len(listing), shard_size):
                names = listing[first : first + shard_size]
                shard, bad = _shard(
                    folder,
                    names,
                    out / f"{split}-{first // shard_size:05d}{SUFFIX}",
                    size,
                    lambda n, before=done: on_progress(before + n, total),  # type: ignore[misc]
                )
                done += len(names)
                shards[split] += [shard] if shard else []
                skipped += bad
        empty = [split for split, written in shards.items() if not written]
        if empty:
            raise DataError(f"No image of {folder} ({empty[0]}) can be decoded. The first: {skipped[0][0]}: {skipped[0][1]}.")
        if skipped:
            write_bytes(out / SKIPPED, to_lines(skipped))
        index = Index(name=folder.resolve().name, size=size, skipped=len(skipped), splits=shards)
        write_bytes(out / INDEX, (index.model_dump_json(indent=2) + "\n").encode())
        for leftover in [*out.glob(f"*{SUFFIX}.json"), out / PLAN]:
            leftover.unlink()
    except OSError as error:
        way_out = "What is packed already is kept; run it again." if (out / PLAN).exists() else "Give another folder."
        raise DataError(f"{out} cannot be written: {error.strerror or error}. {way_out}") from error
    written = [shard for each in shards.values() for shard in each]
    return {
        "out": str(out),
        "images": sum(shard.records for shard in written),
        "skipped": len(skipped),
        "shards": len(written),
        "bytes": sum(shard.bytes for shard in written),
    }


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Makes the folder, or finds that it was begun for the same plan."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / PLAN).exists():
        begun = json.loads((out / PLAN).read_text("utf-8"))
        if begun != plan:
            changed = ", ".join(key for key in plan if begun.get(key) != plan[key])
            raise DataError(f"{out} was begun with another {changed}. Remove it, or give another folder.")
        return
    if (out / INDEX).exists() and any(out.glob(f"*{SUFFIX}")):
        raise DataError(f"{out} is packed already: it holds {INDEX} and its shards. Remove it, or give another folder.")
    if any(out.iterdir()):
        raise DataError(f"{out} must be a new folder, or one that `kvq data pack` did not finish. It holds something else.")
    write_bytes(out / PLAN, json.dumps(plan).encode())


def _shard(
    folder: Path, names: list[str], path: Path, size: int | None, on_progress: Callable[[int], None]
) -> tuple[Shard | None, list[list[str]]]:
    """Writes one shard unless it is there; it appears whole. A file beside it says what came of it, until the end."""
    said = path.with_name(path.name + ".json")
    if said.exists():
        known = json.loads(said.read_text("utf-8"))
        return (Shard.model_validate(known["shard"]) if known["shard"] else None), known["skipped"]
    temporary, skipped = path.with_name(f".{path.name}"), []
    with _new_records(temporary) as write:
        records = 0
        for number, name in enumerate(names):
            try:
                content = _packed(read_bytes(folder / name, name), name, size)
                write(to_record(name, -1, content))
                records += 1
            except BadImageError as error:
                skipped.append([name, error.reason])
            on_progress(number + 1)
    shard = None
    if records:
        digest = sha256(temporary)
        shard = Shard(file=path.name, records=records, bytes=temporary.stat().st_size, sha256=digest)
        flush(temporary)
        os.replace(temporary, path)
    else:
        temporary.unlink()
    write_bytes(said, json.dumps({"shard": shard and shard.model_dump(), "skipped": skipped}).encode())
    return shard, skipped


@contextlib.contextmanager
def _new_records(path: Path) -> Iterator[Callable[[bytes], None]]:
    """What appends a record to a new file, which is gone again if the block fails. A full disk is an OSError, as everywhere."""
    from array_record.python.array_record_module import ArrayRecordWriter

    def told(call: Callable[..., None], *arguments: bytes) -> None:
        try:
            call(*arguments)
        except RuntimeError as error:
            # "write() failed: No space left on device; writing FILE; ..."
            raise OSError(str(error).partition(";")[0]) from error

    # A record for itself, so that one is read without its neighbours; JPEG does not shrink further.
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    try:
        yield functools.partial(told, writer.write)
        told(writer.close)
    except BaseException:
        with contextlib.suppress(RuntimeError):
            writer.close()
        path.unlink(missing_ok=True)
        raise


def _packed(content: bytes, name: str, size: int | None) -> bytes:
    """The bytes to store: as they are, or the image shrunk. Every file is decoded once, so that no bad one is packed."""
    pixels = decode(content, name)
    if size is None:
        return content
    if min(pixels.shape[:2]) > size:
        pixels = ResizeShorterSide(size)(pixels[None], np.empty((1, 0)))[0]
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, colorsubsampling="420")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
