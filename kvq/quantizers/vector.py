"""Vector quantizer with a codebook learnt by gradient. van den Oord et al. 2017, arXiv:1711.00937, equation 3."""

from typing import Any

import keras
from keras import ops

from kvq.ops import Tensor, mean_per_image
from kvq.quantizers.codebook_quantizer import CodebookQuantizer


@keras.saving.register_keras_serializable(package="kvq")
class VectorQuantizer(CodebookQuantizer):
    """Nearest-neighbour quantizer whose codebook follows the gradient of its squared distance to the latents.

    For latents z with nearest codes e, `losses["codebook"]` is mean (sg[z] - e)^2 and `losses["commitment"]` is
    `commitment_weight` times mean (z - sg[e])^2, where sg is the stop-gradient and the mean is over positions and
    channels of each image. The gradient of `codes` goes straight through to the latents.

    Args:
        codebook_size: Number of codes k, at least 2.
        commitment_weight: Weight of the pull of latents towards their code (beta).
        decay: Fraction of the running usage counts kept per step, in [0, 1). They only serve to find dead codes.
        estimator: How the gradient passes the choice: straight_through or rotation.
        regularisers: Further loss terms, members of `kvq.quantizers.regularisers`.

    Call arguments:
        latents: Float tensor (batch, ..., latent_dim).
        training: Whether the usage counts move.

    Returns:
        Dict: `codes`, shaped as `latents`; `indices`, int32 (batch, ...) in [0, k); `losses`, name to per-image values
        (batch,), in squared latent units. In training, codes are rows of the codebook as it was before the call.

    Raises:
        ValueError: If an argument is out of its range.

    Source: van den Oord et al. 2017, arXiv:1711.00937, equation 3. Differs: means instead of sums over positions and
    channels, so that `commitment_weight` does not depend on the size of the grid. vector-quantize-pytorch does the same with
    `learnable_codebook=True, ema_update=False, rotation_trick=False, commitment_weight=0.25, decay=0.99,
    in_place_codebook_optimizer=None`; there the codebook's term has weight 1, too.
    """

    loss_names = ("codebook", "commitment")
    codebook_is_trainable = True

    def loss_terms(self, latents: Tensor, codes: Tensor) -> dict[str, Any]:
        codebook = mean_per_image(ops.square(ops.stop_gradient(latents) - codes))
        return {"codebook": codebook, **super().loss_terms(latents, codes)}
