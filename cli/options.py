"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from kvq.backends import BACKENDS


def known_model(path: Path | None) -> Path | None:
    """Refuses a model that is not there before a backend is imported, which takes seconds."""
    from kvq.artifact import model_folder

    if path is not None:
        model_folder(path)
    return path


MODEL = "RUN_OR_MODEL"
MODELS = "A run or model folder; or fashion_mnist_mini, of kvq."
BACKEND_NAMES = "|".join(sorted(BACKENDS))
Backend = Annotated[
    str | None,
    typer.Option(metavar=BACKEND_NAMES, help="What computes. Default: KERAS_BACKEND, else the fastest installed."),
]
Model = Annotated[
    Path,
    typer.Argument(metavar=MODEL, help=MODELS, callback=known_model),
]
Data = Annotated[str | None, typer.Option(help="Images: a known name, a file or a folder. Default: those of the configuration.")]
Images = Annotated[
    str, typer.Argument(metavar="DATA", help="Images: a known name, a file or a folder, as for `kvq train --data`.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
