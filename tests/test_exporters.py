"""What `kvq export` promises, over every format: files that run in their own runtime and say what the model says."""

import dataclasses
import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from kvq import artifact
from kvq.backends import BACKENDS
from kvq.build import build_model
from kvq.config import RunConfig, load_config
from kvq.data import open_source
from kvq.errors import BackendError, ExportError, KvqError, installing
from kvq.exporters import EXPORTERS, export, writers
from kvq.exporters import check as check_module
from kvq.exporters.parts import Loaded
from kvq.exporters.samples import of_another_size, sample_images
from kvq.tokenizer import Tokenizer
from kvq.training import train

ALL = ["encoder", "decoder", "autoencoder"]
# PyTorch and JAX take long for an autoencoder whose size is free; `nox -s export` writes those as well.
HALVES = ["encoder", "decoder"]
FORMATS = {
    "onnx": ALL,
    "saved_model": ALL,
    "litert": ALL,
    "openvino": HALVES,
    "torch": HALVES,
    "stablehlo": HALVES,
    "keras": ALL,
}
# Those whose example needs kvq and Keras.
NEED_KVQ = {"keras"}
# Runs a program where neither can be imported.
WITHOUT_KVQ = """
import runpy, sys
sys.modules["kvq"] = sys.modules["keras"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    small = ["train.steps=3", "train.batch_size=16", "model.latent_dim=8", "quantizer.codebook_size=16"]
    train(load_config("fashion_mnist_mini", [*small, "data.validation_images=16"]), folder)
    return folder


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, run):
    try:
        writers.choose_backend(request.param, EXPORTERS[request.param], None)
    except BackendError as error:
        pytest.skip(f"Not installed beside {keras.backend.backend()}; `nox -s export` tries it. {error}")
    folder = run.parent / request.param
    return request.param, folder, export(run, request.param, folder, FORMATS[request.param])


def test_every_format_is_tested():
    # Those that are a whole, with a runtime, are tested in test_export_web.py.
    assert {*FORMATS} == {format for format, exporter in EXPORTERS.items() if not exporter.bundle} == {*EXPORTERS} - {"web"}


def test_parts_are_written_and_compared(exported):
    format, folder, report = exported
    files = {path.name for path in folder.iterdir() if path.suffix != ".bin"}
    assert files == {"report.json", "example.py", *(f"{part}.{EXPORTERS[format].extension}" for part in FORMATS[format])}
    assert report == json.loads((folder / "report.json").read_text("utf-8"))
    assert report["compared_on"] == "64 images of fashion_mnist_mini"
    for part, entry in report["parts"].items():
        (given,), (result,) = entry["inputs"], entry["outputs"]
        assert given["dtype"] in ({"int32", "tensor(int32)"} if part == "decoder" else {"uint8", "tensor(uint8)"})
        assert result["dtype"] in ({"int32", "tensor(int32)"} if part == "encoder" else {"uint8", "tensor(uint8)"})
        assert not isinstance(given["shape"][0], int) and not isinstance(result["shape"][0], int)
        assert entry["bytes"] > 10_000 and entry["latency_ms"]["13"]["exported"] > 0 and entry["batches"] == [12, 13]
    assert report["parts"]["encoder"]["different_indices"] <= report["parts"]["encoder"]["near_ties"]
    assert report["parts"]["decoder"]["largest_difference"] <= 1


def test_a_file_takes_any_number_of_images_and_other_sizes(exported, run):
    format, folder, report = exported
    tokenizer = Tokenizer.load(run)
    encoder, decoder = (EXPORTERS[format].load(folder / f"{part}.{EXPORTERS[format].extension}") for part in HALVES)
    images = open_source("fashion_mnist_mini", "test").fetch(np.arange(100, 116))["images"]
    batches = [images[:1], images]
    if report["image_size"] == "free, multiples of 4":
        batches.append(of_another_size(images[:5], 4))
        assert batches[-1].shape == (5, 32, 36, 1)
    else:
        assert report["image_size"] == "28x28"
    for batch in batches:
        indices = encoder.run(batch)
        assert indices.dtype == np.int32
        ties = check_module.near_ties(tokenizer, batch)
        assert (indices == tokenizer.encode(batch))[~ties].all()
        restored = decoder.run(indices)
        assert restored.dtype == np.uint8
        assert np.abs(restored.astype(int) - tokenizer.decode(indices)).max() <= 1


def test_the_example_runs_where_there_is_no_kvq_and_no_keras(exported, run, tmp_path):
    format, folder, _ = exported
    image = open_source("fashion_mnist_mini", "test")[7]["image"]
    # It takes the middle square.
    Image.fromarray(np.pad(image[..., 0], ((0, 0), (9, 9)), constant_values=200)).save(tmp_path / "image.png")

    def example(part, given, result):
        program = [] if format in NEED_KVQ else ["-c", WITHOUT_KVQ]
        file = folder / f"{part}.{EXPORTERS[format].extension}"
        command = [sys.executable, *program, folder / "example.py", file, tmp_path / given, tmp_path / result]
        # Nor has anybody to say which backend is there.
        environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
        subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, env=environment)

    example("encoder", "image.png", "indices.npy")
    indices = np.load(tmp_path / "indices.npy")
    ties = check_module.near_ties(Tokenizer.load(run), image[None])
    assert indices.dtype == np.int32 and (indices == Tokenizer.load(run).encode(image[None]))[~ties].all()
    example("decoder", "indices.npy", "restored.png")
    restored = np.asarray(Image.open(tmp_path / "restored.png"))
    assert np.abs(restored.astype(int) - Tokenizer.load(run).decode(indices)[0, ..., 0]).max() <= 1
    assert len((folder / "example.py").read_text("utf-8").splitlines()) <= 20
    alone = subprocess.run([sys.executable, folder / "example.py"], capture_output=True, text=True)
    assert alone.returncode == 1 and f"python example.py encoder.{EXPORTERS[format].extension}" in alone.stderr


def test_onnx_files_name_their_inputs_and_outputs(exported):
    format, _, report = exported
    if format == "onnx":
        names = {"encoder": ("images", "indices"), "decoder": ("indices", "reconstruction")}
        for part, expected in {**names, "autoencoder": ("images", "reconstruction")}.items():
            (given,), (result,) = report["parts"][part]["inputs"], report["parts"][part]["outputs"]
            assert (given["name"], result["name"]) == expected and given["shape"][0] == "batch"
            assert report["parts"][part]["opset"] >= 15


def test_files_of_others_are_left_alone(run, tmp_path):
    (tmp_path / "example.py").write_text("mine")
    with pytest.raises(KvqError, match="holds files, and no report.json of an export. Give another --out"):
        export(run, "keras", tmp_path, ["decoder"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"example.py": "mine"}


def test_the_process_of_another_backend_takes_no_module_from_the_working_directory(run, tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise SystemExit('mine was imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    report = writers.in_process_of(keras.backend.backend(), run, "keras", tmp_path / "out", ["decoder"], None)
    assert report["parts"]["decoder"]["file"]


def test_only_the_part_that_was_asked_for_is_written(run, tmp_path):
    export(run, "keras", tmp_path, ["decoder"])
    assert {path.name for path in tmp_path.iterdir()} == {"decoder.keras", "example.py", "report.json"}
    # Another one joins it in the report.
    assert {*export(run, "keras", tmp_path, ["encoder"])["parts"]} == {"encoder", "decoder"}
    with pytest.raises(KvqError, match="holds an export to keras. Give another --out"):
        export(run, "onnx", tmp_path, backend=keras.backend.backend())


def test_parts_of_two_models_do_not_mix(run, tmp_path):
    export(run, "keras", tmp_path, ["decoder"])
    report = tmp_path / "report.json"
    other = report.read_text("utf-8").replace(artifact.check(run / "model").weights_sha256, "0" * 64)
    report.write_text(other, "utf-8")
    with pytest.raises(KvqError, match="holds decoder of another model. Give another --out, or leave out --part"):
        export(run, "keras", tmp_path, ["encoder"])
    assert report.read_text("utf-8") == other and not (tmp_path / "encoder.keras").exists()
    assert {*export(run, "keras", tmp_path, ["decoder"])["parts"]} == {"decoder"}  # takes its place


@pytest.mark.parametrize(
    "run_wrongly, message",
    [
        (lambda array: np.zeros((len(array), 7, 7), np.int32), "other indices at"),
        (lambda array: np.zeros((len(array), 7, 7), np.int64), "gives int64"),
        (lambda array: 1 / 0, "does not run: ZeroDivision"),
    ],
)
def test_a_file_that_says_something_else_is_not_kept_but_the_report_is(run, tmp_path, monkeypatch, run_wrongly, message):
    monkeypatch.setitem(
        EXPORTERS, "keras", dataclasses.replace(EXPORTERS["keras"], load=lambda path: Loaded(run_wrongly, [], []))
    )
    (tmp_path / "encoder.keras").write_text("of an earlier export")
    (tmp_path / "report.json").write_text('{"format": "keras", "parts": {}}')
    with pytest.raises(ExportError, match=message):
        export(run, "keras", tmp_path, ["encoder"])
    assert {path.name for path in tmp_path.iterdir()} == {"example.py", "report.json"}
    entry = json.loads((tmp_path / "report.json").read_text("utf-8"))["parts"]["encoder"]
    assert entry["file"] is None and message.split(":")[0] in entry["error"]


def test_what_a_converter_cannot_do_is_one_line_that_names_other_backends(run, tmp_path, monkeypatch):
    def write(part, path):
        raise ValueError("rem has no rule.\nA page of explanations.")

    monkeypatch.setitem(EXPORTERS, "keras", dataclasses.replace(EXPORTERS["keras"], write=write))
    current = keras.backend.backend()
    others = " or ".join(sorted({*BACKENDS} - {current}))
    with pytest.raises(ExportError) as error:
        export(run, "keras", tmp_path, ["encoder"])
    assert str(error.value) == (
        f"The image encoder could not be written to keras on {current}: ValueError: rem has no rule."
        f" Another backend may do it, where it is installed: --backend {others}."
    )


@pytest.mark.parametrize("full_at", ["example.py", "encoder.keras", "report.json"])
def test_a_full_disk_is_one_line_that_names_no_other_backend(run, tmp_path, monkeypatch, full_at):
    def write(part, path):
        write_text(path, "")

    def write_text(path, content):
        if path.name == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text(content, "utf-8")

    monkeypatch.setitem(EXPORTERS, "keras", dataclasses.replace(EXPORTERS["keras"], write=write))
    monkeypatch.setattr("kvq.exporters.write_text", write_text)
    with pytest.raises(KvqError) as error:
        export(run, "keras", tmp_path / "out", ["encoder"])
    assert str(error.value) == f"{tmp_path / 'out'} cannot be written: No space left on device. Give another --out."
    assert not (tmp_path / "out" / "encoder.keras").exists()
    if full_at == "encoder.keras":
        entry = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["parts"]["encoder"]
        assert entry["file"] is None and "No space left" in entry["error"]


def test_pixels_may_differ_by_one_grey_level_and_no_more(run, tmp_path, monkeypatch):
    load = EXPORTERS["keras"].load

    def brighter(by):
        def load_brighter(path):
            loaded = load(path)
            return dataclasses.replace(
                loaded, run=lambda array: np.clip(loaded.run(array).astype(int) + by, 0, 255).astype("uint8")
            )

        return dataclasses.replace(EXPORTERS["keras"], load=load_brighter)

    monkeypatch.setitem(EXPORTERS, "keras", brighter(1))
    assert export(run, "keras", tmp_path, ["decoder"])["parts"]["decoder"]["largest_difference"] == 1
    monkeypatch.setitem(EXPORTERS, "keras", brighter(2))
    with pytest.raises(ExportError, match="differs from the model by 2 grey levels"):
        export(run, "keras", tmp_path, ["decoder"])


def test_models_without_their_images_are_compared_on_those_that_are_shipped(run):
    config = artifact.check(run / "model")
    images, origin = sample_images(run / "model", config)
    assert images.shape == (64, 28, 28, 1) and origin == "64 images of fashion_mnist_mini"
    of_colour = config.model_copy(update={"images": config.images.model_copy(update={"channels": 3, "crop": 40})})
    images, origin = sample_images(run / "model", of_colour)
    assert images.shape == (64, 40, 40, 3) and origin == "64 images of fashion_mnist_mini, as 40x40x3" and images.std() > 30


def test_unknown_names_are_refused(run, tmp_path):
    with pytest.raises(KvqError, match=", ".join(EXPORTERS)):
        export(run, "tflite", tmp_path)
    with pytest.raises(KvqError, match="encoder, decoder, autoencoder"):
        export(run, "keras", tmp_path, ["head"])


def test_a_missing_package_is_named_and_how_to_install_it(run, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    missing = {"onnxruntime", "ai_edge_litert"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else found(name, *rest))
    with pytest.raises(BackendError, match=re.escape(f"onnxruntime: {installing('onnx')}.") + "$"):
        export(run, "onnx", tmp_path / "out", backend=keras.backend.backend())
    # Nothing else is installed.
    monkeypatch.setattr(writers.backends, "installed", lambda: [])
    if keras.backend.backend() == "jax":
        with pytest.raises(BackendError, match=re.escape(f"needs torch: {installing('torch')}.") + "$"):
            export(run, "torch", tmp_path / "out")
    if keras.backend.backend() == "torch":
        both = re.escape(f"tensorflow and ai_edge_litert: {installing('tensorflow', 'litert')}.")
        with pytest.raises(BackendError, match=both + "$"):
            export(run, "litert", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_extra_brings_each_package_that_a_format_needs():
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    extras = {
        extra: {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines}
        for extra, lines in pyproject["project"]["optional-dependencies"].items()
    }
    for exporter in EXPORTERS.values():
        for backend in exporter.backends or BACKENDS:
            for package in exporter.packages(backend):
                assert package in extras[writers._EXTRAS.get(package, package)]


def test_formats_go_to_the_backend_that_suits_them(monkeypatch):
    monkeypatch.setattr(writers, "current_backend", lambda: "jax")
    monkeypatch.setattr(writers.backends, "installed", lambda: ["tensorflow", "torch", "jax"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    chosen = {format: writers.choose_backend(format, exporter, None) for format, exporter in EXPORTERS.items()}
    assert chosen == {
        "onnx": "torch",
        "saved_model": "tensorflow",
        "litert": "tensorflow",
        "openvino": "torch",
        "torch": "torch",
        "stablehlo": "jax",
        "keras": "jax",
        "web": "torch",
    }
    assert writers.choose_backend("onnx", EXPORTERS["onnx"], "tensorflow") == "tensorflow"
    assert writers.choose_backend("litert", EXPORTERS["litert"], "torch") == "tensorflow"
    with pytest.raises(BackendError, match="must be one of jax, tensorflow, torch. Received: pytorch"):
        writers.choose_backend("onnx", EXPORTERS["onnx"], "pytorch")


def test_an_ending_is_answered_with_the_format_that_writes_it(run, tmp_path):
    for ending, hint in (("pt2", " torch writes .pt2."), (".tflite", " litert writes .tflite."), ("gguf", "")):
        with pytest.raises(KvqError, match=f"must be one of onnx, .*Received: {ending}.{hint}$"):
            export(run, ending, tmp_path / "out")


def test_another_backend_exports_in_a_process_of_its_own(run, tmp_path, monkeypatch):
    # Where only one backend is installed, a process of that one stands in for the other.
    import kvq.exporters as exporters

    backend, said = os.environ["KERAS_BACKEND"], []
    monkeypatch.setattr(exporters, "current_backend", lambda: "another")
    monkeypatch.setattr(exporters, "choose_backend", lambda format, exporter, wish: backend)
    report = export(run, "keras", tmp_path / "first", ["encoder"], say=said.append)
    assert report["backend"] == backend and (tmp_path / "first" / "encoder.keras").exists()
    assert said == [f"keras is written on {backend}, in a process of its own"]
    # What goes wrong there is said here, with the exit code of what went wrong.
    monkeypatch.setattr(exporters.artifact, "check", lambda folder: None)
    with pytest.raises(ExportError, match="neither a run nor a model") as error:
        export(tmp_path, "keras", tmp_path / "out")
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "kind, trained",
    # The tensors that are equal at first are the networks', so that one kind will do.
    [
        ("cosine_vector", False),
        ("finite_scalar", True),
        ("residual", True),
        pytest.param("cosine_vector", True, marks=pytest.mark.slow),
        pytest.param("sim_vector", True, marks=pytest.mark.slow),
    ],
)
def test_other_quantizers_are_exported_too(kind, trained, tmp_path, quantizer_section):
    """Unlike any that was trained, first weights have many tensors that are equal, which converters merge."""
    if kind == "finite_scalar" and keras.backend.backend() == "jax":
        pytest.skip("jax2onnx 0.17 does not convert the division of integers in a batch of unknown size; kvq says so and fails.")
    values = load_config("fashion_mnist_mini", ["model.latent_dim=4"]).model_dump()
    config = RunConfig.model_validate({**values, "quantizer": quantizer_section(kind, 4)})
    model, rng = build_model(config.model, config.quantizer, config.loss, 1), np.random.default_rng(0)
    for _, weight in artifact.tensors(model):
        if weight.trainable and trained:
            weight.assign(keras.ops.convert_to_numpy(weight) + 0.05 * rng.normal(size=weight.shape))
    artifact.save(model, config, 1, "fashion_mnist_mini", "train", 1, tmp_path / "model")
    report = export(tmp_path / "model", "onnx", tmp_path / "exported")
    assert report["parts"]["encoder"]["different_indices"] <= report["parts"]["encoder"]["near_ties"]
    assert report["parts"]["decoder"]["largest_difference"] <= 1


def test_a_format_that_is_ready_needs_nothing_more(run, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name.startswith("onnx") else found(name, *rest))
    format = writers.ready(EXPORTERS)
    assert format != "onnx" and not writers._missing(EXPORTERS[format], keras.backend.backend())
    assert keras.backend.backend() in (EXPORTERS[format].backends or BACKENDS)
