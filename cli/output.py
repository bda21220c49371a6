"""What a command prints: the result to stdout, everything else to stderr."""

import io
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from . import OutputError

# Characters. No line of a table is as long.
ENDLESS = 1_000_000


class _Stdout(io.FileIO):
    """What stdout writes to. A reader that has gone, as `head` goes, ends no command: the rest is dropped."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            # Else Python would try once more, and complain of it, when it ends.
            _silence(self)
            if isinstance(error, BrokenPipeError):
                return len(content)
            raise OutputError(error.strerror) from None


def watch_stdout() -> None:
    """Has stdout raise OutputError where it cannot be written. A terminal always can be."""
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper) and stdout is sys.__stdout__ and not stdout.isatty():
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_Stdout(stdout.fileno(), "w", closefd=False)),
            encoding=stdout.encoding,
            errors=stdout.errors,
            # With PYTHONUNBUFFERED.
            line_buffering=stdout.write_through,
        )


def open_closed() -> None:
    """Has stdout and stderr go nowhere where they are closed, as by `>&-`: Python has none then, and files get their number."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            if nowhere != number:
                os.close(nowhere)
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))


def say(text: str) -> None:
    """Tell the user something that is not the result, as long as somebody reads it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        _silence(sys.stderr)


def _silence(stream: TextIO | io.FileIO) -> None:
    """Drop what the stream still holds and all that follows. Of the file descriptor, which others write to as well."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def print_json(result: Mapping[str, Any]) -> None:
    """Print a result as one line of JSON."""
    print(json.dumps(plain(result), allow_nan=False))


def print_table(rows: Iterable[Sequence[str]], headings: Sequence[str] = ()) -> None:
    """Print rows of cells: folded into the width of a terminal, and each as one line where a file or a program reads them."""
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    table = Table(box=None, show_header=bool(headings), pad_edge=False)
    for column in range(max(map(len, [headings, *rows]))):
        table.add_column(headings[column] if headings else "", overflow="fold")
    for row in rows:
        table.add_row(*row)
    if sys.stdout.isatty():
        Console(markup=False, highlight=False, emoji=False).print(table)
        return
    lines = io.StringIO()
    Console(file=lines, force_terminal=False, width=ENDLESS, markup=False, highlight=False, emoji=False).print(table)
    for line in lines.getvalue().splitlines():
        # Rich fills every cell up to the width of its column.
        print(line.rstrip())


def count(number: int, what: str) -> str:
    """So many of something that takes an s."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def size(bytes_: int) -> str:
    """So many bytes, for people."""
    return f"{bytes_ / 1e6:.1f} MB" if bytes_ >= 1e5 else f"{bytes_ / 1e3:.1f} kB"


def number(value: Any) -> str:
    """A value for people: four significant digits, thousands apart."""
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if not isinstance(value, int | float):
        return str(value)
    # Of a large one that would be an exponent.
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def plain(value: Any) -> Any:
    """The same in what JSON knows. It knows no NaN and no infinity, and strict readers refuse what Python writes for them."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
