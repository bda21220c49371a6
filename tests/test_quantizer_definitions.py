"""Each quantizer beside its paper's definition, spelt out in NumPy float64."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

from kvq.build import build_quantizer
from kvq.config import check
from kvq.quantizer_config import ProductQuantizerConfig
from kvq.quantizers import QUANTIZERS
from kvq.quantizers.regularisers import Entropy, Orthogonality

BATCH, POSITIONS, DIM, K = 4, 5, 6, 9


def array(tensor):
    return np.array(ops.convert_to_numpy(tensor)).astype("float64")


def latents(scale=1.0, dim=DIM, seed=0):
    return np.random.default_rng(seed).normal(scale=scale, size=(BATCH, POSITIONS, dim)).astype("float32")


def build(kind, dim=DIM, **arguments):
    keras.utils.set_random_seed(1)
    quantizer = QUANTIZERS[kind](**arguments, name="quantizer")
    quantizer.build((None, None, dim))
    return quantizer


def run(quantizer, values, training=False):
    return keras.tree.map_structure(array, quantizer(ops.convert_to_tensor(values), training=training))


def per_image(values):
    return values.reshape(len(values), -1).mean(1)


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def entropy(p):
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0), -1)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def nearest(vectors, codebook):
    return np.square(vectors[..., None, :] - codebook).sum(-1).argmin(-1)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", ["cosine_vector", "ema_cosine_vector"])
def test_cosine_compares_unit_vectors_in_the_search_and_in_the_loss(kind):
    quantizer, z = build(kind, codebook_size=K, commitment_weight=0.4), latents()
    codes = unit(array(quantizer.codebook))
    indices = (unit(z.astype("float64")) @ codes.T).argmax(-1)
    outputs = run(quantizer, z)
    np.testing.assert_array_equal(outputs["indices"], indices)
    assert_close(outputs["codes"], codes[indices])
    error = per_image(np.square(unit(z.astype("float64")) - codes[indices]))
    assert_close(outputs["losses"]["commitment"], 0.4 * error)
    if kind == "cosine_vector":
        assert_close(outputs["losses"]["codebook"], error)
    # Their length does not matter, so that it has no reason to grow.
    np.testing.assert_array_equal(run(quantizer, 100 * z)["indices"], indices)
    assert_close(run(quantizer, 100 * z)["losses"]["commitment"], outputs["losses"]["commitment"])


def test_cosine_codes_are_the_directions_of_averaged_unit_latents():
    quantizer, gamma = build("ema_cosine_vector", codebook_size=K, decay=0.9), 0.9
    codebook = array(quantizer.codebook)
    sums = codebook.copy()
    for step in range(4):
        z = latents(seed=step)
        p = unit(z.astype("float64"))
        indices = (p @ unit(codebook).T).argmax(-1)
        moment = np.zeros_like(sums)
        np.add.at(moment, indices, p)
        sums = gamma * sums + (1 - gamma) * moment
        codebook = unit(sums)
        run(quantizer, z, training=True)
        assert_close(unit(array(quantizer.codebook)), codebook)


def test_sim_vector_searches_the_mapped_codebook():
    quantizer, z = build("sim_vector", codebook_size=K), latents()
    codes = array(quantizer.codebook) @ array(quantizer.projection)
    indices = nearest(z.astype("float64"), codes)
    outputs = run(quantizer, z)
    np.testing.assert_array_equal(outputs["indices"], indices)
    error = per_image(np.square(z - codes[indices]))
    assert_close(outputs["losses"]["codebook"], error)
    assert_close(outputs["losses"]["commitment"], 0.25 * error)
    assert [weight.name for weight in quantizer.trainable_weights] == ["projection"]


def test_index_backprop_takes_the_largest_product_and_pays_twice():
    quantizer, z = build("index_backprop", codebook_size=K, temperature=0.3, entropy_weight=0.2), latents()
    codes = array(quantizer.codebook)
    logits = z.astype("float64") @ codes.T
    indices = logits.argmax(-1)
    outputs = run(quantizer, z)
    np.testing.assert_array_equal(outputs["indices"], indices)
    assert_close(outputs["codes"], codes[indices])
    error = per_image(np.square(z - codes[indices]))
    assert_close(outputs["losses"]["codebook"], 2 * error)
    assert_close(outputs["losses"]["commitment"], 0.25 * error)
    p = softmax(logits / 0.3)
    assert_close(outputs["losses"]["entropy"], 0.2 * per_image(entropy(p)))
    assert_close(outputs["losses"]["batch_entropy"], -0.2 * entropy(p.mean((0, 1))))


def test_gumbel_divergence_and_choice():
    quantizer, z = build("gumbel", codebook_size=K, kl_weight=0.1, annealing=0.5, final_temperature=0.3), latents(3.0)
    logits = z.astype("float64") @ array(quantizer.kernel) + array(quantizer.bias)
    p = softmax(logits)
    outputs = run(quantizer, z)
    np.testing.assert_array_equal(outputs["indices"], logits.argmax(-1))
    assert_close(outputs["codes"], array(quantizer.codebook)[logits.argmax(-1)])
    assert_close(outputs["losses"]["kl"], 0.1 * per_image(np.sum(p * np.log(p * K), -1)))
    for expected in (0.5, 0.3, 0.3):
        run(quantizer, z, training=True)
        assert_close(array(quantizer.current_temperature), expected)


def test_gumbel_groups_of_a_configuration_draw_each_its_own_noise():
    section = {"kind": "product", "groups": 2, "base": {"kind": "gumbel", "codebook_size": 8, "seed": 3}}
    quantizer = build_quantizer(check(ProductQuantizerConfig, section, "test"), "quantizer")
    assert [member.seed for member in quantizer.members] == [3, 4]
    quantizer.build((None, 4))
    for weight, same in zip(quantizer.members[1].trainable_weights, quantizer.members[0].trainable_weights, strict=True):
        weight.assign(same)
    indices = array(quantizer(ops.zeros((500, 4)), training=True)["indices"])
    # Of eight codes that are as likely, two draws are alike in one of eight.
    assert 0.05 < (indices[:, 0] == indices[:, 1]).mean() < 0.25


def test_gumbel_draws_codes_in_proportion_and_anew_each_step():
    quantizer = build("gumbel", codebook_size=3, dim=2)
    z = np.full((1, 4000, 2), 0.7, "float32")
    p = softmax(z[0, 0].astype("float64") @ array(quantizer.kernel) + array(quantizer.bias))
    first, second = (run(quantizer, z, training=True)["indices"] for _ in range(2))
    assert (first != second).mean() > 0.2
    counts = np.bincount(np.concatenate([first, second]).astype(int).ravel(), minlength=3)
    np.testing.assert_allclose(counts / counts.sum(), p, atol=0.03)


@pytest.mark.parametrize("levels", [[3, 4, 5, 6, 7, 8], [8, 5, 5, 5], [16, 9], [3]])
def test_finite_scalar_equals_listing_1(levels):
    z = latents(2.0, dim=len(levels))
    outputs = run(build("finite_scalar", dim=len(levels), levels=levels), z)
    counts = np.array(levels, "float64")
    half = (counts - 1) * (1 + 1e-3) / 2
    offset = np.where(counts % 2 == 0, 0.5, 0.0)
    rounded = np.round(half * np.tanh(z + np.arctanh(offset / half)) - offset)
    width = counts // 2
    assert_close(outputs["codes"], rounded / width)
    np.testing.assert_array_equal(outputs["indices"], ((rounded + width) * np.cumprod([1, *levels[:-1]])).sum(-1))


@pytest.mark.parametrize("levels", [[2, 3, 4, 5, 8, 16], [2], [2, 2, 2]])
def test_symmetric_finite_scalar_has_even_steps_from_minus_one_to_one(levels):
    z = latents(2.0, dim=len(levels))
    outputs = run(build("symmetric_finite_scalar", dim=len(levels), levels=levels), z)
    counts = np.array(levels, "float64")
    digits = np.floor((counts - 1) * (np.tanh(z.astype("float64")) + 1) / 2 + 0.5)
    assert_close(outputs["codes"], 2 * digits / (counts - 1) - 1)
    np.testing.assert_array_equal(outputs["indices"], (digits * np.cumprod([1, *levels[:-1]])).sum(-1))


@pytest.mark.parametrize("count", [3, 4, 1001, 1002, 2048, 2**16])
@pytest.mark.parametrize("kind", ["finite_scalar", "symmetric_finite_scalar"])
def test_digits_stay_within_any_number_of_levels(kind, count):
    z = np.linspace(-20, 20, 1001, dtype="float32").reshape(1, -1, 1)
    indices = run(build(kind, dim=1, levels=[count]), z)["indices"]
    assert (indices.min(), indices.max()) == (0, count - 1)


@pytest.mark.parametrize("kind", ["finite_scalar", "symmetric_finite_scalar"])
def test_every_level_is_reached_and_codes_and_indices_are_one_to_one(kind):
    levels = [3, 4, 5] if kind == "finite_scalar" else [2, 4, 5]
    quantizer = build(kind, dim=3, levels=levels)
    grid = np.stack(np.meshgrid(*[np.linspace(-6, 6, 49)] * 3), -1).reshape(1, -1, 3).astype("float32")
    outputs = run(quantizer, grid)
    assert set(outputs["indices"].astype(int).ravel()) == set(range(int(np.prod(levels))))
    assert len(np.unique(outputs["codes"].reshape(-1, 3), axis=0)) == np.prod(levels)


def all_codes(bits):
    return np.array(list(itertools.product([-1.0, 1.0], repeat=bits)))


@pytest.mark.parametrize("kind", ["lookup_free", "binary_spherical"])
def test_bit_quantizers_equal_the_sum_over_all_codes(kind):
    tau = 0.8 if kind == "lookup_free" else 5.0
    quantizer = build(kind, bits=DIM, entropy_weight=0.3, diversity=1.7, temperature=tau)
    z = latents(0.4)
    x, scale = (z.astype("float64"), 1.0) if kind == "lookup_free" else (unit(z.astype("float64")), DIM**-0.5)
    outputs = run(quantizer, z)
    signs = np.where(z > 0, 1.0, -1.0)
    assert_close(outputs["codes"], signs * scale)
    np.testing.assert_array_equal(outputs["indices"], ((z > 0) * 2 ** np.arange(DIM)).sum(-1))
    p = softmax(-tau * np.square(x[..., None, :] - scale * all_codes(DIM)).sum(-1))
    assert_close(outputs["losses"]["entropy"], 0.3 * per_image(entropy(p)), rtol=1e-4)
    assert_close(outputs["losses"]["batch_entropy"], -0.3 * 1.7 * entropy(p.mean((0, 1))), rtol=1e-4)
    if kind == "lookup_free":
        assert_close(outputs["losses"]["commitment"], 0.25 * per_image(np.square(z - signs)))


def test_groups_of_bits_give_an_upper_bound_of_the_joint_entropy():
    """Bits that always agree have half the entropy of free ones, which groups of one bit cannot see."""
    z = np.repeat(np.random.default_rng(0).choice([-3.0, 3.0], (BATCH, 500, 1)), DIM, -1).astype("float32")
    joint, single = (
        -run(build("lookup_free", bits=DIM, entropy_weight=1.0, group_bits=size), z)["losses"]["batch_entropy"][0]
        for size in (8, 1)
    )
    assert joint == pytest.approx(np.log(2), abs=0.01) and single == pytest.approx(DIM * np.log(2), abs=0.01)


def test_residual_levels_quantize_what_was_left():
    members = [QUANTIZERS["vector"](K, commitment_weight=0.4, name=f"level{i}") for i in range(3)]
    quantizer, z = build("residual", members=members), latents()
    residual, total, expected = z.astype("float64"), 0.0, []
    losses = 0.0
    for member in members:
        codes = array(member.codebook)
        indices = nearest(residual, codes)
        losses = losses + per_image(np.square(residual - codes[indices]))
        total = total + codes[indices]
        residual = residual - codes[indices]
        expected.append(indices)
    outputs = run(quantizer, z)
    np.testing.assert_array_equal(outputs["indices"], np.stack(expected, -1))
    assert_close(outputs["codes"], total)
    assert_close(outputs["losses"]["codebook"], losses)
    assert_close(outputs["losses"]["commitment"], 0.4 * losses)


def test_shared_residual_moves_its_codebook_once_by_all_levels():
    member = QUANTIZERS["ema_vector"](K, decay=0.5, name="level")
    quantizer, z = build("shared_residual", members=[member], levels=3), latents()
    codes = array(member.codebook)
    residual, counts, sums = z.astype("float64"), np.zeros(K), np.zeros_like(codes)
    for _ in range(3):
        indices = nearest(residual, codes)
        counts += np.bincount(indices.ravel(), minlength=K)
        np.add.at(sums, indices, residual)
        residual = residual - codes[indices]
    run(quantizer, z, training=True)
    assert_close(array(member.counts), 0.5 + 0.5 * counts)
    assert_close(array(member.codebook), (0.5 * codes + 0.5 * sums) / (0.5 + 0.5 * counts)[:, None], atol=1e-5)


def test_levels_that_drop_out_leave_no_code_and_no_loss():
    members = [QUANTIZERS["vector"](K, name=f"level{i}") for i in range(3)]
    quantizer, z = build("residual", members=members, dropout=1.0), latents()
    whole = run(quantizer, z)
    prefixes = np.cumsum([array(m.indices_to_codes(whole["indices"][..., i].astype("int32"))) for i, m in enumerate(members)], 0)
    seen = set()
    for _ in range(20):
        outputs = run(quantizer, z, training=True)
        np.testing.assert_array_equal(outputs["indices"], whole["indices"])
        (used,) = [n for n in range(3) if np.abs(outputs["codes"] - prefixes[n]).max() < 1e-5]
        seen.add(used)
        assert (outputs["losses"]["commitment"] < whole["losses"]["commitment"]).all() == (used < 2)
    assert seen == {0, 1, 2}


def test_product_quantizes_groups_of_channels():
    members = [QUANTIZERS["vector"](K, name=f"group{i}") for i in range(2)]
    quantizer, z = build("product", members=members), latents()
    outputs = run(quantizer, z)
    error = 0.0
    for group, member in enumerate(members):
        part, codes = z[..., 3 * group : 3 * group + 3].astype("float64"), array(member.codebook)
        indices = nearest(part, codes)
        np.testing.assert_array_equal(outputs["indices"][..., group], indices)
        assert_close(outputs["codes"][..., 3 * group : 3 * group + 3], codes[indices])
        error = error + per_image(np.square(part - codes[indices])) / 2
    assert_close(outputs["losses"]["codebook"], error)


def test_projection_is_linear_in_and_out():
    base = QUANTIZERS["vector"](K, name="base")
    quantizer, z = build("projected", base=base, code_dim=2), latents()
    quantizer.bias_in.assign([0.1, -0.2])
    inside = z.astype("float64") @ array(quantizer.kernel_in) + array(quantizer.bias_in)
    indices = nearest(inside, array(base.codebook))
    outputs = run(quantizer, z)
    np.testing.assert_array_equal(outputs["indices"], indices)
    assert_close(outputs["codes"], array(base.codebook)[indices] @ array(quantizer.kernel_out) + array(quantizer.bias_out))
    assert_close(outputs["losses"]["codebook"], per_image(np.square(inside - array(base.codebook)[indices])))


def test_entropy_regulariser():
    z, codes = latents().astype("float64"), latents(seed=3).astype("float64").reshape(-1, DIM)[:K]
    regulariser = Entropy(weight=0.2, diversity=1.5, temperature=0.7)
    terms = {
        n: array(v) for n, v in regulariser.loss_terms(*map(ops.convert_to_tensor, (latents(), codes.astype("float32")))).items()
    }
    p = softmax(-np.square(z[..., None, :] - codes).sum(-1) / 0.7)
    assert_close(terms["entropy"], 0.2 * per_image(entropy(p)), rtol=1e-4)
    assert_close(terms["batch_entropy"], np.full(BATCH, -0.2 * 1.5 * entropy(p.mean((0, 1)))), rtol=1e-4)


def test_orthogonality_regulariser():
    codes = latents(seed=3).astype("float64").reshape(-1, DIM)[:K]
    expected = np.square(unit(codes) @ unit(codes).T).sum() / K**2 - 1 / K
    term = Orthogonality(weight=3.0).loss_terms(*map(ops.convert_to_tensor, (latents(), codes.astype("float32"))))
    assert_close(array(term["orthogonality"]), np.full(BATCH, 3.0 * expected))
    orthogonal = Orthogonality().loss_terms(ops.convert_to_tensor(latents()), ops.eye(DIM))
    assert_close(array(orthogonal["orthogonality"]), np.zeros(BATCH))
