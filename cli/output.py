"""What a command prints: the result to stdout, everything else to stderr."""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any


def say(text: str) -> None:
    """Tell the user something that is not the result."""
    print(text, file=sys.stderr, flush=True)


def print_json(result: Mapping[str, Any]) -> None:
    """Print a result as one line of JSON."""
    print(json.dumps(plain(result), allow_nan=False))


def number(value: Any) -> str:
    """A value for people: four significant digits, thousands apart."""
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def plain(value: Any) -> Any:
    """The same in what JSON knows. It knows no NaN and no infinity, and strict readers refuse what Python writes for them."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
