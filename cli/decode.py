"""`kvq decode`."""

from pathlib import Path
from typing import Annotated

import typer

from . import options, output
from .computing import computing
from .progress import choose_progress


def decode(
    model: options.Model,
    tokens: Annotated[Path, typer.Argument(metavar="TOKENS", help="A folder that `kvq encode` wrote.")],
    out: Annotated[Path, typer.Option(help="The folder to write to, new or begun before.")],
    force: Annotated[bool, typer.Option("--force", help="Decode tokens of other weights all the same.")] = False,
    backend: options.Backend = None,
    json: options.Json = False,
) -> None:
    """Write the images of a token data set, as PNG files named after their sources. A call that was stopped goes on."""
    with computing(backend):
        from kvq.tokens.decoding import decode

        progress = choose_progress("image")
        try:
            result = decode(model, tokens, out, force, progress=progress)
        finally:
            progress.stop()
    if json:
        output.print_json(result)
        return
    print(f"{result['images']} images in {result['out']}, {result['images_per_second']:.0f} per second")
    if not result["same_weights"]:
        output.say("The tokens are of other weights than the model's.")
