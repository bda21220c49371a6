"""How the backend is chosen, and what `doctor` says about an installation."""

import json
import os
import platform
import re
import subprocess
import sys
import types

import keras
import pytest

from kvq import backends, diagnosis
from kvq.backends import memory
from kvq.errors import BackendError, installing

HERE = keras.backend.backend()


@pytest.fixture
def machine(monkeypatch):
    """A machine to make up: what is installed there, whether it has a GPU, and whether Keras already runs."""

    def make(installed, gpu=False, plugin=False, running=None, variable=None):
        monkeypatch.setattr(backends, "installed", lambda: [name for name in backends.BACKENDS if name in installed])
        monkeypatch.setattr(backends, "gpu_found", lambda: gpu)
        monkeypatch.setattr(backends, "jax_gpu_plugin", lambda: plugin)
        monkeypatch.setattr(backends, "_running", lambda: running)
        # Set before deleted, so that what `choose` sets is undone as well.
        monkeypatch.setenv("KERAS_BACKEND", variable or "")
        if variable is None:
            monkeypatch.delenv("KERAS_BACKEND")

    return make


ALL = ("tensorflow", "torch", "jax")


@pytest.mark.parametrize(
    ("installed", "gpu", "plugin", "expected"),
    [
        (ALL, False, False, "tensorflow"),
        (("torch", "jax"), False, False, "torch"),
        (("jax",), False, False, "jax"),
        (ALL, True, True, "jax"),
        (ALL, True, False, "torch"),
        (("tensorflow", "jax"), True, False, "tensorflow"),
        (("tensorflow", "torch"), True, False, "torch"),
        (("jax",), True, False, "jax"),
    ],
)
def test_default(machine, installed, gpu, plugin, expected) -> None:
    machine(installed, gpu, plugin)
    assert backends.default() == expected
    lines = []
    assert backends.choose(report=lines.append) == expected
    assert os.environ["KERAS_BACKEND"] == expected
    assert lines == [f"backend: {expected} ({'GPU' if gpu else 'no GPU'} found; --backend chooses)"]


def test_option_goes_before_variable_and_variable_before_default(machine) -> None:
    machine(ALL, variable="torch")
    assert backends.choose() == "torch"
    assert backends.choose("jax") == "jax"
    assert os.environ["KERAS_BACKEND"] == "jax"


def test_keras_already_running_is_kept(machine) -> None:
    machine(ALL, running="jax", variable="torch")
    assert backends.choose() == "jax"
    with pytest.raises(BackendError, match="already runs on jax"):
        backends.choose("torch")


@pytest.mark.parametrize(
    ("installed", "option", "variable", "message"),
    [
        (ALL, "theano", None, "must be one of jax, tensorflow, torch. Received: theano"),
        (ALL, None, "numpy", r"Received: numpy \(from KERAS_BACKEND\)"),
        (("jax",), "torch", None, re.escape(installing("torch")) + "$"),
        ((), None, None, r"No backend is installed\. Install tensorflow or torch or jax, as with: pip install -c "),
    ],
)
def test_a_choice_that_cannot_be_had(machine, installed, option, variable, message) -> None:
    machine(installed, variable=variable)
    with pytest.raises(BackendError, match=message) as error:
        backends.choose(option)
    assert error.value.exit_code == 2
    assert os.environ.get("KERAS_BACKEND") == variable


def test_finding_backends_imports_none() -> None:
    code = "import sys; from kvq import backends; backends.default(); backends.versions(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"keras", "jax", "tensorflow", "torch"} & set(loaded)


def test_a_folder_of_that_name_is_no_backend(monkeypatch, tmp_path) -> None:
    (tmp_path / "kvq_no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not backends._importable("kvq_no_such_package")


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus_are_not_found(monkeypatch, visible) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert not backends.gpu_found()


def test_this_backend() -> None:
    assert HERE in backends.installed()
    assert backends.versions()[HERE]
    assert backends.devices(HERE)
    assert backends.threads(HERE) >= 1
    assert isinstance(backends.tf32(HERE), bool)
    assert backends.choose() == HERE


def test_doctor_finds_nothing_wrong_here(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    report = json.loads(json.dumps(diagnosis.doctor()))
    assert report["problems"] == []
    assert report["backends"][HERE]["devices"] == ["cpu"]
    assert report["backends"][HERE]["tf32"] is None
    assert report["default"] in report["backends"]
    assert report["data"]["fashion_mnist_mini"]
    assert report["cpus"] >= 1 and report["keras"] == keras.__version__


SOUND = {"version": "1.0", "devices": ["cpu"], "threads": 2, "tf32": None}


@pytest.mark.parametrize(
    ("found", "gpu", "expected"),
    [
        ({}, False, ["No backend is installed"]),
        ({"jax": {"version": "1.0", "error": "no libcuda"}}, False, ["jax is installed and cannot be used: no libcuda"]),
        (
            {"jax": SOUND},
            True,
            [f"jax sees no GPU, although this machine has one. Install its GPU version with: {installing('jax-cuda')}"],
        ),
        ({"torch": SOUND}, True, ["torch sees no GPU"]),
        ({"jax": {**SOUND, "devices": ["gpu: NVIDIA"]}}, True, []),
        ({"jax": SOUND}, False, []),
    ],
)
def test_problems_with_backends(monkeypatch, found, gpu, expected) -> None:
    monkeypatch.setattr(backends, "gpu_found", lambda: gpu)
    monkeypatch.setattr(backends, "distributions", lambda name: [name])
    monkeypatch.setattr(diagnosis, "_unmet_requirements", lambda distributions: [])
    problems = list(diagnosis.problems(found))
    assert len(problems) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(problems, expected, strict=True))


def test_problems_with_packages(monkeypatch) -> None:
    versions = {"kvq": "0.1.0", "keras": "3.9.2", "tensorflow": "2.18", "tensorflow-cpu": "2.18", "numpy": "1.26"}
    requires = {"kvq": ["keras>=3.15", "numpy", "grain>=1", 'absent; extra == "test"'], "tensorflow": ["numpy>=2"]}
    monkeypatch.setattr(diagnosis, "_version", versions.get)
    monkeypatch.setattr(backends, "_version", versions.get)
    monkeypatch.setattr(diagnosis.importlib.metadata, "requires", lambda name: requires.get(name))
    assert sorted(diagnosis.problems({"tensorflow": SOUND})) == [
        "Keras 3.9.2 is too old. Install 3.15 or later with: pip install -c constraints.txt . (in a clone of kvq)",
        "kvq needs grain>=1, which is not installed.",
        "kvq needs keras>=3.15. Installed: keras 3.9.2.",
        "tensorflow and tensorflow-cpu are installed and overwrite each other's files. Uninstall both, then install one.",
        "tensorflow needs numpy>=2. Installed: numpy 1.26.",
    ]


# Memory.

USES_MEMORY_AGAIN = """
import resource, sys
import numpy as np
from kvq.backends.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

told = "kept" in sys.argv[1:] and keep_freed_memory("jax")
np.ones(2**23)
before = faults()
for _ in range(10):
    np.ones(2**23)  # 64 MiB, of 2**14 pages: beyond what the C library keeps by itself
print(told, (faults() - before) / 10 / 2**14)
"""


def memory_used_again(*arguments, **environment):
    """Whether the C library was told to keep memory, and the share of a block that the system had to give anew."""
    about_memory = {"GLIBC_TUNABLES", "LD_PRELOAD"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name not in about_memory}
    environment = {**clean, "CUDA_VISIBLE_DEVICES": "", "NUMPY_MADVISE_HUGEPAGE": "0", **environment}
    command = [sys.executable, "-c", USES_MEMORY_AGAIN, *arguments]
    told, share = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
    return told == "True", float(share)


OF_GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's: elsewhere memory stays as it is")


@OF_GLIBC
def test_freed_memory_is_used_again_where_it_is_asked_for():
    assert memory_used_again()[1] > 0.9  # else there is nothing to gain here
    told, share = memory_used_again("kept")
    assert told and share < 0.05


@OF_GLIBC
@pytest.mark.parametrize(("setting", "value"), [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")])
def test_what_the_environment_says_about_memory_stays(setting, value):
    told, _ = memory_used_again("kept", **{setting: value})
    assert not told


@pytest.mark.parametrize("name", ["jax", "tensorflow", "torch"])
@pytest.mark.parametrize(("limit", "expected"), [(2**40, 2**30), (2**25, 2**25), (2**20, None)])
def test_an_older_c_library_keeps_what_it_can_or_is_left_as_it_is(monkeypatch, limit, expected, name):
    asked = []

    def mallopt(setting, value):
        taken = setting != memory.MMAP_THRESHOLD or value <= limit
        asked.append((setting, value)) if taken else None
        return int(taken)

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(memory, "gpu_found", lambda: False)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    for setting in [each for each in os.environ if each.startswith("MALLOC_")] + ["GLIBC_TUNABLES", "LD_PRELOAD"]:
        monkeypatch.delenv(setting, raising=False)
    assert memory.keep_freed_memory(name) is (expected is not None)
    of_threads = {"jax": [(memory.ARENA_MAX, 1)], "tensorflow": [(memory.TOP_PAD, 2**26)], "torch": []}
    kept = [(memory.MMAP_THRESHOLD, expected), (memory.TRIM_THRESHOLD, -1), *of_threads[name]]
    assert asked == (kept if expected else [])


def test_another_c_library_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(memory, "gpu_found", lambda: False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: types.SimpleNamespace())
    assert not memory.keep_freed_memory("torch")


def test_nothing_is_kept_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(memory, "gpu_found", lambda: True)
    monkeypatch.setattr(memory.ctypes, "CDLL", None)  # would raise
    assert not memory.keep_freed_memory("torch")


def test_commands_that_compute_keep_the_memory_they_free(monkeypatch):
    from kvq_cli import computing

    asked = []
    monkeypatch.setattr(computing, "keep_freed_memory", asked.append)
    with computing.computing(HERE):
        assert asked == [HERE]
