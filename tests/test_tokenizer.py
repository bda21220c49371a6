"""The user's door: what it takes, what it refuses, and that a batch size changes nothing."""

import importlib
import operator
import re
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image

import kvq
from kvq import artifact, backends, load_config
from kvq.artifact import save
from kvq.build import build_model
from kvq.errors import ArtifactError
from kvq.tokenizer import Tokenizer

CODES, CHANNELS = 12, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = load_config("fashion_mnist_mini", ["model.latent_dim=4", f"quantizer.codebook_size={CODES}"])
    keras.utils.set_random_seed(0)
    model = build_model(config.model, config.quantizer, config.loss, CHANNELS)
    # Codes where the latents are, so that images come out as several.
    latents = model.encoder.predict_on_batch(images(6, 8, 12) / 127.5 - 1)
    model.quantizer.initialise(np.asarray(latents))
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    save(model, config, CHANNELS, "fashion_mnist_mini", "train", 1, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, CHANNELS), np.uint8)


def test_tokenizer_knows_its_sizes(tokenizer):
    assert (tokenizer.downsampling, tokenizer.vocabulary_size) == (4, CODES)
    assert tokenizer.config.images.channels == CHANNELS


def test_images_become_indices_and_images_again(tokenizer):
    for height, width in [(8, 12), (4, 4)]:
        batch = images(6, height, width)
        indices = tokenizer.encode(batch)
        assert isinstance(indices, np.ndarray) and indices.dtype == np.int32
        assert indices.shape == (6, height // 4, width // 4)
        assert 0 <= indices.min() and indices.max() < CODES
        restored = tokenizer.decode(indices)
        assert isinstance(restored, np.ndarray) and restored.dtype == np.uint8
        assert restored.shape == batch.shape
    assert len(np.unique(tokenizer.encode(images(6, 8, 12)))) > 3


def test_tokenizer_says_what_its_model_says(tokenizer):
    outputs = tokenizer.model.predict_on_batch(images(6, 8, 12))
    np.testing.assert_array_equal(tokenizer.encode(images(6, 8, 12)), outputs["indices"])
    expected = (np.asarray(outputs["reconstruction"], "float64") + 1) * 127.5
    assert np.abs(tokenizer.decode(outputs["indices"]) - expected).max() <= 0.51


@pytest.mark.parametrize("batch_size", [1, 4, 5, 64])
def test_batch_size_changes_nothing(tokenizer, batch_size):
    batch = images(6, 8, 12)
    indices = tokenizer.encode(batch, batch_size)
    np.testing.assert_array_equal(indices, tokenizer.encode(batch, 6))
    restored, expected = tokenizer.decode(indices, batch_size), tokenizer.decode(indices, 6)
    # Convolutions of other batch sizes may round differently.
    assert np.abs(restored.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["tensor", "list of arrays", "list of tensors", "anything with __array__"])
def test_arrays_of_any_library_are_images_and_indices(tokenizer, kind):
    class Foreign:
        def __init__(self, array):
            self.array = array

        def __array__(self, dtype=None, copy=None):
            return self.array

    wrap = {
        "tensor": ops.convert_to_tensor,
        "list of arrays": list,
        "list of tensors": lambda array: [ops.convert_to_tensor(one) for one in array],
        "anything with __array__": Foreign,
    }[kind]
    indices = tokenizer.encode(wrap(images(3, 8, 12)))
    assert type(indices) is np.ndarray
    np.testing.assert_array_equal(indices, tokenizer.encode(images(3, 8, 12)))
    restored = tokenizer.decode(wrap(indices))
    assert type(restored) is np.ndarray
    np.testing.assert_array_equal(restored, tokenizer.decode(indices))


@pytest.mark.parametrize("library", ["torch", "jax", "tensorflow"])
def test_tensors_of_another_library_than_the_backend_are_images(tokenizer, library):
    if library == keras.backend.backend():
        pytest.skip("This is the backend's own library: the test above.")
    if library not in backends.installed():
        pytest.skip(f"{library} is not installed here.")
    module = importlib.import_module(library)
    convert = {"torch": "from_numpy", "jax": "numpy.asarray", "tensorflow": "convert_to_tensor"}[library]
    tensor = operator.attrgetter(convert)(module)(images(2, 8, 12))
    np.testing.assert_array_equal(tokenizer.encode(tensor), tokenizer.encode(images(2, 8, 12)))


def test_pil_images_are_images(tokenizer):
    pictures = [Image.fromarray(image) for image in images(3, 8, 12)]
    np.testing.assert_array_equal(tokenizer.encode(pictures), tokenizer.encode(images(3, 8, 12)))
    grey = pictures[0].convert("L")
    three = np.repeat(np.asarray(grey)[None, :, :, None], 3, axis=3)
    np.testing.assert_array_equal(tokenizer.encode([grey]), tokenizer.encode(three))
    with pytest.raises(ValueError, match="must have one shape. Received: "):
        tokenizer.encode([pictures[0], pictures[1].resize((8, 8))])


def test_a_ragged_batch_is_not_compiled_anew(folder):
    tokenizer = Tokenizer.load(folder)
    shapes = record_shapes(tokenizer._encoder)
    whole = tokenizer.encode(images(4, 16, 8), batch_size=4)
    traced = len(shapes)
    for count in (5, 6, 7, 11, 4, 3):
        ragged = tokenizer.encode(images(count, 16, 8), batch_size=4)
        np.testing.assert_array_equal(ragged[:4], whole[:count])
    if backends.compiles_each_shape(keras.backend.backend()):
        # Python code runs while a graph is made of it, and only then.
        assert len(shapes) == traced
    else:
        # Nothing is compiled, so that nothing is filled up.
        assert [shape[0] for shape in shapes[traced:]] == [4, 1, 4, 2, 4, 3, 4, 4, 3, 4, 3]


def record_shapes(model):
    """The shapes of the batches with which the model's Python code is run from now on."""
    shapes, call = [], model.call

    def recorded(images):
        shapes.append(tuple(images.shape))
        return call(images)

    model.call = recorded
    return shapes


def test_any_integers_are_indices(tokenizer):
    indices = tokenizer.encode(images(2, 8, 12))
    expected = tokenizer.decode(indices)
    for same in (indices.astype("int64"), indices.astype("uint8"), indices.tolist()):
        np.testing.assert_array_equal(tokenizer.decode(same), expected)


@pytest.mark.parametrize(
    "wrong, received",
    [
        (images(2, 8, 12).astype("float32"), r"float32 \(2, 8, 12, 3\)"),
        (images(2, 8, 12).astype("int64"), r"int64 \(2, 8, 12, 3\)"),
        (images(8, 12), r"uint8 \(8, 12, 3\)"),
        (images(2, 8, 12)[..., :1], r"uint8 \(2, 8, 12, 1\)"),
        (images(2, 8, 12).transpose(0, 3, 1, 2), r"uint8 \(2, 3, 8, 12\)"),
    ],
    ids=["float", "int64", "one image", "grey", "channels first"],
)
def test_other_images_are_refused_with_what_came(tokenizer, wrong, received):
    with pytest.raises(ValueError, match=rf"`images` must be uint8 \(n, h, w, 3\). Received: {received}"):
        tokenizer.encode(wrong)


def test_batches_of_nothing_are_refused(tokenizer):
    with pytest.raises(ValueError, match="`batch_size` must be at least 1. Received: batch_size=0"):
        tokenizer.encode(images(2, 8, 12), 0)


@pytest.mark.parametrize("shape", [(2, 8, 10), (2, 6, 8)], ids=str)
def test_sizes_that_do_not_fit_are_refused(tokenizer, shape):
    with pytest.raises(ValueError, match="must be multiples of 4. Received: "):
        tokenizer.encode(images(*shape))


@pytest.mark.parametrize("nothing", [images(2, 0, 8), images(0, 8, 8), []], ids=["no rows", "no images", "empty list"])
def test_no_image_at_all_is_refused(tokenizer, nothing):
    with pytest.raises(ValueError, match="`images` must hold at least one image. Received: "):
        tokenizer.encode(nothing)


@pytest.mark.parametrize("channels", [1, 3])
def test_refused_images_are_told_the_way_out(tokenizer, monkeypatch, channels):
    images = tokenizer.config.images.model_copy(update={"channels": channels})
    monkeypatch.setattr(tokenizer, "config", tokenizer.config.model_copy(update={"images": images}))
    several = "" if channels == 3 else " Several without channels: images[..., None]."
    for wrong, hint in [
        (np.zeros((8, 12), np.uint8), "" if channels == 3 else " One image: images[None, ..., None]."),
        (np.zeros((8, 12, channels), np.uint8), " One image: images[None]."),
        (np.zeros((2, 8, 12), np.uint8), several),
        (Image.new("RGB", (12, 8)), " One PIL image: [image]."),
    ]:
        with pytest.raises(ValueError, match=r"Received: uint8 \([0-9, ]+\)\." + re.escape(hint) + "$"):
            tokenizer.encode(wrong)


@pytest.mark.parametrize("given", ["photos/a.png", Path("photos/a.png"), ["photos/a.png", "photos/b.png"]], ids=repr)
def test_files_are_not_images(tokenizer, given):
    with pytest.raises(ValueError, match="must not be paths. Received: photos/a.png. Open it with PIL.Image.open"):
        tokenizer.encode(given)


def test_a_printed_tokenizer_says_what_it_is(tokenizer):
    told = f"vocabulary_size={CODES} grid=(7, 7) depth=None downsampling=4 channels=3"
    assert repr(tokenizer) == f"<kvq.Tokenizer {tokenizer.config.quantizer.kind} {told}>"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (np.zeros((2, 2, 3), "float32"), "must be integers"),
        (np.zeros((2, 2, 3), bool), "must be integers"),
        (np.zeros((2, 3), "int32"), "must be integers"),
        (np.zeros((0, 2, 3), "int32"), r"must hold at least one index. Received: int32 \(0, 2, 3\)"),
        (np.full((1, 2, 3), CODES), rf"must be in \[0, {CODES}\). Received: {CODES} to {CODES}"),
        (np.full((1, 2, 3), -1), rf"must be in \[0, {CODES}\). Received: -1 to -1"),
        (np.full((1, 2, 3), 2**32), rf"must be in \[0, {CODES}\). Received: {2**32}"),
    ],
    ids=["float", "bool", "one grid", "none", "too large", "negative", "past int32"],
)
def test_other_indices_are_refused_with_what_came(tokenizer, wrong, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(wrong)


def test_tokenizer_knows_its_grid_and_its_codes(tokenizer):
    assert tokenizer.grid == (7, 7) and tokenizer.depth is None
    codes = tokenizer.codebook
    assert type(codes) is np.ndarray and codes.dtype == np.float32 and codes.shape == (CODES, 4)
    np.testing.assert_array_equal(codes, ops.convert_to_numpy(tokenizer.model.quantizer.codebook))


def test_codes_that_nobody_can_hold_are_refused(tokenizer, monkeypatch):
    monkeypatch.setattr("kvq.tokenizer.CODEBOOK_LIMIT", CODES * 4 - 1)
    with pytest.raises(ValueError, match=f"at most 47 numbers. Received: a vocabulary of {CODES}"):
        tokenizer.codebook  # noqa: B018


def test_saved_again_it_has_the_same_bytes(tokenizer, folder, tmp_path):
    tokenizer.save(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    tokenizer.save(tmp_path / "again")  # a model may be replaced


def test_changed_weights_are_saved_as_another_model(folder, tmp_path):
    tokenizer = Tokenizer.load(folder)
    tokenizer.model.quantizer.codebook.assign(tokenizer.codebook[::-1].copy())
    tokenizer.save(tmp_path / "changed")
    changed = Tokenizer.load(tmp_path / "changed")
    assert changed.config.weights_sha256 != tokenizer.config.weights_sha256
    np.testing.assert_array_equal(changed.encode(images(2, 8, 12)), CODES - 1 - Tokenizer.load(folder).encode(images(2, 8, 12)))


def test_saving_replaces_nothing_but_a_model(tokenizer, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ArtifactError, match="something else"):
        tokenizer.save(tmp_path)
    with pytest.raises(ArtifactError, match="something else"):
        tokenizer.save(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_run_folder_and_model_folder_give_the_same_tokenizer(tokenizer, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text("{}")
    expected = tokenizer.encode(images(2, 8, 12))
    for path in (tmp_path / "run", str(tmp_path / "run" / "model")):
        np.testing.assert_array_equal(kvq.Tokenizer.load(path).encode(images(2, 8, 12)), expected)


def test_the_tokenizer_that_comes_with_kvq_works_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.load("fashion_mnist_mini")
    assert sum(file.stat().st_size for file in artifact.model_folder("fashion_mnist_mini").iterdir()) < 1e6
    config = load_config("fashion_mnist_mini")
    assert (tokenizer.config.model, tokenizer.config.quantizer) == (config.model, config.quantizer)
    assert tokenizer.config.trained.steps == config.train.steps
    measured = kvq.evaluate("fashion_mnist_mini")
    assert measured["images"] == 500 and measured["psnr"] > 20 and measured["usage"] > 0.9


def test_a_folder_of_that_name_goes_first(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "fashion_mnist_mini")
    assert Tokenizer.load("fashion_mnist_mini").vocabulary_size == CODES


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="There is no"):
        Tokenizer.load(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="neither a run nor a model: it has no config.json. .*a run has one in"):
        Tokenizer.load(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ArtifactError, match="has no model yet"):
        Tokenizer.load(tmp_path)
