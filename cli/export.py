"""`kvq export`."""

from pathlib import Path
from typing import Annotated

import typer

from . import options, output
from .computing import computing


def export(
    model: options.Model,
    format: Annotated[str, typer.Option(help="onnx, saved_model, litert, openvino, torch, stablehlo, keras or web.")],
    out: Annotated[Path, typer.Option(help="The folder to write to, one for each format.")],
    part: Annotated[
        list[str] | None, typer.Option(metavar="encoder|decoder|autoencoder", help="Repeatable. Default: all three.")
    ] = None,
    runtime: Annotated[
        Path | None, typer.Option(metavar="FILE", help="web only: the archive of onnxruntime-web. Default: fetched once.")
    ] = None,
    backend: options.Backend = None,
    json: options.Json = False,
) -> None:
    """Write a tokenizer for another runtime.

    It is run there and compared with the model before this counts as done; report.json beside the files says how, example.py runs
    them without kvq. web writes a page for any static file server that runs the tokenizer in the browser. A format of another
    backend is written in a process of that one. Prints the files written.
    """
    with computing(backend):
        from kvq.exporters import export

        report = export(model, format, out, parts=part, backend=backend, runtime=runtime, say=output.say)
    if json:
        output.print_json(report)
        return
    for written in report["parts"].values():
        if written.get("file"):
            shown = ("bytes", "different_indices", "largest_difference", "near_ties")
            facts = [f"{name.replace('_', ' ')} {output.number(written[name])}" for name in shown if name in written]
            print(written["file"], *facts, sep="  ")
    if "page" in report:
        print(report["page"], f"with {report['runtime']}", sep="  ")
    output.say(f"written by {report['backend']}, compared with the model on {report['compared_on']}")
