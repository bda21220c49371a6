"""From a source to batches: a Grain pipeline whose batch k depends on the seed, k, the batch size and the files alone.

A batch is `{"images": uint8 (batch, height, width, channels), "labels": int64 (batch,), "names": list of str}`.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from numpy.typing import NDArray

from kvq.data.sources import Batch, Element, Source, VectorSource
from kvq.data.transforms import Chain, Transform, uniform_numbers
from kvq.errors import DataError

Order = Callable[[NDArray[np.integer]], NDArray[np.integer]]


def training_batches(source: Source, transforms: Sequence[Transform], batch_size: int, seed: int) -> grain.MapDataset[Batch]:
    """Endless batches, shuffled anew in each epoch; every image comes once per epoch.

    `dataset[k]` is batch k, a pure function of (seed, k, batch_size, files). The element at place j of batch k is number
    p = k * batch_size + j of the whole stream, and its random crop and flip follow from (seed, p). Epochs are not cut at batch
    borders: a batch may end one epoch and begin the next.

    Args:
        source: Images to draw from, at least `batch_size` of them.
        transforms: What happens to each image; all results must have the same shape.
        batch_size: Images per batch, at least 1.
        seed: In [0, 2**32).

    Raises:
        ValueError: If `batch_size` or `seed` is out of its range.
        DataError: If the batch is larger than the source; from `dataset[k]`, if a file cannot be read.
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
    source: Source, transforms: Sequence[Transform], batch_size: int, limit: int | None = None
) -> grain.MapDataset[Batch]:
    """Every image once, in the order of the source; the last batch may be smaller.

    Args:
        source: Images to go through.
        transforms: What happens to each image, nothing random; all results must have the same shape.
        batch_size: Images per batch, at least 1; may exceed the source.
        limit: Only that many images from the front, at least 1; None for all.

    Raises:
        ValueError: If `batch_size` or `limit` is out of its range, or a transform is random.
        DataError: From `dataset[k]`, if a file cannot be read.
    """
    chain = Chain(tuple(transforms))
    if chain.draws:
        raise ValueError(f"Evaluation takes only transforms without random numbers. Received: {chain.transforms}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, or None. Received: limit={limit}.")
    count = len(source) if limit is None else min(limit, len(source))
    return _batches(source, count, chain, batch_size, seed=0)


def iterate(
    dataset: grain.MapDataset[Batch], start: int = 0, threads: int | None = None, prefetch: int | None = None
) -> Iterator[Batch]:
    """The batches from number `start` on, read ahead by threads. The order never depends on the threads.

    Starting late costs nothing: what lies before `start` is not read.

    Args:
        dataset: From `training_batches` or `evaluation_batches`.
        start: Number of the first batch, at least 0.
        threads: Batches prepared at the same time; 0 prepares each when it is asked for. Default: where files are decoded,
            one per core, at most 16; else 0, since handing over a batch between threads costs more than to cut it out of an array.
        prefetch: Batches kept ready, 0 for none. Default: one more than there are threads, none without threads.

    Raises:
        ValueError: If a number is negative.
        DataError: While iterating, if a file cannot be read.
    """
    if threads is None:
        threads = min(os.cpu_count() or 1, 16) if _decodes_files(dataset) else 0
    prefetch = (threads + 1 if threads else 0) if prefetch is None else prefetch
    if min(start, threads, prefetch) < 0:
        raise ValueError(f"Numbers must be at least 0. Received: start={start}, threads={threads}, prefetch={prefetch}.")
    # The slice comes last, so that every stage before it still counts from the beginning of the stream.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(dataset[start:].to_iter_dataset(options))


def _batches(source: Source, count: int | None, chain: Chain, batch_size: int, seed: int) -> grain.MapDataset[Batch]:
    """The first `count` elements in the order of the source, or, for None, endlessly many, shuffled.

    Both ways from positions in the stream to batches give the same batches; the first is several times faster where a source
    allows it.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1. Received: batch_size={batch_size}.")
    order = _Shuffled(len(source), seed) if count is None else _InOrder()
    if isinstance(source, VectorSource):
        batches = grain.MapDataset.range(1).repeat(None) if count is None else grain.MapDataset.range(-(-count // batch_size))
        return batches.map_with_index(_WholeBatch(source, order, chain, seed, batch_size, count))
    positions = grain.MapDataset.range(len(source)).repeat(None) if count is None else grain.MapDataset.range(count)
    return _FileBatches(positions.map_with_index(_OneElement(source, order, chain, seed)).batch(batch_size, batch_fn=_stack))


@dataclass(frozen=True)
class _InOrder:
    def __call__(self, positions: NDArray[np.integer]) -> NDArray[np.integer]:
        return positions


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
class _WholeBatch:
    """Batch number to a batch, all images at once."""

    source: VectorSource
    order: Order
    chain: Chain
    seed: int
    batch_size: int
    count: int | None

    def __call__(self, number: int, _: int) -> Batch:
        start = number * self.batch_size
        size = self.batch_size if self.count is None else min(self.batch_size, self.count - start)
        positions = start + np.arange(size)
        batch = self.source.fetch(self.order(positions))
        images = self.chain(batch["images"], uniform_numbers(self.seed, positions, self.chain.draws))
        return {"images": images, "labels": batch["labels"], "names": batch["names"]}


@dataclass(frozen=True)
class _OneElement:
    """Position in the stream to an element, transformed."""

    source: Source
    order: Order
    chain: Chain
    seed: int

    def __call__(self, position: int, _: int) -> Element:
        positions = np.array([position])
        element = self.source[int(self.order(positions)[0])]
        uniform = uniform_numbers(self.seed, positions, self.chain.draws)
        try:
            image = self.chain(element["image"][None], uniform)[0]
        except DataError as error:  # the transform knows no names
            raise DataError(f"{element['name']}: {error}") from error
        return {"image": image, "label": element["label"], "name": element["name"]}


def _stack(elements: Sequence[Element]) -> Batch:
    return {
        "images": np.stack([element["image"] for element in elements]),
        "labels": np.array([element["label"] for element in elements], np.int64),
        "names": [element["name"] for element in elements],
    }
