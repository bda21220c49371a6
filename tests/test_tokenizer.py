"""The user's door: what it takes, what it refuses, and that a batch size changes nothing."""

import shutil

import keras
import numpy as np
import pytest

import kvq
from kvq import load_config
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


@pytest.mark.parametrize("shape", [(2, 8, 10), (2, 6, 8), (2, 0, 8), (0, 8, 8)], ids=str)
def test_sizes_that_do_not_fit_are_refused(tokenizer, shape):
    with pytest.raises(ValueError, match="Received: "):
        tokenizer.encode(images(*shape))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (np.zeros((2, 2, 3), "float32"), "must be integers"),
        (np.zeros((2, 2, 3), bool), "must be integers"),
        (np.zeros((2, 3), "int32"), "must be integers"),
        (np.zeros((0, 2, 3), "int32"), "must be integers"),
        (np.full((1, 2, 3), CODES), rf"must be in \[0, {CODES}\). Received: {CODES} to {CODES}"),
        (np.full((1, 2, 3), -1), rf"must be in \[0, {CODES}\). Received: -1 to -1"),
        (np.full((1, 2, 3), 2**32), rf"must be in \[0, {CODES}\). Received: {2**32}"),
    ],
    ids=["float", "bool", "one grid", "none", "too large", "negative", "past int32"],
)
def test_other_indices_are_refused_with_what_came(tokenizer, wrong, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(wrong)


def test_run_folder_and_model_folder_give_the_same_tokenizer(tokenizer, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text("{}")
    expected = tokenizer.encode(images(2, 8, 12))
    for path in (tmp_path / "run", str(tmp_path / "run" / "model")):
        np.testing.assert_array_equal(kvq.Tokenizer.load(path).encode(images(2, 8, 12)), expected)


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="There is no"):
        Tokenizer.load(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="is not a kvq model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ArtifactError, match="has no model yet"):
        Tokenizer.load(tmp_path)
