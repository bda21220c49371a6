"""Files and folders that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: to a temporary name beside it, flushed, then renamed."""
    with _temporary_file(path, content) as temporary:
        os.replace(temporary, path)


def write_new(path: Path, content: bytes) -> None:
    """`write_bytes` of a file that nobody else has written, not even at the same moment; else FileExistsError."""
    with _temporary_file(path, content) as temporary:
        os.link(temporary, path)


@contextlib.contextmanager
def _temporary_file(path: Path, content: bytes) -> Iterator[Path]:
    """A flushed file beside `path`, which does not outlive the block under its own name."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        yield Path(name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, content.encode("utf-8"))


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that appears under its name whole or not at all; one of that name before it is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        if path.exists():
            # A folder cannot be renamed onto one that is not empty: the old one steps aside, and back if need be.
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.old.") as aside:
                old = Path(aside) / path.name
                os.replace(path, old)
                try:
                    os.replace(temporary, path)
                except BaseException:
                    os.replace(old, path)
                    raise
        else:
            os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def holds_files(folder: Path) -> bool:
    """Whether something lies in a folder, if it is there, other than hidden files such as a file manager leaves."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def flush(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
