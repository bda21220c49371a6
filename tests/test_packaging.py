"""What is installed is what is in the tree, and importing it costs nothing."""

import importlib.metadata
import importlib.resources
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import kvq
from kvq import backends, diagnosis
from kvq.data import open_source
from kvq.errors import installing

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
FOLDERS = {"kvq": "kvq", "cli": "kvq_cli", "configs": "kvq_configs"}


def package_of(folder: Path) -> str:
    """The name under which a folder of the tree is installed."""
    first, *rest = folder.relative_to(ROOT).parts
    return ".".join([FOLDERS[first], *rest])


def test_every_package_of_the_tree_is_listed() -> None:
    found = {package_of(file.parent) for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    assert found == set(SETUPTOOLS["packages"])
    assert all((ROOT / folder / "__init__.py").exists() for folder in FOLDERS)
    assert SETUPTOOLS["package-dir"] == {package: folder for folder, package in FOLDERS.items()}


def test_every_data_file_is_listed_and_installed() -> None:
    files = [
        file
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix not in {".py", ".pyc"} and "__pycache__" not in file.parts
    ]
    assert files
    listed = {
        ROOT / SETUPTOOLS["package-dir"][package.split(".")[0]] / Path(*package.split(".")[1:]) / pattern
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
    }
    for file in files:
        assert any(file.match(str(pattern)) for pattern in listed), f"pyproject.toml lists no package data for {file}."
        package = next(part for part in FOLDERS.values() if file.is_relative_to(ROOT / SETUPTOOLS["package-dir"][part]))
        inside = file.relative_to(ROOT / SETUPTOOLS["package-dir"][package])
        installed = importlib.resources.files(package).joinpath(*inside.parts)
        assert installed.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("split", "count"), [("train", 2000), ("test", 500)])
def test_shipped_images_open(split: str, count: int) -> None:
    source = open_source("fashion_mnist_mini", split)
    assert len(source) == count
    image = source[0]["image"]
    assert image.shape == (28, 28, 1) and image.dtype == np.uint8 and image.max() > 128


def test_version_has_one_source() -> None:
    assert importlib.metadata.version("kvq") == kvq.__version__
    assert f"## {kvq.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_constraints_pin_everything_that_is_asked_for() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {match[1]: match[2] for line in lines if (match := re.fullmatch(r"([a-z0-9.-]+)==([\w.]+)", line))}
    assert len(pins) == sum(not line.startswith("#") for line in lines)
    project = PYPROJECT["project"]
    wanted = [Requirement(line) for line in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]]
    for requirement in wanted:
        name = requirement.name.lower().replace("_", "-")
        if name != "kvq":
            assert requirement.specifier.contains(pins[name]), requirement


def test_base_package_brings_no_backend() -> None:
    names = {Requirement(line).name for line in PYPROJECT["project"]["dependencies"]}
    assert not names & {"jax", "jaxlib", "tensorflow", "tensorflow-cpu", "torch"}


def test_importing_kvq_leaves_the_choice_of_the_backend_open() -> None:
    code = "import sys, kvq, kvq.config, kvq.backends, kvq.data.sources; dir(kvq); print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"keras", "grain", "jax", "tensorflow", "torch", "typer"} & set(loaded)


@pytest.mark.parametrize("use", ['Tokenizer.load("fashion_mnist_mini")', "VQVAE", "quantizers.VectorQuantizer(4)"])
def test_whoever_chose_no_backend_gets_one_that_is_installed(use: str, tmp_path: Path) -> None:
    """Keras itself would take TensorFlow, installed or not."""
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"} | {"HOME": str(tmp_path)}
    code = f"import kvq; kvq.{use}; import keras; print(keras.backend.backend())"
    process = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert process.stdout.strip() == backends.default(), process.stderr


@pytest.mark.parametrize("name", ["benchmark", "doctor", "load_config", "migrate", "report"])
def test_what_computes_nothing_needs_no_backend(name: str) -> None:
    code = f"import sys, kvq, kvq.backends; kvq.backends.installed = lambda: []; kvq.{name}; print('keras' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    process = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert process.stdout.strip() == "False", process.stderr


@pytest.mark.parametrize("name", kvq.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(kvq, name) is not None


def test_what_is_missing_is_installed_as_the_readme_says() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert {*backends.BACKENDS, *diagnosis.WITH_CUDA.values()} <= {*extras}
    assert installing("tensorflow").partition(" (")[0] in (ROOT / "README.md").read_text("utf-8")
    for path in [*(ROOT / "kvq").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]:
        text = path.read_text("utf-8")
        assert {*re.findall(r"installing\('([\w-]+)'\)", text)} <= {*extras}, path
        # By its name alone a package comes in a version that no test ran with, and without what kvq needs beside it.
        assert "pip install" not in text or path.name == "errors.py", path
