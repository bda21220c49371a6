"""`kvq codebook`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options, output
from .computing import computing
from .progress import choose_progress

SPLIT = "train"


def codebook(
    model: options.Model,
    backend: options.Backend = None,
    data: options.Data = None,
    split: Annotated[str, typer.Option(help="Which part of the data: train, test or all.")] = SPLIT,
    images: Annotated[int | None, typer.Option(min=1, help="Only the first N. Default: all.")] = None,
    atlas: Annotated[
        Path | None,
        typer.Option(help="A PNG of the most and least used codes. Default: codebook.png in a run, of all training images."),
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Write a model without the codes that the images leave unused.")] = False,
    out: Annotated[Path | None, typer.Option(help="With --prune: the new model folder.")] = None,
    json: options.Json = False,
) -> None:
    """Count how often images use each code; draw them; drop those that are never used.

    Tokens that were stored before follow by `kvq tokens migrate`.
    """
    if prune != (out is not None):
        raise typer.BadParameter("--prune and --out MODEL are given together.")
    if prune and atlas is not None:
        raise typer.BadParameter("--prune draws no --atlas. Draw it in a call of its own, before or after.")
    if atlas is None and not prune and (data, split, images) == (None, SPLIT, None):
        atlas = _atlas_of(model)
    with computing(backend):
        from kvq.codebook_use import codebook
        from kvq.pruning import prune as prune_codes

        progress = choose_progress("batch")
        try:
            if out is not None:
                result = prune_codes(model, out, data, split, images, progress=progress)
            else:
                result = codebook(model, data, split, images, atlas, progress=progress)
        finally:
            progress.stop()
    if json:
        output.print_json(result)
    elif prune:
        _print_pruned(result)
    else:
        _print_use(result)


def _atlas_of(model: Path) -> Path | None:
    """codebook.png of a run folder. What is only counted in a run of somebody else is told all the same."""
    from kvq.run import Run

    run = Run(model)
    if not run.exists:
        return None
    if not os.access(model, os.W_OK):
        output.say(f"{run.codebook_plot} is not drawn: the folder cannot be written. --atlas names another place.")
        return None
    return run.codebook_plot


def _print_pruned(result: dict[str, Any]) -> None:
    print(f"{result['codebook_size']} of {result['previous_size']} codes are kept, in {result['out']}")
    changed, pixels = result["changed_indices"], result["changed_pixels"]
    print(
        f"{result['images']} images encoded by both: {changed} indices stand for another code than before, {pixels} pixels differ"
    )


def _print_use(result: dict[str, Any]) -> None:
    codes = result["codebook_size"] * result["depth"]
    print(f"{result['used']} of {codes} codes are used by {output.count(result['images'], 'image')}, {result['dead']} are not")
    print(f"usage {result['usage']:.1%}  perplexity {result['perplexity']:.1f}")
    for name in ("most_used", "least_used"):
        listed = "  ".join(f"{_name(code, result['depth'])} ({code['count']})" for code in result[name][:8])
        print(f"{name.replace('_', ' ')} (times): {listed}")
    if result["atlas"]:
        print(result["atlas"])


def _name(code: dict[str, int], depth: int) -> str:
    return f"{code['level']}.{code['code']}" if depth > 1 else str(code["code"])
