"""From a source to batches: a Grain pipeline whose batch k depends on the seed, k, the batch size and the files alone.

A batch is `{"images": uint8 (batch, height, width, channels), "labels": int64 (batch,), "names": list of str}`.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from numpy.typing import NDArray

from kvq.data.sources import Batch, Element, Source, VectorSource
from kvq.data.transforms import Chain, Transform, uniform_numbers
from kvq.errors import DataError


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
    indices = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
    return _batches(source, indices, Chain(tuple(transforms)), batch_size, seed)


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
    return _batches(source, grain.MapDataset.range(count), chain, batch_size, seed=0)


def iterate(
    dataset: grain.MapDataset[Batch], start: int = 0, threads: int | None = None, prefetch: int | None = None
) -> Iterator[Batch]:
    """The batches from number `start` on, read ahead by threads. The order never depends on the threads.

    Starting late costs nothing: what lies before `start` is not read.

    Args:
        dataset: From `training_batches` or `evaluation_batches`.
        start: Number of the first batch, at least 0.
        threads: Batches prepared at the same time; 0 prepares each when it is asked for. Default: where files are decoded,
            one per core, at most 16; else 1, since threads would only wait for Python's lock.
        prefetch: Batches kept ready, 0 for none. Default: one more than there are threads.

    Raises:
        ValueError: If a number is negative.
        DataError: While iterating, if a file cannot be read.
    """
    if threads is None:
        threads = min(os.cpu_count() or 1, 16) if _decodes_files(dataset) else 1
    prefetch = threads + 1 if prefetch is None else prefetch
    if min(start, threads, prefetch) < 0:
        raise ValueError(f"Numbers must be at least 0. Received: start={start}, threads={threads}, prefetch={prefetch}.")
    # The slice comes last, so that every stage before it still counts from the beginning of the stream.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(dataset[start:].to_iter_dataset(options))


def _batches(source: Source, indices: grain.MapDataset[int], chain: Chain, batch_size: int, seed: int) -> grain.MapDataset[Batch]:
    """Both ways from indices to batches give the same batches; the first is several times faster where a source allows it."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1. Received: batch_size={batch_size}.")
    if isinstance(source, VectorSource):
        return indices.batch(batch_size, batch_fn=np.asarray).map_with_index(_WholeBatch(source, chain, seed, batch_size))
    return _FileBatches(indices.map_with_index(_OneElement(source, chain, seed)).batch(batch_size, batch_fn=_stack))


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
    """Batch number and indices (batch,) to a batch, all images at once."""

    source: VectorSource
    chain: Chain
    seed: int
    batch_size: int

    def __call__(self, number: int, indices: NDArray[np.integer]) -> Batch:
        batch = self.source.fetch(indices)
        positions = number * self.batch_size + np.arange(len(indices))
        images = self.chain(batch["images"], uniform_numbers(self.seed, positions, self.chain.draws))
        return {"images": images, "labels": batch["labels"], "names": batch["names"]}


@dataclass(frozen=True)
class _OneElement:
    """Position in the stream and index to an element, transformed."""

    source: Source
    chain: Chain
    seed: int

    def __call__(self, position: int, index: int) -> Element:
        element = self.source[index]
        uniform = uniform_numbers(self.seed, [position], self.chain.draws)
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
