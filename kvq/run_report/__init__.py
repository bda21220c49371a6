"""One HTML page of a run, or of several side by side, that needs no network: everything it shows lies in it.

What the files of a run say goes into the page as one JSON text, and the page's script writes it as text, never as markup. The
page's own policy lets no other script run, and no request leave.
"""

import base64
import hashlib
import html
import importlib.resources
import json
import os
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from kvq import __version__, pages
from kvq.atomic import write_bytes
from kvq.errors import RunError
from kvq.run import Run, now
from kvq.run_report.reading import read_run

SCRIPTS = ("dom.js", "curves.js", "pictures.js", "files.js", "page.js")  # in this order, as one script
MOST_RUNS = 8  # that have colours of their own


def report(runs: str | Path | Sequence[str | Path], out: str | Path | None = None) -> dict[str, Any]:
    """Writes a page of a run, finished or not, or of several side by side.

    Args:
        runs: Run folder, or 2 to 8 of them.
        out: The file to write. Default: report.html in the run folder; of several runs, comparison.html in that of the first.

    Returns:
        `out` and `bytes`, its size.

    Raises:
        RunError: If a folder is no run, or the page cannot be written. What else is missing or broken in a run, the page says.
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    if not 1 <= len(folders) <= MOST_RUNS:
        raise RunError(f"A report is of 1 to {MOST_RUNS} runs. Received: {len(folders)}.")
    opened = [Run(folder) for folder in folders]
    path = Path(out) if out is not None else opened[0].report if len(opened) == 1 else opened[0].comparison
    content = page([read_run(run, name, len(opened)) for run, name in zip(opened, _names(folders), strict=True)])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}. Give another --out.") from None
    return {"out": str(path), "bytes": len(content)}


def page(runs: list[dict[str, Any]]) -> bytes:
    """The page of what `read_run` gave."""
    folder = importlib.resources.files("kvq.run_report") / "page"
    style = pages.style((folder / "style.css").read_text("utf-8"))
    script = "\n".join((folder / name).read_text("utf-8") for name in SCRIPTS)
    data = json.dumps({"kvq": __version__, "written": now(), "runs": runs}, allow_nan=False)
    filled = Template((folder / "index.html").read_text("utf-8")).substitute(
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'",
        title=html.escape(" and ".join(run["name"] for run in runs)),
        style=style,
        script=script,
        # In a script element, only what begins with this character could end it.
        data=data.replace("<", "\\u003c"),
    )
    return filled.encode("utf-8", "replace")


def _hash(text: str) -> str:
    """How a page's policy names the one script or style that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"


def _names(folders: list[Path]) -> list[str]:
    """A short name for each, different ones where they can be."""
    names = [Path(os.path.abspath(folder)).name or str(folder) for folder in folders]
    return names if len({*names}) == len(names) else [str(folder) for folder in folders]
