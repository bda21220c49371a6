"""Who encodes the shards of a token data set, and how one shard is encoded: the same way by all of them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from kvq.data import evaluation_batches, evaluation_transforms, iterate
from kvq.data.contract import Source
from kvq.data.sources import ArraySource
from kvq.data.token_set import DTYPES, TokenPlan
from kvq.tokenizer import Tokenizer
from kvq.tokens import shards
from kvq.tokens.shards import Note

# Encodes and writes the shards of these numbers, and gives each one's number and note, in any order. The function that it takes
# is told how many images are done, each time some are, bad ones included.
EncodeShards = Callable[[Iterable[int], Callable[[int], None]], Iterator[tuple[int, Note]]]


@dataclass(frozen=True)
class Job:
    """What is encoded.

    Attributes:
        model: Run folder or model folder.
        data: Known name, file or folder, which `source` was opened from.
        source: The images.
        out: Folder of the set, begun with `plan`.
        plan: Everything that decides the bytes of the set.
    """

    model: Path
    data: str
    source: Source
    out: Path
    plan: TokenPlan


class Engine(Protocol):
    """Encodes shards: here, or elsewhere. Which one does changes no byte of a set."""

    def start(self, job: Job) -> AbstractContextManager[EncodeShards]:
        """Everything that shards have in common, such as the model, is there inside of the context."""


class LocalEngine:
    """This process, one shard after the other."""

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[EncodeShards]:
        tokenizer = Tokenizer.load(job.model)

        def encode_shards(numbers: Iterable[int], on_images: Callable[[int], None]) -> Iterator[tuple[int, Note]]:
            for number in numbers:
                yield number, encode_shard(tokenizer, job.source, job.out, job.plan, number, on_images)

        yield encode_shards


def encode_shard(
    tokenizer: Tokenizer, source: Source, out: Path, plan: TokenPlan, number: int, on_images: Callable[[int], None]
) -> Note:
    """Encodes and writes one shard. Its bytes depend on the plan and its number alone: batches begin where the shard does.

    Args:
        on_images: Told how many images of the source each batch stood for, bad ones included.
    """
    prepare = plan.preprocessing
    transforms = evaluation_transforms(prepare.pad, prepare.crop, prepare.resize, prepare.small)
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
        on_images(count + len(batch["skipped"]))
    kept = None if isinstance(source, ArraySource) else names
    return shards.write_shard(out, plan, number, np.concatenate(tokens), np.concatenate(labels), kept, skipped)
