"""Training: from a configuration to a run folder with a tokenizer in it."""

import contextlib
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kvq import __version__, artifact, backends
from kvq.bad_files import BadFiles
from kvq.between_steps import BetweenSteps
from kvq.build import build_model, build_optimizer
from kvq.callbacks import DrawSamples, LogBatches, LogMetrics, RestoreSums, SaveCheckpoint, Validate
from kvq.checkpoint import has_checkpoint, newest_checkpoint, restore_checkpoint
from kvq.codebook_callbacks import InitialiseCodebook, ReplaceDeadCodes
from kvq.config import RunConfig, load_config
from kvq.data import (
    evaluation_batches,
    evaluation_transforms,
    iterate,
    training_batches,
    training_transforms,
)
from kvq.data.contract import Source
from kvq.errors import ConfigError
from kvq.inputs import TimedInputs
from kvq.model import VQVAE
from kvq.nonfinite import CheckFinite
from kvq.optimizer import averaged
from kvq.progress import Progress
from kvq.quantizers.initialisers import INITIALISERS
from kvq.resuming import changed_keys, record_resumption
from kvq.run import Run, now
from kvq.run_images import check_unchanged, fingerprints, first_images, keep_listings, open_images, with_data
from kvq.signals import stop_signals
from kvq.tensorboard import TensorBoard

SAMPLED = 16  # images in each grid


def train(
    config: RunConfig | str | Path,
    out: str | Path | None = None,
    *,
    name: str | None = None,
    data: str | Path | None = None,
    validation_data: str | Path | None = None,
    resume: bool = False,
    resume_or_start: bool = False,
    changed_data: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a tokenizer.

    Args:
        config: A configuration, or what `load_config` takes.
        out: Run folder. Default: `runs/NAME`.
        name: For the default of `out`; without it, the configuration's file name.
        data: Where the training images are, or another known data set, instead of the configuration's.
        validation_data: Images to validate on, instead of the test split.
        resume: Continue the run in the folder from its last checkpoint.
            The configuration may differ from its in what `kvq.resuming.FREE` names.
        resume_or_start: The same if there is one, else start: for schedulers that run one command again and again.
        changed_data: Continue even if the images are not those that the run began with.
        overwrite: Replace the run in the folder.
        tensorboard: Write TensorBoard summaries beside metrics.jsonl.
        command: Written into run.json, of each time that the run goes on.
        progress: Told what happens.

    Ctrl-C or SIGTERM ends training after the step under way, with everything saved, and raises nothing: `status` tells.

    Returns:
        `run` (the folder), `status` ("finished" or "interrupted"), `steps`, `metrics` (the last training record).

    Raises:
        KvqError: If the input is wrong, before anything is written; or if training cannot go on, after the run says so.
    """
    name = name or ("run" if isinstance(config, RunConfig) else Path(config).stem)
    config = config if isinstance(config, RunConfig) else load_config(config)
    config = with_data(config, data, validation_data)
    progress = progress or Progress()
    run = Run(out or Path("runs") / name)
    if resume_or_start and run.exists:
        # With neither it was stopped before its first checkpoint: there is nothing to lose.
        resume = has_checkpoint(run) or run.model.exists()
        overwrite = overwrite or not resume
    watchers = [progress, TensorBoard(run)] if tensorboard else [progress]

    def note(text: str) -> None:
        run.log(text)
        progress.note(text)

    # Every seed that Keras draws comes from here. `keras.utils.set_random_seed` would import TensorFlow on every backend.
    random.seed(config.train.seed)
    changes = changed_keys(run, newest_checkpoint(run), config) if resume else {}
    source, validation = open_images(config, run if resume else None)
    model = compiled(config, source.channels, note)
    if not resume:
        run.create(config, {**_record(config, command), "data": fingerprints(source, validation)}, overwrite)
        keep_listings(run, source, validation)
    with run.locked():
        first_step = 0
        if resume:
            if not changed_data:
                check_unchanged(run, config, source, validation)
            checkpoint = restore_checkpoint(run, model, note)
            first_step = checkpoint.step
            if first_step > config.train.steps:
                raise ConfigError(
                    f"train.steps must be at least the {first_step:,} steps that {run.folder} has taken. Received: "
                    f"{config.train.steps:,}. To train for less, start another run with --out."
                )
            run.drop_metrics_after(checkpoint.step)
            if first_step == config.train.steps:
                progress.note(f"All {first_step:,} steps were taken before. A larger train.steps (--steps) goes on from there.")
            if changes or first_step < config.train.steps or run.record.get("status") != "finished":
                record_resumption(run, checkpoint, config, changes, command, model, note)
        return _train(run, config, model, source, validation, first_step, note, progress, watchers)


def describe(
    config: RunConfig | str | Path, data: str | Path | None = None, validation_data: str | Path | None = None
) -> dict[str, Any]:
    """What a configuration makes, without training: parameters, tokens and bits per image, and the configuration itself."""
    config = with_data(config if isinstance(config, RunConfig) else load_config(config), data, validation_data)
    source, validation = open_images(config)
    model = compiled(config, source.channels)
    tokens = (config.data.crop // config.model.downsampling) ** 2
    return {
        "config": config.model_dump(),
        "parameters": sum(int(np.prod(weight.shape)) for weight in model.trainable_weights),
        "tokens_per_image": tokens,
        "bits_per_image": tokens * (config.quantizer.depth or 1) * float(np.log2(config.quantizer.codebook_size)),
        "image_shape": [config.data.crop, config.data.crop, source.channels],
        "training_images": len(source),
        "validation_images": len(validation),
    }


def _train(
    run: Run,
    config: RunConfig,
    model: VQVAE,
    source: Source,
    validation: Source,
    first_step: int,
    note: Callable[[str], None],
    progress: Progress,
    watchers: Sequence[Progress],
) -> dict[str, Any]:
    """From `first_step` to the end, whatever that is; run.json then says which it was."""
    train, data, codebook, checkpoint = config.train, config.data, config.codebook, config.checkpoint
    augmented = training_transforms(data.pad, data.crop, data.flip, data.resize, data.small)
    batches = training_batches(source, augmented, train.batch_size, train.seed)
    cropped = evaluation_transforms(data.pad, data.crop, data.resize, data.small)
    checked = evaluation_batches(validation, cropped, train.batch_size, limit=data.validation_images)
    bad = BadFiles(run, len(source), data.max_bad_fraction)
    inputs = TimedInputs(bad.watch(iterate(batches, start=first_step)), hashed=train.log_batches)

    def write_model(folder: Path, step: int) -> None:
        with averaged(model):
            artifact.save(model, config, source.channels, source.name, source.split, step, folder)

    with stop_signals() as stop, _status_on_error(run):
        samples = {
            name: first_images(bad.name(iterate(evaluation_batches(images, cropped, SAMPLED), threads=0)), images)
            for name, images in (("train", source), ("validation", validation))
        }
        check = CheckFinite(run, model.optimizer.skipped, batches.__getitem__, note)
        model.steps_per_execution = at_once = _steps_at_once(config, first_step)
        between = BetweenSteps(
            first_step,
            train.steps,
            at_once,
            should_stop=lambda: stop.is_set() or bad.too_many,
            on_step=progress.step,
            on_resume=RestoreSums(model),
            check=check,
            note=note,
        )
        waited, trained = lambda: inputs.waited, lambda: between.seconds
        metrics = LogMetrics(run, first_step, train.log_every, train.batch_size, waited, trained, watchers)
        validate = Validate(run, lambda: bad.name(iterate(checked)), train.validate_every, watchers)
        between.actions.append(metrics)
        if train.log_batches:
            between.actions.append(LogBatches(run, first_step, inputs.hashes))
        if codebook.initialise != "none":
            between.actions.append(InitialiseCodebook(lambda: iterate(batches), INITIALISERS[codebook.initialise], train.seed))
        if codebook.replace_dead_every:
            until = round(codebook.replace_until * train.steps)
            every, below = codebook.replace_dead_every, codebook.dead_below
            between.actions.append(ReplaceDeadCodes(batches.__getitem__, every, below, until, train.seed, note))
        # After the codebook, so that what is measured and drawn is what is saved.
        between.actions += [
            validate,
            DrawSamples(run, samples, train.sample_every, watchers),
            SaveCheckpoint(
                run,
                config.model_dump(),
                checkpoint.every_steps,
                checkpoint.every_minutes,
                checkpoint.keep,
                validate,
                write_model,
            ),
        ]
        if first_step < train.steps:
            progress.start(train.steps, first_step)
            with inputs.errors_unchanged():
                model.fit(
                    inputs.images(), steps_per_epoch=train.steps - first_step, shuffle=False, verbose=0, callbacks=[between]
                )
        write_model(run.model, between.step)
        progress.stop()
        if between.step < train.steps:
            bad.check()
    status = "finished" if between.step == train.steps else "interrupted"
    if run.record.get("status") == "running":  # not where a finished run was resumed and nothing was left to do
        run.update_record(status=status, steps=between.step, ended=now())
    return {"run": str(run.folder), "status": status, "steps": between.step, "metrics": metrics.last or _last_record(run)}


def _steps_at_once(config: RunConfig, first_step: int) -> int:
    """As many as the backend gains by, of those numbers of steps into which nothing that is due falls, nor the end."""
    train = config.train
    every = [train.log_every, train.sample_every, train.validate_every, config.checkpoint.every_steps]
    together = math.gcd(first_step, train.steps, *every, config.codebook.replace_dead_every)
    most = backends.steps_at_once(keras.backend.backend())
    return max(number for number in range(1, most + 1) if together % number == 0)


def compiled(config: RunConfig, channels: int, note: Callable[[str], None] = lambda text: None) -> VQVAE:
    """The model of a configuration, ready for `fit`. `note` is told what makes its steps slow."""
    model = build_model(config.model, config.quantizer, config.loss, channels, config.train.precision)
    model.quantizer.trainable = not config.codebook.frozen
    model.compile(optimizer=build_optimizer(config.train))
    model.train_function = backends.train_function(keras.backend.backend(), model, note)
    return model


def _record(config: RunConfig, command: str | None) -> dict[str, Any]:
    backend = keras.backend.backend()
    return {
        "status": "running",
        "kvq": __version__,
        "keras": keras.__version__,
        "python": sys.version.split()[0],
        "backend": backend,
        "devices": backends.devices(backend),
        "seed": config.train.seed,
        "command": command,
        "started": now(),
        "process": os.getpid(),
    }


def _last_record(run: Run) -> dict[str, Any]:
    records = [record for record in run.read_metrics() if record.get("split") == "train"]
    return records[-1] if records else {}


@contextlib.contextmanager
def _status_on_error(run: Run) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a full disk it is the error inside that has to be told
            if isinstance(error, KeyboardInterrupt):
                run.update_record(status="interrupted", ended=now())
            else:
                run.update_record(status="failed", error=f"{type(error).__name__}: {error}", ended=now())
        raise
