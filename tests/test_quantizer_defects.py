"""Defects found in other projects' quantizers, each a test that kvq passes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from kvq.quantizers import QUANTIZERS

DIM, K = 6, 32


def array(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def normal(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype("float32")


def build(kind, dim=DIM, seed=0, **arguments):
    keras.utils.set_random_seed(seed)
    quantizer = QUANTIZERS[kind](**arguments, name="quantizer")
    quantizer.build((None, None, dim))
    return quantizer


class Losses(keras.Model):
    """A quantizer's losses on latents that a weight moves."""

    def __init__(self, quantizer, shape):
        super().__init__()
        self.quantizer = quantizer
        self.move = self.add_weight(shape=shape, initializer="zeros", name="move")

    def call(self, latents, training=False):
        return self.quantizer(ops.add(latents, self.move), training=training)["losses"]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(sum(y_pred.values())) + 0.0 * sum(ops.sum(weight) for weight in self.trainable_weights)


def gradient(quantizer, latents):
    model = Losses(quantizer, latents.shape[1:])
    model.compile(optimizer=keras.optimizers.SGD(1.0), jit_compile=False)
    model.fit(latents, batch_size=len(latents), shuffle=False, verbose=0)
    return -array(model.move)


@pytest.mark.parametrize("kind", ["ema_vector", "ema_cosine_vector"])
def test_codes_neither_explode_nor_collapse_at_the_first_ema_step(kind):
    """Counts from 0 beside random sums made unused codes explode; zero-debiased averages made them 0."""
    quantizer = build(kind, codebook_size=512, dim=8)
    before = np.linalg.norm(array(quantizer.codes()), axis=-1)
    quantizer(ops.convert_to_tensor(normal(0, 4, 256, 8)), training=True)
    after = np.linalg.norm(array(quantizer.codes()), axis=-1)
    assert after.max() < 3 * before.max() + 2 and after.min() > 0.2 * before.min()


def test_laplace_smoothing_is_not_written_back():
    """A code that is never used keeps its place, and its count goes on falling by the decay alone."""
    quantizer = build("ema_vector", codebook_size=4, decay=0.9)
    codes = array(quantizer.codebook)
    latents = ops.convert_to_tensor(np.repeat(codes[:1, None], 5, 1))
    for _ in range(60):
        quantizer(latents, training=True)
    np.testing.assert_allclose(array(quantizer.counts)[1:], 0.9**60, rtol=1e-4)
    np.testing.assert_allclose(array(quantizer.codebook)[1:], codes[1:], rtol=1e-4)


def test_every_residual_level_has_a_commitment_gradient():
    """Subtracting the straight-through form of a level's code instead of the code cancels the gradient of all later levels."""
    latents = normal(0, 1, 5, DIM)
    members = [QUANTIZERS["ema_vector"](K, commitment_weight=1.0, name=f"level{i}") for i in range(3)]
    whole = gradient(build("residual", members=members), latents)
    expected, residual = np.zeros((5, DIM)), latents.astype("float64")[0]
    for member in members:
        codes = array(member.codebook).astype("float64")
        residual = residual - codes[np.square(residual[:, None] - codes).sum(-1).argmin(-1)]
        expected += 2 * residual / residual.size
    # One step of training moved the averages after the gradient was taken; the codebooks above are a little newer.
    np.testing.assert_allclose(whole, expected, atol=0.02)
    first = gradient(build("residual", members=[QUANTIZERS["ema_vector"](K, commitment_weight=1.0, name="level0")]), latents)
    assert np.abs(whole - first).max() > 0.01


@pytest.mark.parametrize("kind", ["vector", "ema_vector", "cosine_vector", "sim_vector", "index_backprop"])
def test_loss_does_not_scale_with_the_batch(kind):
    latents = normal(0, 2, 5, DIM)
    # At the default, 0.01, its entropies multiply what rounding does to the latents by 100.
    softer = {"temperature": 1.0} if kind == "index_backprop" else {}
    quantizer = build(kind, codebook_size=K, **softer)
    small, large = (quantizer(ops.convert_to_tensor(x))["losses"] for x in (latents, np.concatenate([latents] * 8)))
    for name, values in small.items():
        np.testing.assert_allclose(array(large[name]).mean(), array(values).mean(), rtol=1e-5)


def test_beta_is_on_the_encoder_term():
    """`legacy=True` of other projects weighs the codebook's term with beta and commits with 1."""
    latents = normal(0, 1, 5, DIM)
    light, heavy = (
        build("vector", codebook_size=K, commitment_weight=0.0),
        build("vector", codebook_size=K, commitment_weight=2.0),
    )
    assert np.abs(gradient(light, latents)).max() == 0.0
    assert np.abs(gradient(heavy, latents)).max() > 0.01
    np.testing.assert_allclose(array(light.codebook), array(heavy.codebook), atol=1e-6)


def test_entropy_of_saturated_bits_is_not_nan():
    """The naive p log p is NaN where p reaches 0."""
    for kind in ("lookup_free", "binary_spherical"):
        quantizer = build(kind, bits=DIM, temperature=100.0)
        outputs = quantizer(ops.convert_to_tensor(normal(0, 4, 5, DIM, scale=1e3)))
        assert all(np.isfinite(array(values)).all() for values in outputs["losses"].values())
        assert np.isfinite(gradient(quantizer, normal(0, 4, 5, DIM, scale=1e3))).all()


def test_no_initialisation_on_an_evaluation_batch():
    quantizer = build("vector", codebook_size=K)
    before = array(quantizer.codebook)
    quantizer(ops.convert_to_tensor(normal(0, 4, 5, DIM)))
    np.testing.assert_array_equal(array(quantizer.codebook), before)
    assert not quantizer.is_initialised


def test_dead_codes_do_not_depend_on_the_batch_size():
    """A threshold in absolute counts means something else for every batch size."""
    few, many = (build("vector", codebook_size=K, decay=0.5) for _ in range(2))
    latents = normal(0, 4, 50, DIM)
    for _ in range(30):
        few(ops.convert_to_tensor(latents), training=True)
        many(ops.convert_to_tensor(np.concatenate([latents] * 4)), training=True)
    np.testing.assert_array_equal(few.dead_codes(0.6), many.dead_codes(0.6))
    assert len(few.dead_codes(0.6))


PARALLEL = Path(__file__).parent / "parallel_training.py"


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="Keras spreads a process over devices on JAX alone.")
def test_two_devices_give_what_one_gives(tmp_path):
    """Statistics and entropies of the global batch (defect: a batch entropy that ignores the other half), after 50 steps."""
    results = {}
    for devices in (1, 2):
        environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        done = subprocess.run([sys.executable, str(PARALLEL), str(devices)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        results[devices] = json.loads(done.stdout.splitlines()[-1])
    assert results[1].keys() == results[2].keys() and len(results[1]) >= 6
    for name, values in results[1].items():
        np.testing.assert_allclose(results[2][name], values, rtol=1e-5, atol=1e-5, err_msg=name)
