"""The program `kvq`, and `python -m kvq_cli`. Ctrl-C ends it quietly even while its modules are imported."""

import sys

from . import INTERRUPTED


def run() -> None:
    try:
        from .main import app

        app(prog_name="kvq")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


# The loader's worker processes import this file again.
if __name__ == "__main__":
    run()
