"""Values and gradients of convolutions, against their definition spelt out in NumPy float64, by every way that leads to them."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from kvq import backends, convolutions, winograd
from kvq.convolutions import convolution, transposed_convolution, views
from kvq.layers import Conv2D, Conv2DTranspose


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def go(monkeypatch):
    """Chooses a way: as the backend does, with the gradients of kernels spelt out, or as well those of 3x3 ones in tiles."""

    def choose(way):
        monkeypatch.setattr(backends, "gradients_of_kernels_are_slow", lambda name: way != "plain")
        monkeypatch.setattr(backends, "winograd_channels", lambda name: 1 if way == "in tiles" else np.inf)

    return choose


def array(tensor):
    return np.array(ops.convert_to_numpy(ops.cast(tensor, "float32")))


def normal(rng, *shape):
    return rng.normal(size=shape).astype("float32")


def gather(inputs, kernel, strides):
    """A convolution: each output sums what the kernel sees; "same" pads evenly, the odd row and column at the end."""
    size, (_, *sides, _) = kernel.shape[:2], inputs.shape
    counts = [-(-side // stride) for side, stride in zip(sides, strides, strict=True)]
    missing = [max((counts[a] - 1) * strides[a] + size[a] - sides[a], 0) for a in (0, 1)]
    padded = np.pad(inputs, ((0, 0), *((total // 2, total - total // 2) for total in missing), (0, 0)))
    outputs = np.zeros((len(inputs), *counts, kernel.shape[-1]))
    for row, column in np.ndindex(*counts):
        top, left = row * strides[0], column * strides[1]
        seen = padded[:, top : top + size[0], left : left + size[1]]
        outputs[:, row, column] = np.einsum("bhwi,hwio->bo", seen, kernel)
    return outputs


def paste(inputs, kernel, strides):
    """A transposed convolution: every input pastes the kernel, scaled, at its place; "same" cuts what juts out evenly."""
    batch, height, width, _ = inputs.shape
    rows, columns, filters, _ = kernel.shape
    canvas = np.zeros((batch, height * strides[0] + rows, width * strides[1] + columns, filters))
    for row, column in np.ndindex(height, width):
        stamp = np.einsum("bi,hwoi->bhwo", inputs[:, row, column], kernel)
        top, left = row * strides[0], column * strides[1]
        canvas[:, top : top + rows, left : left + columns] += stamp
    top, left = (max(size - stride, 0) // 2 for size, stride in ((rows, strides[0]), (columns, strides[1])))
    return canvas[:, top : top + height * strides[0], left : left + width * strides[1]]


class Weighted(keras.Model):
    """The weighted sum of what a function gives of a tensor, moved by a weight that starts at zero: after SGD(1) -gradient."""

    def __init__(self, function, tensor, weighting):
        super().__init__()
        self.function, self.tensor, self.weighting = function, tensor, ops.convert_to_tensor(weighting)
        self.move = self.add_weight(shape=tensor.shape, initializer="zeros", name="move")

    def call(self, unused):
        moved = ops.convert_to_tensor(self.tensor) + self.move
        return ops.sum(self.function(moved) * self.weighting) + 0.0 * ops.sum(unused)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return y_pred


def gradient(function, tensor, weighting):
    """Of the sum of `function`'s values times `weighting`, as Keras' own training step takes it."""
    model = Weighted(function, tensor, weighting)
    model.compile(optimizer=keras.optimizers.SGD(1.0), jit_compile=False)
    model.train_on_batch(np.zeros((1, 1), "float32"))
    return -array(model.move)


def gradients(function, inputs, kernel, weighting):
    # One after the other: TensorFlow may move the first before the second's gradient reads it, where a loss is as linear as this.
    of_inputs = gradient(lambda x: function(x, ops.convert_to_tensor(kernel)), inputs, weighting)
    return of_inputs, gradient(lambda w: function(ops.convert_to_tensor(inputs), w), kernel, weighting)


def assert_gradients(rng, function, definition, inputs, kernel, strides, tolerance=1e-5):
    """`tolerance` is relative, and of the gradients absolute as well."""
    x, w = inputs.astype("float64"), kernel.astype("float64")
    expected = definition(x, w, strides)
    outputs = array(function(ops.convert_to_tensor(inputs), ops.convert_to_tensor(kernel), strides))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    weighting = normal(rng, *expected.shape)
    found = gradients(lambda x, w: function(x, w, strides), inputs, kernel, weighting)
    # Linear in each argument, so that the derivative along a unit vector is the value there.
    along = (
        lambda unit: (weighting * definition(unit, w, strides)).sum(),
        lambda unit: (weighting * definition(x, unit, strides)).sum(),
    )
    for moved, point, value in zip(found, (x, w), along, strict=True):
        assert moved.shape == point.shape
        for place in map(tuple, rng.permutation(list(np.ndindex(point.shape)))[:20]):
            unit = np.zeros_like(point)
            unit[place] = 1.0
            np.testing.assert_allclose(moved[place], value(unit), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("way", "sides", "size", "strides"),
    [
        ("plain", (6, 8), (4, 4), (2, 2)),
        ("plain", (7, 7), (3, 3), (1, 1)),
        *[("spelt out", (6, 8), size, (2, 2)) for size in ((4, 4), (3, 3), (5, 3), (2, 2))],
        *[("spelt out", (3, 9), size, (1, 1)) for size in ((3, 3), (1, 1), (4, 4))],
        ("spelt out", (6, 9), (2, 5), (2, 3)),
        ("spelt out", (7, 9), (3, 3), (2, 2)),  # which the strides do not divide
        *[("in tiles", sides, (3, 3), (1, 1)) for sides in ((8, 8), (7, 7), (4, 12), (1, 2), (3, 9))],
    ],
    ids=str,
)
def test_gradients_of_a_convolution_are_those_of_its_definition(rng, go, way, sides, size, strides):
    go(way)
    inputs, kernel = normal(rng, 2, *sides, 3), normal(rng, *size, 3, 5)
    assert_gradients(rng, convolution, gather, inputs, kernel, strides)


@pytest.mark.parametrize(
    ("way", "size", "strides"),
    [
        ("plain", (4, 4), (2, 2)),
        ("plain", (3, 3), (1, 1)),
        *[("spelt out", size, (2, 2)) for size in ((4, 4), (3, 3), (2, 2))],
        *[("spelt out", size, (1, 1)) for size in ((3, 3), (4, 4))],
        ("spelt out", (5, 3), (2, 3)),
        ("spelt out", (1, 2), (3, 1)),
        ("in tiles", (3, 3), (1, 1)),
    ],
    ids=str,
)
def test_gradients_of_a_transposed_convolution_are_those_of_its_definition(rng, go, way, size, strides):
    go(way)
    inputs, kernel = normal(rng, 2, 3, 4, 3), normal(rng, *size, 5, 3)
    assert_gradients(rng, transposed_convolution, paste, inputs, kernel, strides)


def test_many_channels_are_multiplied_in_parts(rng, go, monkeypatch):
    go("spelt out")
    monkeypatch.setattr(convolutions, "_COLUMNS", 6)  # two places of the kernel at once, of nine
    inputs, kernel = normal(rng, 2, 6, 4, 3), normal(rng, 3, 3, 3, 5)
    assert_gradients(rng, convolution, gather, inputs, kernel, (2, 2))


@pytest.mark.parametrize(("batch", "most", "together"), [(6, 4, 3), (6, 6, 6), (5, 4, 1), (2, 0, 1)])
def test_what_large_batches_see_is_copied_in_parts(rng, go, monkeypatch, batch, most, together):
    go("spelt out")
    monkeypatch.setattr(convolutions, "_COPIED", most * 4 * 2 * 9 * 3)  # what nine places see of an image of three channels
    seen, real = [], convolutions._of_kernel_at_once
    monkeypatch.setattr(convolutions, "_of_kernel_at_once", lambda *given: seen.append(given[0].shape[0]) or real(*given))
    inputs, kernel = normal(rng, batch, 8, 4, 3), normal(rng, 3, 3, 3, 5)
    assert_gradients(rng, convolution, gather, inputs, kernel, (2, 2))
    assert set(seen) == {together}


def test_tiles_cost_little_accuracy(rng):
    """Against float64, beside what the backend's own gradients in float32 are off."""
    inputs, kernel, upstream = normal(rng, 4, 8, 8, 64), normal(rng, 3, 3, 64, 64), normal(rng, 4, 8, 8, 64)
    own = gradients(lambda x, w: ops.conv(x, w, padding="same", data_format="channels_last"), inputs, kernel, upstream)
    tiles = map(array, winograd.gradients(*map(ops.convert_to_tensor, (inputs, kernel, upstream))))
    padded = np.pad(inputs.astype("float64"), ((0, 0), (1, 1), (1, 1), (0, 0)))
    around = np.pad(upstream.astype("float64"), ((0, 0), (1, 1), (1, 1), (0, 0)))
    places = [(row, column, slice(row, row + 8), slice(column, column + 8)) for row, column in np.ndindex(3, 3)]
    of_inputs = sum(around[:, rows, columns] @ kernel[2 - row, 2 - column].T for row, column, rows, columns in places)
    of_kernel = np.stack([np.einsum("bhwi,bhwo->io", padded[:, rows, columns], upstream) for _, _, rows, columns in places])
    for found, plain, expected in zip(tiles, own, (of_inputs, of_kernel.reshape(kernel.shape)), strict=True):
        errors = [np.sqrt(np.mean(np.square(one - expected)) / np.mean(np.square(expected))) for one in (plain, found)]
        assert errors[0] < 1e-6 and errors[1] < 1.3e-6


@pytest.mark.parametrize(
    ("sides", "channels", "filters", "size", "strides", "dtype", "expected"),
    [
        ((8, 8), 4, 4, 3, 1, "float32", True),
        ((64, 8), 4, 4, 3, 1, "float32", True),
        ((8, 65), 4, 4, 3, 1, "float32", False),
        ((8, 8), 3, 4, 3, 1, "float32", False),
        ((8, 8), 4, 3, 3, 1, "float32", False),
        ((8, 8), 3, 6, 3, 1, "float32", True),  # 4 in the harmonic mean
        ((8, 8), 4, 4, 5, 1, "float32", False),
        ((8, 8), 4, 4, 3, 2, "float32", False),
        ((8, 8), 4, 4, 3, 1, "bfloat16", False),
    ],
)
@pytest.mark.parametrize("slow", [False, True])
def test_what_is_computed_in_tiles(rng, monkeypatch, sides, channels, filters, size, strides, dtype, expected, slow):
    monkeypatch.setattr(backends, "gradients_of_kernels_are_slow", lambda name: slow)
    monkeypatch.setattr(backends, "winograd_channels", lambda name: 4)
    calls, real = [], winograd.gradients
    monkeypatch.setattr(winograd, "gradients", lambda *tensors: calls.append(1) or real(*tensors))
    inputs, kernel = normal(rng, 1, *sides, channels), normal(rng, size, size, channels, filters)
    weighting = np.ones((1, *(-(-side // strides) for side in sides), filters), "float32")

    def function(x, w):
        return ops.cast(convolution(ops.cast(x, dtype), ops.cast(w, dtype), (strides, strides)), "float32")

    gradients(function, inputs, kernel, weighting)
    assert bool(calls) == expected


def test_on_a_gpu_gradients_are_the_backends_own(monkeypatch):
    monkeypatch.setattr(backends, "devices", lambda name: ["gpu: any"])
    for name in backends.BACKENDS:
        assert not backends.gradients_of_kernels_are_slow.__wrapped__(name)
        assert backends.winograd_channels.__wrapped__(name) == np.inf


def test_views_are_what_a_convolution_sees(rng):
    images, kernel = normal(rng, 2, 6, 9, 4), normal(rng, 4, 3, 4, 7)
    seen = np.concatenate([array(view) for view in views(ops.convert_to_tensor(images), (4, 3), (2, 3))], axis=-1)
    np.testing.assert_allclose(seen @ kernel.reshape(-1, 7), gather(images, kernel, (2, 3)), atol=1e-5)


class Trained(keras.Model):
    """A layer whose loss is the weighted sum of its outputs; after SGD(1) its weights have moved by their gradients."""

    def __init__(self, layer, weighting):
        super().__init__()
        self.layer, self.weighting = layer, ops.convert_to_tensor(weighting)

    def call(self, inputs):
        return ops.sum(ops.cast(self.layer(inputs), "float32") * self.weighting)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return y_pred


@pytest.mark.parametrize("way", ["plain", "in tiles"])
@pytest.mark.parametrize(("policy", "tolerance"), [("float32", 1e-5), ("mixed_bfloat16", 2e-2)])
@pytest.mark.parametrize(
    ("kind", "size", "strides"),
    [("Conv2D", 1, 1), ("Conv2D", 3, 1), ("Conv2D", 4, 2), ("Conv2DTranspose", 4, 2), ("Conv2DTranspose", 3, 2)],
)
def test_layers_learn_as_those_of_keras(go, way, kind, size, strides, policy, tolerance):
    go(way)
    batch, given, moved = np.random.default_rng(0).uniform(-1, 1, (4, 6, 8, 3)).astype("float32"), [], []
    weighting = None
    for layer_class in ({"Conv2D": Conv2D, "Conv2DTranspose": Conv2DTranspose}[kind], getattr(layers, kind)):
        layer = layer_class(5, size, strides, padding="same", dtype=policy)
        layer.build(batch.shape)
        layer.kernel.assign(np.random.default_rng(2).normal(size=layer.kernel.shape))
        if weighting is None:
            weighting = np.random.default_rng(1).normal(size=layer.compute_output_shape(batch.shape)).astype("float32")
        given.append(array(layer(batch)))  # outside of a compiled step, where TensorFlow treats variables otherwise
        model = Trained(layer, weighting)
        model.compile(optimizer=keras.optimizers.SGD(1.0), jit_compile=False)
        model.train_on_batch(batch)
        moved.append([array(weight) for weight in layer.weights])
    for ours, theirs in zip((given[0], *moved[0]), (given[1], *moved[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())
