"""What the pure functions compute, against definitions spelt out in NumPy float64."""

import keras
import numpy as np
import pytest
from keras import ops

from kvq import ops as kvq_ops
from kvq.ops import (
    code_counts,
    code_sums,
    gather_codes,
    mean_per_image,
    nearest_code,
    perplexity,
    psnr_from_mse,
    rescale,
    straight_through,
    to_uint8,
    usage,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def array(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def on_tensors(function, *arrays):
    """What a function of tensors gives for arrays, as an array."""
    return array(function(*map(ops.convert_to_tensor, arrays)))


def normal(rng, *shape, scale=1.0):
    return rng.normal(scale=scale, size=shape).astype("float32")


class Differentiated(keras.Model):
    """Its loss is a function of some points, each moved by a weight that starts at zero: after SGD(1) that is -gradient."""

    def __init__(self, function, points):
        super().__init__()
        self.function = function
        self.points = points
        self.moves = [self.add_weight(shape=point.shape, initializer="zeros", name=f"move{i}") for i, point in enumerate(points)]

    def call(self, unused):
        moved = [ops.convert_to_tensor(point) + move for point, move in zip(self.points, self.moves, strict=True)]
        # The second term lets every point have a gradient, if only zero.
        return ops.sum(self.function(*moved)) + 0.0 * sum(ops.sum(move) for move in moved)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return y_pred


def gradients(function, *points):
    """The gradients of the sum of `function`'s values, as Keras' own training step takes them."""
    model = Differentiated(function, points)
    model.compile(optimizer=keras.optimizers.SGD(1.0), jit_compile=False)
    model.train_on_batch(np.zeros((1, 1), "float32"))
    return [-array(move) for move in model.moves]


# The search.


@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 3, 5), (4, 3, 2, 5), (2, 3, 2, 2, 5)], ids=str)
def test_nearest_code_is_the_code_at_the_smallest_distance(rng, shape):
    latents, codebook = normal(rng, *shape), normal(rng, 17, 5)
    squares = np.square(latents[..., None, :].astype("float64") - codebook).sum(-1)
    indices = array(nearest_code(latents, codebook))
    assert indices.dtype == np.int32
    np.testing.assert_array_equal(indices, squares.argmin(-1))


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4])
def test_nearest_code_does_not_depend_on_the_scale(rng, scale):
    latents, codebook = normal(rng, 300, 8), normal(rng, 64, 8)
    squares = np.square(latents[:, None].astype("float64") - codebook).sum(-1)
    first, second = np.sort(squares, -1)[:, :2].T
    clear = (second - first) / second > 1e-5
    assert clear.mean() > 0.98
    indices = array(nearest_code(latents * np.float32(scale), codebook * np.float32(scale)))
    np.testing.assert_array_equal(indices[clear], squares.argmin(-1)[clear])


def test_nearest_code_equals_argmin_form(rng):
    # Whole numbers: no rounding anywhere, and many equal distances.
    latents = rng.integers(-3, 4, (500, 4)).astype("float32")
    codebook = rng.integers(-3, 4, (40, 4)).astype("float32")
    distances = np.square(latents[:, None] - codebook).sum(-1)
    assert (np.sort(distances, -1)[:, 0] == np.sort(distances, -1)[:, 1]).sum() > 50
    indices = array(nearest_code(latents, codebook))
    np.testing.assert_array_equal(indices, array(ops.argmin(ops.convert_to_tensor(distances), axis=-1)))
    np.testing.assert_array_equal(indices, distances.argmin(-1))


def test_of_equally_near_codes_the_lowest_index_wins():
    codebook = np.array([[5, 5], [1, 0], [-1, 0], [1, 0], [0, 1]], "float32")
    latents = np.array([[0, 0], [1, 0], [-2, 0], [0.5, 0.5], [9, 9]], "float32")
    np.testing.assert_array_equal(array(nearest_code(latents, codebook)), [1, 1, 2, 1, 0])
    np.testing.assert_array_equal(array(nearest_code(latents, np.ones((6, 2), "float32"))), [0] * 5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_latent_that_is_not_finite_gets_an_index_in_range(rng, value):
    latents = normal(rng, 3, 4)
    latents[1] = value
    indices = array(nearest_code(latents, normal(rng, 9, 4)))
    assert ((indices >= 0) & (indices < 9)).all()


@pytest.mark.parametrize("block", [1, 40, 41, 4_000])
def test_search_in_blocks_equals_the_search_at_once(rng, block):
    # Whole numbers, so that both round alike, with many equal distances.
    latents, codebook = (rng.integers(-3, 4, shape).astype("float32") for shape in ((5, 7, 9, 4), (40, 4)))
    at_once = array(nearest_code(latents, codebook, block=None))
    np.testing.assert_array_equal(array(nearest_code(latents, codebook, block=block)), at_once)
    assert at_once.shape == (5, 7, 9)


def test_search_over_parts_of_a_large_codebook_equals_the_search_at_once(rng, monkeypatch):
    monkeypatch.setattr(kvq_ops, "_CODES_AT_ONCE", 16)
    latents, codebook = (rng.integers(-3, 4, shape).astype("float32") for shape in ((60, 4), (40, 4)))
    at_once = array(nearest_code(latents, codebook, block=None))
    for block in (16, 320, 10**6):
        np.testing.assert_array_equal(array(nearest_code(latents, codebook, block=block)), at_once)


@pytest.mark.parametrize("block", [64, 10**6])
def test_search_in_a_batch_of_unknown_size(rng, block):
    """As TensorFlow sees it in training: by image where images are large, at once where they are small."""
    codebook = rng.integers(-3, 4, (40, 4)).astype("float32")
    inputs = keras.Input((3, 5, 4))
    search = keras.layers.Lambda(lambda z: nearest_code(z, codebook, block), output_shape=(3, 5), dtype="float32")
    model = keras.Model(inputs, search(inputs))
    latents = rng.integers(-3, 4, (7, 3, 5, 4)).astype("float32")
    np.testing.assert_array_equal(model.predict(latents, verbose=0, batch_size=4), array(nearest_code(latents, codebook, None)))


def test_both_ways_to_find_the_lowest_agree(rng, monkeypatch):
    """One way a backend; the other must mean the same, since exports and other backends take it."""
    distances = rng.integers(0, 9, (50, 3, 40)).astype("float32")
    for fast in (True, False):
        monkeypatch.setattr(kvq_ops, "_FAST_ARGMIN", fast)
        lowest = array(kvq_ops.lowest(ops.convert_to_tensor(distances)))
        assert lowest.dtype == np.int32
        np.testing.assert_array_equal(lowest, distances.argmin(-1))


def test_no_gradient_goes_through_the_search(rng):
    latents, codebook = normal(rng, 6, 4), normal(rng, 9, 4)
    moved = gradients(lambda z, e: ops.sum(z * 0.0) + ops.cast(ops.sum(nearest_code(z, e)), "float32"), latents, codebook)
    for gradient in moved:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nearest_code_searches_in_float32(rng, dtype):
    # Far from the origin, where half precision tells few codes apart.
    latents, codebook = ops.cast(10.5 + 0.5 * normal(rng, 200, 8), dtype), 10.5 + 0.5 * normal(rng, 64, 8)
    squares = np.square(array(ops.cast(latents, "float32")).astype("float64")[:, None] - codebook).sum(-1)
    np.testing.assert_array_equal(array(nearest_code(latents, codebook)), squares.argmin(-1))


# Codes and their gradients.


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
def test_straight_through_gives_codes_bit_for_bit(rng, scale):
    latents, codes = normal(rng, 200, 8, scale=scale), normal(rng, 200, 8)
    # The usual form does not, except for tiny latents: what is claimed here is worth something.
    assert (latents + (codes - latents) != codes).any() == (scale > 1e-8)
    np.testing.assert_array_equal(on_tensors(straight_through, latents, codes), codes)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_straight_through_passes_the_gradient_to_the_latents_alone(rng, scale):
    latents, codes, weights = normal(rng, 6, 8, scale=scale), normal(rng, 6, 8), normal(rng, 6, 8)
    to_latents, to_codes = gradients(lambda z, e: ops.multiply(weights, straight_through(z, e)), latents, codes)
    np.testing.assert_array_equal(to_latents, weights)
    np.testing.assert_array_equal(to_codes, np.zeros_like(codes))


def test_gather_codes_gives_rows(rng):
    codebook, indices = normal(rng, 9, 4), rng.integers(0, 9, (2, 3, 5)).astype("int32")
    np.testing.assert_array_equal(array(gather_codes(codebook, indices)), codebook[indices])


def test_gradient_of_gathered_codes_sums_over_repeated_indices(rng):
    codebook, indices, weights = normal(rng, 5, 3), np.array([1, 1, 4, 1], "int32"), normal(rng, 4, 3)
    (gradient,) = gradients(lambda e: ops.multiply(weights, gather_codes(e, indices)), codebook)
    expected = np.zeros((5, 3))
    np.add.at(expected, indices, weights)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


class Fitted(keras.Model):
    """A codebook whose gathered rows learn some targets."""

    def __init__(self, codebook, indices, targets):
        super().__init__()
        self.indices, self.targets = indices, targets
        self.codebook = self.add_weight(shape=codebook.shape, initializer="zeros", name="codebook")
        self.codebook.assign(codebook)

    def call(self, unused):
        return ops.sum(ops.square(ops.subtract(gather_codes(self.codebook, self.indices), self.targets)))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return y_pred


def test_two_adam_steps_with_repeated_indices_equal_numpy(rng):
    """Keras' Adam squares a sparse gradient without summing the rows that repeat, and TensorFlow's is sparse of itself."""
    codebook, targets = normal(rng, 6, 3), normal(rng, 7, 3)
    indices = np.array([2, 2, 2, 5, 0, 2, 5], "int32")
    rate, beta1, beta2, epsilon = 0.1, 0.9, 0.999, 1e-7
    model = Fitted(codebook, indices, targets)
    model.compile(optimizer=keras.optimizers.Adam(rate, beta1, beta2, epsilon), jit_compile=False)
    expected = codebook.astype("float64")
    mean, square = np.zeros((6, 3)), np.zeros((6, 3))
    for step in (1, 2):
        model.train_on_batch(np.zeros((1, 1), "float32"))
        gradient = np.zeros((6, 3))
        np.add.at(gradient, indices, 2 * (expected[indices] - targets))
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        expected -= rate * mean / (1 - beta1**step) / (np.sqrt(square / (1 - beta2**step)) + epsilon)
        np.testing.assert_allclose(array(model.codebook), expected, atol=1e-5)
    assert (array(model.codebook)[[1, 3, 4]] == codebook[[1, 3, 4]]).all()


# Sums and means.


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (3, 2, 2, 4), (3, 2, 2, 2, 4)], ids=str)
def test_mean_per_image_keeps_the_first_axis_alone(rng, shape):
    values = normal(rng, *shape)
    expected = values.astype("float64").reshape(3, -1).mean(1)
    np.testing.assert_allclose(array(mean_per_image(values)), expected, atol=1e-6)
    half = mean_per_image(ops.cast(values, "bfloat16"))
    assert half.shape == (3,) and array(half).dtype == np.float32


def test_code_counts_and_sums_equal_their_definition(rng):
    latents, indices = normal(rng, 3, 4, 5, 6), rng.integers(0, 7, (3, 4, 5)).astype("int32")
    indices[indices == 2] = 3
    sums = np.zeros((9, 6))
    np.add.at(sums, indices, latents)
    counts = array(code_counts(indices, 9))
    assert counts.dtype == np.float32
    np.testing.assert_array_equal(counts, np.bincount(indices.ravel(), minlength=9))
    np.testing.assert_allclose(array(code_sums(latents, indices, 9)), sums, atol=1e-5)


def test_code_sums_of_half_precision_are_in_float32(rng):
    # In bfloat16 a sum of ones stops at 256, and there is no 1001.
    sums = code_sums(ops.ones((1001, 2), "bfloat16"), np.zeros(1001, "int32"), 3)
    np.testing.assert_array_equal(array(sums), [[1001, 1001], [0, 0], [0, 0]])


def test_code_sums_are_the_same_bits_each_time(rng, many_threads):
    # Large enough for a backend to share it among threads, with codes that all of them add to.
    latents, indices = rng.normal(size=(65536, 64)).astype("float32"), rng.integers(0, 16, 65536).astype("int32")
    first = array(code_sums(latents, indices, 16))
    for _ in range(20):
        np.testing.assert_array_equal(array(code_sums(latents, indices, 16)), first)


@pytest.fixture
def many_threads():
    """PyTorch can change how many it uses."""
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "counts, codes_in_use, fraction",
    [
        ([0, 0, 0, 0], 0.0, 0.0),
        ([0, 0, 7, 0], 1.0, 0.25),
        ([1, 0, 0, 0], 1.0, 0.25),
        ([3, 3, 3, 3], 4.0, 1.0),
        ([5, 5, 0, 0], 2.0, 0.5),
        ([2**30, 2**30, 2**30, 2**30], 4.0, 1.0),
    ],
    ids=str,
)
def test_perplexity_and_usage_of_plain_cases(counts, codes_in_use, fraction):
    counts = np.array(counts, "float32")
    assert float(on_tensors(perplexity, counts)) == pytest.approx(codes_in_use, abs=1e-5)
    assert float(on_tensors(usage, counts)) == fraction


def test_perplexity_is_the_exponential_of_the_entropy(rng):
    counts = rng.integers(0, 50, 100).astype("float32")
    frequencies = counts[counts > 0].astype("float64") / counts.sum()
    expected = np.exp(-np.sum(frequencies * np.log(frequencies)))
    assert float(on_tensors(perplexity, counts)) == pytest.approx(expected, rel=1e-5)
    assert float(on_tensors(perplexity, 1000 * counts)) == pytest.approx(expected, rel=1e-5)


# Images.


def test_every_grey_level_survives_the_way_to_the_model_and_back():
    levels = np.arange(256, dtype="uint8").reshape(1, 16, 16, 1)
    scaled = array(rescale(levels))
    assert scaled.dtype == np.float32 and scaled.min() == -1.0 and scaled.max() == 1.0
    np.testing.assert_allclose(scaled, levels.astype("float64") / 127.5 - 1, atol=1e-7)
    restored = array(to_uint8(scaled))
    assert restored.dtype == np.uint8
    np.testing.assert_array_equal(restored, levels)


def test_to_uint8_rounds_and_clips():
    values = np.array([-7.0, -1.0001, 1.0001, 9.0, (100.4 / 127.5) - 1, (100.6 / 127.5) - 1], "float32")
    np.testing.assert_array_equal(array(to_uint8(values)), [0, 0, 255, 255, 100, 101])


def test_psnr_from_mse_is_of_peak_two_and_at_most_100():
    mse = np.array([4.0, 0.04, 1e-3, 1e-9, 0.0], "float32")
    expected = np.minimum(10 * np.log10(4 / np.maximum(mse.astype("float64"), 1e-30)), 100)
    np.testing.assert_allclose(on_tensors(psnr_from_mse, mse), expected, atol=1e-4)
