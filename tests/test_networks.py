"""What every encoder and decoder keeps, and the exact shapes that the docstrings state."""

import functools
import typing

import keras
import numpy as np
import pytest
from keras import layers, ops

from kvq import config
from kvq.layers import Chain, Conv2D, Conv2DTranspose, InstanceNormalization, Residual, leaf_layers
from kvq.networks import DECODERS, ENCODERS, build_decoder, build_encoder

# Small arguments of its own for each network.
CASES = {
    "plain": {},
    "resnet": {},
    "paper": {"hidden": 8, "residual_blocks": 1, "residual_hidden": 4},
}
# Those whose images nothing keeps in [-1, 1].
UNBOUNDED = {"paper"}
SECTIONS = {
    typing.get_args(section.model_fields["network"].annotation)[0]: section
    for section in typing.get_args(typing.get_args(config.ModelConfig)[0])
}

# Layer by layer for D = `latent_dim` = 16 and 3 channels: convolutions as (kernel shape, stride), "T" where transposed, whose
# kernels are (height, width, outputs, inputs). Written from the descriptions, not from what the code gives.
LEAKY, NORM = "leaky_relu 0.2", "instance_norm"
SHAPES = {
    "plain encoder": [
        *(((3, 3, 3, 4), 1), NORM, LEAKY, ((3, 3, 4, 4), 1), NORM, LEAKY),
        *(((3, 3, 4, 8), 2), NORM, LEAKY, ((3, 3, 8, 8), 1), NORM, LEAKY),
        *(((3, 3, 8, 16), 2), NORM, LEAKY, ((3, 3, 16, 16), 1), NORM, LEAKY),
    ],
    "plain decoder": [
        *(("T", (3, 3, 16, 16), 1), "relu", ((3, 3, 16, 16), 1), "relu"),
        *(("T", (3, 3, 8, 16), 2), "relu", ((3, 3, 8, 8), 1), "relu"),
        *(("T", (3, 3, 4, 8), 2), "relu", ((3, 3, 4, 4), 1), "relu"),
        *(((1, 1, 4, 3), 1), "tanh"),
    ],
    "resnet encoder": [
        *(((3, 3, 3, 4), 1), NORM, LEAKY, ((3, 3, 4, 8), 2), NORM, LEAKY, ((3, 3, 8, 16), 2), NORM, LEAKY),
        *(((3, 3, 16, 16), 1), LEAKY, ((1, 1, 16, 16), 1), "add", LEAKY),
        *(((3, 3, 16, 16), 1), LEAKY, ((1, 1, 16, 16), 1), "add", LEAKY),
    ],
    "resnet decoder": [
        *(((3, 3, 16, 16), 1), LEAKY, ((1, 1, 16, 16), 1), "add", LEAKY),
        *(((3, 3, 16, 16), 1), LEAKY, ((1, 1, 16, 16), 1), "add", LEAKY),
        *(("T", (3, 3, 16, 16), 1), "relu", ("T", (3, 3, 8, 16), 2), "relu", ("T", (3, 3, 4, 8), 2), "relu"),
        *(((1, 1, 4, 3), 1), "tanh"),
    ],
    "paper encoder": [
        *(((4, 4, 3, 64), 2), "relu", ((4, 4, 64, 128), 2), "relu", ((3, 3, 128, 128), 1)),
        *("relu", ((3, 3, 128, 32), 1), "relu", ((1, 1, 32, 128), 1), "add"),
        *("relu", ((3, 3, 128, 32), 1), "relu", ((1, 1, 32, 128), 1), "add"),
        *("relu", ((1, 1, 128, 16), 1)),
    ],
    "paper decoder": [
        ((3, 3, 16, 128), 1),
        *("relu", ((3, 3, 128, 32), 1), "relu", ((1, 1, 32, 128), 1), "add"),
        *("relu", ((3, 3, 128, 32), 1), "relu", ((1, 1, 32, 128), 1), "add"),
        *("relu", ("T", (4, 4, 64, 128), 2), "relu", ("T", (4, 4, 3, 64), 2)),
    ],
}


@pytest.fixture(params=sorted(CASES))
def name(request):
    return request.param


def array(tensor):
    return np.array(ops.convert_to_numpy(tensor))


@functools.cache
def networks(name):
    """Encoder and decoder for three channels and 16 latent dimensions, built once."""
    keras.utils.set_random_seed(0)
    return build_encoder(name, 3, 16, **CASES[name]), build_decoder(name, 3, 16, **CASES[name])


def images(*shape, scale=0.5):
    return np.clip(np.random.default_rng(0).normal(scale=scale, size=shape), -1, 1).astype("float32")


def images_for(name, rows=2, columns=5):
    """Two of three channels that become a grid of latents of this size."""
    return images(2, rows * SECTIONS[name].downsampling, columns * SECTIONS[name].downsampling, 3)


def described(layer):
    """A layer as a line of `SHAPES`; None where it computes nothing."""
    match layer:
        case layers.InputLayer() | Chain():
            return None
        case Conv2DTranspose():
            assert layer.padding == "same" and layer.use_bias and layer.dilation_rate == (1, 1)
            assert layer.strides[0] == layer.strides[1] and layer.activation is keras.activations.linear
            return ("T", tuple(layer.kernel.shape), layer.strides[0])
        case Conv2D():
            assert layer.padding == "same" or layer.kernel_size == (1, 1)
            assert layer.use_bias and layer.dilation_rate == (1, 1) and layer.groups == 1
            assert layer.strides[0] == layer.strides[1] and layer.activation is keras.activations.linear
            return (tuple(layer.kernel.shape), layer.strides[0])
        case InstanceNormalization():
            return NORM
        case layers.LeakyReLU():
            return f"leaky_relu {round(float(layer.negative_slope), 6)}"
        case layers.ReLU():
            return "relu"
        case layers.Activation():
            return layer.activation.__name__
    raise AssertionError(f"SHAPES has no word for {layer}.")


def lines(layer):
    """What a model or layer computes, line by line of `SHAPES`."""
    for member in getattr(layer, "members", None) or layer.layers:
        if isinstance(member, Chain):
            yield from lines(member)
        elif line := described(member):
            yield line
    if isinstance(layer, Residual):
        yield "add"


def test_every_network_has_both_halves_and_a_row():
    assert set(ENCODERS) == set(DECODERS) == set(CASES) == set(SECTIONS)


@pytest.mark.parametrize("network", sorted(SHAPES))
def test_layers_have_the_shapes_that_the_docstring_states(network):
    name, part = network.split()
    if not CASES[name]:
        model = networks(name)[part == "decoder"]
    else:
        model = {"encoder": build_encoder, "decoder": build_decoder}[part](name, 3, 16)
    assert list(lines(model)) == SHAPES[network]


def test_any_size_that_downsampling_divides_fits(name):
    encoder, decoder = networks(name)
    for rows, columns in ((1, 1), (2, 5)):
        batch = images_for(name, rows, columns)
        latents = encoder.predict_on_batch(batch)
        assert latents.shape == (2, rows, columns, 16)
        restored = decoder.predict_on_batch(latents)
        assert restored.shape == batch.shape
        assert np.isfinite(restored).all()


def test_shapes_are_known_before_the_size_is(name):
    encoder, decoder = networks(name)
    assert encoder.input_shape == (None, None, None, 3) and encoder.output_shape == (None, None, None, 16)
    assert decoder.input_shape == (None, None, None, 16) and decoder.output_shape == (None, None, None, 3)


def test_images_stay_in_range_but_for_those_of_unbounded_networks(name):
    restored = networks(name)[1].predict_on_batch(images(2, 1, 1, 16, scale=1.0) * 1e3)
    assert (np.abs(restored).max() > 1.0) == (name in UNBOUNDED)


def test_names_of_layers_and_tensors_do_not_depend_on_what_was_built_before(name):
    first = networks(name)
    layers.Conv2D(3, 3)  # counts up Keras' own names
    second = [build(name, 3, 16, **CASES[name]) for build in (build_encoder, build_decoder)]
    for one, other in zip(first, second, strict=True):
        assert [layer.name for layer in leaf_layers(one)] == [layer.name for layer in leaf_layers(other)]
        assert [weight.path for weight in one.weights] == [weight.path for weight in other.weights]
        assert len({weight.path for weight in one.weights}) == len(one.weights)
    assert [model.name for model in first] == ["encoder", "decoder"]


def test_network_survives_saving(name, tmp_path):
    encoder, _ = networks(name)
    encoder.save(tmp_path / "encoder.keras")
    loaded = keras.saving.load_model(tmp_path / "encoder.keras")
    batch = images_for(name)
    np.testing.assert_array_equal(loaded.predict_on_batch(batch), encoder.predict_on_batch(batch))


def test_first_output_neither_vanishes_nor_explodes(name):
    """Latents of about the size of the first codes, and images inside the range where tanh still has a gradient."""
    encoder, decoder = networks(name)
    latents = encoder.predict_on_batch(images_for(name))
    assert 0.05 < latents.std() < 20
    restored = decoder.predict_on_batch(latents / latents.std())
    assert 0.01 < restored.std() < 20
    assert name in UNBOUNDED or np.abs(restored).mean() < 0.9


def test_plain_has_the_parameters_of_the_original_grey_model():
    encoder, decoder = build_encoder("plain", 1, 16), build_decoder("plain", 1, 16)
    # Convolutions of (in, out, size) with biases, plus scale and shift of each norm.
    convolutions = [(1, 4, 3), (4, 4, 3), (4, 8, 3), (8, 8, 3), (8, 16, 3), (16, 16, 3)]
    norms = 2 * (4 + 4 + 8 + 8 + 16 + 16)
    assert encoder.count_params() == sum(i * o * k * k + o for i, o, k in convolutions) + norms == 4668
    convolutions = [(16, 16, 3), (16, 16, 3), (16, 8, 3), (8, 8, 3), (8, 4, 3), (4, 4, 3), (4, 1, 1)]
    assert decoder.count_params() == sum(i * o * k * k + o for i, o, k in convolutions) == 6829


def test_paper_takes_its_widths_and_depth():
    encoder = build_encoder("paper", 3, 16, hidden=8, residual_blocks=3, residual_hidden=4)
    kernels = [tuple(weight.shape) for weight in encoder.weights if weight.name == "kernel"]
    residual = [(3, 3, 8, 4), (1, 1, 4, 8)] * 3
    assert kernels == [(4, 4, 3, 4), (4, 4, 4, 8), (3, 3, 8, 8), *residual, (1, 1, 8, 16)]
    assert len(build_decoder("paper", 3, 16, hidden=8, residual_blocks=0).weights) == 2 * 3


@pytest.mark.parametrize("build", [build_encoder, build_decoder])
def test_unknown_networks_and_small_dimensions_are_refused(build):
    with pytest.raises(ValueError, match=f"must be one of {', '.join(ENCODERS)}. Received: name='plane'"):
        build("plane", 3, 8)
    with pytest.raises(ValueError, match="must be at least 4.* Received: 3"):
        build("plain", 3, 3)


def test_downsampling_of_the_configuration_is_what_the_encoder_does(name):
    step = SECTIONS[name].downsampling
    latents = networks(name)[0].compute_output_shape((1, 12 * step, 6 * step, 3))
    assert tuple(latents) == (1, 12, 6, 16)


# Instance normalization.


def test_instance_normalization_equals_group_normalization_and_numpy():
    values = 3.0 + 2.0 * images(3, 5, 7, 4, scale=1.0)
    layer, group = InstanceNormalization(), layers.GroupNormalization(groups=-1, epsilon=1e-6)
    gamma, beta = np.array([1.0, -2.0, 0.5, 3.0]), np.array([0.0, 1.0, -1.0, 0.5])
    for normalization in (layer, group):
        normalization.build(values.shape)
        normalization.gamma.assign(gamma)
        normalization.beta.assign(beta)
    wide = values.astype("float64")
    mean, variance = wide.mean((1, 2), keepdims=True), wide.var((1, 2), keepdims=True)
    expected = gamma * (wide - mean) / np.sqrt(variance + 1e-6) + beta
    np.testing.assert_allclose(array(layer(values)), expected, atol=2e-5)
    np.testing.assert_allclose(array(layer(values)), array(group(values)), atol=2e-5)


def test_instance_normalization_keeps_images_apart():
    values = images(3, 4, 4, 2)
    layer = InstanceNormalization()
    together = array(layer(values))
    for i in range(3):
        np.testing.assert_allclose(array(layer(values[i : i + 1]))[0], together[i], atol=1e-6)


def test_instance_normalization_of_a_flat_or_single_position_is_its_shift():
    layer = InstanceNormalization()
    layer.build((None, None, None, 2))
    layer.beta.assign([0.25, -1.0])
    for values in (np.full((1, 4, 4, 2), 0.5, "float32"), images(1, 1, 1, 2), np.zeros((1, 4, 4, 2), "float32")):
        np.testing.assert_allclose(array(layer(values)), np.broadcast_to([0.25, -1.0], values.shape), atol=1e-3)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_instance_normalization_computes_in_float32_under_every_policy(policy):
    half = policy.removeprefix("mixed_")
    # Their squares overflow float16, and bfloat16 has too few digits for their variance.
    values = ops.cast(300.0 + 3.0 * images(2, 8, 8, 3, scale=1.0), half)
    mixed, full = InstanceNormalization(dtype=policy), InstanceNormalization()
    outputs = mixed(values)
    assert keras.backend.standardize_dtype(outputs.dtype) == half
    expected = ops.cast(full(ops.cast(values, "float32")), half)
    np.testing.assert_array_equal(array(ops.cast(outputs, "float32")), array(ops.cast(expected, "float32")))


def test_instance_normalization_survives_its_config():
    layer = InstanceNormalization(epsilon=0.5, name="norm")
    rebuilt = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert rebuilt.epsilon == 0.5 and rebuilt.get_config() == layer.get_config()
    assert layer.compute_output_shape((None, 4, 4, 2)) == (None, 4, 4, 2)


# Convolutions and chains.


@pytest.mark.parametrize("size, strides", [(1, 1), (3, 1), (4, 1), (2, 3), (3, 2), (4, 2), (5, 2), ((3, 4), (1, 2))])
def test_convolutions_equal_those_of_keras(size, strides):
    for ours, theirs in ((Conv2D, layers.Conv2D), (Conv2DTranspose, layers.Conv2DTranspose)):
        one = ours(5, size, strides, padding="same")
        other = theirs(5, size, strides, padding="same")
        batch = images(2, 6, 12, 3)
        one.build(batch.shape), other.build(batch.shape)
        other.kernel.assign(array(one.kernel))
        for layer in (one, other):
            layer.bias.assign(np.arange(5.0))
        assert tuple(one.compute_output_shape(batch.shape)) == tuple(one(batch).shape)
        np.testing.assert_allclose(array(one(batch)), array(other(batch)), atol=1e-5)


def test_chains_compute_their_members_in_order_and_survive_their_config():
    members = [Conv2D(4, 3, padding="same", name="first"), layers.ReLU(name="second")]
    chain = Residual([Chain(members, name="inner"), Conv2D(3, 1, name="last")], name="outer")
    batch = images(2, 4, 4, 3)
    expected = batch + array(chain.members[1](members[1](members[0](batch))))
    np.testing.assert_allclose(array(chain(batch)), expected, atol=1e-6)
    assert [layer.name for layer in leaf_layers(chain)] == ["first", "second", "last"]
    assert chain.compute_output_shape((None, 4, 4, 3)) == (None, 4, 4, 3)
    rebuilt = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(chain))
    assert rebuilt.get_config() == chain.get_config()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_chains_compute_in_the_type_of_the_policy(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        encoder = build_encoder("plain", 3, 16)
    finally:
        keras.config.set_dtype_policy(before)
    latents = encoder(images(2, 8, 8, 3))
    assert keras.backend.standardize_dtype(latents.dtype) == policy.removeprefix("mixed_")
    assert {weight.dtype for weight in encoder.weights} == {"float32"}
