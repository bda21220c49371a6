"""The program `kvq`, and `python -m kvq_cli`. Ctrl-C ends it quietly even while its modules are imported."""

# Nothing else here: what is imported before `run` begins, a Ctrl-C ends with a traceback.
import os
import sys

from . import INTERRUPTED, OutputError

AGAIN = 0.02  # seconds


def send_interrupts_again() -> None:
    """Has a Ctrl-C count that Python drops.

    It drops what is raised while it collects garbage, where JAX has it call a function, or while it destroys an object: after a
    traceback, the program would go on as if nobody had pressed a key.
    """
    import signal
    import threading

    others = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if dropped.exc_type is not KeyboardInterrupt or sys.is_finalizing():
            return others(dropped)
        again = threading.Timer(AGAIN, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook


def run() -> None:
    try:
        send_interrupts_again()
        from .output import open_closed, watch_stdout

        open_closed()
        watch_stdout()
        from .main import app

        try:
            app(prog_name="kvq")
        finally:
            # Python itself would do so later, too late for the exit status.
            sys.stdout.flush()
    except OutputError as error:
        print(f"error: the output cannot be written: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


# The loader's worker processes import this file again.
if __name__ == "__main__":
    run()
