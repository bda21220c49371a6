"""The model in Keras' own loop: what its losses add up to, and that call, encode and decode say the same."""

import keras
import numpy as np
import pytest
from keras import ops

from kvq.model import MODELS, VQVAE, ImageAutoencoder, ImageDecoder, ImageEncoder, decode, encode
from kvq.ops import to_uint8
from kvq.quantizers import EMAVectorQuantizer, SimVectorQuantizer, VectorQuantizer
from kvq.quantizers.quantizer import BATCH_TERMS

CHANNELS, DIM, CODES = 3, 4, 11


def build(quantizer=None, **changes):
    """A model of one layer a side, since it does not matter here which."""
    keras.utils.set_random_seed(0)
    images, codes = keras.Input((None, None, CHANNELS), name="images"), keras.Input((None, None, DIM), name="codes")
    encoder = keras.Model(images, keras.layers.Conv2D(DIM, 4, 4, name="down_conv")(images), name="encoder")
    up = keras.layers.Conv2DTranspose(CHANNELS, 4, 4, activation="tanh", name="up_conv")
    quantizer = quantizer or VectorQuantizer(CODES, name="quantizer")
    model = VQVAE(encoder, quantizer, keras.Model(codes, up(codes), name="decoder"), **changes)
    model.build((None, None, None, CHANNELS))
    return model


@pytest.fixture
def model(quantizer_kind, make_quantizer):
    return build(make_quantizer(quantizer_kind, DIM))


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (7, 8, 12, CHANNELS), np.uint8)


def array(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def arrays(tree):
    return keras.tree.map_structure(array, tree)


def weights(model):
    return {weight.path: array(weight) for weight in model.weights}


def test_call_gives_reconstruction_indices_and_losses(model, images):
    outputs = arrays(model(images))
    assert set(outputs) == {"reconstruction", "indices", "losses"}
    assert outputs["reconstruction"].shape == images.shape and outputs["reconstruction"].dtype == np.float32
    assert np.abs(outputs["reconstruction"]).max() <= 1
    depth = model.quantizer.depth
    assert outputs["indices"].shape == ((7, 2, 3, depth) if depth else (7, 2, 3)) and outputs["indices"].dtype == np.int32
    assert {name: values.shape for name, values in outputs["losses"].items()} == dict.fromkeys(model.quantizer.loss_names, (7,))


def test_encode_and_decode_equal_the_call_in_evaluation(model, images):
    outputs = model(images, training=False)
    indices = model.encode(images)
    np.testing.assert_array_equal(array(indices), array(outputs["indices"]))
    restored = array(model.decode(indices))
    assert restored.dtype == np.uint8 and restored.shape == images.shape
    # As `codes` equal those of the indices bit for bit, so do the images.
    np.testing.assert_array_equal(restored, array(to_uint8(outputs["reconstruction"])))


def test_halves_equal_the_model_and_take_any_size_and_batch(model):
    parts = {"encoder": model.encoder, "quantizer": model.quantizer, "decoder": model.decoder}
    encoder = ImageEncoder(parts["encoder"], parts["quantizer"])
    decoder = ImageDecoder(parts["quantizer"], parts["decoder"])
    autoencoder = ImageAutoencoder(**parts)
    for shape in [(1, 8, 12), (3, 16, 4)]:
        batch = np.random.default_rng(1).integers(0, 256, (*shape, CHANNELS), np.uint8)
        indices = encoder.predict_on_batch(batch)
        assert indices.dtype == np.int32 and indices.shape[:3] == (shape[0], shape[1] // 4, shape[2] // 4)
        np.testing.assert_array_equal(indices, array(model.encode(batch)))
        restored = decoder.predict_on_batch(indices)
        assert restored.dtype == np.uint8 and restored.shape == batch.shape
        # Compiled and not, they may round to neighbouring grey levels.
        assert np.abs(restored.astype(int) - array(model.decode(indices))).max() <= 1
        np.testing.assert_array_equal(autoencoder.predict_on_batch(batch), restored)


def test_halves_build_the_quantizer_that_is_not_yet(images):
    built = build()
    for part in (
        lambda quantizer: ImageEncoder(built.encoder, quantizer).predict_on_batch(images),
        lambda quantizer: ImageDecoder(quantizer, built.decoder).predict_on_batch(np.zeros((1, 2, 2), "int32")),
        lambda quantizer: ImageAutoencoder(built.encoder, quantizer, built.decoder).predict_on_batch(images),
    ):
        quantizer = VectorQuantizer(CODES)
        part(quantizer)
        assert tuple(quantizer.codebook.shape) == (CODES, DIM)


def test_evaluation_changes_no_weight(model, images):
    before = weights(model)
    model(images, training=False)
    model.decode(model.encode(images))
    model.predict(images, verbose=0)
    for name, values in weights(model).items():
        np.testing.assert_array_equal(values, before[name], err_msg=name)


def test_evaluate_on_a_ragged_last_batch_adds_up(images):
    """The mean over images, not over batches: 4 and 3 images of different loss must not count alike."""
    images[4:] = 128
    model = build(loss_weights={"reconstruction": 2.0})
    model.compile()
    result = {name: float(value) for name, value in model.evaluate(images, batch_size=4, verbose=0, return_dict=True).items()}
    outputs = arrays(model(images))
    error = np.square(outputs["reconstruction"].astype("float64") - (images / 127.5 - 1)).mean((1, 2, 3))
    expected = {name: values.mean(dtype="float64") for name, values in outputs["losses"].items()}
    expected |= {"reconstruction": 2.0 * error.mean(), "psnr": np.mean(10 * np.log10(4 / error))}
    counts = np.bincount(outputs["indices"].ravel(), minlength=CODES)
    frequencies = counts[counts > 0] / counts.sum()
    expected |= {"usage": (counts > 0).mean(), "perplexity": np.exp(-np.sum(frequencies * np.log(frequencies)))}
    terms = ("reconstruction", "codebook", "commitment")
    assert set(result) == {"loss", *expected}
    for name in terms:
        assert result[name] == pytest.approx(expected[name], rel=1e-5)
    for name in ("psnr", "usage", "perplexity"):
        assert result[name] == pytest.approx(expected[name], abs=1e-3)
    assert result["loss"] == pytest.approx(sum(result[name] for name in terms), rel=1e-6)
    halves = [error[:4].mean(), error[4:].mean()]
    assert abs(np.mean(halves) - error.mean()) > 1e-3 * error.mean(), "The mean over batches would pass as well."


def test_fit_on_a_ragged_last_batch_adds_up_and_learns(model):
    images = np.random.default_rng(2).integers(0, 2, (7, 2, 3, CHANNELS)).repeat(4, 1).repeat(4, 2).astype("uint8") * 255
    model.compile(optimizer=keras.optimizers.Adam(0.01))
    before = weights(model)
    history = model.fit(images, batch_size=4, epochs=6, shuffle=False, verbose=0).history
    terms = ("reconstruction", *model.quantizer.loss_names)
    for epoch, loss in enumerate(history["loss"]):
        assert float(loss) == pytest.approx(sum(float(history[name][epoch]) for name in terms), rel=1e-6)
    assert float(history["reconstruction"][-1]) < float(history["reconstruction"][0]) - 0.003
    after = weights(model)
    for part in ("encoder", "decoder"):
        assert all((after[weight.path] != before[weight.path]).any() for weight in getattr(model, part).weights)
    # Codes that a linear map moves stay as they are drawn.
    still = {"initialised"} | ({"codebook"} if isinstance(model.quantizer, SimVectorQuantizer) else set())
    for weight in model.quantizer.weights:
        assert (after[weight.path] != before[weight.path]).any() == (weight.name not in still), weight.path


def test_predict_gives_the_same_tree_for_all_images(model, images):
    outputs = model.predict(images, batch_size=4, verbose=0)
    expected = arrays(model(images))
    np.testing.assert_array_equal(outputs["indices"], expected["indices"])
    np.testing.assert_allclose(outputs["reconstruction"], expected["reconstruction"], atol=1e-5)
    for name in set(expected["losses"]) - BATCH_TERMS:
        # The entropy of a choice that is sure is nearly 0, and then what is left of a difference of larger numbers.
        np.testing.assert_allclose(outputs["losses"][name], expected["losses"][name], rtol=1e-4, atol=1e-8)


def test_model_and_its_halves_survive_saving_bit_for_bit(images, tmp_path):
    model = build(EMAVectorQuantizer(CODES, name="quantizer"), loss_weights={"reconstruction": 3.0})
    model(images, training=True)
    parts = {"encoder": model.encoder, "quantizer": model.quantizer, "decoder": model.decoder}
    models = [model, ImageEncoder(model.encoder, model.quantizer), ImageAutoencoder(**parts)]
    for number, saved in enumerate(models):
        saved.predict_on_batch(images)
        saved.save(tmp_path / f"{number}.keras")
        loaded = keras.saving.load_model(tmp_path / f"{number}.keras")
        assert type(loaded) is type(saved) and loaded.name == saved.name
        assert getattr(loaded, "loss_weights", None) == getattr(saved, "loss_weights", None)
        keras.tree.map_structure(np.testing.assert_array_equal, arrays(loaded(images)), arrays(saved(images)))
    indices = array(model.encode(images))
    decoder = ImageDecoder(model.quantizer, model.decoder)
    decoder.predict_on_batch(indices)
    decoder.save(tmp_path / "decoder.keras")
    loaded = keras.saving.load_model(tmp_path / "decoder.keras")
    np.testing.assert_array_equal(array(loaded(indices)), array(decoder(indices)))


@pytest.mark.parametrize("weights", [{"reconstructoin": 5.0}, {"commitment": 1.0}, {"reconstruction": 0.0}])
def test_loss_weights_that_would_do_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="must be a positive `reconstruction` alone. Received: .*" + next(iter(weights))):
        build(loss_weights=weights)


def test_loss_weights_default_to_one_and_survive(images):
    model = build()
    assert model.loss_weights == {"reconstruction": 1.0}
    terms = model.loss_terms(images, model(images))
    heavy = build(loss_weights={"reconstruction": 4.0})
    np.testing.assert_allclose(
        array(heavy.loss_terms(images, heavy(images))["reconstruction"]), 4 * array(terms["reconstruction"]), rtol=1e-6
    )


def test_mixed_precision_computes_losses_in_float32(images):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build()
    finally:
        keras.config.set_dtype_policy("float32")
    outputs = model(images)
    assert keras.backend.standardize_dtype(outputs["reconstruction"].dtype) == "bfloat16"
    terms = model.loss_terms(images, outputs)
    assert all(array(values).dtype == np.float32 for values in terms.values())
    error = array(ops.cast(outputs["reconstruction"], "float32")).astype("float64") - (images / 127.5 - 1)
    np.testing.assert_allclose(array(terms["reconstruction"]), np.square(error).mean((1, 2, 3)), rtol=1e-5)
    model.compile(optimizer=keras.optimizers.Adam(0.01))
    assert np.isfinite(model.fit(images, batch_size=4, verbose=0).history["loss"]).all()


def test_several_grids_are_a_tree_of_quantizers_and_latents(images):
    """The lone grid is the case of one leaf: a hierarchy needs nothing new."""
    inputs = keras.Input((None, None, CHANNELS))
    fine = keras.layers.Conv2D(DIM, 4, 4, name="fine")(inputs)
    coarse = keras.layers.Conv2D(DIM, 2, 2, padding="same", name="coarse")(fine)
    encoder = keras.Model(inputs, {"coarse": coarse, "fine": fine})
    codes = {name: keras.Input((None, None, DIM), name=name) for name in ("coarse", "fine")}
    up = keras.layers.Conv2DTranspose(CHANNELS, 4, 4, name="up")(codes["fine"])
    decoder = keras.Model(codes, up)
    quantizers = {name: VectorQuantizer(CODES, name=name) for name in codes}
    for quantizer in quantizers.values():
        quantizer.build((None, DIM))
    indices = encode(encoder, quantizers, images)
    assert {name: tuple(grid.shape) for name, grid in indices.items()} == {"coarse": (7, 1, 2), "fine": (7, 2, 3)}
    restored = array(decode(quantizers, decoder, indices))
    assert restored.shape == images.shape and restored.dtype == np.uint8


def test_kinds_of_models_are_named():
    assert MODELS == {"vqvae": VQVAE}
