"""Files of a data set that could not be used: named once each in the run folder; where there are too many, the run ends."""

import contextlib
import math
from collections.abc import Iterator

import keras

from kvq.data.contract import Batch
from kvq.data.skipped import read_names, to_lines, written
from kvq.errors import DataError
from kvq.run import Run

SEEN_AT_LEAST = 100  # drawn, before a fraction of them means something


class BadFiles:
    """Watches batches go by and writes each bad file, with the reason, into skipped.txt; an action for `BetweenSteps`.

    Args:
        run: The run; files that an earlier part of it named are known.
        count: Images in the training set.
        max_fraction: Of the files seen since training began or went on, at least 100; more bad ones raise a DataError between two
            steps.
    """

    def __init__(self, run: Run, count: int, max_fraction: float):
        self.run = run
        self.count = count
        self.seen = 0
        self.max_fraction = max_fraction
        self.named = read_names(run.skipped_file)
        self.bad: set[str] = set()
        self.unwritten: list[tuple[str, str]] = []

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The training batches, unchanged."""
        for batch in self.name(batches):
            self.seen += len(batch["images"])
            self.bad.update(name for name, _ in batch["skipped"])
            yield batch

    def name(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Any batches, unchanged; their bad files are named, and do not count."""
        for batch in batches:
            new = {written(name): (name, reason) for name, reason in batch["skipped"] if written(name) not in self.named}
            self.named.update(new)
            self.unwritten += new.values()
            if self.unwritten:
                with contextlib.suppress(OSError):  # of a full disk: the next batch tries again
                    with self.run.skipped_file.open("ab") as file:
                        file.write(to_lines(self.unwritten))
                    self.unwritten.clear()
            yield batch

    @property
    def fraction(self) -> float:
        """Of the different files seen so far. In the first epoch each is a new one, apart from those that stand in."""
        return len(self.bad) / max(min(self.seen, self.count), 1)

    def due(self, step: int, ending: str | None) -> bool:
        return self.seen >= SEEN_AT_LEAST and self.fraction > self.max_fraction

    def act(self, model: keras.Model, step: int) -> None:
        raise DataError(
            f"{len(self.bad)} of {min(self.seen, self.count)} files cannot be used, more than data.max_bad_fraction = "
            f"{self.max_fraction:g}. {self.run.skipped_file} names them with the reasons. Mend the data, or allow more by "
            f"--set data.max_bad_fraction={min(math.ceil(20 * self.fraction) / 10, 1):g}. Then --resume goes on, and --overwrite "
            "starts again where there is no checkpoint yet."
        )
