"""`kvq train`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import INTERRUPTED, options, output
from .computing import computing
from .progress import choose_progress


def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A name (see `kvq configs`), a TOML file, or a run folder.")],
    backend: options.Backend = None,
    data: options.Data = None,
    validation_data: Annotated[str | None, typer.Option(help="Images to validate on. Default: the test split.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder. Default: runs/CONFIG.")] = None,
    steps: Annotated[int | None, typer.Option(help="Short for --set train.steps=N, and stronger.")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set train.seed=N, and stronger.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the configuration; TOML value. Repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder from its last checkpoint.")] = False,
    resume_or_start: Annotated[bool, typer.Option("--resume-or-start", help="Continue if there is a run, else start.")] = False,
    changed_data: Annotated[bool, typer.Option("--changed-data", help="Continue although the images have changed.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the configuration and the model's size only.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard summaries too.")] = False,
    json: options.Json = False,
) -> None:
    """Train a tokenizer.

    Pictures and curves appear in the run folder while it runs. Ctrl-C stops it cleanly, and --resume continues it.
    """
    if resume + resume_or_start + overwrite > 1:
        raise typer.BadParameter("--resume, --resume-or-start and --overwrite exclude each other.")
    from kvq.config import RunConfig, list_configs, load_config

    overrides = list(set_ or [])
    overrides += [f"train.{key}={value}" for key, value in (("steps", steps), ("seed", seed)) if value is not None]
    run_config = load_config(config, overrides)
    # Naming a run folder means to go on there, or to start over there, unless --out says otherwise.
    if out is None and config not in list_configs() and Path(config).is_dir():
        out = Path(config)

    if dry_run:
        with computing(backend):
            from kvq.training import describe

            description = describe(run_config, data=data, validation_data=validation_data)
        if json:
            output.print_json(description)
        else:
            print(RunConfig.model_validate(description["config"]).to_toml())
            _print_description(description)
        return

    with computing(backend):
        from kvq.training import train

        progress = choose_progress()
        try:
            result = train(
                run_config,
                out=out,
                name=Path(config).stem,
                data=data,
                validation_data=validation_data,
                resume=resume,
                resume_or_start=resume_or_start,
                changed_data=changed_data,
                overwrite=overwrite,
                tensorboard=tensorboard,
                command=shlex.join(["kvq", *sys.argv[1:]]),
                progress=progress,
            )
        finally:
            progress.stop()
    if json:
        output.print_json(result)
    else:
        _print_summary(result)
    if result["status"] == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _print_description(description: dict[str, Any]) -> None:
    # As comments, so that the whole output is a configuration file.
    for name, value in description.items():
        if name != "config":
            print(f"# {name.replace('_', ' ')}: {output.number(value)}")


def _print_summary(result: dict[str, Any]) -> None:
    from kvq.exporters import EXPORTERS
    from kvq.exporters.writers import ready

    run = Path(result["run"])
    print(f"{result['status']} after {output.count(result['steps'], 'step')}: {run}")
    if result["status"] == "interrupted":
        print(f"  go on    kvq train {run} --resume")
        return
    grids = sorted(run.glob("samples/validation_*.png")) or sorted(run.glob("samples/train_*.png"))
    for path, what in [*((grid, "original above reconstruction") for grid in grids[-1:]), (run / "loss.png", "the curves")]:
        print(f"  look at  {path}  ({what})")
    print(f"  model    {run / 'model'}")
    print(f"  next     kvq evaluate {run}")
    print(f"           kvq report {run}")
    print(f"           kvq reconstruct {run} IMAGES... --out DIR")
    print(f"           kvq export {run} --format {ready(EXPORTERS)} --out DIR")
