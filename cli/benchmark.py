"""`kvq benchmark`."""

from typing import Annotated, Any

import typer

from . import options, output
from .progress import choose_progress


def benchmark(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A name (see `kvq configs`), a TOML file, or a run folder.")
    ] = "fashion_mnist_mini",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the configuration; TOML value. Repeatable."),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(metavar=options.BACKEND_NAMES, help="Repeatable. Default: all that are installed.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each backend, about 1.5 seconds each.")] = 5,
    json: options.Json = False,
) -> None:
    """Time a training step on every installed backend, and say which is the fastest here.

    In processes of their own that take turns, on noise: nothing is loaded and nothing is written. Compare the ratios: other work
    on the machine makes all of them slower.
    """
    from kvq.config import load_config
    from kvq.timing import benchmark

    progress = choose_progress("turn")
    try:
        result = benchmark(load_config(config, list(set_ or [])), names=backend, rounds=rounds, progress=progress)
    finally:
        progress.stop()
    if json:
        output.print_json({"config": config, **result})
    else:
        _print_table(config, result)


def _print_table(config: str, result: dict[str, Any]) -> None:
    rows = []
    by_speed = sorted(result["backends"].items(), key=lambda item: item[1].get("step", float("inf")))
    for name, facts in by_speed:
        if "error" in facts:
            rows.append([name, facts["error"]])
            continue
        figures = [facts["ratio"], facts["step"], "-".join(map(output.number, facts["step_quartiles"]))]
        figures += [facts["images_per_second"], facts["first_step"], facts["device"]]
        rows.append([name, *map(output.number, figures)])
    shape = "x".join(map(str, result["image_shape"]))
    print(f"{config}: batches of {result['batch_size']} images {shape}, {result['precision']}, {result['cpus']} CPUs")
    output.print_table(rows, ("backend", "ratio", "s/step", "quartiles", "images/s", "first step, s", "device"))
    print(f"fastest: {result['fastest']}")
