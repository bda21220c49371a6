"""Reading files that anyone may have written: bounded, without following a link, without waiting for a pipe."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO


def open_regular(path: Path, links: bool = False) -> BinaryIO:
    """An ordinary file, opened to be read in bytes; through `links` where that is allowed.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is a link, a folder, a pipe or a device.
    """
    try:
        # Without O_NONBLOCK, a pipe would be waited for until someone writes into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("it is a symbolic link") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of an ordinary file of at most `limit` bytes. Raises as `open_regular`, and ValueError if it is larger."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"it is larger than {limit} bytes, which no such file needs")
        return file.read(size)


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises ValueError if it is none, is nested too deeply, or says a thing twice."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        # What another reader, who keeps the first, would see is not what was checked.
        raise ValueError("it has a key twice")
    return values
