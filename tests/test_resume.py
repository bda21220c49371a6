"""A run that was killed and resumed is the run that was not: real processes, real signals, bit for bit."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from kvq.config import load_config
from kvq.errors import DataError, RunError
from kvq.run import Run
from kvq.training import train

STEPS = 30
SMALL = {
    "train.batch_size": 16,
    "model.latent_dim": 8,
    "quantizer.codebook_size": 16,
    "data.validation_images": 16,
    "train.log_every": 7,
    "train.sample_every": 1000,
    "train.warmup_steps": 3,
    # At the same steps, so that a resume finds them done.
    "checkpoint.every_steps": 5,
    "train.validate_every": 5,
    "codebook.replace_dead_every": 5,
    "codebook.dead_below": 0.9,
    "train.log_batches": "true",
}


def changes(**extra):
    return [f"{key}={value}" for key, value in {**SMALL, "train.steps": STEPS, **extra}.items()]


def command(run: Path, *flags: str) -> list[str]:
    settings = [word for change in changes() for word in ("--set", change)]
    backend = keras.backend.backend()
    return [
        sys.executable,
        "-m",
        "kvq_cli",
        "train",
        "fashion_mnist_mini",
        "--out",
        str(run),
        "--backend",
        backend,
        *settings,
        *flags,
    ]


def whole_state(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "checkpoints" / f"step_{STEPS:08d}" / "state.safetensors")


def records(run: Path) -> list[dict]:
    """What was logged, without what a clock decides."""
    timed = {"images_per_second", "input_wait"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


# With two threads PyTorch's last bit differs between runs on busy cores, also between two that nobody stopped.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """In a process of its own, as those that are killed: what else runs in a process may change how it rounds."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    subprocess.run(command(run), check=True, capture_output=True, env=ONE_THREAD)
    return run


def test_killed_at_a_random_moment_and_resumed_gives_the_same_bits(straight, tmp_path):
    """Weights, optimizer, seeds and sums; every record of the log, hashes of the batches too; and nothing is left behind."""
    run, moment = tmp_path / "run", random.Random(os.getpid()).uniform(0, 0.4)
    process = subprocess.Popen(command(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    while process.poll() is None and not list(run.glob("checkpoints/step_*")):
        time.sleep(0.005)
    time.sleep(moment)
    process.kill()
    process.wait()
    resumed = subprocess.run(command(run, "--resume-or-start"), capture_output=True, text=True, env=ONE_THREAD)
    assert resumed.returncode == 0, resumed.stderr
    before, after = whole_state(straight), whole_state(run)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=f"{name}, killed {moment:.3f} s after the first checkpoint")
    assert records(run) == records(straight)
    assert [record["step"] for record in records(run) if record["split"] == "batch"] == [*range(1, STEPS + 1)]
    hidden = {path.name for path in run.rglob(".*") if path.name != ".lock"}
    assert not {name for name in hidden if not name.startswith(".step_")}, "only what a kill left of a checkpoint may stay"


def test_a_stop_between_two_records_loses_no_measurement(straight, tmp_path):
    """The sums since the last record are part of the state: step 7's record covers steps 2 to 7, stopped at 5 or not."""
    run = tmp_path / "run"
    config = load_config("fashion_mnist_mini", changes())
    stopped = {"at": 0}

    class Stop(Exception):
        pass

    from kvq.progress import Progress

    class StopAt(Progress):
        def step(self, step):
            stopped["at"] = step
            if step == 6:
                raise Stop

    with pytest.raises(Stop):
        train(config, run, progress=StopAt())
    assert stopped["at"] == 6 and Run(run).record["status"] == "failed"
    train(config, run, resume=True)
    # Not to the bit, since this process also did other things; without the sums it would be the mean of steps 6 and 7 alone.
    one, other = (next(r for r in records(folder) if r["step"] == 7) for folder in (run, straight))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_sigterm_saves_and_leaves_with_the_status_that_says_so(tmp_path):
    """As Ctrl-C does, for which tests/test_cli.py has one."""
    run = tmp_path / "run"
    process = start(run, "--steps", "100000", "--json")
    process.send_signal(signal.SIGTERM)
    result = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == 130
    record = Run(run).record
    assert result["status"] == record["status"] == "interrupted" and result["steps"] == record["steps"]
    assert (run / "checkpoints" / f"step_{record['steps']:08d}" / "state.json").exists()
    assert (run / "model" / "config.json").exists()
    assert "a second Ctrl-C or SIGTERM leaves at once and loses the steps" in (run / "log.txt").read_text("utf-8")


def test_a_second_signal_leaves_at_once_and_what_was_saved_before_stays(tmp_path):
    run = tmp_path / "run"
    process = start(run, "--steps", "100000")
    saved = whole_states(run)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)  # two that come together are one
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    # The second one may also find Python on its way out, where the system answers it.
    assert process.returncode in (130, -signal.SIGINT)
    # Two are kept, so of those that were there at least one still is; and what is there is whole.
    assert whole_states(run) and max(whole_states(run)) >= max(saved)
    assert not (run / "model").exists() or (run / "model" / "model.safetensors").exists()


def start(run: Path, *flags: str) -> subprocess.Popen:
    """A run that has a checkpoint."""
    process = subprocess.Popen(command(run, *flags), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while process.poll() is None and not list(run.glob("checkpoints/step_*")):
        time.sleep(0.01)
    return process


def whole_states(run: Path) -> list[str]:
    """Names of the checkpoints whose checksum holds."""
    return sorted(
        folder.name
        for folder in run.glob("checkpoints/step_*")
        if hashlib.sha256((folder / "state.safetensors").read_bytes()).hexdigest()
        == json.loads((folder / "state.json").read_text("utf-8"))["sha256"]
    )


def test_a_finished_run_says_so_and_a_larger_number_of_steps_extends_it(straight, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    again = subprocess.run(command(run, "--resume", "--json"), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["status"] == "finished" and json.loads(again.stdout)["steps"] == STEPS
    assert f"All {STEPS} steps were taken before. A larger train.steps (--steps) goes on from there." in again.stderr
    longer = subprocess.run(command(run, "--resume", "--json", "--steps", str(STEPS + 2)), capture_output=True, text=True)
    assert longer.returncode == 0, longer.stderr
    assert json.loads(longer.stdout)["steps"] == STEPS + 2 and records(run)[-1]["step"] == STEPS + 2


def test_resume_or_start_starts_where_there_is_nothing_and_where_nothing_was_saved(tmp_path):
    config = load_config("fashion_mnist_mini", changes(**{"train.steps": 2}))
    run = tmp_path / "run"
    assert train(config, run, resume_or_start=True)["steps"] == 2
    shutil.rmtree(run / "checkpoints")
    # What it ended with is there: it is not thrown away for want of a checkpoint.
    with pytest.raises(RunError, match="no whole checkpoint to resume from. Give --overwrite"):
        train(config, run, resume_or_start=True)
    shutil.rmtree(run / "model")
    assert train(config, run, resume_or_start=True)["steps"] == 2
    with pytest.raises(RunError, match="train.batch_size was 16, is 8"):
        train(load_config("fashion_mnist_mini", changes(**{"train.batch_size": 8})), tmp_path / "run", resume_or_start=True)


@pytest.fixture
def photos(tmp_path):
    """A folder of images, and the settings of a run of two steps on them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(30):
        Image.fromarray(np.full((28, 28, 3), number * 8, np.uint8)).save(folder / f"{number:02d}.png")
    return folder, {"train.steps": 2, "data.source": f'"{folder}"', "data.pad": 0, "train.batch_size": 8}


def test_changed_images_are_refused_with_what_changed(photos, tmp_path):
    (folder, few), run = photos, tmp_path / "run"
    train(load_config("fashion_mnist_mini", changes(**few)), run)
    longer = load_config("fashion_mnist_mini", changes(**{**few, "train.steps": 3}))
    (folder / "05.png").unlink()
    Image.new("RGB", (28, 28)).save(folder / "99.png")
    with pytest.raises(RunError, match=r"train images .* have changed.*\d are gone \(05.png.*, \d are new.*--changed-data"):
        train(longer, run, resume=True)
    assert train(longer, run, resume=True, changed_data=True)["steps"] == 3


@pytest.mark.slow
def test_images_that_moved_are_the_same_and_others_of_the_same_names_are_not(photos, tmp_path):
    (folder, few), run = photos, tmp_path / "run"
    train(load_config("fashion_mnist_mini", changes(**few)), run)
    kept = Run(run).listing_file("train").read_bytes()
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="No file or folder .*photos.* --data gives the new place"):
        train(load_config(run, ["train.steps=3"]), run, resume=True)
    assert train(load_config(run, ["train.steps=3"]), run, resume=True, data=moved)["steps"] == 3
    assert load_config(run).data.source == str(moved) and Run(run).listing_file("train").read_bytes() == kept
    # With more of them the run keeps to those that it began with.
    other = tmp_path / "other"
    other.mkdir()
    for path in moved.iterdir():
        Image.fromarray(np.full((28, 28, 3), 99, np.uint8)).save(other / path.name)
    with pytest.raises(RunError, match="files of these names hold something else.*--changed-data"):
        train(load_config(run, ["train.steps=4"]), run, resume=True, data=other)
    (other / "05.png").unlink()
    for name in ("00a.png", "00b.png"):
        Image.new("RGB", (28, 28)).save(other / name)
    with pytest.raises(RunError, match=r"28 images then, 29 now; 2 are gone \(05.png.*, 3 are new \(00a.png"):
        train(load_config(run, ["train.steps=4"]), run, resume=True, data=other)
    assert train(load_config(run, ["train.steps=4"]), run, resume=True, data=other, changed_data=True)["steps"] == 4
    assert Run(run).listing_file("train").read_bytes() == kept


def test_changed_arrays_are_refused(tmp_path):
    """Of arrays the contents count."""
    arrays = {name: np.zeros((40, 28, 28), np.uint8) for name in ("x_train", "x_test")}
    np.savez(tmp_path / "a.npz", **arrays)
    few = {"train.steps": 1, "data.source": f'"{tmp_path / "a.npz"}"', "data.pad": 0, "train.batch_size": 8}
    train(load_config("fashion_mnist_mini", changes(**few)), tmp_path / "arrays")
    arrays["x_train"][3, 3, 3] = 1
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(RunError, match="train images of .* have changed since it began: 40 images then, 40 now"):
        train(load_config("fashion_mnist_mini", changes(**{**few, "train.steps": 2})), tmp_path / "arrays", resume=True)


# On another backend. tests/golden/make_resume.py made the run, and its losses from there, on JAX.


def test_a_run_goes_on_on_another_backend_as_on_its_own(tmp_path):
    golden = Path(__file__).parent / "golden" / "resume"
    run = Run(shutil.copytree(golden / "run", tmp_path / "run"))
    expected = np.load(golden / "losses.npy")
    config = load_config(run.folder, [f"train.steps={100 + len(expected)}"])
    train(config, run.folder, resume=True, changed_data=False)
    losses = np.array([r["loss"] for r in run.read_metrics() if r["split"] == "train" and r["step"] > 100])
    apart = np.abs(losses / expected - 1)
    assert apart[0] < 1e-4, "the first step after the change"
    assert apart[:5].max() < 1e-3
    assert abs(losses.mean() / expected.mean() - 1) < 0.02
    assert run.record["resumed"][0]["backend"] == keras.backend.backend()
