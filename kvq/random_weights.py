"""Weights before training, drawn by NumPy: the same on every backend for a seed, and at once.

JAX would compile a program for each shape of kernel: 7 of the 16 seconds to the first step of `fashion_mnist_mini`.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from kvq.ops import Tensor

# Standard deviation of a standard normal number that lies within two.
_TRUNCATED = 0.87962566103423978


class _Drawn(keras.initializers.Initializer):
    """Base: the same numbers at every call, by the seed; without one, by the seed of `keras.utils.set_random_seed`."""

    def __init__(self, seed: int | None = None):
        self.seed = random.randrange(2**31) if seed is None else seed

    def __call__(self, shape: Sequence[int], dtype: Any = None, **kwargs: Any) -> Tensor:
        values = self.draw(np.random.default_rng(self.seed), tuple(shape))
        return keras.ops.convert_to_tensor(values, dtype or "float32")

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """float32 numbers of that shape."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return {"seed": self.seed}


@keras.saving.register_keras_serializable(package="kvq")
class Normal(_Drawn):
    """Normal numbers of mean 0.

    Args:
        stddev: Their standard deviation.
        seed: An integer; None draws one.
    """

    def __init__(self, stddev: float, seed: int | None = None):
        super().__init__(seed)
        self.stddev = stddev

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return rng.standard_normal(shape, "float32") * np.float32(self.stddev)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "stddev": self.stddev}


@keras.saving.register_keras_serializable(package="kvq")
class VarianceScaling(_Drawn):
    """Normal numbers within two standard deviations, of variance scale / fan; `keras.initializers.VarianceScaling`.

    Args:
        scale: Positive. 2 is He's for ReLU (He et al. 2015, arXiv:1502.01852).
        fan: Of a kernel (height, width, m, n): "in" is height x width x m, "out" height x width x n.
        seed: An integer; None draws one.
    """

    def __init__(self, scale: float, fan: str = "in", seed: int | None = None):
        super().__init__(seed)
        self.scale = scale
        self.fan = fan

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
        fan = math.prod(shape[:-2]) * shape[-2 if self.fan == "in" else -1]
        values = rng.standard_normal(shape, "float32")
        while (beyond := np.abs(values) > 2).any():
            values[beyond] = rng.standard_normal(int(beyond.sum()), "float32")
        return values * np.float32(math.sqrt(self.scale / fan) / _TRUNCATED)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "scale": self.scale, "fan": self.fan}
