"""What `kvq evaluate` and `kvq reconstruct` promise."""

import json

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kvq.config import load_config
from kvq.data import open_source
from kvq.errors import ArtifactError, DataError, RunError
from kvq.evaluation import evaluate
from kvq.reconstruction import reconstruct
from kvq.tokenizer import Tokenizer
from kvq.training import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    small = ["train.steps=3", "train.batch_size=16", "model.latent_dim=8", "quantizer.codebook_size=16"]
    train(load_config("fashion_mnist_mini", [*small, "data.validation_images=16"]), folder)
    return folder


def test_the_measurements_are_those_of_the_images_and_their_reconstructions(run):
    measured = evaluate(run, images=37, batch_size=16)
    tokenizer = Tokenizer.load(run)
    images = open_source("fashion_mnist_mini", "test").fetch(np.arange(37))["images"]
    indices = tokenizer.encode(images)
    restored = tokenizer.decode(indices)
    assert measured["images"] == 37
    expected = np.mean([peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(images, restored, strict=True)])
    assert measured["psnr"] == pytest.approx(expected, abs=1e-6)
    similar = [structural_similarity(a, b, data_range=255, channel_axis=-1) for a, b in zip(images, restored, strict=True)]
    assert measured["ssim"] == pytest.approx(np.mean(similar), abs=1e-6)
    counts = np.bincount(indices.ravel(), minlength=16)
    frequencies = counts[counts > 0] / counts.sum()
    assert measured["perplexity"] == pytest.approx(np.exp(-(frequencies * np.log(frequencies)).sum()), rel=1e-5)
    assert measured["usage"] == np.mean(counts > 0)
    # Grey levels are rounded for the pictures, not for the error.
    rounded = np.mean((restored / 127.5 - images / 127.5) ** 2)
    assert measured["mse"] == pytest.approx(rounded, rel=1e-2)
    assert measured["losses"]["reconstruction"] == measured["mse"]
    assert {*measured["losses"]} == {"reconstruction", "codebook", "commitment"}


def test_the_result_does_not_depend_on_the_batch_size(run):
    names = ("images", "mse", "psnr", "ssim", "usage", "perplexity")
    first, second = evaluate(run, images=37, batch_size=37), evaluate(run, images=37, batch_size=10)
    for name in names:
        assert first[name] == pytest.approx(second[name], rel=1e-6), name
    assert first["losses"] == pytest.approx(second["losses"], rel=1e-6)


def test_the_result_describes_how_it_was_made(run):
    measured = evaluate(run, images=2)
    assert {"data": "fashion_mnist_mini", "split": "test", "crop": 28}.items() <= measured.items()
    assert measured["weights_sha256"] == json.loads((run / "model" / "config.json").read_text())["weights_sha256"]
    assert measured["images_per_second"] > 0 and measured["backend"]


def test_a_model_folder_does_as_well_as_a_run_folder(run):
    assert evaluate(run / "model", images=2)["psnr"] == evaluate(run, images=2)["psnr"]


def test_a_run_is_measured_on_the_files_that_it_held_out(tmp_path):
    rng, photos, run = np.random.default_rng(0), tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for number in range(42):
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8)).save(photos / f"{number + 10}.png")
    small = [f'data.source="{photos}"', "data.pad=0", "train.steps=1", "train.batch_size=8", "model.latent_dim=8"]
    train(load_config("fashion_mnist_mini", small), run)
    before = evaluate(run)
    assert before["images"] == 3
    # As the first of them all it would be held out, and make training images of those that were.
    Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8)).save(photos / "00.png")
    assert evaluate(run)["mse"] == before["mse"]
    assert evaluate(run, photos)["mse"] != before["mse"]


def test_a_run_with_images_of_its_own_for_validation_is_measured_on_them(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    np.savez(tmp_path / "train.npz", x_train=images)
    np.savez(tmp_path / "other.npz", x_test=images[:7])
    small = ["train.steps=1", "train.batch_size=8", "model.latent_dim=8"]
    config = load_config("fashion_mnist_mini", small)
    train(config, tmp_path / "run", data=tmp_path / "train.npz", validation_data=tmp_path / "other.npz")
    measured = evaluate(tmp_path / "run")
    assert (measured["images"], measured["data"]) == (7, "other")
    assert evaluate(tmp_path / "run", split="train")["data"] == "train"


def test_images_that_do_not_fit_are_refused(run, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "colour.png")
    with pytest.raises(DataError, match="of 1 channel. Received: 3"):
        evaluate(run, data=tmp_path)
    with pytest.raises(ArtifactError, match="There is no"):
        evaluate(tmp_path / "nothing")


def test_a_reconstruction_has_the_size_of_its_image(run, tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"odd": (31, 45), "one": (1, 1), "fits": (28, 28)}
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{name}.png")
    written = reconstruct(run, [tmp_path / f"{name}.png" for name in sizes], tmp_path / "out")
    assert [path.stem for path in written] == [*sizes]
    for path in written:
        with Image.open(path) as restored:
            assert restored.size == sizes[path.stem][::-1]


def test_what_fits_the_grid_is_what_the_tokenizer_gives(run, tmp_path):
    image = open_source("fashion_mnist_mini", "test")[3]["image"]
    Image.fromarray(image[:, :, 0]).save(tmp_path / "image.png")
    with pytest.raises(RunError, match="holds image.png itself, .* Give another --out"):
        reconstruct(run, [tmp_path / "image.png"], tmp_path)
    (written,) = reconstruct(run, [tmp_path / "image.png"], tmp_path / "out")
    with pytest.raises(RunError, match="image.png is there already"):
        reconstruct(run, [tmp_path / "image.png"], tmp_path / "out")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "image.png").symlink_to(written)
    with pytest.raises(RunError, match="holds image.png itself"):
        reconstruct(run, [tmp_path / "link" / "image.png"], tmp_path / "out")
    tokenizer = Tokenizer.load(run)
    expected = tokenizer.decode(tokenizer.encode(image[None]))[0, :, :, 0]
    with Image.open(written) as restored:
        np.testing.assert_array_equal(np.asarray(restored), expected)


def test_a_folder_or_a_missing_image_is_refused_by_what_it_is(run, tmp_path):
    for path, what in ((tmp_path, "a folder"), (tmp_path / "none.png", "not there")):
        with pytest.raises(DataError, match=f"^{path} is {what}. Give image files"):
            reconstruct(run, [path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_unreadable_image_and_nothing_is_written(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("not an image")
    with pytest.raises(DataError, match="bad.png"):
        reconstruct(run, [tmp_path / "good.png", tmp_path / "bad.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_images_of_one_name_are_refused(run, tmp_path):
    with pytest.raises(DataError, match="different names"):
        reconstruct(run, [tmp_path / "a.png", tmp_path / "sub" / "a.jpg"], tmp_path / "out")
