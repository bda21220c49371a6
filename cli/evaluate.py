"""`kvq evaluate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options, output
from .computing import computing
from .progress import choose_progress


def evaluate(
    model: options.Model,
    backend: options.Backend = None,
    data: options.Data = None,
    split: Annotated[str, typer.Option(help="Which part of the data: train, test or all.")] = "test",
    images: Annotated[int | None, typer.Option(min=1, help="Only the first N. Default: all.")] = None,
    json: options.Json = False,
) -> None:
    """Measure a tokenizer on images.

    MSE of images in [-1, 1]; PSNR and SSIM of uint8 images, as means of each image's own value; loss terms; usage and
    perplexity of the codebook over the whole set; images per second. Of a run, on all the test images that its configuration
    names, evaluation.json in it keeps them.
    """
    with computing(backend):
        from kvq.evaluation import evaluate

        progress = choose_progress("batch")
        try:
            result = evaluate(model, data=data, split=split, images=images, progress=progress)
        finally:
            progress.stop()
    if (data, split, images) == (None, "test", None):
        _keep(model, result)
    if json:
        output.print_json(result)
    else:
        _print_table(result)


def _keep(folder: Path, result: dict[str, Any]) -> None:
    """Writes evaluation.json, if it is a run. Where that fails, as in a run of somebody else, the result is told all the same."""
    from kvq.run import Run

    run = Run(folder)
    if not run.exists:
        return
    try:
        run.write_evaluation(output.plain(result))
    except OSError as error:
        output.say(f"{run.evaluation_file} could not be written: {error.strerror or error}.")


def _print_table(result: dict[str, Any]) -> None:
    rows = []
    for name, value in result.items():
        if isinstance(value, dict):
            for part, figure in value.items():
                rows.append((f"{name}.{part}", output.number(figure)))
        else:
            rows.append((name, output.number(value)))
    output.print_table(rows)
