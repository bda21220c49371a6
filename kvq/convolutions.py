"""Convolutions in the layout, and with the gradients, that suit the backend: pure functions of `keras.ops`.

What they compute is what `keras.ops` does. Where a backend has no fast code for a gradient, it is spelt out here as products of
matrices: the same numbers, but for rounding. Exports hold no gradients, and so nothing of it.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from kvq import backends, winograd
from kvq.ops import Tensor

# Of a product of matrices, from which on more of them make it no faster.
_COLUMNS = 128
# Numbers of images, as the places of a kernel see them, to copy at once: 256 MiB in float32. XLA holds the copies of many
# convolutions together, which at 512x512 was more than 24 GB.
_COPIED = 2**26
_CHANNELS_FIRST = backends.convolves_channels_first(keras.backend.backend())


def convolution(inputs: Tensor, kernel: Tensor, strides: tuple[int, int] = (1, 1), padding: str = "same") -> Tensor:
    """Convolution, as `keras.ops.conv`.

    Args:
        inputs: Float tensor (batch, h, w, channels).
        kernel: Float tensor (height, width, channels, filters).
        strides: Of height and width.
        padding: "same" or "valid".

    Returns:
        Float tensor (batch, ceil(h / strides[0]), ceil(w / strides[1]), filters) with "same" padding.
    """
    slow = backends.gradients_of_kernels_are_slow(keras.backend.backend())
    if slow and tuple(kernel.shape[:2]) == (1, 1) == tuple(strides):
        return ops.matmul(inputs, kernel[0, 0])

    def forward(inputs: Tensor, kernel: Tensor) -> Tensor:
        return _in_layout(ops.conv, inputs, kernel, strides, padding)

    def gradients(inputs: Tensor, kernel: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        return _gradients(inputs, kernel, upstream, strides)

    if padding == "same" and _fits(inputs, strides) and (slow or _in_tiles(inputs, kernel, strides)):
        return _with_gradients(forward, gradients)(inputs, kernel)
    return forward(inputs, kernel)


def transposed_convolution(inputs: Tensor, kernel: Tensor, strides: tuple[int, int] = (1, 1), padding: str = "same") -> Tensor:
    """Transposed convolution, as `keras.ops.conv_transpose`: the gradient of a convolution.

    Args:
        inputs: Float tensor (batch, h, w, channels).
        kernel: Float tensor (height, width, filters, channels).
        strides: Of height and width.
        padding: "same" or "valid".

    Returns:
        Float tensor (batch, h * strides[0], w * strides[1], filters) with "same" padding.
    """
    # With an even side the odd row of padding would lie at the other end.
    is_convolution = tuple(strides) == (1, 1) and all(size % 2 for size in kernel.shape[:2])
    if _CHANNELS_FIRST and is_convolution:
        # The same numbers, and no border to compute and throw away: 0.7 times the time on PyTorch. No faster elsewhere, where
        # TensorFlow's converter to ONNX takes the turned kernel wrongly.
        return convolution(inputs, _turned(kernel), strides, padding)

    def forward(inputs: Tensor, kernel: Tensor) -> Tensor:
        return _in_layout(ops.conv_transpose, inputs, kernel, strides, padding)

    def gradients(inputs: Tensor, kernel: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        if is_convolution:
            of_inputs, of_kernel = _gradients(inputs, _turned(kernel), upstream, strides)
            return of_inputs, _turned(of_kernel)
        of_inputs = _in_layout(ops.conv, upstream, kernel, strides, "same")
        return of_inputs, _of_kernel(upstream, inputs, tuple(kernel.shape[:2]), strides)

    if padding == "same" and _fits(inputs, (1, 1)) and backends.gradients_of_kernels_are_slow(keras.backend.backend()):
        return _with_gradients(forward, gradients)(inputs, kernel)
    return forward(inputs, kernel)


def _fits(images: Tensor, strides: tuple[int, int]) -> bool:
    """Whether height and width are known, and multiples of the strides."""
    return all(size is not None and not size % stride for size, stride in zip(images.shape[1:3], strides, strict=True))


def _in_tiles(inputs: Tensor, kernel: Tensor, strides: tuple[int, int]) -> bool:
    """Whether the gradients of a convolution are those of `winograd`, and faster so than by the backend."""
    is_float32 = keras.backend.standardize_dtype(inputs.dtype) == "float32"  # a shorter type would lose too much in the tiles
    if not is_float32 or (*kernel.shape[:2], *strides) != (3, 3, 1, 1) or max(inputs.shape[1:3]) > winograd.LARGEST:
        return False
    channels, filters = kernel.shape[2:]
    return 2 * channels * filters / (channels + filters) >= backends.winograd_channels(keras.backend.backend())


def _gradients(inputs: Tensor, kernel: Tensor, upstream: Tensor, strides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of the inputs and the kernel of a convolution with "same" padding, whose strides divide height and width."""
    if _in_tiles(inputs, kernel, strides):
        return winograd.gradients(inputs, kernel, upstream)
    of_inputs = _in_layout(ops.conv_transpose, upstream, kernel, strides, "same")
    return of_inputs, _of_kernel(inputs, upstream, tuple(kernel.shape[:2]), strides)


def _of_kernel(images: Tensor, upstream: Tensor, size: tuple[int, int], strides: tuple[int, int]) -> Tensor:
    """Gradient of a kernel (*size, c, n): for each of its places, what it sees of the images times what came of it.

    XLA makes a convolution of it, with a kernel as large as an image or dilated by the strides, for which it has no fast code on
    CPUs: up to 100 times the time (jax-ml/jax #23783, openxla/xla #34273).

    Args:
        images: What is convolved, (b, h, w, c).
        upstream: Gradient of what comes of it, (b, h / strides[0], w / strides[1], n).
        size: Height and width of the kernel.
        strides: Of height and width.
    """
    batch, height, width, filters = upstream.shape
    an_image = height * width * size[0] * size[1] * images.shape[-1]
    if batch is None or batch * an_image <= _COPIED:
        return _of_kernel_at_once(images, upstream, size, strides)
    together = max(part for part in range(1, batch + 1) if batch % part == 0 and part * an_image <= max(_COPIED, an_image))

    def add(total: Tensor, part: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        return total + ops.cast(_of_kernel_at_once(*part, size, strides), "float32"), None

    parts = [ops.reshape(tensor, (-1, together, *tensor.shape[1:])) for tensor in (images, upstream)]
    total, _ = ops.scan(add, ops.zeros((*size, images.shape[-1], filters), "float32"), tuple(parts))
    return ops.cast(total, upstream.dtype)


def _of_kernel_at_once(images: Tensor, upstream: Tensor, size: tuple[int, int], strides: tuple[int, int]) -> Tensor:
    channels, filters = images.shape[-1], upstream.shape[-1]
    columns = ops.transpose(ops.reshape(upstream, (-1, filters)))
    # As few products as are large enough, since each reads all of upstream; and no more than that is copied at once.
    seen, together = views(images, size, strides), max(_COLUMNS // channels, 1)
    parts = [ops.concatenate(seen[start : start + together], axis=-1) for start in range(0, len(seen), together)]
    products = [ops.matmul(columns, ops.reshape(part, (-1, part.shape[-1]))) for part in parts]
    return ops.reshape(ops.transpose(ops.concatenate(products, axis=-1)), (*size, channels, filters))


def views(images: Tensor, size: tuple[int, int], strides: tuple[int, int]) -> list[Tensor]:
    """What each place of a kernel sees in a convolution with "same" padding, row by row: each (b, h/strides, w/strides, c).

    Height and width are multiples of the strides.
    """
    height, width = (images.shape[axis + 1] // strides[axis] for axis in (0, 1))
    missing = [max(size[axis] - strides[axis], 0) for axis in (0, 1)]
    images = ops.pad(images, ((0, 0), *((total // 2, total - total // 2) for total in missing), (0, 0)))
    return [
        images[
            :,
            row : row + (height - 1) * strides[0] + 1 : strides[0],
            column : column + (width - 1) * strides[1] + 1 : strides[1],
        ]
        for row in range(size[0])
        for column in range(size[1])
    ]


def _turned(kernel: Tensor) -> Tensor:
    """The kernel of the convolution that is the transpose: by half a turn, with channels and filters exchanged."""
    return ops.transpose(ops.flip(kernel, (0, 1)), (0, 1, 3, 2))


def _with_gradients(
    forward: Callable[[Tensor, Tensor], Tensor], gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Any:
    """`forward` of two tensors, whose gradients are `gradients` of those two and of the gradient of what it gave."""

    @ops.custom_gradient
    def function(inputs: Tensor, kernel: Tensor) -> tuple[Tensor, Any]:
        def backward(*args: Tensor, upstream: Tensor = None) -> tuple[Tensor, Tensor]:
            return gradients(inputs, kernel, args[0] if upstream is None else upstream)

        return forward(inputs, kernel), backward

    # A cast reads the variable. What TensorFlow's `convert_to_tensor` gives is still one, which its custom gradients refuse.
    return lambda inputs, kernel: function(inputs, ops.cast(kernel, kernel.dtype))


def _in_layout(operation: Any, inputs: Tensor, kernel: Tensor, strides: tuple[int, int], padding: str) -> Tensor:
    if not _CHANNELS_FIRST:
        return operation(inputs, kernel, strides=strides, padding=padding, data_format="channels_last")
    inputs = ops.transpose(inputs, (0, 3, 1, 2))
    outputs = operation(inputs, kernel, strides=strides, padding=padding, data_format="channels_first")
    return ops.transpose(outputs, (0, 2, 3, 1))
