"""The whole training state on disk, whole or absent: weights, optimizer, seed generators, sums of the metrics, and the step.

A checkpoint is a folder `checkpoints/step_00001000` of `state.safetensors`, `state.json` and `model`, a saved tokenizer like any
other; it is written under another name, flushed and renamed. Batch k is a function of the seed, k and the files, so the step is
also the position in the data.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from kvq import artifact
from kvq.atomic import new_folder, write_bytes, write_text
from kvq.errors import RunError
from kvq.run import Run
from kvq.untrusted import parse_json, read_bytes

FORMAT_VERSION = 1
_DESCRIPTION_LIMIT = 2**16  # bytes
_HEADER_LIMIT = 2**22  # bytes
_SUMS = "metric."  # begins the names of what a run can go on without
# What reading a broken checkpoint can raise.
_BROKEN = (OSError, ValueError, KeyError, TypeError, SafetensorError)


def save_checkpoint(
    run: Run,
    model: keras.Model,
    step: int,
    keep: int,
    config: dict[str, Any],
    validation_psnr: float | None,
    write_model: Callable[[Path, int], None],
) -> Path:
    """Saves the state after `step` steps, then removes all but the newest `keep` and the best.

    Args:
        config: Of the run, as plain values.
        validation_psnr: In dB, measured at this very step, if it was. The best checkpoint is the one with the highest.
        write_model: Writes the model as it is after so many steps into a folder.
    """
    folder = run.checkpoints / f"step_{step:08d}"
    arrays = {name: np.asarray(keras.ops.convert_to_numpy(variable), order="C") for name, variable in _state(model)}
    content = save(arrays)
    description = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "backend": keras.backend.backend(),
        "validation_psnr": validation_psnr,
        "config": config,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    with new_folder(folder) as temporary:
        write_bytes(temporary / "state.safetensors", content)
        write_text(temporary / "state.json", json.dumps(description, indent=2) + "\n")
        write_model(temporary / "model", step)
    _remove_old(run, keep, step)
    return folder


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself: after `step` steps on `backend`, of a run with `config`."""

    folder: Path
    step: int
    backend: str
    config: dict[str, Any]
    sha256: str


def newest_checkpoint(run: Run) -> Checkpoint:
    """The newest checkpoint that describes itself; whether its state is whole is found out when it is restored.

    Raises:
        RunError: If there is none, or it is of a newer kvq.
    """
    if not run.exists:
        raise RunError(f"{run.folder} holds no run to resume. Leave --resume away to start one.")
    for folder in reversed(_folders(run)):
        with contextlib.suppress(*_BROKEN):
            return _description(folder)
    raise _none_whole(run)


def restore_checkpoint(run: Run, model: keras.Model, note: Callable[[str], None]) -> Checkpoint:
    """Puts the newest checkpoint that is whole into a compiled model, and removes what was left of one that was being written.

    The run is this process', which holds its lock.

    Args:
        note: Told of every checkpoint that was passed over because it is broken, and of sums of metrics that were left out.

    Raises:
        RunError: If there is none, or the newest is of another model or of a newer kvq.
    """
    _tidy(run)
    model.optimizer.build(model.trainable_variables)
    variables = dict(_state(model))
    kinds = {name: (tuple(variable.shape), _is_float(variable.dtype)) for name, variable in variables.items()}
    state = {name: kind for name, kind in kinds.items() if not name.startswith(_SUMS)}
    largest = _HEADER_LIMIT + sum(8 * math.prod(shape) for shape, _ in kinds.values())
    for folder in reversed(_folders(run)):
        try:
            checkpoint = _description(folder)
            arrays = _arrays(checkpoint, largest)
        except _BROKEN as error:
            note(f"{folder} is broken ({error}); the one before it is taken.")
            continue
        found = {name: (array.shape, _is_float(array.dtype.name)) for name, array in arrays.items()}
        if state != {name: kind for name, kind in found.items() if not name.startswith(_SUMS)}:
            raise RunError(f"{folder} is of another model than the configuration of {run.folder}. Its config.toml was edited.")
        if kinds != found:
            note(f"{folder} was written by a kvq that measured otherwise: the next record is of the steps from here on.")
        for name in kinds if kinds == found else state:
            variables[name].assign(arrays[name])
        return checkpoint
    raise _none_whole(run)


def _tidy(run: Run) -> None:
    """Puts back the checkpoint that a killed process was about to replace, and removes what it had not finished."""
    for left in run.checkpoints.glob(".step_*"):
        for old in left.glob("step_*"):
            if not os.path.lexists(run.checkpoints / old.name):
                os.replace(old, run.checkpoints / old.name)
        shutil.rmtree(left, ignore_errors=True)


def _state(model: keras.Model) -> Iterator[tuple[str, Any]]:
    yield from artifact.tensors(model)
    # Numbered: Keras' own names of these are counted over the whole process and differ from one to the next.
    for index, variable in enumerate(model.optimizer.variables):
        yield f"optimizer.{index:04d}", variable
    # Keras leaves these out of its own files, and a resume from them is silently inexact.
    generators = [generator for layer in model._flatten_layers() for generator in layer._seed_generators]
    for index, generator in enumerate(generators):
        yield f"seed.{index:04d}", generator.state
    # What was measured since the last record, for the next one to be that of a run that was not stopped.
    for index, variable in enumerate(model.metrics_variables):
        yield f"{_SUMS}{index:04d}", variable


def has_checkpoint(run: Run) -> bool:
    """Whether there is anything to resume from, whole or not."""
    return bool(_folders(run))


def _folders(run: Run) -> list[Path]:
    """Oldest first. Links are passed over: what they lead to is not the run's, neither to load nor to remove."""
    folders = [
        folder
        for folder in (run.checkpoints.glob("step_*") if not run.checkpoints.is_symlink() else [])
        if re.fullmatch("step_[0-9]+", folder.name) and folder.is_dir() and not folder.is_symlink()
    ]
    return sorted(folders, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _description(folder: Path) -> Checkpoint:
    description = parse_json(read_bytes(folder / "state.json", _DESCRIPTION_LIMIT))
    version = description["format_version"]
    if type(version) is int and version > FORMAT_VERSION:
        raise RunError(f"{folder} was written by a newer kvq, in format_version {version}; this one reads {FORMAT_VERSION}.")
    if type(version) is not int or version != FORMAT_VERSION or description["step"] != _step(folder):
        raise ValueError("its state.json does not describe it")
    if not isinstance(description["config"], dict):
        raise ValueError("its state.json has no configuration")
    return Checkpoint(folder, _step(folder), str(description["backend"]), description["config"], str(description["sha256"]))


def _arrays(checkpoint: Checkpoint, largest: int) -> dict[str, np.ndarray]:
    """The state of a checkpoint that verifies, of at most `largest` bytes."""
    file = checkpoint.folder / "state.safetensors"
    if file.stat().st_size > largest:
        raise RunError(f"{checkpoint.folder} is of another model than the configuration: it is larger. Was config.toml edited?")
    content = read_bytes(file, largest)
    if hashlib.sha256(content).hexdigest() != checkpoint.sha256:
        raise ValueError("its checksum does not hold")
    arrays = load(content)
    for name, array in arrays.items():
        # Measurements may be infinite: the PSNR of a perfect image is.
        if array.dtype.kind == "f" and not name.startswith(_SUMS) and not np.isfinite(array).all():
            raise ValueError(f"{name} is NaN or infinite")
    return arrays


def _is_float(dtype: str) -> bool:
    # Which integers count and seed differs among the backends.
    return "float" in dtype


def _none_whole(run: Run) -> RunError:
    return RunError(f"{run.checkpoints} holds no whole checkpoint to resume from. Give --overwrite to start again.")


def _remove_old(run: Run, keep: int, step: int) -> None:
    """All up to `step` but the newest and the best. Later ones are those that a run did not go on from, being broken."""
    newest = [folder for folder in _folders(run)[::-1] if _step(folder) <= step]
    measured = [(psnr, folder) for folder in newest if (psnr := _validation_psnr(folder)) is not None]
    best = [max(measured)[1]] if measured else []
    for folder in newest:
        if folder not in newest[:keep] + best:
            shutil.rmtree(folder)


def _validation_psnr(folder: Path) -> float | None:
    try:
        psnr = parse_json(read_bytes(folder / "state.json", _DESCRIPTION_LIMIT))["validation_psnr"]
    except _BROKEN:
        return None
    return psnr if isinstance(psnr, float) and not math.isnan(psnr) else None
