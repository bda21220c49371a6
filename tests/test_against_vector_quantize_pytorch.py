"""Side by side with vector-quantize-pytorch, wherever the two mean the same; where they differ, which is right and why."""

import keras
import numpy as np
import pytest
from keras import ops

from kvq.quantizers import QUANTIZERS

if keras.backend.backend() != "torch":
    pytest.skip("The other side is PyTorch, and each session has one backend.", allow_module_level=True)
torch = pytest.importorskip("torch")
theirs = pytest.importorskip("vector_quantize_pytorch", reason="It is installed by the torch session of nox alone.")

DIM, K = 6, 16


def array(tensor):
    return tensor.detach().cpu().numpy() if hasattr(tensor, "detach") else np.asarray(tensor)


def latents(seed=0, dim=DIM, scale=1.0):
    return np.random.default_rng(seed).normal(scale=scale, size=(4, 25, dim)).astype("float32")


def build(kind, dim=DIM, **arguments):
    keras.utils.set_random_seed(0)
    quantizer = QUANTIZERS[kind](**arguments, name="quantizer")
    quantizer.build((None, None, dim))
    return quantizer


def run(quantizer, values, training=False):
    return keras.tree.map_structure(array, quantizer(ops.convert_to_tensor(values), training=training))


def mean(outputs, name):
    return outputs["losses"][name].mean()


def close(one, other, **tolerance):
    np.testing.assert_allclose(array(one), array(other), **{"rtol": 1e-5, "atol": 1e-6, **tolerance})


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [3, 4, 5, 6, 7, 8], [16, 9]])
def test_finite_scalar_codes_and_indices_are_the_same(levels):
    x = latents(dim=len(levels), scale=2.0)
    codes, indices = theirs.FSQ(levels)(torch.tensor(x))
    outputs = run(build("finite_scalar", dim=len(levels), levels=levels), x)
    close(outputs["codes"], codes)
    np.testing.assert_array_equal(outputs["indices"], array(indices))


def test_symmetric_finite_scalar_codes_are_the_same():
    levels = [2, 3, 4, 5, 8]
    x = latents(dim=5, scale=2.0)
    codes, indices = theirs.FSQ(levels, preserve_symmetry=True)(torch.tensor(x))
    outputs = run(build("symmetric_finite_scalar", dim=5, levels=levels), x)
    close(outputs["codes"], codes)
    np.testing.assert_array_equal(outputs["indices"], array(indices))


def test_gradient_codebook_finds_the_same_codes_and_weighs_its_terms_apart():
    """There one weight pulls both sides; here beta is the latents' alone, as in equation 3 of the paper."""
    ours, x = build("vector", codebook_size=K, commitment_weight=0.25), latents()
    other = theirs.VectorQuantize(
        DIM, K, learnable_codebook=True, ema_update=False, rotation_trick=False, commitment_weight=0.25
    ).eval()
    other._codebook.embed.data.copy_(torch.tensor(array(ours.codebook))[None])
    codes, indices, _ = other(torch.tensor(x))
    outputs = run(ours, x)
    np.testing.assert_array_equal(outputs["indices"], array(indices))
    close(outputs["codes"], codes)
    loss = other.train()(torch.tensor(x))[2]
    close(mean(outputs, "commitment"), loss.item(), rtol=1e-4)
    close(mean(outputs, "codebook"), loss.item() / 0.25, rtol=1e-4)


def test_ema_codebook_moves_alike():
    """Up to its smoothing of the counts by eps, which draws rare codes to the origin, and is therefore left out here."""
    ours, x = build("ema_vector", codebook_size=K, decay=0.9), latents()
    other = theirs.VectorQuantize(
        DIM, K, decay=0.9, eps=1e-9, rotation_trick=False, commitment_weight=0.25, ema_update=True
    ).train()
    other.codebook = torch.tensor(array(ours.codebook))
    inner = other._codebook
    inner.embed_avg.data.copy_(torch.tensor(array(ours.codebook))[None])
    inner.cluster_size.data.fill_(1.0)
    loss = other(torch.tensor(x))[2]
    outputs = run(ours, x, training=True)
    close(mean(outputs, "commitment"), loss.item(), rtol=1e-4)
    close(array(ours.counts), inner.cluster_size[0], rtol=1e-4)
    close(array(ours.codebook), other.codebook, rtol=1e-3, atol=1e-4)


def test_sim_vector_losses_are_the_same_but_for_the_name_of_the_weights():
    ours, x = build("sim_vector", codebook_size=K, commitment_weight=0.25), latents()
    transform = torch.nn.Linear(DIM, DIM, bias=False)
    other = theirs.SimVQ(DIM, K, codebook_transform=transform, rotation_trick=False)
    transform.weight.data.copy_(torch.tensor(array(ours.projection)).T)
    other.frozen_codebook.data.copy_(torch.tensor(array(ours.codebook)))
    codes, indices, loss = other(torch.tensor(x))
    outputs = run(ours, x)
    np.testing.assert_array_equal(outputs["indices"], array(indices))
    close(outputs["codes"], codes)
    close(mean(outputs, "codebook") + mean(outputs, "commitment"), loss.item(), rtol=1e-4)


@pytest.mark.parametrize("kind", ["lookup_free", "binary_spherical"])
def test_bit_entropies_are_the_same_and_bits_stand_in_the_opposite_order(kind):
    """The lowest bit belongs to the first channel here, as in finite scalar quantization of both; there to the last."""
    tau = 1.0 if kind == "lookup_free" else 8.0
    ours, x = build(kind, bits=DIM, entropy_weight=1.0, temperature=tau), latents(scale=0.5)
    other = theirs.LFQ(
        dim=DIM, codebook_size=2**DIM, entropy_loss_weight=1.0, commitment_loss_weight=0.25, spherical=kind != "lookup_free"
    )
    (codes, indices, _), parts = other.train()(torch.tensor(x), inv_temperature=tau, return_loss_breakdown=True)
    outputs = run(ours, x)
    bits = (array(indices)[..., None] >> np.arange(DIM)[::-1]) & 1
    np.testing.assert_array_equal(outputs["indices"], (bits * 2 ** np.arange(DIM)).sum(-1))
    close(outputs["codes"], codes)
    close(mean(outputs, "entropy"), float(parts.per_sample_entropy), rtol=1e-3)
    close(-mean(outputs, "batch_entropy"), float(parts.batch_entropy), rtol=1e-3)
    if kind == "lookup_free":
        close(mean(outputs, "commitment"), 0.25 * float(parts.commitment), rtol=1e-4)


def test_rotation_trick_has_the_same_gradient():
    from kvq.quantizers.estimators import rotate

    x, q, g = (torch.tensor(latents(seed).reshape(-1, DIM)) for seed in range(3))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    (rotate(one, q) * g).sum().backward()
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

    (rotate_to(other, q) * g).sum().backward()
    close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_residual_levels_find_the_same_codes():
    members = [QUANTIZERS["vector"](K, name=f"level{i}") for i in range(3)]
    ours, x = build("residual", members=members), latents()
    other = theirs.ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3, rotation_trick=False).eval()
    for layer, member in zip(other.layers, members, strict=True):
        layer.codebook = torch.tensor(array(member.codebook))
    codes, indices, _ = other(torch.tensor(x))
    outputs = run(ours, x)
    np.testing.assert_array_equal(outputs["indices"], array(indices))
    close(outputs["codes"], codes, atol=1e-5)
