"""The whole training state on disk, whole or absent: weights, optimizer, seed generators, sums of the metrics, and the step.

A checkpoint is a folder `checkpoints/step_00001000` of `state.safetensors` and `state.json`, written under another name,
flushed and renamed. Batch k is a function of the seed, k and the files, so the step is also the position in the data.
"""

import hashlib
import json
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

FORMAT_VERSION = 1
# What reading a broken checkpoint can raise.
_BROKEN = (OSError, ValueError, KeyError, TypeError, SafetensorError)


def save_checkpoint(
    run: Run, model: keras.Model, step: int, keep: int, config: dict[str, Any], validation_psnr: float | None = None
) -> Path:
    """Saves the state after `step` steps, then removes all but the newest `keep` and the best.

    Args:
        config: Of the run, as plain values.
        validation_psnr: In dB, measured at this very step, if it was. The best checkpoint is the one with the highest.
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
    _remove_old(run, keep)
    return folder


@dataclass(frozen=True)
class Checkpoint:
    """A whole training state: after `step` steps on `backend`, of a run with `config`."""

    folder: Path
    step: int
    backend: str
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def restore(self, model: keras.Model) -> None:
        """Puts the state into a compiled model.

        Raises:
            RunError: If it is of another model.
        """
        model.optimizer.build(model.trainable_variables)
        variables = dict(_state(model))
        if {name: variable.shape for name, variable in variables.items()} != {k: a.shape for k, a in self.arrays.items()}:
            raise RunError(f"{self.folder} is of another model than the configuration. Was its state or config.toml edited?")
        for name, variable in variables.items():
            variable.assign(self.arrays[name])


def read_checkpoint(run: Run, note: Callable[[str], None]) -> Checkpoint:
    """The newest checkpoint that is whole.

    Args:
        note: Told of every checkpoint that was passed over because it is broken.

    Raises:
        RunError: If there is none.
    """
    if not run.exists:
        raise RunError(f"{run.folder} holds no run to resume. Leave --resume away to start one.")
    for folder in reversed(_folders(run)):
        try:
            return _read(folder)
        except _BROKEN as error:
            note(f"{folder} is broken ({error}); the one before it is taken.")
    raise RunError(f"{run.checkpoints} holds no whole checkpoint to resume from. Give --overwrite to start again.")


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
        yield f"metric.{index:04d}", variable


def has_checkpoint(run: Run) -> bool:
    """Whether there is anything to resume from, whole or not."""
    return bool(_folders(run))


def _folders(run: Run) -> list[Path]:
    """Oldest first."""
    folders = [
        folder for folder in run.checkpoints.glob("step_*") if folder.is_dir() and folder.name.removeprefix("step_").isdigit()
    ]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step_")))


def _read(folder: Path) -> Checkpoint:
    description = json.loads((folder / "state.json").read_text("utf-8"))
    if description["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version {description['format_version']}, not {FORMAT_VERSION}")
    content = (folder / "state.safetensors").read_bytes()
    if hashlib.sha256(content).hexdigest() != description["sha256"]:
        raise ValueError("its checksum does not hold")
    return Checkpoint(folder, description["step"], description["backend"], description["config"], load(content))


def _remove_old(run: Run, keep: int) -> None:
    newest = _folders(run)[::-1]
    measured = [(psnr, folder) for folder in newest if (psnr := _validation_psnr(folder)) is not None]
    best = [max(measured)[1]] if measured else []
    for folder in newest:
        if folder not in newest[:keep] + best:
            shutil.rmtree(folder)


def _validation_psnr(folder: Path) -> float | None:
    try:
        return json.loads((folder / "state.json").read_text("utf-8"))["validation_psnr"]
    except _BROKEN:
        return None
