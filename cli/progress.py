"""What a long command shows while it runs: a live display on a terminal, plain lines where stderr is a file or a pipe.

Both are a `kvq.progress.Progress`.
"""

import math
import os
import sys
import time
from typing import Any

from kvq.progress import NOT_TERMS, Progress

from .output import number, say


def choose_progress(unit: str = "step") -> Progress:
    """The display that fits where stderr goes. `unit` is what is counted."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return LiveProgress(unit)
    return LineProgress(unit)


def figures(record: dict[str, Any]) -> dict[str, str]:
    """The figures of a record, in reading order: the loss, its terms, then quality, codebook and speed."""
    terms = [name for name, value in record.items() if name not in NOT_TERMS and isinstance(value, int | float)]
    shown = {name: number(record[name]) for name in ("loss", *terms, "psnr", "ssim") if record.get(name) is not None}
    if record.get("usage") is not None:
        shown["usage"] = f"{record['usage']:.0%}"
    if record.get("perplexity") is not None:
        shown["perplexity"] = f"{record['perplexity']:.1f}"
    if record.get("images_per_second") is not None:
        shown["images/s"] = f"{record['images_per_second']:.0f}"
    return shown


class LineProgress(Progress):
    """One plain line for each record; where there are none, one now and then for how far it is."""

    PERIOD = 10.0  # seconds

    def __init__(self, unit: str = "step") -> None:
        self.unit = unit

    def start(self, total_steps: int, first_step: int) -> None:
        self.total, self.first = total_steps, first_step
        # Time counts from the first step that is done, or its record: before it was compiled, which would make estimates useless.
        self.measured: tuple[int, float] | None = None
        self.said = 0.0

    def step(self, step: int) -> None:
        if step == self.first:
            return
        now = time.monotonic()
        if self.measured is None:
            self.measured, self.said = (step, now), now
        elif now - self.said >= self.PERIOD:
            self.said = now
            say(f"{self.unit} {step}/{self.total}{self._left(step, now)}")

    def log(self, record: dict[str, Any]) -> None:
        step, now = record["step"], time.monotonic()
        self.said = math.inf  # records tell enough
        words = [
            f"{self.unit} {step}/{self.total}",
            record["split"],
            *(f"{name} {value}" for name, value in figures(record).items()),
        ]
        if record["split"] == "train":
            self.measured = self.measured or (step, now)
            words[-1] += self._left(step, now)
        say("  ".join(words))

    def note(self, text: str) -> None:
        say(text)

    def _left(self, step: int, now: float) -> str:
        first, started = self.measured or (step, now)
        return f"  {(now - started) / (step - first) * (self.total - step):.0f} s left" if step > first else ""


class LiveProgress(Progress):
    """A bar with the remaining time, and under it the newest figures of each split, one a row: narrow terminals show them too."""

    # Seconds between two moves of the bar. Training calls `step` up to thousands of times a second.
    PERIOD = 0.1

    def __init__(self, unit: str = "step") -> None:
        from rich.console import Console

        self.unit = unit
        self.console = Console(stderr=True)
        self.newest: dict[str, dict[str, str]] = {}
        self.display: Any = None

    def start(self, total_steps: int, first_step: int) -> None:
        from rich import progress

        latest = self

        class Display(progress.Progress):
            def get_renderables(self) -> Any:
                yield self.make_tasks_table(self.tasks)
                yield latest.table()

        self.display = Display(
            progress.TextColumn(f"{self.unit} {{task.completed:.0f}}/{{task.total:.0f}}"),
            progress.BarColumn(bar_width=None),
            progress.TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=4,
            expand=True,
        )
        self.task = self.display.add_task("", total=total_steps, completed=first_step)
        self.moved, self.total = 0.0, total_steps
        self.display.start()

    def step(self, step: int) -> None:
        now = time.monotonic()
        if now - self.moved >= self.PERIOD or step >= self.total:
            self.moved = now
            self.display.update(self.task, completed=step)

    def log(self, record: dict[str, Any]) -> None:
        self.newest[record["split"]] = figures(record)
        self.display.update(self.task, completed=record["step"])

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        if self.display is not None:
            self.display.stop()
            self.display = None

    def table(self) -> Any:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        # Where there is little room, names give way before figures.
        table.add_column("", overflow="ellipsis")
        for split in self.newest:
            table.add_column(split, justify="right", no_wrap=True)
        names = dict.fromkeys(name for shown in self.newest.values() for name in shown)
        for name in names:
            table.add_row(name, *(shown.get(name, "") for shown in self.newest.values()))
        return table
