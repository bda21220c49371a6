"""The text of skipped.txt: a line for each bad file, its name and the reason with a tab between."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def to_lines(skipped: Iterable[Sequence[str]]) -> bytes:
    """(name, reason) of each bad file as lines."""
    return b"".join(f"{_one_line(name)}\t{_one_line(reason)}\n".encode("utf-8", "backslashreplace") for name, reason in skipped)


def read_names(path: Path) -> set[str]:
    """The names in a file of such lines, as they are written there; none where there is no file."""
    return {line.partition("\t")[0] for line in path.read_text("utf-8").split("\n") if line} if path.exists() else set()


def written(name: str) -> str:
    """A name as it is written there."""
    return to_lines([(name, "")]).decode().partition("\t")[0]


def _one_line(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
