"""What quantizers with one bit per channel share: signs, indices, and the entropy of the choice."""

from typing import Any

import numpy as np
from keras import ops

from kvq.ops import Tensor, entropy_of, mean_per_image, straight_through
from kvq.quantizers.quantizer import Quantizer, check_dim, check_range
from kvq.quantizers.regularisers import repeated


class BitQuantizer(Quantizer):
    """Base: the code of a latent is the signs of its channels, the index sum_i 1[z_i > 0] 2^i.

    The probability of a code is softmax of -temperature |z - c|^2, which factorises: bit i is set with probability
    sigmoid(4 temperature z_i s) for codes of +-s. So the mean entropy of single latents is a sum over bits, exactly. That of
    the batch's mean does not factorise; it is that of groups of `group_bits` bits, summed: exact within a group, an upper
    bound over groups.

    Args:
        bits: Channels of the latents, in [1, 31): 2^bits codes.
        entropy_weight: Of both entropies, not negative.
        diversity: Weight of the batch's entropy against that of single latents (gamma), not negative.
        temperature: Positive: the larger, the surer the choice.
        group_bits: In [1, 12].
    """

    loss_names: tuple[str, ...] = ("entropy", "batch_entropy")

    def __init__(
        self,
        bits: int,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 1.0,
        group_bits: int = 8,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        rule = 'be in [1, 31), so that an index fits 32 bits; `ProductQuantizer` (kind "product") makes groups of an index each'
        check_range("bits", bits, 1 <= bits < 31, rule)
        check_range("entropy_weight", entropy_weight, entropy_weight >= 0, "not be negative")
        check_range("diversity", diversity, diversity >= 0, "not be negative")
        check_range("temperature", temperature, temperature > 0, "be positive")
        check_range("group_bits", group_bits, 1 <= group_bits <= 12, "be in [1, 12]")
        self.bits = bits
        self.entropy_weight = entropy_weight
        self.diversity = diversity
        self.temperature = temperature
        self.group_bits = group_bits
        self.codebook_size = 2**bits

    @property
    def scale(self) -> float:
        """The size of each coordinate of a code."""
        return 1.0

    def build(self, latents_shape: tuple[int | None, ...]) -> None:
        check_dim(latents_shape, self.bits, "one for each of `bits`")

    def call(self, latents: Tensor, training: bool = False) -> dict[str, Any]:
        latents = self.comparable(latents)
        is_set = latents > 0.0
        codes = self._signs(is_set)
        losses = {**self.entropies(4.0 * self.temperature * self.scale * latents), **self.loss_terms(latents, codes)}
        codes = ops.cast(straight_through(latents, codes), self.compute_dtype)
        return {"codes": codes, "indices": self._index(is_set), "losses": losses}

    def comparable(self, latents: Tensor) -> Tensor:
        """Latents in float32, in the form in which they are compared with the codes."""
        return ops.cast(latents, "float32")

    def loss_terms(self, latents: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Weighted loss terms (batch,) beside the entropies, by name."""
        return {}

    def entropies(self, logits: Tensor) -> dict[str, Tensor]:
        """Both terms, of the logits (batch, ..., bits) of the bits, in nats."""
        # H of a bit with logit a: softplus(a) - a sigmoid(a); p log p would be NaN where p is 0.
        single = ops.softplus(logits) - logits * ops.sigmoid(logits)
        axes = tuple(range(len(logits.shape) - 1))
        batch = 0.0
        for start in range(0, self.bits, self.group_bits):
            group = logits[..., start : start + self.group_bits]
            # p(c) of a group is softmax over its codes of the sum of the logits of the bits that are set.
            p = ops.softmax(ops.matmul(group, ops.convert_to_tensor(_bits_of_codes(group.shape[-1]))), axis=-1)
            batch = batch + entropy_of(ops.mean(p, axis=axes))
        return {
            "entropy": self.entropy_weight * self.bits * mean_per_image(single),
            "batch_entropy": repeated(-self.entropy_weight * self.diversity * batch, logits),
        }

    def latents_to_indices(self, latents: Tensor) -> Tensor:
        return self._index(self.comparable(latents) > 0.0)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        digits = (ops.expand_dims(ops.cast(indices, "int32"), -1) // self._places()) % 2
        return ops.cast(self._signs(digits > 0), self.compute_dtype)

    def _signs(self, is_set: Tensor) -> Tensor:
        return (2.0 * ops.cast(is_set, "float32") - 1.0) * self.scale

    def _index(self, is_set: Tensor) -> Tensor:
        return ops.cast(ops.sum(ops.cast(is_set, "int32") * self._places(), axis=-1), "int32")

    def _places(self) -> Tensor:
        return ops.convert_to_tensor((2 ** np.arange(self.bits)).astype("int32"))

    def get_config(self) -> dict[str, Any]:
        names = ("bits", "entropy_weight", "diversity", "temperature", "group_bits")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _bits_of_codes(bits: int) -> np.ndarray:
    """float32 (bits, 2^bits): whether bit i is set in code j."""
    return (np.arange(2**bits)[None, :] >> np.arange(bits)[:, None] & 1).astype("float32")
