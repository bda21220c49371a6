"""Weights before training: of the distribution that was asked for, by the seed, and the same on every backend."""

import keras
import numpy as np
import pytest

from kvq.build import build_model
from kvq.config import load_config
from kvq.random_weights import Normal, VarianceScaling

KERNEL = (3, 4, 50, 40)
# Of the first and the last kernel of the encoder of fashion_mnist_mini, and of its codebook, with seed 0.
SUMS = [15.427896722219884, 222.1347336977401, 202.97645279736025]


def array(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


@pytest.mark.parametrize(("fan", "count"), [("in", 3 * 4 * 50), ("out", 3 * 4 * 40)])
def test_variance_scaling_is_that_of_keras(fan, count):
    values = array(VarianceScaling(2.0, fan, seed=3)(KERNEL))
    deviation = np.sqrt(2.0 / count)
    assert values.dtype == np.float32 and values.shape == KERNEL
    assert values.std() == pytest.approx(deviation, rel=0.02) and abs(values.mean()) < 0.02 * deviation
    # What Keras draws lies within the same bounds, with the same share near them.
    other = array(keras.initializers.VarianceScaling(2.0, f"fan_{fan}", "truncated_normal", seed=3)(KERNEL))
    assert np.abs(values).max() <= np.float32(2 * deviation / 0.87962566103423978)
    assert np.abs(values).max() == pytest.approx(np.abs(other).max(), rel=1e-3)
    np.testing.assert_allclose(
        np.quantile(values, [0.05, 0.25, 0.75, 0.95]), np.quantile(other, [0.05, 0.25, 0.75, 0.95]), rtol=0.05
    )


def test_normal_numbers_are_not_cut():
    values = array(Normal(0.5, seed=1)((100, 1000)))
    assert values.std() == pytest.approx(0.5, rel=0.01) and np.abs(values).max() > 1.75


def test_the_seed_decides_and_without_one_that_of_keras():
    np.testing.assert_array_equal(array(Normal(1.0, seed=5)((7,))), array(Normal(1.0, seed=5)((7,))))
    drawn = Normal(1.0)
    np.testing.assert_array_equal(array(drawn((7,))), array(drawn((7,))))
    keras.utils.set_random_seed(4)
    first = [array(Normal(1.0)((7,))) for _ in range(2)]
    keras.utils.set_random_seed(4)
    second = [array(Normal(1.0)((7,))) for _ in range(2)]
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(*first)


@pytest.mark.parametrize("member", [Normal(0.3, seed=2), VarianceScaling(0.1, "out", seed=2)], ids=lambda one: type(one).__name__)
def test_a_config_gives_the_same_numbers(member):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(member))
    np.testing.assert_array_equal(array(again((4, 5))), array(member((4, 5))))


def test_a_model_starts_from_the_same_weights_on_every_backend():
    config = load_config("fashion_mnist_mini")
    keras.utils.set_random_seed(0)
    model = build_model(config.model, config.quantizer, config.loss, 1)
    kernels = [weight for weight in model.encoder.weights if weight.path.endswith("kernel")]
    sums = [
        float(np.abs(array(weight).astype("float64")).sum()) for weight in (kernels[0], kernels[-1], model.quantizer.codebook)
    ]
    np.testing.assert_allclose(sums, SUMS, rtol=1e-6)
