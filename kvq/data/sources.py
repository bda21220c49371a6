"""Image collections: arrays in memory, or a folder of files that are decoded when asked for; `open_source` opens either."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvq.data.files import IMAGE_SUFFIXES, decode_image, opened_image, read_idx, read_npz
from kvq.data.places import IDX_FILES, KNOWN, idx_file, locate, npz_file, recognise, split_names, splits_of
from kvq.errors import DataError


class Element(TypedDict):
    """An image uint8 (height, width, channels), its label, -1 if there is none, and its name within the collection."""

    image: NDArray[np.uint8]
    label: int
    name: str


class Batch(TypedDict):
    """Images uint8 (batch, height, width, channels), labels int64 (batch,), -1 where there is none, and one name per image."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: list[str]


class Source(Protocol):
    """One split of a collection. `splits` are the names that the collection offers; only `("all",)` where it has none."""

    name: str
    split: str
    splits: tuple[str, ...]
    channels: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Element: ...

    def check(self, crop: int, pad: int = 0) -> None: ...

    def check_channels(self, channels: int) -> None: ...


@runtime_checkable
class VectorSource(Source, Protocol):
    """A source that gives many images at once, which the loader then asks for whole batches."""

    def fetch(self, indices: Sequence[int] | NDArray[np.integer]) -> Batch: ...


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
        return {"images": self._images[chosen], "labels": self._labels[chosen], "names": [self._name(i) for i in chosen]}

    def check(self, crop: int, pad: int = 0) -> None:
        """Raises DataError if an image, with `pad` pixels added on each side, is smaller than a square of side `crop`."""
        _, height, width, _ = self._images.shape
        _check_size(f"{self.name} ({self.split})", height, width, crop, pad)

    def check_channels(self, channels: int) -> None:
        """Raises DataError if the images do not have so many channels."""
        _check_channels(self, channels)

    def _name(self, index: int) -> str:
        return f"{self.split}/{index:05d}"


class FolderSource:
    """Image files, decoded when they are asked for, as RGB and upright; labels are -1.

    Args:
        folder: Where the collection lies.
        names: The files' paths below `folder`, with forward slashes; see `image_names`.
        name: The collection's name.
        split: Which of `splits` this is.
        splits: What the collection offers.

    Raises:
        DataError: If `names` is empty; from `source[i]`, if the file is broken, cut short or too large, with its name.
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
        if not names:
            raise DataError(f"No images in {folder}. Looked for {', '.join(IMAGE_SUFFIXES)}.")
        self.name, self.split, self.splits = name or folder.name, split, splits
        self._folder, self._names = folder, tuple(names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Element:
        name = self._names[index]
        return {"image": decode_image(self._folder / name), "label": -1, "name": name}

    def check(self, crop: int, pad: int = 0) -> None:
        """Reads every file's header, no pixels: the first that is unreadable or smaller than `crop` raises a DataError.

        Args:
            crop: Side of the square that must fit.
            pad: Pixels added on each side before.
        """
        for name in self._names:
            path = self._folder / name
            with opened_image(path) as image:
                _check_size(str(path), image.height, image.width, crop, pad)

    def check_channels(self, channels: int) -> None:
        """Raises DataError if `channels` is not 3: files are read as RGB."""
        _check_channels(self, channels)


def _check_size(what: str, height: int, width: int, crop: int, pad: int) -> None:
    if min(height, width) + 2 * pad < crop:
        padded = f" and {pad} of padding" if pad else ""
        raise DataError(
            f"{what} is smaller than the crop. Received: {height} x {width} pixels (height x width){padded}, crop={crop}. "
            "Choose a smaller `data.crop` or leave such images out."
        )


def _check_channels(source: Source, channels: int) -> None:
    if source.channels != channels:
        raise DataError(
            f"{source.name} has images of {source.channels} channels. Received: a model for {channels}. "
            "Choose other images, or a configuration for such images."
        )


def open_source(source: str, split: str = "train", data: str | Path | None = None) -> ArraySource | FolderSource:
    """One split of a collection.

    A folder of images without folders for its splits still has `train` and `test`: of its files, sorted by path, every
    20th, from the first on, is held out for `test`, the others are `train`; a single image is both.

    Args:
        source: A known name or a path, see `locate`.
        split: `train`, `test`, or `all` for a collection that has no splits of its own.
        data: Where the user says the images are, see `locate`.

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
        return FolderSource(path, split_names(path, split, splits), name=name, split=split, splits=splits)
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
