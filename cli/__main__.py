"""The program `kvq`, and `python -m kvq_cli`. Ctrl-C ends it quietly even while its modules are imported."""

import os
import signal
import sys
import threading
from typing import Any

from . import INTERRUPTED

AGAIN = 0.02  # seconds


def send_interrupts_again() -> None:
    """Has a Ctrl-C count that Python drops.

    It drops what is raised while it collects garbage, where JAX has it call a function, or while it destroys an object: after a
    traceback, the program would go on as if nobody had pressed a key.
    """
    others = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if dropped.exc_type is not KeyboardInterrupt or sys.is_finalizing():
            return others(dropped)
        again = threading.Timer(AGAIN, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook


def run() -> None:
    send_interrupts_again()
    try:
        from .main import app

        app(prog_name="kvq")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


# The loader's worker processes import this file again.
if __name__ == "__main__":
    run()
