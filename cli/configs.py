"""`kvq configs`."""

from typing import Annotated

import typer

from . import options, output


def configs(
    name: Annotated[str | None, typer.Argument(metavar="CONFIG", help="Print this one, resolved. Default: list all.")] = None,
    json: options.Json = False,
) -> None:
    """List the configurations that come with kvq, or print one."""
    from kvq.config import list_configs, load_config

    if name is None:
        known = list_configs()
        if json:
            output.print_json(known)
        else:
            width = max(map(len, known))
            for each, line in known.items():
                print(f"{each:{width}}  {line}")
        return
    config = load_config(name)
    if json:
        output.print_json(config.model_dump())
    else:
        print(config.to_toml(), end="")
