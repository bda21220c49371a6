"""Vector quantizer with a codebook of moving averages. van den Oord et al. 2017, arXiv:1711.00937, appendix A.1."""

import keras
import numpy as np
from keras import ops

from kvq.ops import Tensor, code_sums
from kvq.quantizers.codebook_quantizer import CodebookQuantizer, with_rows

# Below this many latents a step the ratio of the two averages says nothing more: the code stays where it is.
_FEWEST = 1e-3


@keras.saving.register_keras_serializable(package="kvq")
class EMAVectorQuantizer(CodebookQuantizer):
    """Nearest-neighbour quantizer whose codebook follows a moving average of the latents.

    With n_j the number of a step's latents z that fall to code j and gamma the `decay`: N_j = gamma N_j + (1 - gamma) n_j,
    m_j = gamma m_j + (1 - gamma) sum z, e_j = m_j / N_j. The only loss is `losses["commitment"]`, `commitment_weight`
    times mean (z - sg[e])^2 over positions and channels of each image.

    Args:
        codebook_size: Number of codes k, at least 2.
        commitment_weight: Weight of the pull of latents towards their code (beta).
        decay: Fraction of the running averages kept per step (gamma), in [0, 1). 0.99 averages about 100 steps.
        estimator: How the gradient passes the choice: straight_through or rotation.
        regularisers: Further loss terms, members of `kvq.quantizers.regularisers`.

    Call arguments:
        latents: Float tensor (batch, ..., latent_dim).
        training: Whether the running averages, and with them the codebook, move.

    Returns:
        Dict: `codes`, shaped as `latents`; `indices`, int32 (batch, ...) in [0, k); `losses`, name to per-image values
        (batch,), in squared latent units. In training, codes are rows of the codebook as it was before the call.

    Raises:
        ValueError: If an argument is out of its range.

    Source: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1. Differs: starts from N_j = 1, m_j = e_j; a code whose
    N_j fell below 0.001 stays where it is. No Laplace smoothing, which draws rare codes to the origin. In
    vector-quantize-pytorch, `VectorQuantize(rotation_trick=False, commitment_weight=0.25, decay=0.99)` (its defaults: True, 1,
    0.8), which smooths the counts by `eps`.
    """

    loss_names = ("commitment",)

    def build(self, latents_shape: tuple[int | None, ...]) -> None:
        super().build(latents_shape)
        # The same initializer gives the same values again: m_j = e_j, as N_j = 1.
        self.sums = self._add_statistic("sums", tuple(self.codebook.shape), self.codebook_initializer)

    def move_means(self, finite: Tensor, latents: Tensor, indices: Tensor) -> None:
        super().move_means(finite, latents, indices)
        self.sums.assign(self._moved(self.sums, code_sums(latents, indices, self.codebook_size), finite))
        counts = ops.expand_dims(ops.convert_to_tensor(self.counts), -1)
        self.codebook.assign(ops.where(counts > _FEWEST, self._means(counts), ops.convert_to_tensor(self.codebook)))

    def _means(self, counts: Tensor) -> Tensor:
        """The codes that the averages give, of counts (codebook_size, 1)."""
        return ops.divide(self.sums, ops.maximum(counts, _FEWEST))

    def replace(self, rows: np.ndarray, codes: np.ndarray) -> None:
        super().replace(rows, codes)
        counts, codebook = ops.convert_to_numpy(self.counts), ops.convert_to_numpy(self.codebook)
        self.sums.assign(with_rows(self.sums, rows, counts[rows, None] * codebook[rows]))
