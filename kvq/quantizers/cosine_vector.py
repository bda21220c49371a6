"""Quantizers on the unit sphere: latents and codes compared by angle. Yu et al. 2021, arXiv:2110.04627 (ViT-VQGAN)."""

from typing import Any

import keras
import numpy as np
from keras import ops

from kvq.ops import Tensor, unit_norm
from kvq.quantizers.codebook_quantizer import CodebookQuantizer
from kvq.quantizers.ema_vector import EMAVectorQuantizer
from kvq.quantizers.vector import VectorQuantizer


@keras.saving.register_keras_serializable(package="kvq")
class CosineVectorQuantizer(VectorQuantizer):
    """Nearest code by angle; the codebook follows the gradient.

    With p = z / |z| and c = e / |e|, the index is argmax p.c, `codes` are c, and both losses of `VectorQuantizer` are of p and
    c: mean (sg[p] - c)^2 and `commitment_weight` times mean (p - sg[c])^2. Normalised in the losses too, or the length of the
    latents would grow without bound. A mean of squares over d channels of unit vectors is (2 - 2 cos) / d: scale the weight.

    Args:
        codebook_size, commitment_weight, decay, estimator, regularisers: As in `VectorQuantizer`.

    Call arguments:
        latents: Float tensor (batch, ..., latent_dim); few channels, 8 to 32, work best.
        training: Whether the usage counts move.

    Returns:
        Dict: `codes`, shaped as `latents`, of unit length; `indices`, int32 (batch, ...) in [0, k); `losses`, name to
        per-image values (batch,).

    Raises:
        ValueError: If an argument is out of its range.

    Source: Yu et al. 2021, arXiv:2110.04627, section 3.2. vector-quantize-pytorch: `use_cosine_sim=True`, whose losses compare
    the unit codes with latents of any length.
    """

    def comparable(self, latents: Tensor) -> Tensor:
        return unit_norm(super().comparable(latents))

    def codes(self) -> Tensor:
        return unit_norm(super().codes())

    def for_export(self) -> VectorQuantizer:
        return _folded(self)


@keras.saving.register_keras_serializable(package="kvq")
class EMACosineVectorQuantizer(EMAVectorQuantizer):
    """Nearest code by angle; codes are the directions of a moving average of unit latents.

    With p = z / |z|: m_j = gamma m_j + (1 - gamma) sum of p, e_j = m_j / |m_j|. The only loss is `losses["commitment"]`,
    `commitment_weight` times mean (p - sg[e])^2.

    Args:
        codebook_size, commitment_weight, decay, estimator, regularisers: As in `EMAVectorQuantizer`.

    Call arguments:
        latents: Float tensor (batch, ..., latent_dim).
        training: Whether the running averages, and with them the codebook, move.

    Returns:
        Dict: `codes`, shaped as `latents`, of unit length; `indices`, int32 (batch, ...) in [0, k); `losses`, name to
        per-image values (batch,). In training, codes are rows of the codebook as it was before the call.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Yu et al. 2021, arXiv:2110.04627, section 3.2, with the averages of van den Oord et al. 2017, appendix A.1.
    """

    def comparable(self, latents: Tensor) -> Tensor:
        return unit_norm(super().comparable(latents))

    def codes(self) -> Tensor:
        return unit_norm(super().codes())

    def for_export(self) -> VectorQuantizer:
        return _folded(self)

    def _means(self, counts: Tensor) -> Tensor:
        # Only the direction matters, and a sum that cancelled out has none: the code stays.
        sums = ops.convert_to_tensor(self.sums)
        length = ops.sqrt(ops.sum(ops.square(sums), axis=-1, keepdims=True))
        return ops.where(length > 1e-6, sums / ops.maximum(length, 1e-6), ops.convert_to_tensor(self.codebook))

    def replace(self, rows: np.ndarray, codes: Any) -> None:
        codes = np.asarray(codes, "float32")
        super().replace(rows, codes / np.maximum(np.linalg.norm(codes, axis=-1, keepdims=True), 1e-12))


class _UnitCodes(VectorQuantizer):
    """What is exported: codes that are of unit length already."""

    def comparable(self, latents: Tensor) -> Tensor:
        return unit_norm(super().comparable(latents))


def _folded(quantizer: CodebookQuantizer) -> VectorQuantizer:
    """One codebook in the graph. Normalised in encoder and decoder, PyTorch's converter would fold it twice, and lose one."""
    return quantizer.folded_into(_UnitCodes)
