"""`kvq data`: what a collection of images holds, and how to make it load faster."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from . import options, output
from .progress import choose_progress

data = typer.Typer(no_args_is_help=True, help="Look at a collection of images, or pack it.")


@data.command()
def inspect(
    path: options.Images,
    sheet: Annotated[str, typer.Option(help="Where the contact sheet goes, a PNG.")] = "contact_sheet.png",
    json: options.Json = False,
) -> None:
    """Count, measure and show the images, and name the bad files."""
    from kvq.data import inspect

    with _progress() as show:
        result = inspect(path, sheet, on_progress=show)
    if json:
        output.print_json(result)
        return
    for name, value in result.items():
        if name == "bad":
            continue
        print(f"{name:9} {_in_words(value)}{'  (of pixels in [-1, 1])' if name in ('mean', 'variance') else ''}")
    print(f"{'bad':9} {len(result['bad'])}")
    for bad in result["bad"]:
        print(f"  {bad['name']}: {bad['reason']}")


@data.command()
def pack(
    path: options.Images,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write, new or begun before.")],
    shard_size: Annotated[int, typer.Option(min=1, help="Images to a file.")] = 5000,
    size: Annotated[
        int | None, typer.Option(min=4, help="Shrink shorter sides to so many pixels. Default: bytes are kept.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Write a folder of images as shards that load faster. A call that was stopped goes on."""
    from kvq.data import pack

    with _progress() as show:
        result = pack(path, out, shard_size, size, on_progress=show)
    if json:
        output.print_json(result)
    else:
        images, shards = output.count(result["images"], "image"), output.count(result["shards"], "shard")
        print(f"{images} in {shards}, {output.size(result['bytes'])}, in {result['out']}")
        if result["skipped"]:
            print(f"{output.count(result['skipped'], 'file')} could not be decoded: {result['out']}/skipped.txt")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    display, started = choose_progress("image"), False

    def show(done: int, total: int) -> None:
        nonlocal started
        if not started:
            started = True
            display.start(total, 0)
        display.step(done)

    try:
        yield show
    finally:
        display.stop()


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    if isinstance(value, list):
        return " ".join(f"{part:.4f}" for part in value)
    return str(value)
