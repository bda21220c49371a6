"""`kvq doctor`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options, output
from .computing import computing, only_results_on_stdout
from .progress import choose_progress


def doctor(
    model: Annotated[
        Path | None,
        typer.Argument(metavar=options.MODEL, help=f"{options.MODELS} Its codebook is looked at.", callback=options.known_model),
    ] = None,
    backend: options.Backend = None,
    data: options.Data = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="With RUN_OR_MODEL: how many images of each split. Default: 512.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Show what is installed and what is wrong with it; with RUN_OR_MODEL, what is wrong with its codebook.

    Ends with status 1 if there is a problem.
    """
    if model is not None:
        _examine(model, backend, data, images, json)
        return
    if data or backend or images:
        raise typer.BadParameter("--data, --images and --backend go with RUN_OR_MODEL. Alone, it looks at the installation.")
    with only_results_on_stdout():
        from kvq.diagnosis import doctor

        report = doctor()
    if json:
        output.print_json(report)
    else:
        _print_report(report)
    if report["problems"]:
        raise typer.Exit(1)


def _examine(model: Path, backend: str | None, data: str | None, images: int | None, json: bool) -> None:
    with computing(backend):
        from kvq.health import IMAGES, diagnose

        progress = choose_progress("batch")
        try:
            result = diagnose(model, data, images or IMAGES, progress=progress)
        finally:
            progress.stop()
    if json:
        output.print_json(result)
    else:
        _print_findings(result)
    if result["findings"]:
        raise typer.Exit(1)


def _print_findings(result: dict[str, Any]) -> None:
    from rich.console import Console

    # A terminal gets lines broken between words, everything else whole ones.
    console = Console(markup=False, highlight=False, soft_wrap=not sys.stdout.isatty())
    rows = []
    for name, value in result["measured"].items():
        values = value if isinstance(value, list) else [value]
        rows.append((name.replace("_", " "), "  ".join(output.number(one) for one in values)))
    output.print_table(rows)
    for finding in result["findings"]:
        console.print(f"\n{finding['name']}: {finding['found']}")
        console.print(f"  {finding['remedy']}")
        console.print(f"  settings: {', '.join(finding['keys'])}")
    if not result["findings"]:
        console.print("The codebook is healthy.")


def _print_report(report: dict[str, Any]) -> None:
    rows = [(name, output.number(value)) for name, value in report.items() if not isinstance(value, dict | list)]
    rows += [(f"backend {name}", _backend_line(facts)) for name, facts in report["backends"].items()]
    rows += [(f"data {name}", str(place or "not here")) for name, place in report["data"].items()]
    output.print_table(rows)
    if not report["gpu_found"]:
        print("Without a GPU the fastest backend is another on each processor. What is the fastest here: kvq benchmark")
    for problem in report["problems"] or ["No problems."]:
        print(f"problem: {problem}" if report["problems"] else problem)


def _backend_line(facts: dict[str, Any]) -> str:
    if "error" in facts:
        return f"{facts['version']}, cannot be used"
    words = [facts["version"], ", ".join(facts["devices"]), output.count(facts["threads"], "thread")]
    if facts["tf32"] is not None:
        words.append(f"TF32 {'on' if facts['tf32'] else 'off'}")
    return "; ".join(words)
