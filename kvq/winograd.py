"""Gradients of 3x3 convolutions with a quarter of the multiplications: F(4x4, 3x3) of Lavin & Gray 2015, arXiv:1509.09308.

Images are cut into tiles of 4x4 positions. What a convolution sums over the 3x3 places of its kernel becomes, in another basis of
6x6 coefficients per tile, one product of matrices for each coefficient: 36 for 16 positions, in place of 144. Along an axis
outputs and weights are polynomials, whose product has their values multiplied: at five points, and at infinity. Pure functions of
`keras.ops`, equal to the definition but for rounding: in float32 2 to 4 times that of the sums, in shorter types too much.
"""

import numpy as np
from keras import ops

from kvq.ops import Tensor

# Of the height and width of images: in larger ones the change of basis takes longer than is gained.
LARGEST = 64
TILE, KERNEL = 4, 3
COEFFICIENTS = TILE + KERNEL - 1
# Neither large nor close to each other, for the sake of rounding: it is 2.3 times that with 0, 1, -1, 2, -2, as in the paper.
POINTS = (0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)


def _values(count: int) -> np.ndarray:
    """The values of a polynomial of `count` coefficients at the points and, its last coefficient, at infinity: one row each."""
    return np.vstack([np.vander(POINTS, count, increasing=True), np.eye(count)[-1]])


OF_OUTPUTS, OF_WEIGHTS = _values(TILE), _values(KERNEL)
# A sum of inputs times the coefficients of that product, by its values.
OF_INPUTS = np.linalg.inv(_values(COEFFICIENTS)).T


def gradients(inputs: Tensor, kernel: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a 3x3 convolution with stride 1 and "same" padding.

    Args:
        inputs: Float tensor (batch, h, w, channels).
        kernel: Float tensor (3, 3, channels, filters).
        upstream: Gradient of its outputs, (batch, h, w, filters).

    Returns:
        Those of the inputs and of the kernel.
    """
    channels, filters = kernel.shape[2:]
    weights = np.kron(OF_WEIGHTS, OF_WEIGHTS).astype("float32")
    seen, given = _coefficients(inputs, OF_INPUTS, 1), _coefficients(upstream, OF_OUTPUTS, 0)
    of_kernel = ops.matmul(weights.T, ops.reshape(ops.matmul(ops.transpose(seen, (0, 2, 1)), given), (-1, channels * filters)))
    kernels = ops.reshape(ops.matmul(weights, ops.reshape(kernel, (9, channels * filters))), (-1, channels, filters))
    of_seen = ops.matmul(given, ops.transpose(kernels, (0, 2, 1)))
    return _positions(of_seen, inputs.shape), ops.reshape(of_kernel, kernel.shape)


def _coefficients(images: Tensor, basis: np.ndarray, before: int) -> Tensor:
    """(b, h, w, c) to (36, tiles of all images, c)."""
    _, height, width, channels = images.shape
    rows, columns = _bands(basis, height, before), _bands(basis, width, before)
    down, across = len(rows) // COEFFICIENTS, len(columns) // COEFFICIENTS
    images = ops.matmul(rows, ops.reshape(images, (-1, height, width * channels)))
    images = ops.matmul(columns, ops.reshape(images, (-1, width, channels)))
    images = ops.reshape(images, (-1, COEFFICIENTS, down, COEFFICIENTS, across, channels))
    return ops.reshape(ops.transpose(images, (1, 3, 0, 2, 4, 5)), (COEFFICIENTS**2, -1, channels))


def _positions(coefficients: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The transpose of `_coefficients` of inputs: (36, tiles of all images, c) to (b, h, w, c)."""
    _, height, width, channels = shape
    rows, columns = _bands(OF_INPUTS, height, 1), _bands(OF_INPUTS, width, 1)
    down, across = len(rows) // COEFFICIENTS, len(columns) // COEFFICIENTS
    images = ops.reshape(coefficients, (COEFFICIENTS, COEFFICIENTS, -1, down, across, channels))
    images = ops.reshape(ops.transpose(images, (2, 0, 3, 1, 4, 5)), (-1, len(columns), channels))
    images = ops.reshape(ops.matmul(columns.T, images), (-1, len(rows), width * channels))
    return ops.reshape(ops.matmul(rows.T, images), (-1, height, width, channels))


def _bands(basis: np.ndarray, length: int, before: int) -> np.ndarray:
    """One axis of `length` to the coefficients of its tiles, (6 * tiles, length); outside of it is zero, as it is padded.

    All at once, since tiles of inputs overlap: to cut them out first is to copy them. `before` are the positions that a tile has
    before its first.
    """
    tiles = -(-length // TILE)
    bands = np.zeros((COEFFICIENTS, tiles, length + 2 * COEFFICIENTS), "float32")
    for tile in range(tiles):
        start = COEFFICIENTS + tile * TILE - before
        bands[:, tile, start : start + basis.shape[1]] = basis
    return bands[:, :, COEFFICIENTS:-COEFFICIENTS].reshape(-1, length)
