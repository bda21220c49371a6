"""What `kvq train` promises: the run folder, determinism, resuming, stopping, and errors that leave nothing behind."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from kvq import backends
from kvq.callbacks import LogMetrics
from kvq.config import load_config
from kvq.data import open_source
from kvq.errors import ConfigError, DataError, KvqError, RunError
from kvq.evaluation import evaluate
from kvq.ops import to_uint8
from kvq.plots import image_grid
from kvq.progress import Progress
from kvq.run import Run
from kvq.tokenizer import Tokenizer
from kvq.training import SAMPLED, _steps_at_once, describe, train

# A network and batches small enough for a few steps a second on every backend.
SMALL = ("train.batch_size=16", "model.latent_dim=8", "quantizer.codebook_size=16", "data.validation_images=32")


def small_config(steps, *overrides):
    often = ("train.log_every=2", "train.sample_every=4", "train.validate_every=4", "train.warmup_steps=0")
    return load_config("fashion_mnist_mini", [*SMALL, *often, f"train.steps={steps}", *overrides])


def steps_logged(run, split):
    return [record["step"] for record in run.read_metrics() if record["split"] == split]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 7 steps, which no interval divides."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    result = train(small_config(7), folder, command="kvq train fashion_mnist_mini")
    return result, Run(folder)


def test_a_run_leaves_everything_that_its_folder_promises(finished):
    result, run = finished
    assert result["status"] == "finished" and result["steps"] == 7 and result["run"] == str(run.folder)
    assert run.config == small_config(7)
    assert {"status": "finished", "steps": 7, "seed": 0, "command": "kvq train fashion_mnist_mini"}.items() <= run.record.items()
    assert {file.name for file in run.model.iterdir()} == {"config.json", "model.safetensors"}
    assert {file.name for file in run.samples.iterdir()} == {
        f"{name}_{step:08d}.png" for name in ("train", "validation") for step in (4, 7)
    }
    with Image.open(run.loss_plot) as plot:
        assert plot.size[0] > 500
    assert not [file for file in run.folder.rglob(".*") if file.name != ".lock"], "temporary files were left behind"


def test_the_first_and_the_last_step_are_logged_and_the_last_is_validated_and_saved(finished):
    result, run = finished
    assert steps_logged(run, "train") == [1, 2, 4, 6, 7]
    assert steps_logged(run, "validation") == [4, 7]
    assert sorted(folder.name for folder in run.checkpoints.iterdir())[-1] == "step_00000007"
    last = [record for record in run.read_metrics() if record["split"] == "train"][-1]
    assert result["metrics"] == last
    names = {"step", "split", "loss", "reconstruction", "codebook", "commitment", "psnr", "usage", "perplexity"}
    assert {*last} == names | {"images_per_second", "input_wait"}
    assert last["loss"] == pytest.approx(last["reconstruction"] + last["codebook"] + last["commitment"], rel=1e-5)


def test_a_checkpoint_is_a_model_too(finished):
    _, run = finished
    for checkpoint in run.checkpoints.iterdir():
        result = evaluate(checkpoint, images=5)  # of the run's own images
        assert result["images"] == 5 and result["data"] == "fashion_mnist_mini"
    last = run.checkpoints / "step_00000007" / "model"
    assert {file.name: file.read_bytes() for file in last.iterdir()} == {
        file.name: file.read_bytes() for file in run.model.iterdir()
    }


def test_validation_pictures_and_the_model_have_the_averages_of_the_weights(tmp_path):
    decay, steps = 0.9, 4
    every_step = ("checkpoint.every_steps=1", f"checkpoint.keep={steps}", "codebook.replace_dead_every=0")
    train(small_config(steps, f"train.average_decay={decay}", *every_step), tmp_path / "run")
    run = Run(tmp_path / "run")
    # Of the weights after each step, which the checkpoints have.
    states = [load_file(run.checkpoints / f"step_{step:08d}" / "state.safetensors") for step in range(1, steps + 1)]
    for name, written in load_file(run.model / "model.safetensors").items():
        average = states[0][name].astype("float64")
        for state in states[1:]:
            average = decay * average + (1 - decay) * state[name]
        trained = not name.startswith(("quantizer.counts", "quantizer.initialised"))
        np.testing.assert_allclose(written, average if trained else states[-1][name], rtol=1e-4, atol=1e-6, err_msg=name)
    # By the model that was written, whatever was in memory.
    measured, record = evaluate(run.folder, images=32, batch_size=16), run.read_metrics()[-1]
    assert (record["step"], record["split"]) == (steps, "validation")
    for name in ("psnr", "ssim", "perplexity", "usage"):
        assert record[name] == pytest.approx(measured[name], rel=1e-6), name
    for name, loss in measured["losses"].items():
        assert record[name] == pytest.approx(loss, rel=1e-6), name
    images = open_source("fashion_mnist_mini", "test").fetch(range(SAMPLED))["images"]
    restored = to_uint8(Tokenizer.load(run.folder).model.predict_on_batch(images)["reconstruction"])
    picture = image_grid(images, keras.ops.convert_to_numpy(restored))
    with Image.open(run.samples / f"validation_{steps:08d}.png") as drawn:
        assert drawn.tobytes() == picture.tobytes()


def test_a_validation_loss_without_the_terms_of_a_batch_is_none(tmp_path, monkeypatch):
    axes = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: axes.append(figure.axes[0]))
    bits = ['quantizer={kind="lookup_free", bits=4, entropy_weight=3.0}', "model.latent_dim=4", 'codebook.initialise="none"']
    train(small_config(4, *bits), tmp_path / "run")
    records = Run(tmp_path / "run").read_metrics()
    training, validation = ([r for r in records if r["split"] == split] for split in ("train", "validation"))
    assert "batch_entropy" in training[-1] and "loss" in training[-1]
    assert "batch_entropy" not in validation[-1] and "loss" not in validation[-1] and "reconstruction" in validation[-1]
    # The picture has every term. What is not above zero would fall off a logarithmic axis.
    assert {"loss", "reconstruction", "batch_entropy"} <= {line.get_label() for line in axes[-1].lines}
    lowest = min(min(line.get_ydata()) for line in axes[-1].lines)
    assert axes[-1].get_yscale() == "symlog" and lowest <= 0


def test_the_same_configuration_gives_the_same_weights(finished, tmp_path):
    _, run = finished
    train(small_config(7), tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (run.model, tmp_path / "again" / "model"))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras takes one step at a time on PyTorch")
def test_several_steps_at_once_change_nothing_but_when_the_first_record_comes(tmp_path, monkeypatch):
    config = small_config(8, "codebook.replace_dead_every=4", "codebook.dead_below=0.5")
    monkeypatch.setattr(backends, "steps_at_once", lambda name: 1)
    train(config, tmp_path / "one")
    monkeypatch.setattr(backends, "steps_at_once", lambda name: 3)
    train(config, tmp_path / "two")  # not 3: something is due after every second step
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    assert (steps_logged(one, "train"), steps_logged(two, "train")) == ([1, 2, 4, 6, 8], [2, 4, 6, 8])
    assert steps_logged(two, "validation") == steps_logged(one, "validation") == [4, 8]
    first, second = (load_file(run.model / "model.safetensors") for run in (one, two))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras takes one step at a time on PyTorch")
def test_a_run_of_several_steps_at_once_stops_between_them_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "steps_at_once", lambda name: 2)
    train(small_config(8), tmp_path / "whole")
    stopping = Progress()
    stopping.step = lambda step: signal.raise_signal(signal.SIGTERM) if step == 2 else None
    stopped = train(small_config(8), tmp_path / "run", progress=stopping)
    assert (stopped["status"], stopped["steps"]) == ("interrupted", 4)
    assert train(small_config(8), tmp_path / "run", resume=True)["steps"] == 8
    whole, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run"))
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)
    assert steps_logged(Run(tmp_path / "run"), "train") == [2, 4, 6, 8]


@pytest.mark.parametrize(
    "settings, first, expected",
    [
        ((), 0, 10),
        (("train.steps=122",), 0, 2),
        (("train.log_every=15",), 0, 5),
        (("codebook.replace_dead_every=0",), 30, 10),
        ((), 37, 1),
        (("train.steps=10",), 0, 10),
    ],
)
def test_as_many_steps_at_once_as_nothing_falls_between(monkeypatch, settings, first, expected):
    config = load_config("cifar10", ["train.steps=200", *settings])
    monkeypatch.setattr(backends, "steps_at_once", lambda name: 10)
    assert _steps_at_once(config, first) == expected


@pytest.mark.parametrize("name, device, expected", [("jax", "gpu: A", 10), ("torch", "gpu: A", 1), ("tensorflow", "cpu", 1)])
def test_several_steps_at_once_are_for_gpus_where_keras_can(monkeypatch, name, device, expected):
    monkeypatch.setattr(backends, "devices", lambda name: [device])
    assert backends.steps_at_once(name) == expected


def test_the_first_record_after_a_resume_is_of_all_that_was_waited(tmp_path):
    run = Run(tmp_path / "run")
    run.create(small_config(8), {})
    results = {"loss": 1.0, "reconstruction": 1.0}
    model = SimpleNamespace(
        quantizer=SimpleNamespace(loss_names=()), get_metrics_result=lambda: dict(results), reset_metrics=lambda: None
    )
    # Ten steps at once: that something was waited for is seen after the first ten.
    action = LogMetrics(run, 30, 20, 4, waited=lambda: 3.0, trained=lambda: 6.0, watchers=[])
    assert action.due(40, None)
    action.act(model, 40)
    assert (action.last["input_wait"], action.last["images_per_second"]) == (0.5, 10 * 4 / 6)


def test_another_seed_gives_other_weights(finished, tmp_path):
    _, run = finished
    train(small_config(1, "train.seed=1"), tmp_path / "other")
    first, second = (load_file(folder / "model.safetensors") for folder in (run.model, tmp_path / "other" / "model"))
    assert not np.array_equal(first["encoder.stage0.down.conv.kernel"], second["encoder.stage0.down.conv.kernel"])


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(finished, tmp_path):
    _, run = finished
    # A constant learning rate: the cosine of 4 steps is not the beginning of the cosine of 7.
    constant = 'train.schedule="constant"'
    train(small_config(4, constant, "codebook.replace_dead_every=0"), tmp_path / "run")
    result = train(small_config(7, constant, "codebook.replace_dead_every=0"), tmp_path / "run", resume=True)
    assert result["steps"] == 7
    assert steps_logged(Run(tmp_path / "run"), "train") == [1, 2, 4, 6, 7]
    train(small_config(7, constant, "codebook.replace_dead_every=0"), tmp_path / "straight")
    resumed, straight = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "straight"))
    for name in resumed:
        np.testing.assert_array_equal(resumed[name], straight[name], err_msg=name)


def test_what_a_checkpoint_says_of_its_model_is_measured_on_that_model(tmp_path):
    """Also where codes were replaced after the step: those are in the checkpoint, too."""
    replacing = ("codebook.replace_dead_every=4", "codebook.dead_below=0.9", "codebook.replace_until=1.0")
    train(small_config(8, *replacing), tmp_path / "run")
    assert "step 4: " in (tmp_path / "run" / "log.txt").read_text("utf-8")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    recorded = json.loads((checkpoint / "state.json").read_text("utf-8"))["validation_psnr"]
    assert recorded == pytest.approx(evaluate(checkpoint, images=small_config(8).data.validation_images)["psnr"], abs=1e-5)


def test_resuming_a_finished_run_trains_nothing(finished):
    result, run = finished
    run.update_record(ended="2026-01-01T00:00:00+00:00")
    before, record = run.read_metrics(), run.record
    assert train(small_config(7), run.folder, resume=True)["metrics"] == result["metrics"]
    assert run.read_metrics() == before and run.record == record


def test_a_run_that_goes_on_says_when_it_had_stopped_and_by_which_command(tmp_path):
    run = Run(tmp_path / "run")
    train(small_config(1), run.folder, command="kvq train mine")
    run.update_record(status="failed", error="the disk is full", ended="2026-01-01T00:00:00+00:00")
    train(small_config(2), run.folder, resume=True, command="kvq train mine --resume --steps 2")
    run.write_record({key: value for key, value in run.record.items() if key not in ("ended", "steps")} | {"status": "running"})
    train(small_config(2), run.folder, resume=True)  # killed before it could say that it had finished
    stopped, killed = run.record["resumed"]
    assert (stopped["command"], stopped["stopped"]) == ("kvq train mine --resume --steps 2", "2026-01-01T00:00:00+00:00")
    assert (killed["step"], killed["command"], killed["stopped"]) == (2, None, None)
    assert (run.record["command"], run.record["status"]) == ("kvq train mine", "finished") and "error" not in run.record


def test_a_run_that_goes_on_does_not_say_how_it_ended(tmp_path):
    run, records = Run(tmp_path / "run"), []

    class Look(Progress):
        def start(self, total_steps: int, first_step: int) -> None:
            records.append(run.record)

    train(small_config(1), run.folder)
    train(small_config(2), run.folder, resume=True, progress=Look())
    (record,) = records
    assert record["status"] == "running" and not {"ended", "steps"} & {*record}


def test_resuming_for_fewer_steps_than_were_taken_is_refused_and_changes_nothing(finished):
    _, run = finished
    before = {file: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match="at least the 7 steps"):
        train(small_config(5), run.folder, resume=True)
    assert {file: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()} == before


def test_images_that_a_configuration_names_by_a_relative_path_are_found_from_anywhere(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1), np.uint8)
    np.savez(tmp_path / "images.npz", x_train=images, x_test=images)
    monkeypatch.chdir(tmp_path)
    config = small_config(1, 'data.source="images.npz"', "train.batch_size=4")
    train(config, tmp_path / "run")
    assert Run(tmp_path / "run").config.data.source == str(tmp_path / "images.npz")
    train(config, tmp_path / "run", resume=True)  # the same configuration, still


def test_resuming_with_another_configuration_is_refused_with_the_differences(finished):
    _, run = finished
    with pytest.raises(RunError, match=r"data.crop was 28, is 24, train.seed was 0, is 1\. Its state fits no other"):
        train(small_config(7, "train.seed=1", "data.crop=24", "train.learning_rate=0.5"), run.folder, resume=True)


def test_a_folder_that_holds_a_run_is_refused_and_overwritten_only_when_told(finished, tmp_path):
    train(small_config(1), tmp_path / "run")
    with pytest.raises(RunError, match="--resume .* --overwrite"):
        train(small_config(1), tmp_path / "run")
    assert train(small_config(2), tmp_path / "run", overwrite=True)["steps"] == 2
    assert steps_logged(Run(tmp_path / "run"), "train") == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "data", "message"),
    [
        (["train.batch_size=4096"], None, r"train.batch_size must not be larger than the data set, 2000 images. Received: 4096"),
        (["data.crop=40", "data.pad=0"], None, "smaller than the crop|40"),
        ([], "no/such/place", "no/such/place"),
        ([], "EMPTY", "EMPTY"),
    ],
    ids=["batch", "crop", "missing", "empty"],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing_behind(tmp_path, monkeypatch, overrides, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    with pytest.raises(KvqError, match=message) as error:
        train(small_config(2, *overrides), tmp_path / "run", data=data)
    assert error.value.exit_code == 2
    assert isinstance(error.value, (ConfigError, DataError))
    assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="Give another --out"):
        train(small_config(1), tmp_path / "file" / "run")


def test_a_folder_of_photographs_trains_and_validates_on_another_folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 24), ("other", 8)):
        (tmp_path / name).mkdir()
        for index in range(count):
            height, width = rng.integers(20, 40, 2)
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / name / f"photo {index}'s.jpg")
    config = load_config("mscoco_resnet", [*SMALL[1:], "data.crop=16", "train.batch_size=8", "train.steps=2"])
    result = train(config, tmp_path / "run", data=tmp_path / "train", validation_data=tmp_path / "other")
    run = Run(tmp_path / "run")
    assert result["status"] == "finished"
    assert run.config.data.source == str(tmp_path / "train") and run.config.data.validation == str(tmp_path / "other")
    assert steps_logged(run, "validation") == [2]


def test_describe_says_what_a_configuration_makes():
    described = describe(load_config("fashion_mnist_mini"))
    # 49 tokens of one of 64 codes, 6 bits each.
    assert described["tokens_per_image"] == 49 and described["bits_per_image"] == 294.0
    assert described["training_images"] == 2000 and described["validation_images"] == 500
    assert described["image_shape"] == [28, 28, 1]


def test_tensorboard_summaries_are_written_when_asked_for(tmp_path):
    train(small_config(1), tmp_path / "run", tensorboard=True)
    files = list(Path(tmp_path / "run" / "tensorboard").glob("events*"))
    assert files and files[0].stat().st_size > 1000
