"""Lookup-free quantization: the signs of the latents are the code. Yu et al. 2023, arXiv:2310.05737 (MAGVIT-v2, LFQ)."""

from typing import Any

import keras
from keras import ops

from kvq.ops import Tensor, mean_per_image
from kvq.quantizers.bits import BitQuantizer
from kvq.quantizers.quantizer import check_range


@keras.saving.register_keras_serializable(package="kvq")
class LookupFreeQuantizer(BitQuantizer):
    """One bit per channel, +-1, with an entropy term that keeps the choices sure and the codes in even use.

    With c = sign(z), sign(0) = -1: `losses["entropy"]` is `entropy_weight` times E[H(p(c|z))], `losses["batch_entropy"]` minus
    `entropy_weight` times `diversity` times H(E p(c|z)), for p(c|z) = softmax(-temperature |z - c|^2), in nats, and
    `losses["commitment"]` `commitment_weight` times mean (z - c)^2. The total may be negative. H(E p) is exact within groups of
    `group_bits` bits and summed over groups, an upper bound that can hide collapse onto correlated bits: see `usage`.

    Args:
        bits: Channels of the latents, in [1, 31): 2^bits codes.
        entropy_weight: Of both entropies. They are sums over bits: tune it anew for another number of them.
        diversity: Weight of the batch's entropy against that of single latents (gamma).
        temperature: The larger, the surer the choice.
        group_bits: In [1, 12].
        commitment_weight: Weight of the pull of latents towards their code.

    Call arguments:
        latents: Float tensor (batch, ..., bits), best from a normalisation layer without an activation.
        training: Makes no difference.

    Returns:
        Dict: `codes`, shaped as `latents`, of -1 and 1; `indices`, int32 (batch, ...) in [0, 2^bits); `losses`, name to
        per-image values (batch,).

    Raises:
        ValueError: If an argument is out of its range.

    Source: Yu et al. 2023, arXiv:2310.05737, section 3.1. vector-quantize-pytorch: `LFQ(dim=bits, codebook_size=2**bits,
    entropy_loss_weight=0.1, diversity_gamma=1., inv_temperature=...)`, which sets the bits in the opposite order.
    """

    loss_names = ("entropy", "batch_entropy", "commitment")

    def __init__(
        self,
        bits: int,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 1.0,
        group_bits: int = 8,
        commitment_weight: float = 0.25,
        **kwargs: Any,
    ):
        super().__init__(bits, entropy_weight, diversity, temperature, group_bits, **kwargs)
        check_range("commitment_weight", commitment_weight, commitment_weight >= 0, "not be negative")
        self.commitment_weight = commitment_weight

    def loss_terms(self, latents: Tensor, codes: Tensor) -> dict[str, Tensor]:
        return {"commitment": self.commitment_weight * mean_per_image(ops.square(latents - codes))}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "commitment_weight": self.commitment_weight}
