"""What training is fed with, and how long it waited for it."""

import contextlib
import hashlib
import time
from collections import deque
from collections.abc import Iterator

import numpy as np

from kvq.data.contract import Batch
from kvq.errors import DataError


class TimedInputs:
    """Training batches, and how long training waited for them.

    Where a backend fetches ahead by itself, as TensorFlow does, that is an upper bound. `hashes` are the SHA-256 of the batches,
    if they are to be `hashed`.
    """

    def __init__(self, batches: Iterator[Batch], hashed: bool = False):
        self.batches = batches
        self.hashed = hashed
        self.hashes: deque[str] = deque()
        self.waited = 0.0
        self.error: DataError | None = None

    def images(self) -> Iterator[tuple[np.ndarray]]:
        while True:
            started = time.perf_counter()
            try:
                batch = next(self.batches)
            except DataError as error:
                self.error = error
                raise
            self.waited += time.perf_counter() - started
            if self.hashed:
                self.hashes.append(hashlib.sha256(batch["images"].tobytes()).hexdigest())
            yield (batch["images"],)

    @contextlib.contextmanager
    def errors_unchanged(self) -> Iterator[None]:
        """A DataError comes through as it is: TensorFlow wraps what a generator raises in an error of its own."""
        try:
            yield
        except Exception:
            if self.error is not None:
                raise self.error from None
            raise
