"""`kvq doctor`."""

from typing import Any

import typer

from . import options, output
from .computing import only_results_on_stdout


def doctor(json: options.Json = False) -> None:
    """Show what is installed, and what is wrong with it.

    Versions, backends with their devices, data sets, problems. Ends with status 1 if there is a problem.
    """
    with only_results_on_stdout():
        from kvq.diagnosis import doctor

        report = doctor()
    if json:
        output.print_json(report)
    else:
        _print_report(report)
    if report["problems"]:
        raise typer.Exit(1)


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in report.items():
        if not isinstance(value, dict | list):
            table.add_row(name, output.number(value))
    for name, facts in report["backends"].items():
        table.add_row(f"backend {name}", _backend_line(facts))
    for name, place in report["data"].items():
        table.add_row(f"data {name}", str(place or "not here"))
    console.print(table)
    if not report["gpu_found"]:
        # `kvq benchmark cifar10 --set train.batch_size=128` on two quiet CPU cores.
        console.print("Without a GPU a training step took 1.2 times as long on torch as on tensorflow, 2.1 times on jax.")
        console.print("What is the fastest here: kvq benchmark")
    for problem in report["problems"] or ["No problems."]:
        console.print(f"problem: {problem}" if report["problems"] else problem)


def _backend_line(facts: dict[str, Any]) -> str:
    if "error" in facts:
        return f"{facts['version']}, cannot be used"
    words = [facts["version"], ", ".join(facts["devices"]), f"{facts['threads']} threads"]
    if facts["tf32"] is not None:
        words.append(f"TF32 {'on' if facts['tf32'] else 'off'}")
    return "; ".join(words)
