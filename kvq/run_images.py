"""The images of a run: opened, checked, and the same when it is resumed."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvq.atomic import write_bytes
from kvq.config import RunConfig
from kvq.data import locate, open_source
from kvq.data.contract import Batch, Source
from kvq.data.decoding import read_bytes
from kvq.data.places import KNOWN
from kvq.data.sources import FolderSource, check_images, fingerprint, listing_of
from kvq.errors import BadImageError, ConfigError, DataError, RunError
from kvq.run import Run

NAMES = ("train", "validation")
SOME = 8  # files of a folder that are looked into


def with_data(config: RunConfig, data: str | Path | None, validation_data: str | Path | None) -> RunConfig:
    """The configuration with the images that were asked for: known names, or absolute paths, to evaluate a run from anywhere.

    Links are kept: what they lead to may move, or lie elsewhere on another machine.
    """
    named = {"source": config.data.source, "validation": config.data.validation}
    paths = {key: Path(name) for key, name in named.items() if name and name not in KNOWN}
    changes = {key: _absolute(path) for key, path in paths.items() if path.exists()}
    if data is not None:
        changes["source"] = _place(config.data.source, data)
    if validation_data is not None:
        changes["validation"] = _place(str(validation_data), validation_data)
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def open_images(config: RunConfig, resumed: Run | None = None) -> tuple[Source, Source]:
    """Training and validation images that fit the configuration. A resumed run goes on with the files that it began with."""
    data = config.data
    source, validation = (
        open_source(data.place(split), split, listing=resumed.listing_file(split) if resumed else None)
        for split in ("train", "test")
    )
    for images in (source, validation):
        check_images(images, data.crop, data.pad, data.resize)
    if validation.channels != source.channels:
        raise DataError(
            f"Validation images must have the {source.channels} channels of the training images. Received: "
            f"{validation.channels} in {validation.name}."
        )
    if config.train.batch_size > len(source):
        raise ConfigError(
            f"train.batch_size must not be larger than the data set, {len(source)} images. Received: {config.train.batch_size}."
        )
    return source, validation


def keep_listings(run: Run, source: Source, validation: Source) -> None:
    """Writes the names of a folder's files into the run, for those who resume it."""
    for images in (source, validation):
        listing = listing_of(images)
        if listing:
            file = run.listing_file(images.split)
            file.parent.mkdir(exist_ok=True)
            write_bytes(file, listing)


def fingerprints(source: Source, validation: Source) -> dict[str, Any]:
    """What run.json says of the images, to find out whether they have changed."""
    return {name: _fingerprint(images) for name, images in zip(NAMES, (source, validation), strict=True)}


def _fingerprint(source: Source) -> dict[str, Any]:
    """That of the source, and of a folder the contents of a few files: their names are often those of other images, too."""
    found = fingerprint(source)
    if isinstance(source, FolderSource):
        digest = hashlib.sha256()
        for number in np.unique(np.linspace(0, len(source) - 1, SOME).astype(int)).tolist():
            with contextlib.suppress(BadImageError):
                digest.update(read_bytes(source.folder / source.names[number]))
        found["some_sha256"] = digest.hexdigest()
    return found


def check_unchanged(run: Run, config: RunConfig, source: Source, validation: Source) -> None:
    """Refuses to resume on other images than the run began with, by their names and the contents of a few, or, of arrays
    and shards, the contents of all.

    They may lie elsewhere than they did.

    Args:
        config: That the run goes on with.
        source, validation: Its images, with the names of files that the run keeps.

    Raises:
        RunError: With what has changed.
    """
    before = run.record.get("data")
    if not isinstance(before, dict):
        before = {}
    for name, images in zip(NAMES, (source, validation), strict=True):
        now: Source = images
        if isinstance(images, FolderSource):  # opened with the names that the run keeps, so looked through once more
            now = open_source(config.data.place(images.split), images.split)
        known = before.get(name)
        # A run of an older kvq knows less of them.
        if isinstance(known, dict) and known and known.items() <= _fingerprint(now).items():
            continue
        then = known.get("images", "unknown") if isinstance(known, dict) else "unknown"
        what = f"{then} images then, {len(now)} now"
        if isinstance(images, FolderSource) and isinstance(now, FolderSource):
            old, new = set(images.names), set(now.names)
            gone, added = sorted(old - new), sorted(new - old)
            what += f"; {len(gone)} are gone{_first(gone)}, {len(added)} are new{_first(added)}"
            if not gone and not added:
                what += "; files of these names hold something else"
        raise RunError(
            f"The {name} images of {run.folder} have changed since it began: {what}. Bring them back, or give "
            "--changed-data to go on with the files that it began with."
        )


def first_images(batches: Iterator[Batch], source: Source) -> np.ndarray:
    """Those of the first batch that has any, (n, h, w, c)."""
    skipped: list[tuple[str, str]] = []
    for batch in batches:
        if len(batch["images"]):
            return batch["images"]
        skipped += batch["skipped"]
    raise DataError(f"No image of {source.name} ({source.split}) can be used. The first: {skipped[0][0]}: {skipped[0][1]}.")


def _place(source: str, data: str | Path) -> str:
    """What was asked for, as a configuration names it."""
    return str(data) if str(data) in KNOWN else _absolute(locate(source, data))


def _absolute(path: Path) -> str:
    # Of what a link leads to, `..` is another folder than in the path as it is written.
    return str(path.resolve() if ".." in path.parts else path.absolute())


def _first(names: list[str]) -> str:
    return f" ({names[0]}{', ...' if len(names) > 1 else ''})" if names else ""
