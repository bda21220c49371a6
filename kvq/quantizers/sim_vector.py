"""Vector quantizer whose codes are a learnt linear map of fixed ones. Zhu et al. 2024, arXiv:2411.02038 (SimVQ)."""

from typing import Any

import keras
from keras import ops

from kvq.ops import Tensor
from kvq.quantizers.quantizer import known_dim
from kvq.quantizers.vector import VectorQuantizer


@keras.saving.register_keras_serializable(package="kvq")
class SimVectorQuantizer(VectorQuantizer):
    """Nearest-neighbour quantizer with codebook C = C_0 W: C_0 stays as it was drawn, W (latent_dim, latent_dim) learns.

    Every step moves every code, used or not, so that none can die. Losses as in `VectorQuantizer`, of the rows of C.

    Args:
        codebook_size, commitment_weight, decay, estimator, regularisers: As in `VectorQuantizer`.

    Call arguments:
        latents: Float tensor (batch, ..., latent_dim).
        training: Whether the usage counts move.

    Returns:
        Dict: `codes`, shaped as `latents`; `indices`, int32 (batch, ...) in [0, k); `losses`, name to per-image values
        (batch,), in squared latent units.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Zhu et al. 2024, arXiv:2411.02038, section 4. Differs: W starts as a random rotation. vector-quantize-pytorch:
    `SimVQ(rotation_trick=False)`, whose `commitment_weight` of 0.25 weighs both terms by `input_to_quantize_commit_loss_weight`.
    """

    codebook_is_trainable = False

    def build(self, latents_shape: tuple[int | None, ...]) -> None:
        super().build(latents_shape)
        latent_dim = known_dim(latents_shape)
        self.projection = self.add_weight(
            name="projection", shape=(latent_dim, latent_dim), initializer="orthogonal", dtype="float32", autocast=False
        )

    def codes(self) -> Tensor:
        return ops.matmul(super().codes(), ops.convert_to_tensor(self.projection))

    @property
    def is_replaceable(self) -> bool:
        """No, since all codes move at each step, and C_0 is what must not."""
        return False

    @property
    def is_initialised(self) -> bool:
        return True

    def initialise(self, latents: Any, place: Any = None, seed: int = 0) -> None:
        """Nothing: C_0 is drawn from a normal distribution, not from data."""

    def for_export(self) -> VectorQuantizer:
        """A `VectorQuantizer` with the codebook C_0 W, multiplied once."""
        return self.folded_into(VectorQuantizer)
