"""`kvq tokens`: what is done to stored tokens."""

from pathlib import Path
from typing import Annotated

import typer

from . import options, output
from .progress import choose_progress

tokens = typer.Typer(no_args_is_help=True, help="Work on token data sets.")


@tokens.callback()
def main() -> None:
    """Work on token data sets."""


@tokens.command()
def migrate(
    tokens: Annotated[Path, typer.Argument(metavar="TOKENS", help="The token data set of the model before it was pruned.")],
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model that `kvq codebook --prune` wrote.")],
    out: Annotated[Path, typer.Option(help="The new folder to write to.")],
    json: options.Json = False,
) -> None:
    """Rewrite tokens for a pruned model, without the images."""
    from kvq.tokens.migration import migrate

    progress = choose_progress("image")
    try:
        result = migrate(tokens, model, out, progress)
    finally:
        progress.stop()
    if json:
        output.print_json(result)
        return
    sizes = f"{result['previous_vocabulary']} to {result['vocabulary']}"
    print(f"{result['images']} images, {output.size(result['bytes'])}, vocabulary {sizes}, in {result['out']}")
