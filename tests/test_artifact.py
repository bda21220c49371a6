"""The saved tokenizer: frozen names, the same bytes, the same outputs; and that nothing broken or hostile gets in."""

import hashlib
import json
import shutil
import struct
import subprocess
import sys

import keras
import numpy as np
import pytest

from kvq import artifact, load_config
from kvq.artifact import ArtifactConfig, check, load, save
from kvq.build import build_model
from kvq.config import RunConfig
from kvq.errors import ArtifactError
from kvq.networks import ENCODERS
from kvq.quantizers import QUANTIZERS

SMALL = ["model.latent_dim=8", "quantizer.codebook_size=9"]
NETWORKS = {
    "plain": [],
    "resnet": [],
    "paper": ["model.hidden=8", "model.residual_blocks=1", "model.residual_hidden=4"],
}

# Frozen: a file that was saved must load for ever. A change here needs a new format_version and a way to read the old one.
EMA = "codebook counts initialised sums"
CODEBOOK = {
    "vector": "codebook counts initialised",
    "ema_vector": EMA,
    "cosine_vector": "codebook counts initialised",
    "ema_cosine_vector": EMA,
    "sim_vector": "codebook counts initialised projection",
    "index_backprop": "codebook counts initialised",
    "gumbel": "codebook kernel bias temperature",
    "finite_scalar": "",
    "symmetric_finite_scalar": "",
    "lookup_free": "",
    "binary_spherical": "",
    "residual": " ".join(f"{member}.{name}" for member in ("level0", "level1") for name in EMA.split()),
    "shared_residual": " ".join(f"level.{name}" for name in EMA.split()),
    "product": " ".join(f"{member}.{name}" for member in ("group0", "group1") for name in EMA.split()),
    "projected": "kernel_in bias_in kernel_out bias_out " + " ".join(f"base.{name}" for name in EMA.split()),
}
WEIGHTS = {
    "plain": """
        encoder.stage0.down.conv.kernel encoder.stage0.down.conv.bias encoder.stage0.down.norm.gamma encoder.stage0.down.norm.beta
        encoder.stage0.same.conv.kernel encoder.stage0.same.conv.bias encoder.stage0.same.norm.gamma encoder.stage0.same.norm.beta
        encoder.stage1.down.conv.kernel encoder.stage1.down.conv.bias encoder.stage1.down.norm.gamma encoder.stage1.down.norm.beta
        encoder.stage1.same.conv.kernel encoder.stage1.same.conv.bias encoder.stage1.same.norm.gamma encoder.stage1.same.norm.beta
        encoder.stage2.down.conv.kernel encoder.stage2.down.conv.bias encoder.stage2.down.norm.gamma encoder.stage2.down.norm.beta
        encoder.stage2.same.conv.kernel encoder.stage2.same.conv.bias encoder.stage2.same.norm.gamma encoder.stage2.same.norm.beta
        decoder.stage0.up.conv.kernel decoder.stage0.up.conv.bias decoder.stage0.same.conv.kernel decoder.stage0.same.conv.bias
        decoder.stage1.up.conv.kernel decoder.stage1.up.conv.bias decoder.stage1.same.conv.kernel decoder.stage1.same.conv.bias
        decoder.stage2.up.conv.kernel decoder.stage2.up.conv.bias decoder.stage2.same.conv.kernel decoder.stage2.same.conv.bias
        decoder.image.conv.kernel decoder.image.conv.bias
    """,
    "resnet": """
        encoder.stage0.down.conv.kernel encoder.stage0.down.conv.bias encoder.stage0.down.norm.gamma encoder.stage0.down.norm.beta
        encoder.stage1.down.conv.kernel encoder.stage1.down.conv.bias encoder.stage1.down.norm.gamma encoder.stage1.down.norm.beta
        encoder.stage2.down.conv.kernel encoder.stage2.down.conv.bias encoder.stage2.down.norm.gamma encoder.stage2.down.norm.beta
        encoder.residual0.wide.conv.kernel encoder.residual0.wide.conv.bias
        encoder.residual0.point.conv.kernel encoder.residual0.point.conv.bias
        encoder.residual1.wide.conv.kernel encoder.residual1.wide.conv.bias
        encoder.residual1.point.conv.kernel encoder.residual1.point.conv.bias
        decoder.residual0.wide.conv.kernel decoder.residual0.wide.conv.bias
        decoder.residual0.point.conv.kernel decoder.residual0.point.conv.bias
        decoder.residual1.wide.conv.kernel decoder.residual1.wide.conv.bias
        decoder.residual1.point.conv.kernel decoder.residual1.point.conv.bias
        decoder.stage0.up.conv.kernel decoder.stage0.up.conv.bias decoder.stage1.up.conv.kernel decoder.stage1.up.conv.bias
        decoder.stage2.up.conv.kernel decoder.stage2.up.conv.bias decoder.image.conv.kernel decoder.image.conv.bias
    """,
    "paper": """
        encoder.down0.conv.kernel encoder.down0.conv.bias encoder.down1.conv.kernel encoder.down1.conv.bias
        encoder.same.conv.kernel encoder.same.conv.bias
        encoder.residual0.wide.conv.kernel encoder.residual0.wide.conv.bias
        encoder.residual0.point.conv.kernel encoder.residual0.point.conv.bias
        encoder.latents.conv.kernel encoder.latents.conv.bias
        decoder.same.conv.kernel decoder.same.conv.bias
        decoder.residual0.wide.conv.kernel decoder.residual0.wide.conv.bias
        decoder.residual0.point.conv.kernel decoder.residual0.point.conv.bias
        decoder.up0.conv.kernel decoder.up0.conv.bias decoder.up1.conv.kernel decoder.up1.conv.bias
    """,
}


def configured(network="plain", quantizer=None):
    values = load_config("fashion_mnist_mini", [*SMALL, *NETWORKS[network], f"model.network={network}"]).model_dump()
    return RunConfig.model_validate({**values, "quantizer": quantizer or values["quantizer"]})


def build(config, seed=0):
    keras.utils.set_random_seed(seed)
    return build_model(config.model, config.quantizer, config.loss, channels=1)


def write(model, config, folder, steps=7):
    save(model, config, 1, "fashion_mnist_mini", "train", steps, folder)


@pytest.fixture(scope="module")
def model():
    return build(configured())


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "model"
    write(model, configured(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to break."""
    return shutil.copytree(saved, tmp_path / "model")


def read_parts(folder):
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return config, json.loads(content[8 : 8 + length]), content[8 + length :]


def write_parts(folder, config, header, data):
    """Puts the parts together again, with a checksum that holds: what is left to find is the change itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + data
    (folder / "model.safetensors").write_bytes(content)
    config["weights_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


# What is saved.


def test_names_of_every_member_are_frozen():
    assert NETWORKS.keys() == WEIGHTS.keys() == ENCODERS.keys() and CODEBOOK.keys() == QUANTIZERS.keys()


@pytest.mark.parametrize("network, quantizer", [*((n, "vector") for n in NETWORKS), *(("plain", q) for q in CODEBOOK)])
def test_tensors_have_the_names_that_files_out_there_have(network, quantizer, tmp_path, quantizer_section):
    config = configured(network, quantizer_section(quantizer, 8))
    write(build(config), config, tmp_path / "model")
    expected = sorted([*WEIGHTS[network].split(), *(f"quantizer.{name}" for name in CODEBOOK[quantizer].split())])
    described, header, _ = read_parts(tmp_path / "model")
    assert sorted(header) == sorted(described["tensors"]) == expected
    loaded, _ = load(tmp_path / "model")
    assert sorted(name for name, _ in artifact.tensors(loaded)) == expected


def test_config_says_everything(saved):
    config = check(saved)
    assert isinstance(config, ArtifactConfig)
    values = json.loads((saved / "config.json").read_text("utf-8"))
    assert set(values) == {
        *("format_version", "kind", "kvq_version", "model", "quantizer", "loss", "grids", "images", "data"),
        *("trained", "weights_sha256", "tensors"),
    }
    assert (values["format_version"], values["kind"]) == (1, "vqvae")
    assert values["grids"] == [{"name": "grid", "shape": [7, 7], "vocabulary": 9, "depth": 1}]
    assert values["images"] == {"channels": 1, "resize": None, "pad": 4, "crop": 28, "small": "enlarge"}
    assert values["data"] == {"name": "fashion_mnist_mini", "split": "train"}
    assert values["trained"] == {"steps": 7, "backend": keras.backend.backend()}
    assert values["weights_sha256"] == hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    assert values["tensors"]["quantizer.codebook"] == {"shape": [9, 8], "dtype": "float32"}


def test_folder_has_two_files_and_nothing_else(saved):
    assert sorted(path.name for path in saved.parent.rglob("*")) == ["config.json", "model", "model.safetensors"]


def test_same_weights_give_the_same_bytes(model, saved, tmp_path):
    write(model, configured(), tmp_path / "again")
    # A model built anew, as in another process, counts its names on.
    other = build(configured(), seed=1)
    for one, another in zip(model.weights, other.weights, strict=True):
        another.assign(one)
    write(other, configured(), tmp_path / "other")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (saved / file).read_bytes()
        assert (tmp_path / "other" / file).read_bytes() == (saved / file).read_bytes()


def test_saving_replaces_the_model_that_is_there(model, folder):
    (folder / "stray.txt").write_text("old")
    write(model, configured(), folder, steps=8)
    assert check(folder).trained.steps == 8 and not (folder / "stray.txt").exists()


def test_model_is_checked_without_keras(saved):
    program = (
        "import sys; from pathlib import Path; from kvq.artifact import check\n"
        "config = check(Path(sys.argv[1]))\n"
        "print(config.model.latent_dim, *sorted({name.partition('.')[0] for name in sys.modules} & set(sys.argv[2:])))"
    )
    heavy = ["keras", "grain", "jax", "tensorflow", "torch"]
    done = subprocess.run([sys.executable, "-c", program, str(saved), *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["8"], done.stdout


def test_every_kind_of_quantizer_has_its_names(quantizer_kind):
    assert quantizer_kind in CODEBOOK


def test_loaded_model_gives_the_same_outputs_bit_for_bit(quantizer_kind, tmp_path, quantizer_section):
    config = configured(quantizer=quantizer_section(quantizer_kind, 8))
    model, rng = build(config), np.random.default_rng(0)
    for _, weight in artifact.tensors(model):
        weight.assign(rng.uniform(0.5, 1.5, weight.shape).astype(weight.dtype))  # other than any first value
    write(model, config, tmp_path / "model")
    loaded, described = load(tmp_path / "model")
    assert described.model == config.model and described.quantizer == config.quantizer
    for (name, one), (_, other) in zip(artifact.tensors(model), artifact.tensors(loaded), strict=True):
        np.testing.assert_array_equal(convert(one), convert(other), err_msg=name)
    images = rng.integers(0, 256, (2, 8, 12, 1), np.uint8)
    expected, outputs = (keras.tree.map_structure(convert, one(images)) for one in (model, loaded))
    keras.tree.map_structure(np.testing.assert_array_equal, outputs, expected)


def convert(weight):
    return np.array(keras.ops.convert_to_numpy(weight))


# What only `load` refuses, which builds the model; tests/test_hostile_files.py has what `check` does.


def make_it_ema(config, header, data):
    config["quantizer"]["kind"] = "ema_vector"


def rename_a_bias(config, header, data):
    for names in (config["tensors"], header):
        names["encoder.other"] = names.pop("encoder.stage0.down.conv.bias")


def bend_a_bias(config, header, data):
    for names in (config["tensors"], header):
        names["decoder.stage0.up.conv.bias"]["shape"] = [2, 4]


@pytest.mark.parametrize("breakage", [make_it_ema, rename_a_bias, bend_a_bias], ids=lambda function: function.__name__)
def test_tensors_that_fit_their_list_but_not_the_model_are_refused(folder, breakage):
    parts = read_parts(folder)
    breakage(*parts)
    write_parts(folder, *parts)
    assert check(folder)
    with pytest.raises(ArtifactError, match="holds other tensors than its model has.* in the model that config.json names"):
        load(folder)


# Folders.


def test_a_run_folder_means_its_model(saved, tmp_path, monkeypatch):
    assert artifact.model_folder(saved) == saved
    with pytest.raises(ArtifactError, match="There is no .*absent. Give a run folder, a model folder, or fashion_mnist_mini"):
        artifact.model_folder(tmp_path / "absent")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ArtifactError, match="has no model yet"):
        artifact.model_folder(tmp_path)
    shutil.copytree(saved, tmp_path / "checkpoints" / "step_00000010" / "model")
    (tmp_path / "checkpoints" / "step_00000010" / "state.json").write_text("{}")
    with pytest.raises(ArtifactError, match="Its newest checkpoint has one: .*step_00000010"):
        artifact.model_folder(tmp_path)
    newest = tmp_path / "checkpoints" / "step_00000010"
    assert artifact.model_folder(newest) == newest / "model" and artifact.run_folder(newest) == tmp_path
    shutil.copytree(saved, tmp_path / "model")
    assert artifact.model_folder(tmp_path) == tmp_path / "model" and artifact.run_folder(tmp_path) == tmp_path
    # As seen from another folder, and where a run lies in one of that name.
    monkeypatch.chdir(newest.parent)
    assert artifact.run_folder(newest.name) == tmp_path
    run = shutil.copytree(tmp_path, tmp_path / "runs" / "checkpoints" / "run", ignore=shutil.ignore_patterns("runs"))
    assert artifact.run_folder(run) == run
    shutil.rmtree(newest / "model")
    with pytest.raises(ArtifactError, match="is a checkpoint of an older kvq, which holds no model. Resume its run"):
        artifact.model_folder(newest)
