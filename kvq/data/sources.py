"""Image collections: arrays in memory, or a folder of files that are decoded when asked for; `open_source` opens either."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvq.data.contract import Batch, Element, Source
from kvq.data.decoding import IMAGE_SUFFIXES, decode_image
from kvq.data.files import read_idx, read_npz
from kvq.data.listing import Listing
from kvq.data.places import HOLD_OUT, IDX_FILES, KNOWN, idx_file, list_split, locate, npz_file, recognise, splits_of
from kvq.data.shards import ShardSource
from kvq.errors import BadImageError, DataError

TRIED = 100  # files of a folder, before it is given up


class ArraySource:
    """Images of one size, held in memory.

    Args:
        images: uint8 (n, height, width) or (n, height, width, channels), 1 to 4 channels, channels last.
        labels: Integers (n,) or (n, 1), or None.
        name: The data set's name.
        split: Which of `splits` this is.
        splits: What the collection offers.

    Raises:
        DataError: If an array is not as above.
    """

    def __init__(
        self,
        images: NDArray[Any],
        labels: NDArray[Any] | None = None,
        *,
        name: str = "arrays",
        split: str = "all",
        splits: tuple[str, ...] = ("all",),
    ) -> None:
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape or images.shape[3:] > (4,):
            raise DataError(
                "Images must be a uint8 array (count, height, width) or (count, height, width, channels) with 1 to 4 channels, "
                f"no side empty. Received: {images.dtype} {images.shape}."
            )
        if labels is None:
            labels = np.full(len(images), -1)
        if labels.dtype.kind not in "iu" or labels.shape not in ((len(images),), (len(images), 1)):
            raise DataError(f"{len(images)} images need as many integer labels. Received: {labels.dtype} {labels.shape}.")
        self.name, self.split, self.splits = name, split, splits
        self._images: NDArray[np.uint8] = images if images.ndim == 4 else images[..., None]
        self._labels = labels.reshape(-1).astype(np.int64)
        self.channels = self._images.shape[-1]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Element:
        return {"image": self._images[index], "label": int(self._labels[index]), "name": self._name(index)}

    def fetch(self, indices: Sequence[int] | NDArray[np.integer]) -> Batch:
        """The elements at `indices` (batch,), as one batch."""
        chosen = np.asarray(indices)
        names = [self._name(i) for i in chosen]
        return {"images": self._images[chosen], "labels": self._labels[chosen], "names": names, "skipped": []}

    def identity(self) -> Iterable[memoryview]:
        return (np.ascontiguousarray(array).data for array in self.arrays)

    @property
    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """All images and labels."""
        return self._images, self._labels

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every image."""
        return self._images.shape[1:3]

    def _name(self, index: int) -> str:
        return f"{self.split}/{index:05d}"


class FolderSource:
    """Image files, decoded when they are asked for, as RGB and upright; labels are -1.

    Args:
        folder: Where the collection lies.
        names: The files' paths below `folder`, with forward slashes; see `listing.list_images`.
        name: The collection's name.
        split: Which of `splits` this is.
        splits: What the collection offers.

    Raises:
        DataError: If `names` is empty; from `source[i]`, BadImageError, if the file is gone, broken, cut short or too large.
    """

    channels = 3

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        name: str | None = None,
        split: str = "all",
        splits: tuple[str, ...] = ("all",),
    ) -> None:
        if not len(names):
            raise DataError(f"No images in {folder}. Looked for {', '.join(IMAGE_SUFFIXES)}.")
        self.name, self.split, self.splits = name or folder.name, split, splits
        self.folder, self.names = folder, names if isinstance(names, Listing) else Listing.of(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Element:
        name = self.names[index]
        return {"image": decode_image(self.folder / name, name), "label": -1, "name": name}

    def identity(self) -> Iterable[bytes]:
        return [self.names.content]


def check_images(source: Source, crop: int, pad: int = 0, resize: int | None = None) -> None:
    """Finds out before training what would make it impossible.

    Images of one size must be at least as large as the crop, with `pad` pixels added on each side. Of files, which may differ
    in size and of which some may be broken, one among the first 100 must decode.

    Raises:
        DataError: If not.
    """
    if isinstance(source, ArraySource):
        height, width = source.size
        if resize is None and min(height, width) + 2 * pad < crop:
            padded = f" and {pad} of padding" if pad else ""
            raise DataError(
                f"{source.name} ({source.split}) is smaller than the crop. Received: {height} x {width} pixels (height x width)"
                f"{padded}, crop={crop}. Choose a smaller `data.crop`, or other images."
            )
        return
    first: BadImageError | None = None
    for index in range(min(TRIED, len(source))):
        try:
            source[index]
            return
        except BadImageError as error:
            first = first or error
    tried = f"the first {TRIED}" if len(source) > TRIED else f"all {len(source)}"
    raise DataError(f"No image of {source.name} ({source.split}) can be decoded, {tried} were tried. The first: {first}")


def open_source(
    source: str, split: str = "train", data: str | Path | None = None, listing: Path | None = None
) -> ArraySource | FolderSource | ShardSource:
    """One split of a collection.

    A folder of images without folders for its splits still has `train` and `test`: of its files, sorted by path, every
    20th, from the first on, is held out for `test`, the others are `train`; a single image is both.

    Args:
        source: A known name or a path, see `locate`.
        split: `train`, `test`, or `all` for a collection that has no splits of its own.
        data: Where the user says the images are, see `locate`.
        listing: File with what `listing_of` gave for this split, wherever the folder lay: its list is taken instead of a new
            walk.

    Raises:
        DataError: If nothing is found there, a file is broken, or the collection does not offer the split.
    """
    path = locate(source, data)
    asked = source if data is None else str(data)
    name = asked if asked in KNOWN else Path(os.path.abspath(path)).name.removesuffix(".npz")
    kind = recognise(path)
    splits = splits_of(path, kind)
    offered = ("train", "test", "all") if splits == ("all",) else splits
    if split not in offered:
        raise DataError(f"{name} offers the splits {', '.join(offered)}. Received: split={split}.")
    if kind == "images":
        known = Listing.read(listing, split=split) if listing else None
        names = known or _held_out(list_split(path, split, splits), split, splits)
        return FolderSource(path, names, name=name, split=split, splits=splits)
    if kind == "shards":
        packed = ShardSource(path, split, splits)
        return packed.where(_chosen(len(packed), split)) if splits == ("all",) else packed
    file, labels_file = (idx_file(path, each) for each in IDX_FILES[split]) if kind == "idx" else (npz_file(path), None)
    assert file is not None  # the collection offers the split
    if kind == "idx":
        images, labels = read_idx(file, ranks=(3, 4)), read_idx(labels_file, ranks=(1,)) if labels_file else None
    else:
        images, labels = read_npz(file, split)
    try:
        return ArraySource(images, labels, name=name, split=split, splits=splits)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def listing_of(source: Source) -> bytes | None:
    """What to write into the file that `open_source` takes as `listing`; None where the source is no folder of images."""
    if not isinstance(source, FolderSource):
        return None
    return source.names.to_bytes(split=source.split)


def fingerprint(source: Source) -> dict[str, Any]:
    """`images` (how many) and `sha256`: of the names of files; of the arrays, or of the shards' own checksums, elsewhere."""
    digest = hashlib.sha256()
    for part in source.identity():
        digest.update(part)
    return {"images": len(source), "sha256": digest.hexdigest()}


def _held_out(names: Listing, split: str, splits: tuple[str, ...]) -> Listing:
    return names.where(_chosen(len(names), split)) if splits == ("all",) and split != "all" else names


def _chosen(count: int, split: str) -> NDArray[np.bool_]:
    """Which of `count` images without splits of their own belong to one, (count,)."""
    if split == "all" or count == 1:
        return np.ones(count, bool)
    return (np.arange(count) % HOLD_OUT == 0) == (split == "test")
