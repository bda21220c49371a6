"""`kvq encode`."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from . import options, output
from .computing import computing
from .progress import choose_progress


class Engine(enum.StrEnum):
    """What `--engine` takes."""

    local = "local"
    ray = "ray"


def encode(
    model: options.Model,
    data: options.Images,
    out: Annotated[Path, typer.Option(help="The folder to write to, new or begun before.")],
    split: Annotated[str, typer.Option(help="Which part of the data: train, test or all.")] = "train",
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Do this part of N only, counted from 0. Default: all.", show_default=False)
    ] = "0/1",
    shard_size: Annotated[int, typer.Option(min=1, help="Images to a file.")] = 4096,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that go through the model at once.")] = 64,
    engine: Annotated[Engine, typer.Option(help="Who encodes: this process, or the workers of a Ray cluster.")] = Engine.local,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="With --engine ray: how many, each with a model. Default: what the cluster has room for."),
    ] = None,
    backend: options.Backend = None,
    json: options.Json = False,
) -> None:
    """Write a collection of images as tokens.

    Images are prepared as for evaluation. A call that was stopped goes on. With --shard, whichever part ends last completes
    the set. With --engine ray, all machines must see the model, the images and the folder under the same paths; RAY_ADDRESS names
    the cluster.
    """
    part = _part(shard)
    if workers and engine is Engine.local:
        raise typer.BadParameter(
            "--workers goes with --engine ray. To share the work without Ray, give each process its --shard."
        )
    with computing(backend):
        from kvq.tokens.encoding import encode
        from kvq.tokens.engines import LocalEngine
        from kvq.tokens.ray_engine import RayEngine

        progress = choose_progress("image")
        try:
            chosen = RayEngine(workers) if engine is Engine.ray else LocalEngine()
            result = encode(model, data, out, split, batch_size, shard_size, part, progress, chosen)
        except KeyboardInterrupt:
            if any(out.glob("*.npy")):
                output.say(f"Finished shards stay in {out}: the same command goes on from them.")
            raise
        finally:
            progress.stop()
    if json:
        output.print_json(result)
        return
    what = "" if result["complete"] else f", part {shard}: run the other parts to complete the set"
    images, shards = output.count(result["images"], "image"), output.count(result["shards"], "shard")
    print(f"{images} in {shards}, {output.size(result['bytes'])}, in {result['out']}{what}")
    if result["skipped"]:
        where = f": {result['out']}/skipped.txt" if result["complete"] else ""
        print(f"{output.count(result['skipped'], 'image')} could not be used{where}")


def _part(shard: str) -> tuple[int, int]:
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise typer.BadParameter(f"--shard takes I/N with I from 0 to N - 1, such as 0/4. Received: {shard}.")
    return int(number), int(count)
