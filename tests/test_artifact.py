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


def refused(folder, pattern, function=check):
    with pytest.raises(ArtifactError, match=pattern) as caught:
        function(folder)
    message = str(caught.value)
    assert len(message) < 800 and "Traceback" not in message
    return message


# What is saved.


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
    assert values["images"] == {"channels": 1, "resize": None, "pad": 4, "crop": 28}
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
    model = build(config)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 1), np.uint8)
    model.compile(optimizer=keras.optimizers.Adam(0.01))
    model.train_on_batch(images)
    write(model, config, tmp_path / "model")
    loaded, described = load(tmp_path / "model")
    assert described.model == config.model and described.quantizer == config.quantizer
    for (name, one), (_, other) in zip(artifact.tensors(model), artifact.tensors(loaded), strict=True):
        np.testing.assert_array_equal(convert(one), convert(other), err_msg=name)
    expected, outputs = model.predict_on_batch(images), loaded.predict_on_batch(images)
    keras.tree.map_structure(np.testing.assert_array_equal, outputs, expected)


def convert(weight):
    return np.array(keras.ops.convert_to_numpy(weight))


# What is refused: files.


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["missing", "link", "folder"])
def test_what_is_not_two_regular_files_is_not_a_model(folder, tmp_path, name, kind):
    target = (folder / name).rename(tmp_path / "elsewhere")
    if kind == "link":
        (folder / name).symlink_to(target)
    elif kind == "folder":
        (folder / name).mkdir()
    assert name in refused(folder, "is not a kvq model: it has no file")


def test_place_without_a_folder_is_not_a_model(tmp_path):
    refused(tmp_path / "absent", "is not a kvq model")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is not a kvq model")


@pytest.mark.parametrize(
    "content, pattern",
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "has no format_version"),
        (b"3", "has no format_version"),
        (b"{}", "has no format_version"),
        (b" " * (2**20 + 1), "is larger than"),
    ],
    ids=["empty", "cut", "binary", "deep", "list", "number", "of another program", "huge"],
)
def test_config_that_is_not_ours_is_refused(folder, content, pattern):
    (folder / "config.json").write_bytes(content)
    refused(folder, pattern)


# What is refused: what config.json says.


@pytest.mark.parametrize(
    "path, value, pattern",
    [
        (["format_version"], 2, "format_version 2; this kvq .* reads 1. Upgrade kvq"),
        (["format_version"], "1", "format_version '1'"),
        (["kind"], "vqgan", "kind: "),
        (["extra"], 1, "extra: there is no such key"),
        (["model", "__class__"], "os.system", "model.__class__: there is no such key"),
        (["model", "network"], "transformer", "model.network: must be one of plain, resnet, paper"),
        (["model", "network"], "", "model.network: must be one of"),
        (["model", "latent_dim"], 10**9, "model.latent_dim: "),
        (["model", "latent_dim"], "8", "model.latent_dim: "),
        (["quantizer", "codebook_size"], 2**40, "quantizer.codebook_size: "),
        (["quantizer", "kind"], "fsq", "quantizer.kind: must be one of vector, ema_vector, "),
        (["images", "channels"], 0, "images.channels: "),
        (["images", "crop"], 2.5, "images.crop: "),
        (["grids"], [], "grids: "),
        (["grids", 0, "vocabulary"], -1, "grids.0.vocabulary: "),
        (["kvq_version"], "x" * 10_000, "kvq_version: "),
        (["weights_sha256"], "../../etc/passwd", "weights_sha256: "),
        (["trained"], None, "trained: "),
        (["tensors"], {}, "tensors: "),
        (["tensors", "quantizer.codebook", "dtype"], "float64", "dtype: "),
        (["tensors", "quantizer.codebook", "shape"], [2**31, 2**31], "shape.0: "),
        (["tensors", "quantizer.codebook", "shape"], [9, 0], "shape.1: "),
        (["tensors", "quantizer.codebook", "shape"], [1] * 9, "shape: "),
    ],
)
def test_config_that_says_what_it_must_not_is_refused(folder, path, value, pattern):
    config, header, data = read_parts(folder)
    *outer, last = path
    place = config
    for key in outer:
        place = place[key]
    place[last] = value
    digest = config["weights_sha256"]
    write_parts(folder, config, header, data)
    if last == "weights_sha256":
        config["weights_sha256"] = digest
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    refused(folder, pattern)


def test_missing_keys_are_named(folder):
    config, header, data = read_parts(folder)
    del config["loss"], config["quantizer"]["codebook_size"]
    write_parts(folder, config, header, data)
    message = refused(folder, "does not fit")
    assert "loss: is missing." in message and "quantizer.codebook_size: is missing." in message


@pytest.mark.parametrize(
    "changes",
    [{"vocabulary": 1000}, {"vocabulary": 8}, {"depth": 2}, {"shape": [14, 14]}, {"shape": [49]}],
    ids=str,
)
def test_grids_that_are_not_those_of_the_model_are_refused(folder, changes):
    """`Tokenizer` believes them: an index past the codebook is silently NaN on some backends."""
    config, header, data = read_parts(folder)
    config["grids"][0] |= changes
    write_parts(folder, config, header, data)
    refused(folder, "grid")


def test_codebook_of_another_size_than_the_tensor_is_refused_before_anything_is_built(folder):
    """Else a few bytes of config would have `load` make a codebook of gigabytes first."""
    config, header, data = read_parts(folder)
    config["quantizer"]["codebook_size"] = config["grids"][0]["vocabulary"] = 2**20
    write_parts(folder, config, header, data)
    refused(folder, "quantizer.codebook")
    # Nor where the list leaves it out.
    for names in (config["tensors"], header):
        names["quantizer.other"] = names.pop("quantizer.codebook")
    write_parts(folder, config, header, data)
    refused(folder, "quantizer.codebook")


# What is refused: the tensors.


def cut_data(config, header, data):
    return config, header, data[:-4]


def add_data(config, header, data):
    return config, header, data + bytes(4)


def cut_within_the_header(config, header, data):
    return config, json.dumps(header).encode()[:-20], b""


def change_dtype(config, header, data):
    header["quantizer.codebook"]["dtype"] = "I32"
    return config, header, data


def change_shape(config, header, data):
    header["quantizer.codebook"]["shape"] = [8, 9]
    return config, header, data


def remove_shape(config, header, data):
    del header["quantizer.codebook"]["shape"]
    return config, header, data


def remove_tensor(config, header, data):
    del header["quantizer.codebook"]
    return config, header, data


def add_tensor(config, header, data):
    header["quantizer.bomb"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    return config, header, data + bytes(4)


def overlap(config, header, data):
    header["encoder.stage0.down.norm.gamma"]["data_offsets"] = header["encoder.stage0.down.norm.beta"]["data_offsets"]
    return config, header, data


def leave_a_hole(config, header, data):
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    header[last]["data_offsets"] = [offset + 4 for offset in header[last]["data_offsets"]]
    return config, header, data + bytes(4)


def shift_a_border(config, header, data):
    first, second = sorted(header, key=lambda name: header[name]["data_offsets"])[:2]
    for offsets, end in ((header[first]["data_offsets"], 1), (header[second]["data_offsets"], 0)):
        offsets[end] += 4
    return config, header, data


def put_offsets_out_of_the_file(config, header, data):
    header["quantizer.codebook"]["data_offsets"] = [2**62, 2**62 + 4 * 72]
    return config, header, data


def make_offsets_negative(config, header, data):
    header["quantizer.codebook"]["data_offsets"] = [-4 * 72, 0]
    return config, header, data


def make_offsets_floats(config, header, data):
    header["quantizer.codebook"]["data_offsets"] = [float(offset) for offset in header["quantizer.codebook"]["data_offsets"]]
    return config, header, data


def make_an_entry_a_number(config, header, data):
    header["quantizer.codebook"] = 3
    return config, header, data


def make_the_header_a_list(config, header, data):
    return config, b"[]", data


def make_the_header_no_json(config, header, data):
    return config, b"{" * 1000, data


def make_the_header_huge(config, header, data):
    return config, json.dumps(header).encode() + b" " * 2**22, data


BREAKAGES = {
    cut_data: "bytes of data; its tensors need",
    add_data: "bytes of data; its tensors need",
    cut_within_the_header: "header that is not JSON",
    change_dtype: "quantizer.codebook is I32 .*config.json says F32",
    change_shape: r"quantizer.codebook is F32 \[8, 9\]; config.json says F32 \[9, 8\]",
    remove_shape: "quantizer.codebook is F32 None",
    remove_tensor: "do not name the same tensors.* quantizer.codebook",
    add_tensor: "do not name the same tensors.* quantizer.bomb",
    overlap: "do not lie where",
    leave_a_hole: "do not lie where",
    shift_a_border: "do not lie where",
    put_offsets_out_of_the_file: "do not lie where",
    make_offsets_negative: "do not lie where",
    make_offsets_floats: "no proper data_offsets",
    make_an_entry_a_number: "no proper data_offsets",
    make_the_header_a_list: "not a JSON object",
    make_the_header_no_json: "header that is not JSON",
    make_the_header_huge: "is not a safetensors file, or was cut",
}


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda function: function.__name__)
def test_broken_tensors_are_refused(folder, breakage):
    write_parts(folder, *breakage(*read_parts(folder)))
    refused(folder, BREAKAGES[breakage])


@pytest.mark.parametrize("length", [0, 1, 2**22 + 1, 2**40, 2**63, 2**64 - 1])
def test_header_of_terabytes_is_refused_and_not_read(folder, length):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + content[8:])
    refused(folder, "is not a safetensors file, or was cut")


@pytest.mark.parametrize("kept", [0, 7, 8, 200, -1])
def test_cut_files_are_refused(folder, kept):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:kept])
    refused(folder, "cut")


@pytest.mark.parametrize("position", [-1, -500])
def test_changed_byte_of_a_weight_is_found(folder, position):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[position] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "is not the file that config.json describes: its sha256 is")


# What is refused: a model that is not the one of the tensors.


def make_it_resnet(config, header, data):
    config["model"] = {"kind": "vqvae", "network": "resnet", "latent_dim": 8}
    return config, header, data


def make_it_ema(config, header, data):
    config["quantizer"]["kind"] = "ema_vector"
    return config, header, data


def make_it_coloured(config, header, data):
    config["images"]["channels"] = 3
    return config, header, data


def rename_a_tensor(config, header, data):
    for names in (config["tensors"], header):
        names["encoder.other"] = names.pop("encoder.stage0.down.conv.kernel")
    return config, header, data


def turn_a_tensor(config, header, data):
    for names in (config["tensors"], header):
        names["decoder.stage1.up.conv.kernel"]["shape"].reverse()
    return config, header, data


@pytest.mark.parametrize(
    "breakage", [make_it_resnet, make_it_ema, make_it_coloured, rename_a_tensor, turn_a_tensor], ids=lambda f: f.__name__
)
def test_tensors_that_fit_their_list_but_not_the_model_are_refused(folder, breakage):
    write_parts(folder, *breakage(*read_parts(folder)))
    message = refused(folder, "holds other tensors than its model has", load)
    assert "in the model that config.json names" in message


def make_metadata_a_list(config, header, data):
    return config, {"__metadata__": [1], **header}, data


def make_metadata_numbers(config, header, data):
    return config, {"__metadata__": {"a": 1}, **header}, data


def make_a_shape_floats(config, header, data):
    header["quantizer.codebook"]["shape"] = [9.0, 8.0]
    return config, header, data


def make_a_shape_booleans(config, header, data):
    name = "encoder.stage0.down.conv.kernel"
    header[name]["shape"] = [True if side == 1 else side for side in header[name]["shape"]]
    return config, header, data


STRICTER = [make_metadata_a_list, make_metadata_numbers, make_a_shape_floats, make_a_shape_booleans]


@pytest.mark.parametrize("breakage", STRICTER, ids=lambda f: f.__name__)
def test_file_that_only_the_safetensors_library_refuses_is_an_artifact_error_too(folder, breakage):
    write_parts(folder, *breakage(*read_parts(folder)))
    refused(folder, "is not a safetensors file", load)


# Folders.


def test_a_run_folder_means_its_model(saved, tmp_path):
    assert artifact.model_folder(saved) == saved
    with pytest.raises(ArtifactError, match="There is no .*absent. Give a run folder or a model folder"):
        artifact.model_folder(tmp_path / "absent")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ArtifactError, match="has no model yet"):
        artifact.model_folder(tmp_path)
    shutil.copytree(saved, tmp_path / "model")
    assert artifact.model_folder(tmp_path) == tmp_path / "model"
