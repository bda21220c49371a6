"""PSNR and SSIM against scikit-image, on real images; codebook usage over a whole set."""

import keras
import numpy as np
import pytest
from keras import ops
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kvq.data import open_source
from kvq.metrics import CodebookUsage, ImageMeans, psnr, ssim


def disturbed(images, seed):
    """Some of them hardly, some of them badly."""
    rng = np.random.default_rng(seed)
    strength = np.linspace(0.5, 80, len(images))[:, None, None, None]
    return np.clip(np.round(images + strength * rng.normal(size=images.shape)), 0, 255).astype("uint8")


@pytest.fixture(scope="module")
def pairs():
    """Name to originals and reconstructions, uint8 (n, h, w, c)."""
    source = open_source("fashion_mnist_mini", "test")
    real = np.stack([source[i]["image"] for i in range(24)])
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (6, 13, 31, 3), np.uint8)
    smooth = np.add.outer(np.arange(40), 2 * np.arange(33)).astype("uint8")[None, :, :, None].repeat(2, 0).repeat(4, 3)
    return {
        "real": (real, disturbed(real, 1)),
        "noise in colour": (colours, disturbed(colours, 2)),
        "unrelated": (colours, rng.integers(0, 256, colours.shape, np.uint8)),
        "four channels": (smooth, disturbed(smooth, 3)),
        "smallest": (colours[:, :7, :7], disturbed(colours[:, :7, :7], 4)),
        "black and white": (np.zeros((2, 9, 9, 1), np.uint8), np.full((2, 9, 9, 1), 255, np.uint8)),
    }


NAMES = ["real", "noise in colour", "unrelated", "four channels", "smallest", "black and white"]


@pytest.mark.parametrize("name", NAMES)
def test_psnr_equals_scikit_image(pairs, name):
    images, restored = pairs[name]
    values = psnr(images, restored)
    expected = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(images, restored, strict=True)]
    assert values.shape == (len(images),) and values.dtype == np.float64
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_ssim_equals_scikit_image(pairs, name):
    images, restored = pairs[name]
    values = ssim(images, restored)
    expected = [structural_similarity(a, b, data_range=255, channel_axis=-1) for a, b in zip(images, restored, strict=True)]
    assert values.shape == (len(images),) and values.dtype == np.float64
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)


def test_equal_images_have_the_best_values(pairs):
    images, _ = pairs["real"]
    np.testing.assert_array_equal(psnr(images, images), np.full(len(images), 100.0))
    np.testing.assert_allclose(ssim(images, images), 1.0, atol=1e-12)


def test_one_grey_level_in_one_pixel_counts():
    images = np.full((1, 64, 64, 1), 100, np.uint8)
    restored = images.copy()
    restored[0, 3, 3, 0] = 99
    np.testing.assert_allclose(psnr(images, restored), 10 * np.log10(255**2 * 64 * 64), atol=1e-9)


@pytest.mark.parametrize("size", [(6, 20), (20, 6), (1, 1)], ids=str)
def test_images_smaller_than_the_window_have_no_ssim(size):
    images = np.zeros((3, *size, 1), np.uint8)
    values = ssim(images, images)
    assert values.shape == (3,) and np.isnan(values).all()
    assert (psnr(images, images) == 100).all()


# The codebook.


def result(metric):
    return {name: float(ops.convert_to_numpy(value)) for name, value in metric.result().items()}


def test_image_means_are_over_the_images_that_count_and_of_none_zero():
    means = ImageMeans(("one", "two"))
    assert result(means) == {"one": 0.0, "two": 0.0}
    one, two = np.random.default_rng(0).normal(size=(2, 8)).astype("float32")
    spoilt = np.array([two[0], np.nan, two[2], two[3], np.inf], "float32")
    counted = np.array([True, False, True, True, False])
    means.update_state({"one": ops.convert_to_tensor(one[:5]), "two": ops.convert_to_tensor(spoilt)}, sample_weight=counted)
    means.update_state({"one": ops.convert_to_tensor(one[5:]), "two": ops.convert_to_tensor(two[5:])})
    whole = [0, 2, 3, 5, 6, 7]
    expected = {"one": one.astype("float64")[whole].mean(), "two": two.astype("float64")[whole].mean()}
    assert result(means) == pytest.approx(expected, rel=1e-6)
    means.reset_state()
    assert result(means) == {"one": 0.0, "two": 0.0}
    again = ImageMeans.from_config(means.get_config())
    assert (again.names, again.name) == (means.names, means.name)


def test_codebook_usage_is_of_the_whole_set_not_a_mean_over_batches():
    batches = [np.array([[0, 0], [0, 0]]), np.array([[1, 1], [1, 1]]), np.array([[2, 2]])]
    metric = CodebookUsage(8)
    for batch in batches:
        metric.update_state(ops.convert_to_tensor(batch.astype("int32")))
    frequencies = np.array([4, 4, 2]) / 10
    expected = np.exp(-np.sum(frequencies * np.log(frequencies)))
    # Each batch alone uses one code of eight.
    assert result(metric) == pytest.approx({"usage": 3 / 8, "perplexity": expected}, abs=1e-5)
    assert expected > 2.8


def test_codebook_usage_of_nothing_is_zero_and_it_can_start_again():
    metric = CodebookUsage(4)
    assert result(metric) == {"usage": 0.0, "perplexity": 0.0}
    metric.update_state(ops.convert_to_tensor(np.arange(4, dtype="int32")))
    assert result(metric) == pytest.approx({"usage": 1.0, "perplexity": 4.0}, abs=1e-5)
    metric.reset_state()
    assert result(metric) == {"usage": 0.0, "perplexity": 0.0}


def test_codebook_usage_survives_its_config():
    metric = CodebookUsage(5, name="codes")
    rebuilt = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric))
    assert (rebuilt.codebook_size, rebuilt.name) == (5, "codes")
