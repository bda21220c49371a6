"""What `kvq encode --engine ray` promises: the bytes of the local engine, whatever dies on the way, and one clear error."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from kvq_cli.main import app
from PIL import Image
from typer.testing import CliRunner

from kvq import load_config
from kvq.artifact import save
from kvq.build import build_model
from kvq.data import TokenSource
from kvq.errors import BackendError, WorkerError, installing
from kvq.tokens import ray_engine
from kvq.tokens.encoding import encode
from kvq.tokens.engines import LocalEngine
from kvq.tokens.ray_engine import ATTEMPTS, RayEngine

SIDE = 8
CUT = {"split": "all", "batch_size": 4, "shard_size": 10}
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason=f"Ray is not installed: {installing('ray')}")
# Ray Data 2.60 warns of settings that it makes itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    config = load_config("fashion_mnist_mini", ["model.latent_dim=4", "quantizer.codebook_size=12", f"data.crop={SIDE}"])
    keras.utils.set_random_seed(0)
    built = build_model(config.model, config.quantizer, config.loss, 3)
    # Codes where the latents are, so that images come out as several.
    noise = np.random.default_rng(0).uniform(-1, 1, (16, SIDE, SIDE, 3)).astype("float32")
    built.quantizer.initialise(np.asarray(built.encoder.predict_on_batch(noise)))
    save(built, config, 3, "fashion_mnist_mini", "train", 1, folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """45 images; two are broken."""
    folder, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(45):
        path = folder / f"{number:02d}.png"
        Image.fromarray(rng.integers(0, 256, (9 + number % 3, 12, 3), np.uint8)).save(path)
        if number in (7, 20):
            path.write_bytes(path.read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """8,000 images in 400 shards of 20: work for a while."""
    file = tmp_path_factory.mktemp("data") / "many.npz"
    images = np.random.default_rng(0).integers(0, 256, (8000, SIDE, SIDE, 3), np.uint8)
    np.savez(file, x_train=images, y_train=np.arange(8000) % 10)
    return file


@pytest.fixture(scope="module")
def ray():
    """A Ray that this process has started, and that kvq must leave as it is."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Whatever encodes


def test_shards_may_come_in_any_order(model, photos, tmp_path):
    class Backwards(LocalEngine):
        def start(self, job):
            started = super().start(job)

            class Context:
                def __enter__(self):
                    encode_shards = started.__enter__()
                    return lambda numbers, on_images: encode_shards(reversed(numbers), on_images)

                def __exit__(self, *error):
                    return started.__exit__(*error)

            return Context()

    encode(model, photos, tmp_path / "whole", **CUT)
    result = encode(model, photos, tmp_path / "set", **CUT, engine=Backwards())
    assert result["complete"] and result["encoded"] == 43
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_without_ray_it_says_what_to_install(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "_installed", lambda: False)
    with pytest.raises(BackendError):
        RayEngine()
    result = run("encode", model, photos, "--split", "all", "--out", tmp_path / "set", "--engine", "ray")
    assert result.exit_code == 2 and f"error: Encoding on Ray needs it: {installing('ray')}." in result.stderr
    assert not (tmp_path / "set").exists()


def test_workers_without_ray_are_wrong_usage(model, photos, tmp_path):
    result = run("encode", model, photos, "--split", "all", "--out", tmp_path / "set", "--workers", "2")
    assert result.exit_code == 2 and "--workers goes with --engine ray" in result.stderr and not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("cluster", "wanted", "shards", "expected"),
    [
        ({"CPU": 64.0, "GPU": 8.0}, None, 1000, (8, {"num_gpus": 1})),
        ({"CPU": 64.0, "GPU": 8.0}, 2, 1000, (2, {"num_gpus": 1})),
        ({"CPU": 64.0, "GPU": 8.0}, None, 3, (3, {"num_gpus": 1})),
        ({"CPU": 64.0}, None, 1000, (16, {"num_cpus": 4})),
        ({"CPU": 64.0}, 20, 1000, (20, {"num_cpus": 3})),
        ({"CPU": 2.0}, None, 1000, (1, {"num_cpus": 2})),
        ({"CPU": 2.0}, 2, 1000, (2, {"num_cpus": 1})),
        ({"CPU": 2.0}, 5, 1000, (5, {"num_cpus": 1})),
    ],
)
def test_workers_take_what_the_cluster_has(cluster, wanted, shards, expected):
    assert ray_engine._share(cluster, wanted, shards) == expected


@needs_ray
def test_a_cluster_that_is_not_there_is_said_so(model, photos, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(WorkerError, match=f"Ray could not be reached at RAY_ADDRESS={address}: .*refused"):
        encode(model, photos, tmp_path / "set", **CUT, engine=RayEngine())
    assert "RAY_BACKEND_LOG_LEVEL" not in os.environ


# In a Ray of this process. Each test starts workers that import Keras, which takes 10 s and more.


@needs_ray
@pytest.mark.slow
def test_the_bytes_are_those_of_the_local_engine(ray, model, photos, tmp_path, monkeypatch):
    encode(model, photos, tmp_path / "local", **CUT)
    # Workers start in folders of their own.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "model")
    shutil.copytree(photos, "photos")
    result = encode("model", "photos", "set", **CUT, shard=(1, 2), engine=RayEngine(2))
    assert not result["complete"] and (result["images"], result["skipped"], result["encoded"]) == (20, 0, 20)
    result = encode("model", "photos", "set", **CUT, engine=RayEngine(2))
    assert result["complete"] and (result["images"], result["skipped"], result["encoded"]) == (43, 2, 23)
    assert contents(tmp_path / "set") == contents(tmp_path / "local")
    assert ray.is_initialized()


class BrokenOnTheWay(RayEngine):
    """The model is whole when the call begins, and broken when workers load it."""

    def start(self, job):
        weights = job.model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        return super().start(job)


@needs_ray
@pytest.mark.slow
def test_what_fails_in_a_worker_is_one_error_here(ray, model, photos, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    with pytest.raises(WorkerError, match=r"A worker on .* failed: .*model.*What is encoded already is kept") as failure:
        encode(tmp_path / "model", photos, tmp_path / "set", **CUT, engine=BrokenOnTheWay(2))
    assert failure.value.exit_code == 1 and "Traceback" not in str(failure.value)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("when", ["start", "shard"])
def test_work_that_kills_each_worker_is_given_up(ray, model, photos, tmp_path, monkeypatch, when):
    # A class of a function travels to the workers whole.
    class Worker(ray_engine._Worker):
        def _load(self):
            if when == "start":
                os.kill(os.getpid(), signal.SIGKILL)
            super()._load()

        def _encode(self, number):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ray_engine, "_Worker", Worker)
    with pytest.raises(WorkerError, match=f"{ATTEMPTS} workers died at (the )?{when}.*memory"):
        encode(model, photos, tmp_path / "set", **CUT, engine=RayEngine(1))


@needs_ray
@pytest.mark.slow
def test_workers_that_see_another_folder_are_told_from_those_that_see_this_one(ray, model, photos, tmp_path):
    class Elsewhere(RayEngine):
        def start(self, job):
            shutil.move(job.out, tmp_path / "moved")
            return super().start(job)

    with pytest.raises(WorkerError, match="Give a folder that all machines see under the same path"):
        encode(model, photos, tmp_path / "set", **CUT, engine=Elsewhere(1))


# As a command, with a Ray of its own


@pytest.fixture
def command(model, many, tmp_path):
    """`kvq encode --engine ray` at work: the process, once the first shard is there."""
    arguments = ["encode", model, many, "--shard-size", 20, "--batch-size", 20, "--out", tmp_path / "set", "--json"]
    arguments += ["--engine", "ray", "--workers", 2]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "kvq_cli", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 240
        while not list(tmp_path.glob("set/.shard-*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, "no shard in 240 s"
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def descendants(pid):
    """Process numbers and titles of all processes below one."""
    lines = subprocess.run(["ps", "-axo", "pid=,ppid=,command="], capture_output=True, text=True, check=True).stdout.splitlines()
    processes = {int(pid): (int(parent), *title) for pid, parent, *title in (line.split(None, 2) for line in lines)}
    below, found = {pid}, {}
    while below:
        below = {child for child, (parent, *_) in processes.items() if parent in below}
        found |= {child: " ".join(processes[child][1:]) for child in below}
    return found


def workers_of(process):
    return {pid for pid, title in descendants(process.pid).items() if title.startswith("ray::MapWorker")}


def shards_done(folder):
    return len(list(folder.glob(".shard-*")))


@needs_ray
@pytest.mark.slow
def test_a_worker_is_killed_and_nothing_is_lost_and_nothing_doubled(command, model, many, tmp_path):
    until = time.monotonic() + 60
    while len(before := workers_of(command)) < 2 or shards_done(tmp_path / "set") < 20:
        assert time.monotonic() < until, before
        time.sleep(0.05)
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    at = shards_done(tmp_path / "set")
    assert 20 <= at < 300, "it must be killed at work"
    seen = set()
    while command.poll() is None:
        seen |= workers_of(command)
        time.sleep(0.2)
    out, said = command.communicate()
    assert command.returncode == 0, said
    assert seen - before, "another worker must have come in its place"
    result = json.loads(out)
    assert (result["images"], result["encoded"], result["shards"], result["complete"]) == (8000, 8000, 400, True)
    assert "Traceback" not in said and not re.search(r"^(\[?20\d\d-|\()", said, re.MULTILINE), "Ray's own lines"
    source = TokenSource(tmp_path / "set", verify=True)
    assert [source[i]["name"] for i in range(0, 8000, 7)] == [f"train/{i:05d}" for i in range(0, 8000, 7)]
    encode(model, many, tmp_path / "local", shard_size=20, batch_size=20)
    assert contents(tmp_path / "set") == contents(tmp_path / "local")


@needs_ray
@pytest.mark.slow
def test_interrupted_it_keeps_what_is_done_and_leaves_no_process(command, model, many, tmp_path):
    below = descendants(command.pid)
    command.send_signal(signal.SIGINT)
    out, said = command.communicate(timeout=60)
    assert command.returncode == 130 and out == "" and said.endswith("interrupted\n") and "Traceback" not in said, said
    until = time.monotonic() + 30
    while left := [pid for pid in below if _runs(pid)]:
        assert time.monotonic() < until, left
        time.sleep(0.2)
    done = shards_done(tmp_path / "set")
    assert 0 < done < 400
    result = encode(model, many, tmp_path / "set", shard_size=20, batch_size=20)
    assert result["complete"] and result["encoded"] == 8000 - 20 * done


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
