"""From a source to batches: a Grain pipeline whose batch k depends on the seed, k, the batch size and the files alone.

A batch is `{"images": uint8 (batch, height, width, channels), "labels": int64 (batch,), "names": list of str, "skipped": list}`;
the last holds (name, reason) of each file that could not be used on the way to it. Training puts others in the place of such
files, so that a batch is always full and batch k always the same; evaluation leaves them out.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np
from numpy.typing import NDArray

from kvq.data.contract import Batch, Element, Source, VectorSource
from kvq.data.transforms import Chain, Transform, hashed, uniform_numbers
from kvq.errors import BadImageError, DataError

SUBSTITUTES = 100  # tried in the place of one file
Order = Callable[[NDArray[np.integer]], NDArray[np.integer]]


def training_batches(source: Source, transforms: Sequence[Transform], batch_size: int, seed: int) -> grain.MapDataset[Batch]:
    """Endless batches, shuffled anew in each epoch; every image comes once per epoch.

    `dataset[k]` is batch k, a pure function of (seed, k, batch_size, files). The element at place j of batch k is number
    p = k * batch_size + j of the whole stream, and its random crop and flip follow from (seed, p). Epochs are not cut at batch
    borders: a batch may end one epoch and begin the next. Where a file cannot be used, substitutes are drawn from
    (seed, epoch, index, attempt) until one can.

    For several hosts take Grain's own slices: host h of n trains on `dataset[h::n]`.

    Args:
        source: Images to draw from, at least `batch_size` of them.
        transforms: What happens to each image; all results must have the same shape.
        batch_size: Images per batch, at least 1.
        seed: In [0, 2**32).

    Raises:
        ValueError: If `batch_size` or `seed` is out of its range.
        DataError: If the batch is larger than the source; from `dataset[k]`, if so many files are bad that none is found to
            stand in.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be in [0, 2**32). Received: seed={seed}.")
    if batch_size > len(source):
        raise DataError(
            f"A training batch must not be larger than the images it is drawn from. Received: a batch size of {batch_size} "
            f"and {len(source)} images in {source.name} ({source.split}). Lower `train.batch_size` or add images."
        )
    return _batches(source, None, Chain(tuple(transforms)), batch_size, seed)


def evaluation_batches(
    source: Source, transforms: Sequence[Transform], batch_size: int, limit: int | None = None, first: int = 0
) -> grain.MapDataset[Batch]:
    """Every image once, in the order of the source; the last batch may be smaller, and so is one with bad files in it.

    Args:
        source: Images to go through.
        transforms: What happens to each image, nothing random; all results must have the same shape.
        batch_size: Images per batch, at least 1; may exceed the source.
        limit: Only that many images, at least 1; None for all.
        first: Number of the image to begin with, in [0, len(source)).

    Raises:
        ValueError: If a number is out of its range, or a transform is random.
    """
    chain = Chain(tuple(transforms))
    if chain.draws:
        raise ValueError(f"Evaluation takes only transforms without random numbers. Received: {chain.transforms}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, or None. Received: limit={limit}.")
    if not 0 <= first < len(source):
        raise ValueError(f"`first` must be in [0, {len(source)}). Received: first={first}.")
    count = len(source) - first
    return _batches(source, count if limit is None else min(limit, count), chain, batch_size, seed=0, first=first)


def iterate(dataset: grain.MapDataset[Batch], start: int = 0, threads: int | None = None) -> Iterator[Batch]:
    """The batches from number `start` on, read ahead by threads. The order never depends on the threads.

    Starting late costs nothing: what lies before `start` is not read.

    Args:
        dataset: From `training_batches` or `evaluation_batches`.
        start: Number of the first batch, at least 0.
        threads: Batches prepared at the same time; 0 prepares each when it is asked for. Default: where files are decoded,
            one per core, at most 16; else 0: to hand a batch from thread to thread costs more than to cut it out of an array.

    Raises:
        ValueError: If a number is negative.
        DataError: While iterating, as from `dataset[k]`.
    """
    if threads is None:
        threads = min(os.cpu_count() or 1, 16) if _decodes_files(dataset) else 0
    if min(start, threads) < 0:
        raise ValueError(f"Numbers must be at least 0. Received: start={start}, threads={threads}.")
    # The slice comes last, so that every stage before it still counts from the beginning of the stream.
    # One batch more than there are threads is kept ready.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1 if threads else 0)
    return iter(dataset[start:].to_iter_dataset(options))


def _batches(
    source: Source, count: int | None, chain: Chain, batch_size: int, seed: int, first: int = 0
) -> grain.MapDataset[Batch]:
    """`count` elements from number `first` on in the order of the source, or, for None, endlessly many, shuffled.

    Both ways from positions in the stream to batches give the same batches; the first is several times faster where a source
    allows it.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1. Received: batch_size={batch_size}.")
    order = _Shuffled(len(source), seed) if count is None else _InOrder(first)
    numbers = grain.MapDataset.range(1).repeat(None) if count is None else grain.MapDataset.range(-(-count // batch_size))
    if isinstance(source, VectorSource):
        return numbers.map_with_index(_ArrayBatch(source, order, chain, seed, batch_size, count))
    return _FileBatches(numbers.map_with_index(_FileBatch(source, order, chain, seed, batch_size, count)))


def as_grain(transform: Transform) -> grain.transforms.RandomMap:
    """A transform for Grain pipelines of one's own, `dataset.random_map(as_grain(RandomCrop(128)), seed=0)`.

    It changes `element["image"]`, uint8 (height, width, channels), by numbers from Grain's generator, and keeps the rest.
    """
    return _AsGrain(transform)


class _AsGrain(grain.transforms.RandomMap):
    def __init__(self, transform: Transform):
        self.transform = transform

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {**element, "image": self.transform(element["image"][None], rng.random((1, self.transform.draws)))[0]}


@dataclass(frozen=True)
class _InOrder:
    first: int

    def __call__(self, positions: NDArray[np.integer]) -> NDArray[np.integer]:
        return self.first + positions


@dataclass(frozen=True)
class _Shuffled:
    """Positions in the endless stream to indices in the source, each of which comes once per epoch."""

    count: int
    seed: int

    def __call__(self, positions: NDArray[np.integer]) -> NDArray[np.integer]:
        epochs, places = np.divmod(positions, self.count)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = _permutation(self.seed, int(epoch), self.count)[places[chosen]]
        return indices


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.integer]:
    # The generator whose numbers NumPy has promised never to change; Grain's own shuffle, index by index, took most of the time
    # of a batch of small images.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, epoch)))).permutation(count)


class _FileBatches(grain.MapDataset[Batch]):
    """Its parent unchanged: marks batches that more threads make faster, because decoders release Python's lock."""

    def __len__(self) -> int:
        return len(self.parents[0])

    def __getitem__(self, index: Any) -> Any:
        return self.slice(index) if isinstance(index, slice) else self.parents[0][index]


def _decodes_files(dataset: grain.MapDataset[Any]) -> bool:
    """Whether `_FileBatches` is in the pipeline, whatever was put on top of it."""
    return isinstance(dataset, _FileBatches) or any(_decodes_files(parent) for parent in dataset.parents)


@dataclass(frozen=True)
class _BatchOf:
    """Number of a batch to the positions of its elements in the stream."""

    source: Any
    order: Order
    chain: Chain
    seed: int
    batch_size: int
    count: int | None

    def positions(self, number: int) -> NDArray[np.integer]:
        start = number * self.batch_size
        size = self.batch_size if self.count is None else min(self.batch_size, self.count - start)
        return start + np.arange(size)

    def uniform(self, positions: NDArray[np.integer]) -> NDArray[np.float64]:
        return uniform_numbers(self.seed, positions, self.chain.draws)


@dataclass(frozen=True)
class _ArrayBatch(_BatchOf):
    """Number of a batch to the batch, all images at once."""

    def __call__(self, number: int, _: int) -> Batch:
        positions = self.positions(number)
        batch: Batch = self.source.fetch(self.order(positions))
        batch["images"] = self.chain(batch["images"], self.uniform(positions))
        return batch


class _Loaded(NamedTuple):
    """An element, None where its file is bad and nothing stands in for it, and the bad files that were met."""

    element: Element | None
    skipped: list[tuple[str, str]]


@dataclass(frozen=True)
class _FileBatch(_BatchOf):
    """Number of a batch to the batch, image by image. In training (no `count`), others stand in for bad files."""

    def __call__(self, number: int, _: int) -> Batch:
        positions = self.positions(number)
        each = zip(positions.tolist(), self.order(positions).tolist(), self.uniform(positions), strict=True)
        return _stack([self._load(*one) for one in each])

    def _load(self, position: int, wanted: int, uniform: NDArray[np.float64]) -> _Loaded:
        skipped: list[tuple[str, str]] = []
        for attempt in range(SUBSTITUTES + 1 if self.count is None else 1):
            try:
                return _Loaded(self._decode(self._index(position, wanted, attempt), uniform), skipped)
            except BadImageError as error:
                skipped.append((error.name, error.reason))
        if self.count is None:
            name, reason = skipped[-1]
            raise DataError(
                f"{self.source.name} ({self.source.split}) has too few images that can be used: {len(skipped)} drawn in a row "
                f"cannot. The last: {name}: {reason}."
            )
        return _Loaded(None, skipped)

    def _index(self, position: int, wanted: int, attempt: int) -> int:
        count = len(self.source)
        return hashed(self.seed, position // count, wanted, attempt) % count if attempt else wanted

    def _decode(self, index: int, uniform: NDArray[np.float64]) -> Element:
        element = self.source[index]
        try:
            image = self.chain(element["image"][None], uniform[None])[0]
        except DataError as error:  # the transform knows no names
            raise BadImageError(element["name"], str(error).rstrip(".")) from error
        return {"image": image, "label": element["label"], "name": element["name"]}


def _stack(loaded: Sequence[_Loaded]) -> Batch:
    elements = [each.element for each in loaded if each.element is not None]
    return {
        "images": np.stack([element["image"] for element in elements]) if elements else np.zeros((0, 0, 0, 0), np.uint8),
        "labels": np.array([element["label"] for element in elements], np.int64),
        "names": [element["name"] for element in elements],
        "skipped": [bad for each in loaded for bad in each.skipped],
    }
