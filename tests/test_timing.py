"""`kvq benchmark`: real processes, one step or a few each."""

import json
import subprocess
import sys

import keras
import pytest

import kvq
from kvq import backends, timing
from kvq.errors import BackendError, TrainingError

HERE = keras.backend.backend()
SMALL = ["model.latent_dim=4", "quantizer.codebook_size=8", "train.batch_size=4", "data.crop=8"]


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.01)


def test_every_backend_takes_its_turns_and_the_figures_fit_together():
    config = kvq.load_config("fashion_mnist_mini", SMALL)
    result = kvq.benchmark(config, names=[HERE], rounds=3)
    facts = result["backends"][HERE]
    assert result["fastest"] == HERE and facts["ratio"] == 1.0
    assert facts["parameters"] == kvq.describe(config)["parameters"]
    assert result["image_shape"] == kvq.describe(config)["image_shape"] and result["batch_size"] == 4
    low, high = facts["step_quartiles"]
    assert 0 < low <= facts["step"] <= high
    assert facts["images_per_second"] == pytest.approx(4 / facts["step"])
    assert facts["version"] == backends.versions()[HERE]


def test_figures_are_medians_and_ratios_of_the_same_round():
    figures = timing._figures([2.0, 30.0, 4.0, 8.0], [1.0, 10.0, 2.0, 2.0], batch_size=6)
    assert figures == {"step": 6.0, "step_quartiles": [3.5, 13.5], "images_per_second": 1.0, "ratio": 2.5}


def test_the_command_prints_one_json_object_and_tells_its_turns_on_stderr():
    sets = [word for one in SMALL for word in ("--set", one)]
    process = subprocess.run(
        [sys.executable, "-m", "kvq_cli", "benchmark", "--backend", HERE, "--rounds", "1", "--json", *sets],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["config"] == "fashion_mnist_mini" and result["fastest"] == HERE
    assert f"{HERE}: first step" in process.stderr


def test_a_backend_that_cannot_be_used_is_named_with_its_reason(monkeypatch):
    monkeypatch.setattr(timing, "WORKER", "raise OSError('no such library')")
    with pytest.raises(TrainingError, match=f"{HERE}: OSError: no such library"):
        kvq.benchmark("fashion_mnist_mini", names=[HERE], rounds=1)


def test_one_that_the_system_kills_is_said_to_want_memory(monkeypatch):
    monkeypatch.setattr(timing, "WORKER", "import os, sys; print('oneDNN is on', file=sys.stderr); os.kill(os.getpid(), 9)")
    with pytest.raises(TrainingError, match=f"{HERE}: killed, probably for want of memory: make train.batch_size"):
        kvq.benchmark("fashion_mnist_mini", names=[HERE], rounds=1)


def test_one_that_fails_leaves_the_others_their_turns(monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda: [HERE, "other"])
    monkeypatch.setattr(backends, "versions", lambda: {HERE: "1", "other": "2"})
    result = kvq.benchmark(kvq.load_config("fashion_mnist_mini", SMALL), rounds=1)
    assert result["fastest"] == HERE and set(result["backends"]["other"]) == {"version", "error"}


def test_a_backend_that_is_not_there_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(timing, "_worker", None)
    with pytest.raises(BackendError, match="The backend must be one of jax, tensorflow, torch. Received: theano."):
        kvq.benchmark("fashion_mnist_mini", names=[HERE, "theano"])
    monkeypatch.setattr(backends, "installed", lambda: [])
    with pytest.raises(BackendError, match=f"Not installed: {HERE}"):
        kvq.benchmark("fashion_mnist_mini", names=[HERE])
