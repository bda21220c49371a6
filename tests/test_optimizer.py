"""No step with a loss or gradient that is not finite moves anything; averages of the weights; clipping."""

import keras
import numpy as np
import pytest
from keras import ops

from kvq.build import build_optimizer
from kvq.config import TrainConfig
from kvq.model import VQVAE
from kvq.optimizer import FiniteSteps, averaged
from kvq.quantizers import EMAVectorQuantizer, VectorQuantizer

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)


def build(optimizer, quantizer=None):
    keras.utils.set_random_seed(0)
    images, codes = keras.Input((None, None, 1), name="images"), keras.Input((None, None, 4), name="codes")
    model = VQVAE(
        keras.Model(images, keras.layers.Conv2D(4, 4, 4, name="down_conv")(images), name="encoder"),
        quantizer or VectorQuantizer(5, name="quantizer"),
        keras.Model(codes, keras.layers.Conv2DTranspose(1, 4, 4, name="up_conv")(codes), name="decoder"),
    )
    model.build((None, None, None, 1))
    model.compile(optimizer=optimizer)
    return model


def numbers(variables):
    return [np.array(ops.convert_to_numpy(variable)) for variable in variables]


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


class poisoned:
    """A weight of the decoder, its kernel or its bias, that is `value` for a while, so that loss or gradient are not finite."""

    def __init__(self, model, value, weight=0):
        self.weight, self.value = model.decoder.weights[weight], value

    def __enter__(self):
        self.before = np.array(ops.convert_to_numpy(self.weight))
        self.weight.assign(np.full_like(self.before, self.value))

    def __exit__(self, *error):
        self.weight.assign(self.before)


@pytest.mark.parametrize(("value", "weight"), [(np.nan, 0), (np.inf, 0), (1e25, 1)], ids=["nan", "inf", "only_the_loss"])
def test_a_step_that_is_not_finite_moves_no_weight_and_no_slot(value, weight):
    """With a bias of 1e25 every gradient is finite, and only the loss, a square, is not."""
    model = build(FiniteSteps(keras.optimizers.Adam(0.01, use_ema=True), tolerated=5))
    model.train_on_batch(IMAGES)
    weights, slots = numbers(model.trainable_variables), numbers(model.optimizer.inner.variables)
    with poisoned(model, value, weight):
        model.train_on_batch(IMAGES)
    assert equal(numbers(model.trainable_variables), weights)
    assert equal(numbers(model.optimizer.inner.variables), slots)
    assert (model.optimizer.skipped, model.optimizer.last_skipped) == (1, 2)
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 2
    model.train_on_batch(IMAGES)
    assert not equal(numbers(model.trainable_variables), weights) and model.optimizer.skipped == 1


def test_beyond_what_is_tolerated_nothing_moves_any_longer():
    model = build(FiniteSteps(keras.optimizers.Adam(0.01), tolerated=1))
    with poisoned(model, np.nan):
        model.train_on_batch(IMAGES)
    model.train_on_batch(IMAGES)
    weights = numbers(model.trainable_variables)
    with poisoned(model, np.nan):
        model.train_on_batch(IMAGES)
    model.train_on_batch(IMAGES)
    assert equal(numbers(model.trainable_variables), weights)
    assert (model.optimizer.skipped, model.optimizer.last_skipped) == (2, 3)


def test_finite_steps_are_those_of_the_inner_optimizer():
    plain, guarded = build(keras.optimizers.Adam(0.01)), build(FiniteSteps(keras.optimizers.Adam(0.01)))
    for model in (plain, guarded):
        for _ in range(3):
            model.train_on_batch(IMAGES)
    for one, other in zip(numbers(plain.trainable_variables), numbers(guarded.trainable_variables), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_moving_averages_of_a_codebook_leave_out_latents_that_are_not_finite():
    model = build(FiniteSteps(keras.optimizers.Adam(0.01), tolerated=5), EMAVectorQuantizer(5, name="quantizer"))
    model.train_on_batch(IMAGES)
    before = numbers(model.quantizer.weights)
    kernel = model.encoder.weights[0]
    good = np.array(ops.convert_to_numpy(kernel))
    kernel.assign(np.full_like(good, np.nan))
    model.train_on_batch(IMAGES)
    kernel.assign(good)
    assert equal(numbers(model.quantizer.weights), before)
    model.train_on_batch(IMAGES)
    assert not equal(numbers(model.quantizer.weights), before)


def test_one_bad_image_does_not_make_the_measured_means_so():
    model = build(FiniteSteps(keras.optimizers.Adam(0.01)))
    outputs = model(IMAGES)
    expected = float(np.mean(ops.convert_to_numpy(model.loss_terms(IMAGES, outputs)["reconstruction"])[1:]))
    worst = np.array(ops.convert_to_numpy(outputs["reconstruction"]))
    worst[0, 3, 3] = np.nan
    loss = model.compute_loss(x=IMAGES, y_pred={**outputs, "reconstruction": ops.convert_to_tensor(worst)})
    assert np.isnan(float(ops.convert_to_numpy(loss)))
    assert float(model.means.result()["reconstruction"]) == pytest.approx(expected)
    assert np.isfinite(float(model.means.result()["psnr"]))


def test_averages_follow_their_definition_and_are_there_only_inside():
    decay = 0.5
    model = build(FiniteSteps(keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=decay)))
    expected = None
    for _ in range(4):
        model.train_on_batch(IMAGES)
        now = [value.astype("float64") for value in numbers(model.trainable_variables)]
        expected = now if expected is None else [decay * a + (1 - decay) * n for a, n in zip(expected, now, strict=True)]
    before = numbers(model.trainable_variables)
    with averaged(model):
        for average, value in zip(numbers(model.trainable_variables), expected, strict=True):
            np.testing.assert_allclose(average, value, rtol=1e-5, atol=1e-7)
        assert not equal(numbers(model.trainable_variables), before)
    assert equal(numbers(model.trainable_variables), before)


def test_the_end_of_fit_leaves_the_weights_that_a_resumed_run_needs():
    model = build(FiniteSteps(keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9)))
    model.fit(IMAGES, epochs=2, batch_size=2, verbose=0)
    assert not equal(numbers(model.trainable_variables), numbers(model.optimizer.inner._model_variables_moving_average))


def test_rows_that_were_replaced_are_forgotten_and_their_average_starts_anew():
    model = build(FiniteSteps(keras.optimizers.Adam(0.01, use_ema=True)))
    model.train_on_batch(IMAGES)
    codebook, inner = model.quantizer.codebook, model.optimizer.inner
    model.quantizer.replace(np.array([1, 3]), np.full((2, 4), 7.0, "float32"))
    model.optimizer.forget(codebook, np.array([1, 3]))
    index = inner._get_variable_index(codebook)
    momentum, average = numbers([inner._momentums[index], inner._model_variables_moving_average[index]])
    assert (momentum[[1, 3]] == 0).all() and (average[[1, 3]] == 7).all()
    assert not (average[[0, 2, 4]] == 7).any()


def test_configuration_round_trip():
    optimizer = FiniteSteps(keras.optimizers.Adam(0.25, global_clipnorm=2.0), tolerated=3)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert isinstance(again, FiniteSteps) and again.tolerated == 3
    assert again.inner.global_clipnorm == 2.0 and float(ops.convert_to_numpy(again.learning_rate)) == 0.25


def test_a_constant_rate_is_the_same_at_every_step_and_no_state():
    optimizer = build_optimizer(TrainConfig(steps=10, batch_size=1, learning_rate=0.25, schedule="constant"))
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    model = build(again)
    rates = [float(ops.convert_to_numpy(again.learning_rate))]
    model.train_on_batch(IMAGES)
    assert rates + [float(ops.convert_to_numpy(again.learning_rate))] == [0.25, 0.25]
    # Among Adam's variables it would be restored on a resume, and could not be changed.
    assert not [variable.path for variable in again.inner.variables if "learning_rate" in variable.path]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_rate_rises_in_a_line_and_then_stays_or_falls_as_half_a_cosine(schedule, warmup):
    optimizer = build_optimizer(TrainConfig(steps=12, batch_size=1, learning_rate=0.02, schedule=schedule, warmup_steps=warmup))
    optimizer = FiniteSteps.from_config(optimizer.get_config())  # as it is saved
    optimizer.build([keras.Variable(np.zeros(1, "float32"))])
    for step in range(15):
        optimizer.inner.iterations.assign(step)
        after = min(max(step - warmup, 0), 12 - warmup)
        expected = 0.02 * (0.5 * (1 + np.cos(np.pi * after / (12 - warmup))) if schedule == "cosine" else 1.0)
        expected *= min(step / warmup, 1.0) if warmup else 1.0
        np.testing.assert_allclose(float(optimizer.learning_rate), expected, rtol=1e-6, atol=1e-9)
