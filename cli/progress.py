"""What a long command shows while it runs: a live display on a terminal, plain lines where stderr is a file or a pipe.

Both are a `kvq.progress.Progress`.
"""

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
    """One plain line for each record."""

    def __init__(self, unit: str = "step") -> None:
        self.unit = unit

    def start(self, total_steps: int, first_step: int) -> None:
        self.total = total_steps
        self.measured: tuple[int, float] | None = None

    def log(self, record: dict[str, Any]) -> None:
        step = record["step"]
        words = [
            f"{self.unit} {step}/{self.total}",
            record["split"],
            *(f"{name} {value}" for name, value in figures(record).items()),
        ]
        if record["split"] == "train":
            now = time.monotonic()
            # Time counts from the first record: before it the step was compiled, which would make the estimate useless.
            self.measured = self.measured or (step, now)
            first, started = self.measured
            if step > first:
                words.append(f"{(now - started) / (step - first) * (self.total - step):.0f} s left")
        say("  ".join(words))

    def note(self, text: str) -> None:
        say(text)


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
