"""Finite scalar quantization: each channel rounded to a few levels. Mentzer et al. 2023, arXiv:2309.15505 (FSQ)."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kvq.ops import Tensor, round_through, straight_through
from kvq.quantizers.quantizer import LARGEST_INDEX, Quantizer, check_dim, check_range


class _Levels(Quantizer):
    """Channels of L_i values each. The index is sum_i digit_i prod_{j<i} L_j, in integers, of digits in [0, L_i)."""

    # The fewest levels that a channel can have.
    fewest = 2

    def __init__(self, levels: Sequence[int], **kwargs: Any):
        super().__init__(**kwargs)
        levels = [int(level) for level in levels]
        check_range(
            "levels", levels, bool(levels) and min(levels) >= self.fewest, f"be at least one number from {self.fewest} on"
        )
        if math.prod(levels) > LARGEST_INDEX:
            raise ValueError(
                f"The product of `levels` must be at most {LARGEST_INDEX}, so that an index fits 32 bits. Received: "
                f'levels={levels}. Split them into groups with an index each: `ProductQuantizer` (kind "product").'
            )
        self.levels = levels
        self.codebook_size = math.prod(levels)
        self._places = np.cumprod([1, *levels[:-1]]).astype("int32")

    def build(self, latents_shape: tuple[int | None, ...]) -> None:
        check_dim(latents_shape, len(self.levels), "one for each of `levels`")

    def call(self, latents: Tensor, training: bool = False) -> dict[str, Any]:
        bounded = self._bounded(ops.cast(latents, "float32"))
        digits = round_through(bounded)
        codes = straight_through(self._scaled(bounded), self._scaled(ops.stop_gradient(digits)))
        return {"codes": ops.cast(codes, self.compute_dtype), "indices": self._index(digits), "losses": {}}

    def _bounded(self, latents: Tensor) -> Tensor:
        """Latents as real digits, between 0 and L_i - 1 once rounded."""
        raise NotImplementedError

    def _scaled(self, digits: Tensor) -> Tensor:
        """Digits as codes in [-1, 1]."""
        raise NotImplementedError

    def _index(self, digits: Tensor) -> Tensor:
        # Integers before the sum: in half precision, and in float32 above 2^24, sums of products are wrong.
        return ops.cast(ops.sum(ops.cast(digits, "int32") * ops.convert_to_tensor(self._places), axis=-1), "int32")

    def latents_to_indices(self, latents: Tensor) -> Tensor:
        return self._index(ops.round(self._bounded(ops.cast(latents, "float32"))))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        levels, places = ops.convert_to_tensor(np.array(self.levels, "int32")), ops.convert_to_tensor(self._places)
        digits = (ops.expand_dims(ops.cast(indices, "int32"), -1) // places) % levels
        return ops.cast(self._scaled(ops.cast(digits, "float32")), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "levels": list(self.levels)}


@keras.saving.register_keras_serializable(package="kvq")
class FiniteScalarQuantizer(_Levels):
    """Each channel bounded by tanh and rounded to one of L_i whole numbers; no codebook, no loss of its own.

    b(z) = h tanh(z + s) - o with h = (L - 1)(1 + m) / 2 and m = min(1e-3, 1 / (2 (L - 1))), o = 1/2 for even L, else 0, and
    s = artanh(o / h); the code is round(b) / floor(L / 2), in [-1, 1], and the gradient that of b / floor(L / 2). Even L reach
    from -1 to 1 - 2 / L.

    Args:
        levels: L_i of each channel, at least 3; their product is the codebook size. [8, 5, 5, 5] is 1,000 codes, [8, 8, 4] 256.
            Two levels would be {-1, 0}: use `SymmetricFiniteScalarQuantizer`, or lookup-free quantization.

    Call arguments:
        latents: Float tensor (batch, ..., len(levels)).
        training: Makes no difference.

    Returns:
        Dict: `codes`, shaped as `latents`, in [-1, 1]; `indices`, int32 (batch, ...) in [0, codebook_size); `losses`, empty.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Mentzer et al. 2023, arXiv:2309.15505, section 3 and listing 1. Differs: 1 + m where the listing has 1 - 1e-3,
    which reaches the same levels (and of more than 1,001 none beyond), and artanh where it prints tan. vector-quantize-pytorch's
    `FSQ(levels)` gives the same codes and indices.
    """

    fewest = 3

    def _bounded(self, latents: Tensor) -> Tensor:
        levels = np.array(self.levels, "float64")
        half = (levels - 1) * (1 + np.minimum(1e-3, 0.5 / (levels - 1))) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)
        shift = np.arctanh(offset / half)
        # From 0 on: round(b) + floor(L / 2).
        return ops.tanh(latents + _tensor(shift)) * _tensor(half) + _tensor(levels // 2 - offset)

    def _scaled(self, digits: Tensor) -> Tensor:
        half = _tensor(np.array(self.levels) // 2)
        return (digits - half) / half


@keras.saving.register_keras_serializable(package="kvq")
class SymmetricFiniteScalarQuantizer(_Levels):
    """As finite scalar quantization, with levels that lie symmetrically around 0, for every level count from 2 on.

    The digit is floor((L - 1)(tanh z + 1) / 2 + 1/2), the code 2 digit / (L - 1) - 1: from -1 to 1 in steps of 2 / (L - 1);
    the gradient is that of tanh z.

    Args:
        levels: L_i of each channel, at least 2; their product is the codebook size.

    Call arguments:
        latents: Float tensor (batch, ..., len(levels)).
        training: Makes no difference.

    Returns:
        Dict: `codes`, shaped as `latents`, in [-1, 1]; `indices`, int32 (batch, ...) in [0, codebook_size); `losses`, empty.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Parker et al. 2024, arXiv:2411.19842, section 3. Differs: halves are rounded to even, and without the noise that
    stands in for rounding there. vector-quantize-pytorch: `FSQ(levels, preserve_symmetry=True)`.
    """

    def _bounded(self, latents: Tensor) -> Tensor:
        return (ops.tanh(latents) + 1.0) * _tensor((np.array(self.levels) - 1) / 2)

    def _scaled(self, digits: Tensor) -> Tensor:
        return digits * _tensor(2.0 / (np.array(self.levels) - 1)) - 1.0


def _tensor(values: np.ndarray) -> Tensor:
    return ops.convert_to_tensor(values.astype("float32"))
