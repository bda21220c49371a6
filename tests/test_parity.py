"""One model is the same model on every backend: the same indices, and the same training until rounding makes a difference.

What is compared with was stored by golden/make_golden.py. Indices are held against NumPy in float64, losses against those of
each backend on the machine where they were stored, so that no backend is the measure of the others.
"""

from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import load_file

from kvq import Tokenizer, artifact
from kvq.data import evaluation_batches, evaluation_transforms, open_source, training_batches, training_transforms
from kvq.model import VQVAE
from kvq.networks import build_decoder, build_encoder
from kvq.ops import gather_codes, straight_through
from kvq.quantizers import VectorQuantizer

GOLDEN = Path(__file__).parent / "golden"
MODEL = GOLDEN / "plain"
STEPS, BATCH, CODES, DIM, SIDE = 20, 32, 64, 16, 7
BACKENDS = ("jax", "tensorflow", "torch")


class GivenIndices(VectorQuantizer):
    """Takes the indices that it is given instead of searching for them."""

    def build(self, shape):
        super().build(shape)
        # A weight, since it changes from step to step and must not be compiled in.
        self.given = self.add_weight(name="given", shape=(BATCH, SIDE, SIDE), dtype="int32", initializer="zeros", trainable=False)

    def call(self, latents, training=False):
        codes = gather_codes(self.codebook, self.given)
        indices = ops.convert_to_tensor(self.given)
        return {"codes": straight_through(latents, codes), "indices": indices, "losses": self.loss_terms(latents, codes)}


def test_images():
    source = open_source("fashion_mnist_mini", "test")
    return evaluation_batches(source, evaluation_transforms(4, 28), len(source))[0]["images"]


test_images.__test__ = False


def given_indices():
    """Codes of every step, drawn so that each occurs in a step many times over."""
    return np.random.default_rng(0).integers(0, CODES, (STEPS, BATCH, SIDE, SIDE))


def losses(weights, indices=None):
    """The loss of each of the first steps from `weights`, on the same batches everywhere; float64 (STEPS,).

    With `indices` (STEPS, BATCH, SIDE, SIDE), the quantizer takes those.
    """
    quantizer = (VectorQuantizer if indices is None else GivenIndices)(CODES, name="quantizer")
    model = VQVAE(build_encoder("plain", 1, DIM), quantizer, build_decoder("plain", 1, DIM))
    model.build((None, None, None, 1))
    for name, weight in artifact.tensors(model):
        if name in weights:
            weight.assign(weights[name])
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    batches = training_batches(open_source("fashion_mnist_mini", "train"), training_transforms(4, 28, True), BATCH, seed=0)
    curve = []
    for step in range(STEPS):
        if indices is not None:
            quantizer.given.assign(indices[step])
        model.reset_metrics()  # else Keras gives the mean since the start
        curve.append(float(model.train_on_batch(batches[step]["images"], return_dict=True)["loss"]))
    return np.array(curve)


def latents_in_numpy(images, weights):
    """The encoder of `plain` in float64, from its definition: latents (n, h/4, w/4, d) of uint8 images (n, h, w, 1)."""
    weights = {name: array.astype("float64") for name, array in weights.items()}
    values = images / 127.5 - 1.0
    for stage, first_stride in enumerate((1, 2, 2)):
        for place, stride in (("down", first_stride), ("same", 1)):
            name = f"encoder.stage{stage}.{place}"
            values = convolved(values, weights[f"{name}.conv.kernel"], stride) + weights[f"{name}.conv.bias"]
            mean, variance = values.mean((1, 2), keepdims=True), values.var((1, 2), keepdims=True)
            values = (values - mean) / np.sqrt(variance + 1e-6) * weights[f"{name}.norm.gamma"] + weights[f"{name}.norm.beta"]
            values = np.where(values > 0, values, 0.2 * values)
    return values


def convolved(values, kernel, stride):
    """Convolution (n, h, w, c) with (3, 3, c, filters); zeros around, of which the odd row and column come last."""
    before = (3 - stride) // 2
    values = np.pad(values, ((0, 0), (before, 2 - before), (before, 2 - before), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(values, (3, 3), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("nhwcij,ijcf->nhwf", windows, kernel, optimize=True)


def distances_in_numpy(images, weights):
    """Squared distance of every latent to every code in float64: (n, h/4, w/4, k)."""
    codebook = weights["quantizer.codebook"].astype("float64")
    return np.stack([((latent[..., None, :] - codebook) ** 2).sum(-1) for latent in latents_in_numpy(images, weights)])


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "training.npz") as file:
        return dict(file)


def test_a_saved_model_gives_the_indices_of_numpy():
    """At least 99.99% of 24,500 positions on real images, the rest near-ties: the two nearest codes are equally far to 1e-5."""
    images = test_images()
    with np.load(GOLDEN / "indices.npz") as file:
        expected = file["indices"].astype("int32")
    indices = Tokenizer.load(MODEL).encode(images)
    assert indices.shape == expected.shape == (500, SIDE, SIDE)
    differ = indices != expected
    assert differ.mean() <= 1e-4
    if differ.any():
        affected = differ.any(axis=(1, 2))
        distances = distances_in_numpy(images[affected], load_file(MODEL / artifact.WEIGHTS_NAME))[differ[affected]]
        chosen, nearest = (np.take_along_axis(distances, which[differ][:, None], 1) for which in (indices, expected))
        assert (chosen - nearest <= 1e-5 * nearest).all()


def test_the_stored_indices_are_those_of_numpy():
    images = test_images()[:20]
    with np.load(GOLDEN / "indices.npz") as file:
        stored = file["indices"][:20]
    np.testing.assert_array_equal(distances_in_numpy(images, load_file(MODEL / artifact.WEIGHTS_NAME)).argmin(-1), stored)


def test_training_agrees_until_codes_flip(golden):
    """The same weights and batches: 5 steps within 2e-4 relative of every backend, 20 steps within 2e-3.

    A latent almost between two codes takes one or the other by rounding, and the two trainings part from there.
    """
    curve = losses(_weights(golden))
    for backend in BACKENDS:
        stored = golden[f"searched/{backend}"]
        np.testing.assert_allclose(curve[:5], stored[:5], rtol=2e-4, err_msg=backend)
        np.testing.assert_allclose(curve, stored, rtol=2e-3, err_msg=backend)


def test_training_with_given_indices_agrees_to_rounding(golden):
    """With the indices out of play, 20 steps are within 1e-5 relative of every backend: arithmetic and Adam are the same."""
    curve = losses(_weights(golden), given_indices())
    for backend in BACKENDS:
        np.testing.assert_allclose(curve, golden[f"given/{backend}"], rtol=1e-5, err_msg=backend)


def _weights(golden):
    return {name.removeprefix("weights/"): array for name, array in golden.items() if name.startswith("weights/")}
