"""What `vector` and `ema_vector` promise beyond the contract of all quantizers, against NumPy float64; and k-means."""

import keras
import numpy as np
import pytest
from keras import ops

from kvq.quantizers import QUANTIZERS
from kvq.quantizers.initialisers import kmeans

# Constructor arguments of each member, small enough for a test.
CASES = {
    "vector": {"codebook_size": 7, "commitment_weight": 0.4, "decay": 0.9},
    "ema_vector": {"codebook_size": 7, "commitment_weight": 0.4, "decay": 0.9},
}
DIM = 6
# Ranks 2 to 5; batches of one, and of sizes that nothing divides.
SHAPES = [(1,), (5,), (3, 4), (1, 3, 4), (3, 2, 2, 3)]


@pytest.fixture(params=sorted(CASES))
def kind(request):
    return request.param


def build(kind, dtype="float32", seed=0, **changes):
    keras.utils.set_random_seed(seed)
    quantizer = QUANTIZERS[kind](**{**CASES[kind], **changes}, name="quantizer", dtype=dtype)
    quantizer.build((None, DIM))
    return quantizer


def array(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def float32(tensor):
    return array(ops.cast(tensor, "float32"))


def normal(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype("float32")


def run(quantizer, latents, training=False):
    return keras.tree.map_structure(array, quantizer(ops.convert_to_tensor(latents), training=training))


def state(quantizer):
    return {weight.path.split("/")[-1]: array(weight) for weight in quantizer.weights}


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def nearest(latents, codebook):
    return np.square(latents[..., None, :].astype("float64") - codebook).sum(-1).argmin(-1)


class Moved(keras.Model):
    """A quantizer in a training step of its own losses, on latents that a weight moves; it starts at zero."""

    def __init__(self, quantizer, latents_shape, weights=None):
        super().__init__()
        self.quantizer = quantizer
        self.move = self.add_weight(shape=latents_shape, initializer="zeros", name="move")
        self.code_weights = weights

    def call(self, latents, training=False):
        outputs = self.quantizer(latents + self.move, training=training)
        return outputs["losses"] if self.code_weights is None else ops.multiply(outputs["codes"], self.code_weights)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = ops.sum(y_pred) if self.code_weights is not None else ops.mean(sum(y_pred.values()))
        # Without this, a codebook that only has this gradient has none at all, which Keras warns of.
        return loss + 0.0 * sum(ops.sum(weight) for weight in self.trainable_weights)


def descend(quantizer, latents, weights=None):
    """The gradient at the latents after one step of SGD(1) as `fit` takes it, which moves the quantizer too."""
    model = Moved(quantizer, latents.shape[1:], weights)
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    model.fit(latents, batch_size=len(latents), shuffle=False, verbose=0)
    return -array(model.move)


# What both promise.


def test_indices_of_codes_are_the_codes(kind):
    quantizer = build(kind)
    indices = ops.arange(quantizer.codebook_size, dtype="int32")
    codes = quantizer.indices_to_codes(indices)
    np.testing.assert_array_equal(array(quantizer.latents_to_indices(codes)), array(indices))


def test_in_training_codes_are_rows_of_the_codebook_as_it_was_before(kind):
    quantizer = build(kind)
    for step in range(3):
        latents = normal(step, 4, 5, DIM)
        before = array(quantizer.indices_to_codes(ops.arange(quantizer.codebook_size, dtype="int32")))
        expected = run(quantizer, latents)
        outputs = run(quantizer, latents, training=True)
        np.testing.assert_array_equal(outputs["indices"], expected["indices"])
        np.testing.assert_array_equal(outputs["codes"], before[outputs["indices"]])
        for name in quantizer.loss_names:
            np.testing.assert_array_equal(outputs["losses"][name], expected["losses"][name])


def test_training_moves_statistics_and_no_trainable_weight(kind):
    quantizer = build(kind)
    trainable, others = map(array_list, (quantizer.trainable_weights, quantizer.non_trainable_weights))
    run(quantizer, normal(0, 4, 5, DIM), training=True)
    for before, weight in zip(trainable, quantizer.trainable_weights, strict=True):
        np.testing.assert_array_equal(before, array(weight))
    assert any((before != array(weight)).any() for before, weight in zip(others, quantizer.non_trainable_weights, strict=True))
    assert state(quantizer)["initialised"] == 0.0


def array_list(weights):
    return [array(weight) for weight in weights]


def test_compiled_training_moves_the_state_as_plain_calls_do(kind):
    """Keras compiles the step where the backend can; there an assignment may get lost without a word."""
    latents = normal(0, 12, 4, DIM)
    compiled, plain = build(kind), build(kind)
    before = state(compiled)
    model = Moved(compiled, latents.shape[1:])
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    model.fit(latents, batch_size=6, shuffle=False, verbose=0)
    for start in (0, 6):
        run(plain, latents[start : start + 6], training=True)
    after = state(compiled)
    for name, values in state(plain).items():
        np.testing.assert_allclose(after[name], values, atol=1e-6, err_msg=name)
    assert (after["counts"] != before["counts"]).any()


def test_gradient_of_codes_goes_straight_through_to_the_latents(kind):
    latents, weights = normal(0, 1, 5, DIM), normal(1, 1, 5, DIM)
    quantizer = build(kind)
    trainable = array_list(quantizer.trainable_weights)
    gradient = descend(quantizer, latents, weights)
    np.testing.assert_array_equal(gradient, weights[0])
    for before, weight in zip(trainable, quantizer.trainable_weights, strict=True):
        np.testing.assert_array_equal(before, array(weight))


def test_commitment_pulls_latents_by_its_weight(kind):
    """beta (z - e)^2, not the (z - e)^2 of the projects that put beta on the codebook."""
    latents = normal(0, 1, 5, DIM)
    quantizer = build(kind)
    codebook = state(quantizer)["codebook"]
    codes = codebook[nearest(latents, codebook)]
    beta = CASES[kind]["commitment_weight"]
    commitment = beta * np.mean((latents.astype("float64") - codes) ** 2, axis=(1, 2))
    np.testing.assert_allclose(run(quantizer, latents)["losses"]["commitment"], commitment, rtol=1e-5)
    gradient = descend(quantizer, latents)
    np.testing.assert_allclose(gradient, beta * 2 * (latents - codes)[0] / latents[0].size, atol=1e-7)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_under_mixed_precision_search_losses_and_statistics_stay_in_float32(kind, policy):
    half = policy.removeprefix("mixed_")
    # Far from the origin, where half precision tells no two codes apart.
    codebook = 10.5 + 0.5 * normal(5, 7, DIM)
    mixed, full = build(kind, dtype=policy), build(kind)
    for quantizer in (mixed, full):
        quantizer.replace(np.arange(7), codebook)
    assert {weight.dtype for weight in mixed.weights} == {"float32"}
    latents = ops.cast(10.5 + 0.5 * normal(6, 40, 5, DIM), half)
    in_full = ops.cast(latents, "float32")
    for training in (False, True):
        outputs = mixed(latents, training=training)
        expected = full(in_full, training=training)
        np.testing.assert_array_equal(array(outputs["indices"]), array(expected["indices"]))
        assert keras.backend.standardize_dtype(outputs["codes"].dtype) == half
        np.testing.assert_array_equal(float32(outputs["codes"]), float32(ops.cast(expected["codes"], half)))
        for name in mixed.loss_names:
            assert array(outputs["losses"][name]).dtype == np.float32
            np.testing.assert_array_equal(array(outputs["losses"][name]), array(expected["losses"][name]))
    assert_same_state(state(mixed), state(full))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_latents_in_float32_are_searched_as_they_are_under_every_policy(kind, policy):
    """Keras would round the inputs of a layer to its policy, and the call would no longer equal its two halves."""
    quantizer = build(kind, dtype=policy)
    latents = normal(0, 4000, 5, DIM)
    outputs = quantizer(ops.convert_to_tensor(latents))
    indices = quantizer.latents_to_indices(ops.convert_to_tensor(latents))
    np.testing.assert_array_equal(array(outputs["indices"]), array(indices))
    np.testing.assert_array_equal(float32(outputs["codes"]), float32(quantizer.indices_to_codes(indices)))


@pytest.mark.parametrize("argument, value", [("codebook_size", 1), ("commitment_weight", -0.1), ("decay", 1.0), ("decay", -0.1)])
def test_arguments_out_of_range_are_refused_by_name(kind, argument, value):
    with pytest.raises(ValueError, match=rf"`{argument}` must .* Received: {argument}={value}"):
        QUANTIZERS[kind](**{**CASES[kind], argument: value})


def test_latents_of_unknown_dimension_are_refused(kind):
    with pytest.raises(ValueError, match="must be known"):
        QUANTIZERS[kind](**CASES[kind]).build((None, None))


# What happens between steps.


def test_initialise_places_codes_where_kmeans_would(kind):
    """A fixed point of Lloyd's iteration: every code is the mean of the latents that are nearest to it."""
    centres = normal(0, 7, DIM, scale=10)
    latents = (centres[np.arange(700) % 7] + normal(1, 700, DIM, scale=0.1)).reshape(7, 10, 10, DIM)
    quantizer = build(kind)
    assert state(quantizer)["initialised"] == 0.0
    quantizer.initialise(latents)
    after = state(quantizer)
    assert after["initialised"] == 1.0
    flat = latents.reshape(-1, DIM)
    owner = nearest(flat, after["codebook"])
    for row in range(7):
        np.testing.assert_allclose(after["codebook"][row], flat[owner == row].mean(0), atol=1e-3)


def test_initialise_follows_from_latents_and_seed(kind):
    latents = normal(0, 90, DIM)
    codebooks = []
    for seed in (3, 3, 4):
        quantizer = build(kind, seed=len(codebooks))
        quantizer.initialise(latents, seed=seed)
        codebooks.append(state(quantizer)["codebook"])
    np.testing.assert_array_equal(codebooks[0], codebooks[1])
    assert (codebooks[0] != codebooks[2]).any()


def test_initialise_from_fewer_latents_than_codes_gives_distinct_codes(kind):
    latents = normal(0, 3, DIM)
    quantizer = build(kind)
    quantizer.initialise(latents)
    codebook = state(quantizer)["codebook"]
    assert len(np.unique(codebook, axis=0)) == 7
    assert np.abs(codebook[:, None] - latents).max(-1).min(1).max() < 0.01


def test_initialise_from_latents_that_are_all_equal_gives_finite_codes(kind):
    quantizer = build(kind)
    quantizer.initialise(np.full((20, DIM), 0.5, "float32"))
    np.testing.assert_allclose(state(quantizer)["codebook"], 0.5, atol=1e-3)


def test_initialise_refuses_what_is_not_finite(kind):
    for latents in (np.full((9, DIM), np.nan, "float32"), np.zeros((0, DIM), "float32")):
        with pytest.raises(ValueError, match="finite"):
            build(kind).initialise(latents)


def test_dead_codes_are_those_used_less_than_a_share_of_the_mean(kind):
    quantizer = build(kind)
    counts = np.array([0.0, 10.0, 0.09, 0.11, 10.0, 0.2, 49.6], "float32")  # of mean 10
    for scale in (1.0, 1000.0):
        quantizer.counts.assign(scale * counts)
        np.testing.assert_array_equal(quantizer.dead_codes(0.01), [0, 2])
        np.testing.assert_array_equal(quantizer.dead_codes(0.03), [0, 2, 3, 5])
        np.testing.assert_array_equal(quantizer.dead_codes(0.0), [])


def test_replaced_codes_are_alive_and_the_others_untouched(kind):
    quantizer = build(kind)
    for step in range(5):
        run(quantizer, normal(step, 4, 5, DIM) + 3.0, training=True)
    before = state(quantizer)
    rows, codes = np.array([1, 4]), normal(9, 2, DIM)
    quantizer.replace(rows, codes)
    after = state(quantizer)
    np.testing.assert_array_equal(after["codebook"][rows], codes)
    np.testing.assert_allclose(after["counts"][rows], before["counts"].mean(), rtol=1e-6)
    others = np.array([0, 2, 3, 5, 6])
    np.testing.assert_array_equal(after["codebook"][others], before["codebook"][others])
    np.testing.assert_array_equal(after["counts"][others], before["counts"][others])
    assert not {*rows} & {*quantizer.dead_codes(0.3)}


def test_statistics_count_how_often_a_step_used_each_code(kind):
    quantizer = build(kind)
    decay, expected = CASES[kind]["decay"], np.ones(7)
    for step in range(4):
        indices = run(quantizer, normal(step, 4, 5, DIM), training=True)["indices"]
        expected = decay * expected + (1 - decay) * np.bincount(indices.ravel(), minlength=7)
        np.testing.assert_allclose(state(quantizer)["counts"], expected, rtol=1e-5)


def test_first_codes_are_distinct_at_any_size(kind):
    codebook = state(build(kind, codebook_size=4096))["codebook"]
    squares = np.sort(np.square(codebook[:64, None].astype("float64") - codebook).sum(-1), -1)
    assert squares[:, 1].min() > 1e-3
    np.testing.assert_allclose(np.linalg.norm(codebook, axis=-1).mean(), 1.0, atol=0.1)


# `vector` alone.


def test_vector_losses_and_their_gradients_equal_the_paper():
    """Equation 3 with means: mean (sg[z] - e)^2 moves codes, beta mean (z - sg[e])^2 moves latents."""
    latents = normal(0, 4, 5, DIM)
    quantizer = build("vector")
    codebook = state(quantizer)["codebook"].astype("float64")
    indices = nearest(latents, codebook)
    difference = codebook[indices] - latents
    np.testing.assert_allclose(run(quantizer, latents)["losses"]["codebook"], np.mean(difference**2, (1, 2)), rtol=1e-5)
    expected = np.zeros_like(codebook)
    np.add.at(expected, indices, 2 * difference / latents.size)
    descend(quantizer, latents)
    # One step of SGD(1): without beta, which is the commitment's.
    np.testing.assert_allclose(codebook - state(quantizer)["codebook"], expected, atol=1e-6)


def test_vector_gradient_does_not_grow_with_the_batch():
    latents = normal(0, 4, 5, DIM)
    once, often = build("vector"), build("vector")
    descend(once, latents)
    descend(often, np.concatenate([latents] * 5))
    np.testing.assert_allclose(state(often)["codebook"], state(once)["codebook"], atol=1e-6)


# `ema_vector` alone.


def test_ema_codebook_equals_its_definition():
    quantizer = build("ema_vector")
    gamma = CASES["ema_vector"]["decay"]
    codebook = state(quantizer)["codebook"].astype("float64")
    counts, sums = np.ones(7), codebook.copy()
    np.testing.assert_array_equal(state(quantizer)["sums"], state(quantizer)["codebook"])
    for step in range(5):
        latents = normal(step, 4, 5, DIM)
        indices = nearest(latents, codebook)
        moment = np.zeros((7, DIM))
        np.add.at(moment, indices, latents)
        counts = gamma * counts + (1 - gamma) * np.bincount(indices.ravel(), minlength=7)
        sums = gamma * sums + (1 - gamma) * moment
        codebook = sums / counts[:, None]
        run(quantizer, latents, training=True)
        after = state(quantizer)
        np.testing.assert_allclose(after["counts"], counts, rtol=1e-5)
        np.testing.assert_allclose(after["sums"], sums, atol=1e-5)
        np.testing.assert_allclose(after["codebook"], codebook, atol=1e-5)


def test_ema_codebook_has_no_gradient_and_no_codebook_loss():
    quantizer = build("ema_vector")
    assert quantizer.trainable_weights == [] and quantizer.loss_names == ("commitment",)


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_unused_ema_codes_stay_where_they_are(decay):
    """Nor do they explode, collapse to zero at the first update, or drift to the origin: after 1,000 steps, still there."""
    quantizer = build("ema_vector", decay=decay)
    before = state(quantizer)["codebook"]
    # One latent: PyTorch would share more between threads, and take long where others use the processor.
    latents = before[2:3] + 0.1
    index = run(quantizer, latents)["indices"][0]
    tensors = ops.convert_to_tensor(latents), ops.convert_to_tensor(np.array([index]))
    for step in range(1, 1001):
        quantizer.update_statistics(*tensors)
        if step in (1, 100, 1000):
            after = state(quantizer)["codebook"]
            unused = np.arange(7) != index
            np.testing.assert_allclose(after[unused], before[unused], rtol=1e-4)
    np.testing.assert_allclose(after[index], latents[0], atol=1e-3)
    # One that is hit at last goes there at once, from wherever it was.
    again = ops.convert_to_tensor(np.array([(index + 1) % 7]))
    quantizer.update_statistics(tensors[0], again)
    assert decay > 0.5 or np.abs(state(quantizer)["codebook"][(index + 1) % 7] - latents[0]).max() < 1e-3
    assert np.isfinite(state(quantizer)["codebook"]).all()


@pytest.mark.parametrize("kind", ["ema_vector", "ema_cosine_vector"])
def test_replacing_leaves_the_averages_of_the_other_codes_alone(kind):
    """Those of `ema_cosine_vector` are shorter than count times code: made to be that, a code turned more slowly afterwards."""
    quantizer = QUANTIZERS[kind](7, decay=0.9)
    quantizer.build((None, DIM))
    for step in range(3):
        run(quantizer, normal(step, 4, 5, DIM), training=True)
    before = state(quantizer)
    quantizer.replace(np.array([2, 5]), normal(9, 2, DIM))
    after, others = state(quantizer), [0, 1, 3, 4, 6]
    for name in ("sums", "counts", "codebook"):
        np.testing.assert_array_equal(after[name][others], before[name][others], err_msg=name)
    np.testing.assert_allclose(after["sums"][[2, 5]], (after["counts"][:, None] * after["codebook"])[[2, 5]], rtol=1e-6)


@pytest.mark.parametrize("distinct", [1, 5])
def test_codes_replaced_by_few_latents_are_apart(kind, distinct):
    """Of equal codes the first takes all latents, and the others stay dead."""
    quantizer = build(kind, codebook_size=64)
    for _ in range(30):
        run(quantizer, np.tile(array(quantizer.codebook)[:1], (50, 1)), training=True)
    latents = np.repeat(normal(4, distinct, DIM), 40, axis=0)
    ((_, rows),) = quantizer.replace_dead(latents, 0.8, np.random.default_rng(0))
    codes = array(quantizer.codebook)[rows]
    assert len(rows) == 63 and len(np.unique(codes, axis=0)) == 63
    assert np.abs(codes[:, None] - latents[None, ::40]).max(-1).min(-1).max() < 1e-3


def test_latents_that_are_not_finite_become_no_codes(kind):
    quantizer = build(kind)
    for _ in range(30):
        run(quantizer, array(quantizer.codebook)[:1], training=True)
    latents = normal(4, 20, DIM)
    latents[3:] = np.nan
    assert quantizer.replace_dead(latents, 0.8, np.random.default_rng(0))
    assert np.isfinite(array(quantizer.codebook)).all()
    assert quantizer.replace_dead(latents[3:], 0.8, np.random.default_rng(0)) == []


def test_ema_sums_belong_to_the_codes_after_initialising():
    quantizer = build("ema_vector")
    quantizer.initialise(normal(1, 90, DIM))
    after = state(quantizer)
    np.testing.assert_allclose(after["sums"], after["counts"][:, None] * after["codebook"], rtol=1e-6)
    # A step without a latent for a code leaves it there.
    quantizer.update_statistics(ops.convert_to_tensor(after["codebook"][:1]), ops.zeros((1,), "int32"))
    np.testing.assert_allclose(state(quantizer)["codebook"][1:], after["codebook"][1:], rtol=1e-5)


# k-means.


def test_kmeans_lowers_the_error_of_a_random_sample():
    vectors = normal(0, 500, 4)
    centres = kmeans(vectors, 8, seed=1)
    assert centres.shape == (8, 4) and centres.dtype == np.float32
    sample = vectors[np.random.default_rng(1).choice(500, 8, replace=False)]

    def error(codes):
        return np.square(vectors - codes[nearest(vectors, codes)]).sum(-1).mean()

    assert error(centres) < 0.8 * error(sample)
    # Nearly a fixed point.
    assert error(kmeans(vectors, 8, seed=1, iterations=200)) > 0.97 * error(centres)


def test_kmeans_leaves_its_input_alone():
    vectors = normal(0, 50, 4)
    before = vectors.copy()
    kmeans(vectors, 8)
    np.testing.assert_array_equal(vectors, before)
