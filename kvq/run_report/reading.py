"""What a report says of a run, as values of JSON. Its files may be anyone's: reading is bounded and follows no link."""

import json
import math
import os
import shlex
from collections.abc import Callable
from typing import Any

from kvq.config import list_configs, load_config, parse_config
from kvq.errors import ConfigError, RunError
from kvq.run import Run
from kvq.run_report.images import Pictures
from kvq.run_report.sessions import sessions
from kvq.untrusted import open_regular, parse_json, read_bytes

_TEXT = 2**20  # bytes of a small file
_SKIPPED = 2**26  # bytes of skipped.txt
_LOG = 2**16  # bytes of the end of log.txt
_SHOWN_SKIPPED = 20
_DEPTH, _ROWS = 4, 400  # of what is shown of nested values
_POINTS = 1000  # of a curve
_CURVES = 64

Read = Callable[..., Any]


def read_run(run: Run, name: str, of: int = 1) -> dict[str, Any]:
    """Everything that a page shows of a run.

    Args:
        run: To read; only run.json must be there.
        name: To call it by.
        of: How many runs the page shows: each has fewer pictures then.

    Raises:
        RunError: If it is no run.
    """
    record, notes = run.record, []

    def attempt(read: Read, *arguments: Any) -> Any:
        """What a reader gives; None, and a note of why, where a file that is there cannot be read."""
        try:
            return read(run, *arguments)
        except FileNotFoundError:
            return None
        except (RunError, OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            notes.append(str(error) if isinstance(error, RunError) else f"{_FILES[read]} cannot be read: {reason}.")
            return None

    pictures = Pictures(run, of)
    shown = {
        "name": name,
        "folder": shlex.quote(str(run.folder)),
        "status": str(record.get("status", "unknown")),
        "record": flat(record),
        **sessions(record),
        "series": attempt(_series) or {},
        "config": attempt(_config),
        "evaluation": attempt(_evaluation),
        "skipped": attempt(_skipped),
        "log": attempt(_log),
        "samples": pictures.samples(),
        "atlas": pictures.atlas(),
    }
    return {**shown, "notes": [*notes, *pictures.notes], "remarks": pictures.remarks}


def flat(values: dict[str, Any], depth: int = _DEPTH) -> dict[str, Any]:
    """Nested values with dotted names, as strings, numbers, truth values and null. What is too deep or too long is cut."""
    rows: dict[str, Any] = {}
    for key, value in values.items():
        if len(rows) >= _ROWS:
            break
        if isinstance(value, dict) and value and depth > 1:
            rows |= {f"{key}.{name}": leaf for name, leaf in flat(value, depth - 1).items()}
        else:
            rows[str(key)] = _leaf(value)
    return rows


def thinned(points: list[list[float]], most: int = _POINTS) -> list[list[float]]:
    """At most about so many points of a curve: its ends, and the lowest and the highest of each stretch, so that no peak goes."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = sorted(range(start, min(start + size, len(points))), key=lambda at: points[at][1])
        kept |= {stretch[0], stretch[-1]}
    return [points[at] for at in sorted(kept)]


def _leaf(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return value if abs(value) < 2**53 else str(value)
    try:
        return json.dumps(value)[:500]
    except RecursionError:
        return "..."


def _series(run: Run) -> dict[str, dict[str, list[list[float]]]]:
    """Split to name to (step, value) pairs."""
    series: dict[str, dict[str, list[list[float]]]] = {"train": {}, "validation": {}}
    for record in sorted(run.read_metrics(), key=lambda record: record["step"]):
        split = record.get("split")
        curves = series.get(split, {}) if isinstance(split, str) else {}
        for name, value in record.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if abs(value) < 1e300 and (name in curves or len(curves) < _CURVES):
                curves.setdefault(name, []).append([record["step"], float(f"{value:.6g}")])
    return {split: {name: thinned(points) for name, points in curves.items()} for split, curves in series.items()}


def _config(run: Run) -> dict[str, Any]:
    """The values, and those of the nearest shipped configuration, of the same images if there is one; or a text that is none."""
    text = read_bytes(run.config_file, _TEXT).decode("utf-8")
    try:
        values = flat(parse_config(text, "config.toml").model_dump(exclude_none=True))
    except ConfigError as error:
        return {"text": text, "error": str(error)}
    shipped = {name: flat(load_config(name).model_dump(exclude_none=True)) for name in list_configs()}

    def distance(name: str) -> tuple[bool, int]:
        different = {key for key in {*values, *shipped[name]} if values.get(key) != shipped[name].get(key)}
        return "data.source" in different, len(different)

    nearest = min(shipped, key=distance)
    return {"values": values, "nearest": nearest, "shipped": shipped[nearest]}


def _evaluation(run: Run) -> dict[str, Any]:
    """The values, and whether they are of other weights than those that the run's model has now."""
    measured = parse_json(read_bytes(run.evaluation_file, _TEXT))
    if not isinstance(measured, dict):
        raise ValueError("it holds no JSON object")
    now = None
    if not run.model.is_symlink():
        try:
            now = parse_json(read_bytes(run.model / "config.json", _TEXT)).get("weights_sha256")
        except (OSError, ValueError, AttributeError):
            pass  # evaluation.json stands for itself
    return {"values": flat(measured), "outdated": now is not None and measured.get("weights_sha256") != now}


def _skipped(run: Run) -> dict[str, Any]:
    lines = [line for line in read_bytes(run.skipped_file, _SKIPPED).decode("utf-8", "replace").split("\n") if line]
    return {"count": len(lines), "first": [line[:500].partition("\t")[::2] for line in lines[:_SHOWN_SKIPPED]]}


def _log(run: Run) -> dict[str, Any]:
    """The end of log.txt."""
    with open_regular(run.log_file) as file:
        start = max(0, os.fstat(file.fileno()).st_size - _LOG)
        file.seek(start)
        text = file.read(_LOG).decode("utf-8", "replace")
    return {"text": text.partition("\n")[2] if start else text, "cut": start > 0}


_FILES: dict[Read, str] = {
    _config: "config.toml",
    _evaluation: "evaluation.json",
    _skipped: "skipped.txt",
    _log: "log.txt",
    _series: "metrics.jsonl",
}
