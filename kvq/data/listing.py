"""The image files below a folder: found in one walk, sorted once, held as one block of bytes instead of a million objects."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvq.data.decoding import IMAGE_SUFFIXES
from kvq.errors import DataError
from kvq.untrusted import parse_json, read_bytes

_LIMIT = 2**30  # bytes; ten million names have fewer


class Listing(Sequence[str]):
    """Names of files, in an order.

    Args:
        names: Encoded as the file system has them, each ended by a zero byte, which no name contains.
    """

    def __init__(self, names: bytes):
        self.content = names
        self._ends: NDArray[np.integer] = np.flatnonzero(np.frombuffer(names, np.uint8) == 0)

    @classmethod
    def of(cls, names: Iterable[str]) -> "Listing":
        return cls(b"".join(os.fsencode(name) + b"\0" for name in names))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"No name {index} among {len(self)}.")
        index %= len(self)
        start = self._ends[index - 1] + 1 if index else 0
        return os.fsdecode(self.content[start : self._ends[index]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Listing) and self.content == other.content

    __hash__ = None  # type: ignore[assignment]

    def where(self, chosen: NDArray[np.bool_]) -> "Listing":
        """Those at which `chosen` (len(self),) is true."""
        return Listing.of(self[i] for i in np.flatnonzero(chosen))

    def to_bytes(self, **of: str) -> bytes:
        """The names after a line that says what they are the names `of`."""
        return json.dumps(of).encode() + b"\n" + self.content

    @classmethod
    def read(cls, path: Path, **of: str) -> "Listing | None":
        """What `to_bytes` made, if the file is there, whole, of the same, and of image files below the folder alone."""
        try:
            head, _, names = read_bytes(path, _LIMIT).partition(b"\n")
            said = parse_json(head)
            if not isinstance(said, dict) or any(said.get(key) != value for key, value in of.items()):
                return None
            if not names.endswith(b"\0") or _leave_their_folder(names) or not _are_images(names):
                return None
        except (OSError, ValueError):
            return None
        return cls(names)


def _leave_their_folder(names: bytes) -> bool:
    """Whether one of them, each ended by a zero byte, is empty, absolute, or goes up."""
    ended = b"\0" + names
    # Of one block, this takes a second for a hundred million names.
    return any(part in ended for part in (b"\0\0", b"\0/", b"\0../", b"/../", b"\0..\0", b"/..\0"))


def _are_images(names: bytes) -> bool:
    """Whether each of them has one of the endings. None ends in two."""
    lowered = names.lower()
    return sum(lowered.count(suffix.encode() + b"\0") for suffix in IMAGE_SUFFIXES) == names.count(b"\0")


def list_images(folder: Path) -> Listing:
    """All image files below `folder` as relative paths with forward slashes, in the order of their bytes.

    Hidden files and folders and `__MACOSX` are left out; links to folders are not followed, since they can form circles.
    """
    return Listing(b"".join(sorted(os.fsencode(name) + b"\0" for name in walk_images(folder))))


def walk_images(folder: Path) -> Iterator[str]:
    """The names of `list_images` as they are found, in no promised order."""
    waiting = [""] if folder.is_dir() else []
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{below}{entry.name}/")
                    elif entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir():
                        yield below + entry.name
        except OSError as error:
            raise DataError(f"{folder / below} cannot be read: {error}.") from error
