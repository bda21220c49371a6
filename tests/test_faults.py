"""What goes wrong in a long run and does not end it, or ends it with what helps: numbers, disks, edited configurations."""

import errno
import json
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

import kvq.callbacks
from kvq import atomic, checkpoint
from kvq.config import load_config
from kvq.data import open_source, training_batches
from kvq.errors import RunError, TrainingError
from kvq.model import VQVAE
from kvq.progress import Progress
from kvq.run import Run
from kvq.training import train

SMALL = ("train.batch_size=16", "model.latent_dim=8", "quantizer.codebook_size=16", "data.validation_images=16")


@pytest.fixture
def white(tmp_path, monkeypatch):
    """64 images, number 5 of which is white, and a loss that is infinite for a white image: 4 steps of 16 meet it once."""
    images = np.random.default_rng(0).integers(0, 250, (64, 28, 28), np.uint8)
    images[5] = 255
    np.savez(tmp_path / "images.npz", x_train=images, x_test=images[8:24])
    terms = VQVAE.loss_terms

    def loss_terms(self, images, outputs):
        white = keras.ops.all(keras.ops.equal(images, 255), axis=(1, 2, 3))
        result = terms(self, images, outputs)
        return {**result, "reconstruction": result["reconstruction"] / (1.0 - keras.ops.cast(white, "float32"))}

    monkeypatch.setattr(VQVAE, "loss_terms", loss_terms)
    return tmp_path / "images.npz"


def small_config(steps, *overrides):
    often = ("train.log_every=2", "train.sample_every=4", "train.validate_every=4", "checkpoint.every_steps=2")
    return load_config("fashion_mnist_mini", [*SMALL, *often, f"train.steps={steps}", "train.warmup_steps=0", *overrides])


def first_white_step(path):
    batches = training_batches(open_source(str(path), "train"), [], 16, seed=0)
    return next(step for step in range(1, 5) if any((image == 255).all() for image in batches[step - 1]["images"]))


class Notes(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


# Numbers.


def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint_and_names_step_term_and_batch(white, tmp_path):
    step = first_white_step(white)
    with pytest.raises(TrainingError, match=f"Step {step}: the loss is not finite: reconstruction is inf in 1 of 16") as error:
        train(small_config(12, "data.pad=0"), tmp_path / "run", data=white)
    assert "train.learning_rate" in str(error.value) and 'train.on_nonfinite = "skip"' in str(error.value)
    assert error.value.exit_code == 1
    run = Run(tmp_path / "run")
    assert run.record["status"] == "failed" and "reconstruction is inf" in run.record["error"]
    with np.load(run.nonfinite_file(step)) as batch:
        assert sum((image == 255).all() for image in batch["images"]) == 1 and len(batch["names"]) == 16
    saved = [int(folder.name.removeprefix("step_")) for folder in run.checkpoints.iterdir()]
    assert all(number < step for number in saved)
    assert all(np.isfinite(record["loss"]) for record in run.read_metrics())


def test_steps_that_are_not_finite_are_left_out_where_that_is_asked_for(white, tmp_path):
    notes = Notes()
    skip = ("data.pad=0", 'train.on_nonfinite="skip"', "train.most_skipped=2")
    result = train(small_config(8, *skip), tmp_path / "run", data=white, progress=notes)
    assert result["status"] == "finished" and result["steps"] == 8
    assert [note.endswith(f"{n} of at most 2 in all") for n, note in enumerate(notes.notes, 1)] == [True, True]
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(np.isfinite(values).all() for values in weights.values())
    assert "1 of at most 2" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    # The third is one too many, also in a run that goes on: the count is part of the state.
    with pytest.raises(TrainingError, match="2 such steps were left out before it"):
        train(small_config(12, *skip), tmp_path / "run", data=white, resume=True)


@pytest.mark.slow
def test_clipping_averages_and_bfloat16_train_and_resume_to_the_same_bits(tmp_path):
    more = ("train.clip_norm=0.5", "train.average_decay=0.9", 'train.precision="mixed_bfloat16"', "codebook.replace_dead_every=0")
    config = [small_config(steps, *more, 'train.schedule="constant"') for steps in (3, 6)]
    train(config[0], tmp_path / "run")
    train(config[1], tmp_path / "run", resume=True)
    train(config[1], tmp_path / "straight")
    model, state = "model/model.safetensors", "checkpoints/step_00000006/state.safetensors"
    for file in (model, state):
        one, other = load_file(tmp_path / "run" / file), load_file(tmp_path / "straight" / file)
        for name, values in other.items():
            np.testing.assert_array_equal(one[name], values, err_msg=name)
    # The model of a run with averages is the averages, and its state is the weights.
    kernel = "encoder.stage0.down.conv.kernel"
    assert not np.array_equal(load_file(tmp_path / "run" / model)[kernel], load_file(tmp_path / "run" / state)[kernel])


# Disks.


def no_space(*arguments, **named):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_disk_that_is_full_for_a_while_costs_nothing_that_was_saved(tmp_path, monkeypatch):
    """Steps 3 and 4 cannot be written: training goes on, says so, and everything is there in the end."""
    notes = Notes()

    run = Run(tmp_path / "run")
    opened = Path.open

    def open_full(path, *arguments, **named):
        return opened(Path("/dev/full") if path == run.metrics_file else path, *arguments, **named)

    class FullFor(Notes):
        def step(self, step):
            if step == 3:
                for module in (atomic, checkpoint, kvq.callbacks):
                    monkeypatch.setattr(module, "write_bytes", no_space)
                monkeypatch.setattr(Path, "open", open_full)
            if step == 5:
                assert (run.checkpoints / "step_00000002").exists()
                monkeypatch.undo()

    notes = FullFor()
    result = train(small_config(6), tmp_path / "run", progress=notes)
    assert result["status"] == "finished"
    for action in ("SaveCheckpoint", "LogMetrics", "DrawSamples"):
        assert any(f"step 4: {action} could not write" in note and "No space left" in note for note in notes.notes)
    assert [record["step"] for record in run.read_metrics() if record["split"] == "train"] == [1, 2, 4, 6]
    assert {folder.name for folder in run.checkpoints.iterdir()} >= {"step_00000006"}
    assert not [path for path in run.folder.rglob(".*") if path.name != ".lock"]


def test_a_disk_that_stays_full_ends_the_run_with_what_to_do_and_it_goes_on_later(tmp_path, monkeypatch):
    class Full(Notes):
        def step(self, step):
            if step == 1:
                for module in (atomic, checkpoint, kvq.callbacks):
                    monkeypatch.setattr(module, "write_bytes", no_space)

    notes = Full()
    # What it advises works where there is no checkpoint yet, too.
    with pytest.raises(TrainingError, match="step 4, but .* cannot be written: .*No space left.* give --resume-or-start: "):
        train(small_config(4), tmp_path / "run", progress=notes)
    monkeypatch.undo()
    assert not list(tmp_path.glob("run/checkpoints/*"))
    saving = [note for note in notes.notes if "SaveCheckpoint could not write" in note]
    assert [note.endswith("; it will try again") for note in saving] == [True, False]
    assert train(small_config(4), tmp_path / "run", resume_or_start=True)["status"] == "finished"


def test_a_failed_checkpoint_is_tried_again_soon(tmp_path, monkeypatch):
    from kvq.callbacks import SaveCheckpoint

    class Validate:
        last: dict = {}

        def due(self, step, ending):
            return False

    action = SaveCheckpoint(Run(tmp_path), {}, 10, 1000.0, 2, Validate(), lambda folder, step: None)
    monkeypatch.setattr(kvq.callbacks, "save_checkpoint", no_space)
    with pytest.raises(OSError):
        action.act(None, 10)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 59)
    assert not action.due(11, None)
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert action.due(12, None)


# Configurations, and another kvq's runs.


def test_a_configuration_edited_between_runs_is_listed_or_refused(tmp_path):
    run, notes = Run(tmp_path / "run"), Notes()
    train(small_config(2), run.folder)
    edited = run.config_file.read_text("utf-8")
    # In the run's own file, as `kvq train RUN --resume` reads it.
    run.config_file.write_text(edited.replace("\nsteps = 2", "\nsteps = 4").replace("log_every = 2", "log_every = 3"), "utf-8")
    assert train(run.folder, run.folder, resume=True, progress=notes)["steps"] == 4
    assert "step 2: train.log_every was 2, is 3" in notes.notes and "step 2: train.steps was 2, is 4" in notes.notes
    entry = run.record["resumed"][0]
    assert entry["step"] == 2 and set(entry["changes"]) == {"train.log_every", "train.steps"}
    assert run.config.train.steps == 4
    run.config_file.write_text(edited.replace("latent_dim = 8", "latent_dim = 12").replace("seed = 0", "seed = 3"), "utf-8")
    with pytest.raises(RunError, match="model.latent_dim was 8, is 12, .*train.seed was 0, is 3"):
        train(run.folder, run.folder, resume=True)


def test_another_learning_rate_is_allowed_and_used(tmp_path):
    train(small_config(2), tmp_path / "run")
    train(small_config(4, "train.learning_rate=1e-6"), tmp_path / "run", resume=True)
    states = [load_file(tmp_path / "run" / "checkpoints" / f"step_0000000{n}" / "state.safetensors") for n in (2, 4)]
    kernel = "decoder.image.conv.kernel"
    assert 0 < np.abs(states[1][kernel] - states[0][kernel]).max() < 1e-5


def test_a_run_of_a_newer_format_is_refused_by_name(tmp_path):
    train(small_config(1), tmp_path / "run")
    run = Run(tmp_path / "run")
    run.write_record({**run.record, "format_version": 7, "kvq": "9.9.0"})
    for resumed in ({"resume": True}, {"resume_or_start": True}):
        with pytest.raises(RunError, match="format 7, of kvq 9.9.0. This kvq reads format 1"):
            train(small_config(2), tmp_path / "run", **resumed)


def test_a_change_of_backend_names_the_random_streams_that_differ(tmp_path):
    gumbel = 'quantizer={kind="gumbel", codebook_size=16}'
    train(small_config(2, gumbel, 'codebook.initialise="none"'), tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "backend": "another"}), "utf-8")
    notes = Notes()
    train(small_config(3, gumbel, 'codebook.initialise="none"'), tmp_path / "run", resume=True, progress=notes)
    said = [note for note in notes.notes if "from another to" in note]
    assert len(said) == 1 and "random numbers that go on in another stream: " in said[0] and "quantizer" in said[0]
    assert said[0] in (tmp_path / "run" / "log.txt").read_text("utf-8")
