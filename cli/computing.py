"""The surroundings of a command that computes: the backend is decided, Keras imported, stdout kept for the result."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

from kvq import backends

from .output import say

# Lines of absl's C++ logging at the level of information, and its complaint that it comes too early.
CHATTER = re.compile(r"I0000 |WARNING: All log messages before absl::InitializeLog\(\)")


@contextlib.contextmanager
def computing(backend: str | None) -> Iterator[None]:
    """Compute inside. Everything that imports Keras belongs there.

    Args:
        backend: What `--backend` says.
    """
    backends.choose(backend, report=say)
    with only_results_on_stdout():
        import_keras()
        yield


@contextlib.contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """Send to stderr what anything prints meanwhile, backends' C++ libraries included."""
    sys.stdout.flush()
    sys.stderr.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def import_keras() -> None:
    """Import Keras, and with it the chosen backend, without what TensorFlow's C++ library says of itself on stderr.

    No setting reaches those lines: they are written before it reads any.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            import keras  # noqa: F401
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            for line in said.read().decode(errors="replace").splitlines():
                if not CHATTER.match(line):
                    say(line)
