"""`kvq export`."""

from pathlib import Path
from typing import Annotated

import typer

from . import options, output
from .computing import computing


def export(
    model: options.Model,
    format: Annotated[str, typer.Option(help="onnx or keras.")],
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    part: Annotated[
        list[str] | None, typer.Option(metavar="encoder|decoder|autoencoder", help="Repeatable. Default: all three.")
    ] = None,
    backend: options.Backend = None,
) -> None:
    """Write a tokenizer for another runtime.

    It is run there and compared with the model before this counts as done. Prints the files written.
    """
    with computing(backend):
        from kvq.exporters import export

        report = export(model, format, out, parts=part)
    for written in report["parts"].values():
        facts = [f"{name.replace('_', ' ')} {output.number(value)}" for name, value in written.items() if name != "file"]
        print(written["file"], *facts, sep="  ")
    output.say(f"written by {report['backend']}, compared with the model on {report['compared_on']}")
