"""The surroundings of a command that computes: the backend is decided, Keras imported, stdout kept for the result."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

from kvq import backends
from kvq.backends.memory import keep_freed_memory

from .output import say

# Lines of absl's C++ logging at the level of information, its complaint that it comes too early, and Grain's about absent JAX.
CHATTER = re.compile(r"I0000 |WARNING: All log messages before absl::InitializeLog\(\)|WARNING:absl:Failed to load jax profiler")


@contextlib.contextmanager
def computing(backend: str | None) -> Iterator[None]:
    """Compute inside. Everything that imports Keras belongs there.

    Args:
        backend: What `--backend` says.
    """
    keep_freed_memory(backends.choose(backend, report=say))
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
    """Import Keras, and with it the chosen backend, and Grain, without what they say of themselves on stderr.

    No setting reaches the lines of TensorFlow's C++ library: they are written before it reads any.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            import grain  # noqa: F401
            import keras  # noqa: F401
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            for line in said.read().decode(errors="replace").splitlines():
                if not CHATTER.match(line):
                    say(line)
