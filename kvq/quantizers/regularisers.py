"""Further loss terms of a quantizer with a codebook, each a class of its own, handed to its `regularisers` argument.

A member has `loss_names` and `loss_terms(latents, codebook)`, from float32 latents (batch, ..., latent_dim) and all codes
(codebook_size, latent_dim) to values (batch,) by name. A term of the whole batch or of weights alone is repeated for every image.
"""

from typing import Any

import keras
from keras import ops

from kvq.ops import Tensor, entropy_of, mean_per_image
from kvq.quantizers.quantizer import check_range


class Regulariser:
    """Base of the regularisers: a configuration that mirrors the constructor.

    Attributes:
        loss_names: Keys of what `loss_terms` returns.
    """

    loss_names: tuple[str, ...] = ()

    def loss_terms(self, latents: Tensor, codebook: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Regulariser":
        return cls(**config)


@keras.saving.register_keras_serializable(package="kvq")
class Entropy(Regulariser):
    """Sure choices of single latents, even use of the codes by the batch.

    With p(j|z) = softmax of -|z - e_j|^2 / temperature: `entropy` is `weight` times the mean over positions of H(p(.|z)),
    `batch_entropy` minus `weight` times `diversity` times H of the mean of p over the batch, in nats. A table of latents times
    codes is held for the gradient.

    Args:
        weight: Of both terms, not negative.
        diversity: Of the second against the first (gamma), not negative.
        temperature: Positive, in squared latent units.

    Source: Yu et al. 2023, arXiv:2310.05737 (MAGVIT-v2), equation 4, as MaskGIT applies it to a codebook.
    """

    loss_names = ("entropy", "batch_entropy")

    def __init__(self, weight: float = 0.1, diversity: float = 1.0, temperature: float = 0.01):
        check_range("weight", weight, weight >= 0, "not be negative")
        check_range("diversity", diversity, diversity >= 0, "not be negative")
        check_range("temperature", temperature, temperature > 0, "be positive")
        self.weight = weight
        self.diversity = diversity
        self.temperature = temperature

    def loss_terms(self, latents: Tensor, codebook: Tensor) -> dict[str, Tensor]:
        # |z|^2 is the same for all codes, and a softmax does not see it.
        distances = ops.sum(ops.square(codebook), axis=-1) - 2.0 * ops.matmul(latents, ops.transpose(codebook))
        return choice_entropies(-distances / self.temperature, self.weight, self.diversity)


@keras.saving.register_keras_serializable(package="kvq")
class Orthogonality(Regulariser):
    """Codes that point in different directions: `weight` times (sum_ij (e_i . e_j)^2 / k^2 - 1 / k) of unit codes e.

    Args:
        weight: Not negative. The term is 0 for orthogonal codes, and close to 1 where all codes are alike.

    Source: Shin et al. 2021, arXiv:2112.00384, equation 3.
    """

    loss_names = ("orthogonality",)

    def __init__(self, weight: float = 10.0):
        check_range("weight", weight, weight >= 0, "not be negative")
        self.weight = weight

    def loss_terms(self, latents: Tensor, codebook: Tensor) -> dict[str, Tensor]:
        directions = codebook * ops.rsqrt(ops.sum(ops.square(codebook), axis=-1, keepdims=True) + 1e-12)
        # The sum of squares of E E^T is that of E^T E, which is latent_dim squared instead of codebook_size squared.
        gram = ops.matmul(ops.transpose(directions), directions)
        value = ops.sum(ops.square(gram)) / codebook.shape[0] ** 2 - 1.0 / codebook.shape[0]
        return {"orthogonality": self.weight * repeated(value, latents)}


REGULARISERS = {"entropy": Entropy, "orthogonality": Orthogonality}


def choice_entropies(logits: Tensor, weight: float, diversity: float) -> dict[str, Tensor]:
    """The two terms of `Entropy`, from the logits (batch, ..., choices) of a choice."""
    log_p = ops.log_softmax(logits, axis=-1)
    p = ops.exp(log_p)
    sure = mean_per_image(-ops.sum(p * log_p, axis=-1, keepdims=True))
    mean = ops.mean(p, axis=tuple(range(len(p.shape) - 1)))
    return {"entropy": weight * sure, "batch_entropy": repeated(-weight * diversity * entropy_of(mean), logits)}


def repeated(value: Tensor, like: Tensor) -> Tensor:
    """A scalar as (batch,), the batch being that of `like`."""
    return ops.broadcast_to(ops.reshape(value, (1,)), (ops.shape(like)[0],))
