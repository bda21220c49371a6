"""`kvq reconstruct`."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .computing import computing


def reconstruct(
    model: options.Model,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Image files, of any size.")],
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    backend: options.Backend = None,
) -> None:
    """Send images through a tokenizer and back.

    What comes out has the size of what went in. Prints the files written.
    """
    with computing(backend):
        from kvq.reconstruction import reconstruct

        written = reconstruct(model, images, out)
    for path in written:
        print(path)
