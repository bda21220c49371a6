"""Product quantization: groups of channels with an index each. Jegou et al. 2011; van den Oord et al. 2017, section 4.1."""

from typing import Any

import keras
import numpy as np
from keras import ops

from kvq.ops import Tensor
from kvq.quantizers.composite import CompositeQuantizer
from kvq.quantizers.initialisers import kmeans
from kvq.quantizers.quantizer import known_dim


@keras.saving.register_keras_serializable(package="kvq")
class ProductQuantizer(CompositeQuantizer):
    """Latents cut along their channels into groups of equal size, each with a quantizer of its own.

    With G groups of K codes there are K^G codes, for G log2 K bits a position. `indices` have one per group, as a last axis.
    Losses are the groups' own, averaged, so that a mean over channels stays one.

    Args:
        members: The quantizers, one per group, all with the same `codebook_size` and loss terms. Those that draw random numbers
            need a `seed` each.

    Call arguments:
        latents: Float tensor (batch, ..., latent_dim), latent_dim a multiple of the number of groups.
        training: Whether running statistics move.

    Returns:
        Dict: `codes`, shaped as `latents`; `indices`, int32 (batch, ..., groups) in [0, codebook_size); `losses`, name to
        per-image values (batch,).

    Raises:
        ValueError: If an argument is out of its range, or latent_dim does not divide by the number of groups.

    Source: Jegou et al. 2011, "Product Quantization for Nearest Neighbor Search"; the paper's CIFAR-10 model has ten groups.
    vector-quantize-pytorch: `GroupedResidualVQ(groups=..., num_quantizers=1)`.
    """

    def build(self, latents_shape: tuple[int | None, ...]) -> None:
        groups, latent_dim = len(self.members), known_dim(latents_shape)
        if latent_dim % groups:
            raise ValueError(f"Latents must have a multiple of {groups} channels, the groups. Received: shape={latents_shape}.")
        super().build((*latents_shape[:-1], latent_dim // groups))

    def call(self, latents: Tensor, training: bool = False) -> dict[str, Any]:
        outputs = [member(group, training=training) for member, group in zip(self.members, self._groups(latents), strict=True)]
        return {
            "codes": ops.concatenate([ops.cast(output["codes"], self.compute_dtype) for output in outputs], axis=-1),
            "indices": ops.stack([output["indices"] for output in outputs], axis=-1),
            "losses": {name: values / len(outputs) for name, values in self._summed(outputs).items()},
        }

    def _groups(self, latents: Any) -> list[Any]:
        size = latents.shape[-1] // len(self.members)
        return [latents[..., start : start + size] for start in range(0, latents.shape[-1], size)]

    def latents_to_indices(self, latents: Tensor) -> Tensor:
        parts = [member.latents_to_indices(group) for member, group in zip(self.members, self._groups(latents), strict=True)]
        return ops.stack(parts, axis=-1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        parts = [member.indices_to_codes(indices[..., group]) for group, member in enumerate(self.members)]
        return ops.cast(ops.concatenate(parts, axis=-1), self.compute_dtype)

    def initialise(self, latents: np.ndarray, place: Any = kmeans, seed: int = 0) -> None:
        for number, (member, group) in enumerate(zip(self.members, self._groups(np.asarray(latents)), strict=True)):
            member.initialise(group, place, seed + number)

    def replace_dead(self, latents: np.ndarray, threshold: float, rng: np.random.Generator) -> list[tuple[Any, np.ndarray]]:
        pairs = zip(self.members, self._groups(latents), strict=True)
        return [changed for member, group in pairs for changed in member.replace_dead(group, threshold, rng)]
