"""Binary spherical quantization: signs of latents on the unit sphere. Zhao et al. 2024, arXiv:2406.07548 (BSQ)."""

import math

import keras

from kvq.ops import Tensor, unit_norm
from kvq.quantizers.bits import BitQuantizer


@keras.saving.register_keras_serializable(package="kvq")
class BinarySphericalQuantizer(BitQuantizer):
    """One bit per channel of the latent's direction u = z / |z|; the code is sign(u) / sqrt(bits), of unit length.

    |u - code| stays below sqrt(2), so that no commitment is needed. The entropies are those of lookup-free quantization on u:
    bit i is set with probability sigmoid(4 temperature u_i / sqrt(bits)). The gradient goes straight through to u.

    Args:
        bits: Channels of the latents, in [1, 31): 2^bits codes.
        entropy_weight: Of both entropies.
        diversity: Weight of the batch's entropy against that of single latents (gamma).
        temperature: The larger, the surer the choice; u_i / sqrt(bits) is small, so larger than in lookup-free quantization.
        group_bits: Bits whose joint entropy is exact, in [1, 12].

    Call arguments:
        latents: Float tensor (batch, ..., bits).
        training: Makes no difference.

    Returns:
        Dict: `codes`, shaped as `latents`, of +-1 / sqrt(bits); `indices`, int32 (batch, ...) in [0, 2^bits); `losses`, name to
        per-image values (batch,).

    Raises:
        ValueError: If an argument is out of its range.

    Source: Zhao et al. 2024, arXiv:2406.07548, section 3. Differs: straight through at the scaled code; the reference scales
    behind it, which multiplies the gradient by 1 / sqrt(bits). vector-quantize-pytorch: `LFQ(spherical=True)`.
    """

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.bits)

    def comparable(self, latents: Tensor) -> Tensor:
        return unit_norm(super().comparable(latents))
