"""`kvq report`."""

from pathlib import Path
from typing import Annotated

import typer

from . import options, output


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="A run folder, or several to compare.")],
    out: Annotated[
        Path | None, typer.Option(help="The page. Default: report.html in the run; of several, comparison.html in the first.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Write a page of a run, or of several side by side, that needs no network.

    Curves, reconstructions over the steps, the use of the codebook, the code atlas, the evaluation, the configuration and the
    environment. Of a run that still goes on, too. Prints the file written.
    """
    from kvq.run_report import report

    result = report(runs, out)
    if json:
        output.print_json(result)
    else:
        print(result["out"])
