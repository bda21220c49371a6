"""Pure tensor functions of the tokenizer, on `keras.ops`: no state, no configuration, no backend by name."""

import math
from typing import Any

import keras
from keras import ops

from kvq import backends

Tensor = Any
_FAST_ARGMIN = backends.argmin_is_fast(keras.backend.backend())
_ROW_SUMS = backends.row_sums(keras.backend.backend())


# As many distances at once as suit the device.
DEVICES_OWN = 0
_CODES_AT_ONCE = 2**13
# Blocks that a graph spells out one by one; more become a loop, of which one block is in memory. As many as an image of 32x32
# positions has with `_CODES_AT_ONCE`: TensorFlow begins ten images at once, and would hold a block for each.
_UNROLLED = 8


def nearest_code(latents: Tensor, codebook: Tensor, block: int | None = DEVICES_OWN) -> Tensor:
    """Index of the code nearest to each latent vector, by squared Euclidean distance.

    Args:
        latents: Float tensor (..., latent_dim).
        codebook: Float tensor (codebook_size, latent_dim).
        block: How many distances are held at once, `DEVICES_OWN` or a number; None for all, in the form that exporters take.
            Where the batch is of unknown size, as in TensorFlow's graphs, a block is at least an image, or all if they are small.

    Returns:
        int32 tensor (...) in [0, codebook_size), through which no gradient goes. Of equally near codes the lowest index. A
        latent that is not finite has no nearest code and gets any.
    """
    latents = ops.stop_gradient(ops.cast(latents, "float32"))
    codebook = ops.stop_gradient(ops.cast(codebook, "float32"))
    # |z|^2 is the same for every code, and the argmin needs no square root.
    if block is None:
        return lowest(ops.sum(ops.square(codebook), axis=-1) - 2.0 * ops.matmul(latents, ops.transpose(codebook)))
    block = block or backends.search_block(keras.backend.backend())
    # A last coordinate that is 1 in every latent, for |e|^2 to ride along in the product.
    latents = ops.concatenate([latents, ops.ones_like(latents[..., :1])], axis=-1)
    positions, codebook_size = latents.shape[:-1], codebook.shape[0]
    rows = max(block // min(codebook_size, _CODES_AT_ONCE), 1)
    # Made once where it is small, not for each image.
    weights = _as_weights(codebook) if codebook_size <= _CODES_AT_ONCE else None

    def search(some: Tensor) -> Tensor:
        flat = ops.reshape(some, (-1, some.shape[-1]))
        return _nearest_in_parts(flat, codebook, rows) if weights is None else _nearest_in_blocks(flat, weights, rows)

    if positions and all(isinstance(size, int) for size in positions):
        return ops.reshape(search(latents), positions)
    inside = positions[1:]
    if inside and all(isinstance(size, int) for size in inside) and math.prod(inside) * codebook_size * _UNROLLED > block:
        return ops.reshape(ops.map(search, latents), (-1, *inside))
    return lowest(ops.matmul(latents, _as_weights(codebook) if weights is None else weights))


def _as_weights(codebook: Tensor) -> Tensor:
    """Codes (k, d) as the matrix (d + 1, k) that gives |e|^2 - 2 z e for latents with a last coordinate of 1.

    One pass less over all distances than to add |e|^2. (Not in exports: with it, TensorFlow's converter to ONNX gave an
    autoencoder that computes something else.)
    """
    return ops.transpose(ops.concatenate([-2.0 * codebook, ops.sum(ops.square(codebook), axis=-1, keepdims=True)], axis=-1))


def _nearest_in_parts(latents: Tensor, codebook: Tensor, rows: int) -> Tensor:
    """Indices (n,) for latents (n, d + 1) among codes (k, d), some codes after the others, so that few are copied at once."""
    count, codebook_size = latents.shape[0], codebook.shape[0]
    parts = -(-codebook_size // _CODES_AT_ONCE)
    size = -(-codebook_size // parts)

    def search(number: Tensor, best: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        # All are of one length, so that they overlap where it does not divide: codes that come again are not nearer. A number of
        # Python's where `number` is one: to slice at a tensor, PyTorch would wait for its value.
        start = number * size - number * (parts * size - codebook_size) // (parts - 1)
        weights = _as_weights(_after(ops.slice(codebook, (start, 0), (size, codebook.shape[1])), best[1]))
        position = _nearest_in_blocks(latents, weights, rows)
        distance = ops.sum(latents * ops.take(ops.transpose(weights), position, axis=0), axis=-1)
        # Only what is nearer replaces, so that of equals the first stays.
        nearer = distance < best[0]
        return ops.where(nearer, distance, best[0]), ops.where(nearer, position + start, best[1])

    none = ops.full((count,), math.inf, "float32"), ops.zeros((count,), "int32")
    return ops.fori_loop(0, parts, search, none)[1]


def _nearest_in_blocks(latents: Tensor, weights: Tensor, rows: int) -> Tensor:
    """Indices (n,) for latents (n, d + 1), `rows` of them at once; n is known."""
    count = latents.shape[0]
    blocks = max(-(-count // rows), 1)
    if blocks <= _UNROLLED:
        parts = [latents[number * rows : (number + 1) * rows] for number in range(blocks)]
        return ops.concatenate([lowest(ops.matmul(part, weights)) for part in parts])
    padded = ops.pad(latents, ((0, blocks * rows - count), (0, 0)))

    def search(number: Tensor, indices: Tensor) -> Tensor:
        part = _after(ops.slice(padded, (number * rows, 0), (rows, latents.shape[1])), indices)
        # Into one result: kept one by one, the small results would lie between the large distances that are freed, and PyTorch
        # would find no place for the next ones but behind them, until all of the table was held.
        return ops.slice_update(indices, (number * rows,), lowest(ops.matmul(part, weights)))

    return ops.fori_loop(0, blocks, search, ops.zeros((blocks * rows,), "int32"))[:count]


def _after(values: Tensor, indices: Tensor) -> Tensor:
    """The same values, but not before these indices (n,), which are not negative, are there.

    TensorFlow begins ten rounds of a loop at once where it can, each with a block of distances.
    """
    return values + ops.cast(ops.minimum(indices[0], 0), values.dtype)


def lowest(distances: Tensor) -> Tensor:
    """Position of the first smallest value along the last axis, int32."""
    if 0 in distances.shape:  # of which TensorFlow takes no minimum
        return ops.zeros(distances.shape[:-1], "int32")
    if _FAST_ARGMIN:
        return ops.cast(ops.argmin(distances, axis=-1), "int32")
    # Two minima: on floats `ops.argmin` brings a bit-cast into the graph of the other backends that the ONNX, OpenVINO and
    # LiteRT runtimes reject, and it is slower there.
    size = distances.shape[-1]
    is_lowest = ops.equal(distances, ops.min(distances, axis=-1, keepdims=True))
    # With its start, since the ONNX converter of JAX takes `arange` in no other form.
    positions = ops.arange(0, size, dtype="int32")
    return ops.min(ops.where(is_lowest, positions, size - 1), axis=-1)


def gather_codes(codebook: Tensor, indices: Tensor) -> Tensor:
    """Rows of the codebook (codebook_size, latent_dim) at `indices` (...): a float tensor (..., latent_dim).

    The gradient that reaches the codebook is dense.
    """
    # The gradient of a bare `take` is sparse on TensorFlow, and Keras' Adam squares it without summing repeated rows.
    # Through a reshape it becomes dense, at no cost.
    codebook = ops.convert_to_tensor(codebook)
    return ops.take(ops.reshape(codebook, codebook.shape), indices, axis=0)


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """`codes`, bit for bit, whose gradient goes to `latents` unchanged (Bengio et al. 2013, arXiv:1308.3432).

    The more usual `latents + stop_gradient(codes - latents)` rounds, so that its value is not a row of the codebook.
    """
    return ops.stop_gradient(codes) + (latents - ops.stop_gradient(latents))


def round_through(values: Tensor) -> Tensor:
    """Values rounded to whole numbers (halves to even), whose gradient is that of the values."""
    return straight_through(values, ops.round(values))


def unit_norm(vectors: Tensor) -> Tensor:
    """Vectors (..., d) divided by their length, if that is from 1e-12 to 1e19; shorter ones stay short, and zero zero."""
    return vectors * ops.rsqrt(ops.maximum(ops.sum(ops.square(vectors), axis=-1, keepdims=True), 1e-24))


def mean_per_image(values: Tensor) -> Tensor:
    """Mean over all axes but the first: (batch, ...) becomes (batch,), in float32."""
    return ops.mean(ops.cast(values, "float32"), axis=tuple(range(1, len(values.shape))))


def code_counts(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs in an int32 tensor of any shape: float32 (codebook_size,)."""
    flat = ops.reshape(indices, (-1, 1))
    return ops.scatter_update(ops.zeros((codebook_size,)), flat, ops.ones_like(flat[:, 0], dtype="float32"), reduction="add")


def code_sums(latents: Tensor, indices: Tensor, codebook_size: int) -> Tensor:
    """Sum of the latents (..., latent_dim) that each code was given by `indices` (...): (codebook_size, latent_dim)."""
    rows, indices = ops.reshape(ops.cast(latents, "float32"), (-1, latents.shape[-1])), ops.reshape(indices, (-1,))
    if _ROW_SUMS is not None:
        return _ROW_SUMS(rows, indices, codebook_size)
    return ops.segment_sum(rows, indices, num_segments=codebook_size)


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the code frequencies, in codes: 1 when one code is used, k when all k are used alike.

    Args:
        counts: Float tensor (..., codebook_size) of how often each code occurred over the whole set. Of no counts at all: 0.
    """
    total = ops.sum(counts, axis=-1, keepdims=True)
    frequencies = counts / ops.maximum(total, 1.0)
    return ops.where(total[..., 0] > 0, ops.exp(entropy_of(frequencies)), 0.0)


def entropy_of(probabilities: Tensor) -> Tensor:
    """Entropy in nats along the last axis; 0 log 0 is 0, in the gradient as well."""
    return -ops.sum(probabilities * ops.log(ops.maximum(probabilities, 1e-30)), axis=-1)


def usage(counts: Tensor) -> Tensor:
    """Fraction of the codes that occur at all, in [0, 1], from counts (..., codebook_size)."""
    return ops.mean(ops.cast(counts > 0, "float32"), axis=-1)


def rescale(images: Tensor) -> Tensor:
    """uint8 images in [0, 255] as float32 in [-1, 1]."""
    return ops.cast(images, "float32") / 127.5 - 1.0


def to_uint8(reconstruction: Tensor) -> Tensor:
    """Float images in [-1, 1] as uint8, rounded and clipped."""
    return ops.cast(ops.clip(ops.round((ops.cast(reconstruction, "float32") + 1.0) * 127.5), 0.0, 255.0), "uint8")


def psnr_from_mse(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (peak to peak 2), from their mean squared errors; at most 100."""
    return -10.0 * ops.log10(ops.maximum(mse / 4.0, 1e-10))
