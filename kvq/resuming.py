"""What a run goes on with: its last checkpoint, and a configuration that fits it."""

from collections.abc import Callable
from typing import Any

import keras

from kvq import __version__
from kvq.checkpoint import Checkpoint
from kvq.config import RunConfig
from kvq.errors import RunError
from kvq.run import Run, now
from kvq.validation import check

# What may differ when a run goes on: the state means the same with another value. The rest makes another model or other batches.
FREE = {
    "train.steps",
    "train.learning_rate",
    "train.schedule",
    "train.warmup_steps",
    "train.clip_norm",
    "train.on_nonfinite",
    "train.most_skipped",
    "train.log_every",
    "train.sample_every",
    "train.validate_every",
    "train.log_batches",
    "codebook.replace_dead_every",
    "codebook.dead_below",
    "codebook.replace_until",
    # Where images lie, not which they are: `kvq.run_images.check_unchanged` looks at that.
    "data.source",
    "data.validation",
    "data.max_bad_fraction",
    "data.validation_images",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.keep",
}
_OF_AN_END = ("ended", "steps", "error")  # what run.json says of how a session ended


def changed_keys(run: Run, checkpoint: Checkpoint, config: RunConfig) -> dict[str, str]:
    """How a configuration differs from that of a checkpoint: key to "was ..., is ...".

    Raises:
        RunError: If a key differs that must not, with all of them.
    """
    # Through the schema: a key that is younger than the checkpoint has its default.
    before = _flat(check(RunConfig, checkpoint.config, str(checkpoint.folder)).model_dump())
    now = _flat(config.model_dump())
    changes = {
        key: f"was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
    refused = [f"{key} {change}" for key, change in changes.items() if key not in FREE]
    if refused:
        raise RunError(
            f"{run.folder} was trained with another configuration: {', '.join(refused)}. Its state fits no other; what may "
            f"change is {', '.join(sorted(FREE))}. Set it back, or start another run with --out."
        )
    return changes


def record_resumption(
    run: Run,
    checkpoint: Checkpoint,
    config: RunConfig,
    changes: dict[str, str],
    command: str | None,
    model: keras.Model,
    note: Callable[[str], None],
) -> None:
    """Writes into run.json, log.txt and config.toml that the run goes on, from where, and what is not as it was."""
    backend = keras.backend.backend()
    record = run.record
    # What the session before ended with is not how the run stands now. A killed one left nothing.
    before = {name: record.pop(name, None) for name in _OF_AN_END}
    entry: dict[str, Any] = {"step": checkpoint.step, "backend": backend, "kvq": __version__, "command": command}
    entry |= {"stopped": before["ended"], "at": now()}
    note(f"step {checkpoint.step}: resumed on {backend}")
    for key, change in changes.items():
        note(f"step {checkpoint.step}: {key} {change}")
    if changes:
        entry["changes"] = changes
    if checkpoint.backend != backend:
        # The counters are carried over; each backend makes other numbers of them.
        entry["random_streams_that_differ"] = streams = [
            layer.path for layer in model._flatten_layers() if layer._seed_generators
        ]
        note(
            f"step {checkpoint.step}: from {checkpoint.backend} to {backend}; random numbers that go on in another stream: "
            f"{', '.join(streams) or 'none'}"
        )
    run.write_config(config)
    run.write_record({**record, "status": "running", "backend": backend, "resumed": [*record.get("resumed", []), entry]})


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
