"""What a collection of images is to everyone else: elements, batches, and the two kinds of source."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Element(TypedDict):
    """An image uint8 (height, width, channels), its label, -1 if there is none, and its name within the collection."""

    image: NDArray[np.uint8]
    label: int
    name: str


class Batch(TypedDict):
    """Images uint8 (batch, height, width, channels), labels int64 (batch,), -1 where there is none, and one name per image.

    `skipped` holds (name, reason) of the files that could not be used on the way to this batch.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: list[str]
    skipped: list[tuple[str, str]]


class Source(Protocol):
    """One split of a collection. `splits` are the names that the collection offers; only `("all",)` where it has none.

    `source[i]` is the same every time; it raises BadImageError where that one image cannot be used, and IndexError from
    `len(source)` on. Sources can be pickled.
    """

    name: str
    split: str
    splits: tuple[str, ...]
    channels: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Element: ...

    def identity(self) -> Iterable[bytes | memoryview]:
        """What is not the same where the images have changed: their pixels, checksums or names."""
        ...


@runtime_checkable
class VectorSource(Source, Protocol):
    """A source that gives many images at once, which the loader then asks for whole batches."""

    def fetch(self, indices: Sequence[int] | NDArray[np.integer]) -> Batch: ...
