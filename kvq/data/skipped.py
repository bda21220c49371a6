"""The text of skipped.txt: a line for each bad file, its name and the reason with a tab between."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvq.errors import DataError
from kvq.untrusted import read_bytes

_LIMIT = 2**30  # bytes


def to_lines(skipped: Iterable[Sequence[str]]) -> bytes:
    """(name, reason) of each bad file as lines."""
    return b"".join(f"{_one_line(name)}\t{_one_line(reason)}\n".encode("utf-8", "backslashreplace") for name, reason in skipped)


def read_names(path: Path) -> set[str]:
    """The names in a file of such lines, as they are written there; none where there is no file.

    Raises:
        DataError: If it cannot be read.
    """
    if not os.path.lexists(path):
        return set()
    try:
        # A name in another encoding than ours is not one that was written here, and only fails to be found.
        lines = read_bytes(path, _LIMIT).decode("utf-8", "replace").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Remove it.") from None
    return {line.partition("\t")[0] for line in lines if line}


def written(name: str) -> str:
    """A name as it is written there."""
    return to_lines([(name, "")]).decode().partition("\t")[0]


def _one_line(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
