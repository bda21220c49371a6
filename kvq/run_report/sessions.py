"""When a run was trained, and by which commands: at a stretch, or in sessions with pauses between them."""

from datetime import datetime
from typing import Any


def sessions(record: dict[str, Any]) -> dict[str, Any]:
    """The sessions of a run, as run.json has them.

    Returns:
        `seconds`, those of all sessions together, or None where the run has not ended; `with_pauses`, whether these are from the
        first start to the end, since not every session says when it stopped; and `commands`, the newest first: `step`, from
        which it went on, and `command`, None where run.json names none. One that was repeated is there once.
    """
    resumed = record.get("resumed")
    entries = [entry for entry in resumed if isinstance(entry, dict)] if isinstance(resumed, list) else []
    starts = [record.get("started"), *(entry.get("at") for entry in entries)]
    ends = [*(entry.get("stopped") for entry in entries), record.get("ended")]
    each = [_seconds(start, end) for start, end in zip(starts, ends, strict=True)]
    known = [seconds for seconds in each if seconds is not None]
    with_pauses = len(known) < len(each)
    commands: list[dict[str, Any]] = []
    for number, entry in enumerate([record, *entries]):
        command, step = entry.get("command"), entry.get("step") if number else 0
        command = command if isinstance(command, str) else None
        if not commands or commands[-1]["command"] != command:
            commands.append({"step": step if isinstance(step, int) and abs(step) < 2**53 else None, "command": command})
    seconds = _seconds(starts[0], ends[-1]) if with_pauses else sum(known)
    return {
        "seconds": None if each[-1] is None else seconds,
        "with_pauses": with_pauses,
        "commands": commands[::-1],
    }


def _seconds(start: Any, end: Any) -> float | None:
    """From one time to another that is not before it."""
    try:
        seconds = (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    except (TypeError, ValueError):
        return None
    return seconds if seconds >= 0 else None
