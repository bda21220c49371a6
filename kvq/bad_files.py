"""Files of a data set that could not be used: named once each in the run folder; where there are too many, the run ends."""

import contextlib
import math
from collections.abc import Iterator

from kvq.data.contract import Batch
from kvq.data.skipped import read_names, to_lines, written
from kvq.errors import DataError
from kvq.run import Run


class BadFiles:
    """Watches batches go by and writes each bad file, with the reason, into skipped.txt.

    Args:
        run: The run; files that an earlier part of it named are known.
        count: Images in the training set.
        max_fraction: Of those, how many may be bad. Counted, not estimated: of a set with fewer no order of the files has more.
    """

    def __init__(self, run: Run, count: int, max_fraction: float):
        self.run = run
        self.count = count
        self.max_fraction = max_fraction
        self.named = read_names(run.skipped_file)
        self.bad: set[str] = set()
        self.unwritten: list[tuple[str, str]] = []

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The training batches, unchanged."""
        for batch in self.name(batches):
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
    def too_many(self) -> bool:
        """Whether more of the training set are bad than may be, by those that were drawn since training began or went on."""
        return len(self.bad) > self.max_fraction * self.count

    def check(self) -> None:
        """Raises a DataError where there are too many."""
        if self.too_many:
            allowed = min(math.ceil(20 * len(self.bad) / self.count) / 10, 1)
            raise DataError(
                f"{len(self.bad)} of the {self.count} training files cannot be used so far, more than data.max_bad_fraction = "
                f"{self.max_fraction:g}. {self.run.skipped_file} names them with the reasons. Mend the data, or allow more by "
                f"--set data.max_bad_fraction={allowed:g}. Then --resume goes on from where the run stopped."
            )
