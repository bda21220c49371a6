"""Commands of the stages of `gpu.py`, stopped at a moment, and what came of them."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import tempfile
import time


class StageError(Exception):
    """Why a stage failed, in a line."""


@dataclasses.dataclass
class Ended:
    """A command that ended or was stopped: what it wrote to stdout, and, if it did not succeed, why in a line."""

    text: str
    error: str | None

    def checked(self) -> str:
        """The text of a command that succeeded."""
        if self.error:
            raise StageError(self.error)
        return self.text

    def told(self) -> str:
        """The text of a command that may have failed after it told something."""
        return self.text if self.text.strip() else self.checked()


def run(command: list[str], until: float, stop: signal.Signals = signal.SIGKILL) -> Ended:
    """Runs a command until a moment, at which it is stopped, with all that it started; by `stop`, if it heeds that in 15 s."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
    error = None
    with tempfile.TemporaryFile("w+", errors="replace") as said, tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=said, start_new_session=True)
        try:
            process.wait(max(until - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            error = "not done in time"
            process.send_signal(stop)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        said.seek(0)
        text, complaint = output.read(), said.read().strip().splitlines()
    if process.returncode and not error:
        error = f"ended with status {process.returncode}"
    return Ended(text, error and ": ".join([error, *complaint[-1:]]))
