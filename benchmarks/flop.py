"""What hardware can do at its best, and how much of it a training step asks for, both in FLOP."""

import contextlib
import time
from collections.abc import Iterator
from math import prod
from typing import Any


class Product:
    """A large product of square matrices in the backend's own way: the most FLOP a second to be had here.

    Args:
        backend: The backend.
        precision: That of the training step.
        wait: Waits until all that was queued is done.
    """

    def __init__(self, backend: str, precision: str, wait: Any):
        import keras
        import numpy as np

        from kvq.backends import devices

        self.backend, self.wait = backend, wait
        self.side, self.repeats = (2048, 1) if devices(backend)[0] == "cpu" else (8192, 4)
        values = np.random.default_rng(0).normal(size=(self.side, self.side)).astype("float32")  # zeros would be faster on GPUs
        self.matrix = keras.ops.cast(values, "bfloat16" if precision == "mixed_bfloat16" else "float32")
        self.measure()  # what is compiled is compiled now

    def measure(self) -> float:
        """FLOP a second, once."""
        import keras

        with _products_round_like_convolutions(self.backend):
            self.wait()
            started = time.perf_counter()
            for _ in range(self.repeats):
                result = keras.ops.matmul(self.matrix, self.matrix)
            self.wait()
            seconds = time.perf_counter() - started
        del result
        return self.repeats * 2.0 * self.side**3 / seconds


@contextlib.contextmanager
def _products_round_like_convolutions(backend: str) -> Iterator[None]:
    """PyTorch lets GPUs round the inputs of float32 convolutions to TF32, but not those of products."""
    if backend != "torch":
        yield
        return
    import torch

    products, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    products.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        products.allow_tf32 = before


def step_flop(model: Any, image_shape: tuple[int, int, int, int]) -> int:
    """FLOP of a training step on images of this shape: those of the convolutions.

    A kernel is applied once at each position: of the output, or of the input where the convolution is transposed; 2 FLOP a
    weight. The gradients of its inputs and of itself take as many each. The search for codes is not counted: 1.5% with 512.
    """
    from kvq.layers import leaf_layers

    forward, shape = 0, image_shape
    for layer in (*leaf_layers(model.encoder), *leaf_layers(model.decoder)):
        before, shape = shape, layer.compute_output_shape(shape) if hasattr(layer, "kernel") else shape
        if hasattr(layer, "kernel"):
            batch, height, width, _ = before if "Transpose" in type(layer).__name__ else shape
            forward += 2 * prod(layer.kernel.shape) * batch * height * width
    return 3 * forward
