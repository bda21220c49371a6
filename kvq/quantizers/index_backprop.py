"""Index back-propagation: every code learns at each step, through a softmax over all. Shi et al. 2024, arXiv:2412.02692 (IBQ)."""

from typing import Any

import keras
from keras import ops

from kvq.ops import Tensor, gather_codes, lowest, mean_per_image
from kvq.quantizers.codebook_quantizer import CodebookQuantizer
from kvq.quantizers.quantizer import check_range
from kvq.quantizers.regularisers import choice_entropies


@keras.saving.register_keras_serializable(package="kvq")
class IndexBackpropQuantizer(CodebookQuantizer):
    """The code with the largest inner product with the latent; the gradient goes to all codes and the latent.

    With logits l_j = z.e_j, p = softmax(l) and h the one-hot of the largest logit, q = (h - sg[p] + p) E. Its value is a row of
    the codebook; its gradient reaches the choice through p and the code chosen through h. `losses["codebook"]` is mean
    (q - sg[z])^2 plus mean (h E - sg[z])^2, `losses["commitment"]` `commitment_weight` times mean (z - sg[h E])^2, and the two
    entropies are those of `Entropy` on l. The lengths of the codes matter. A table of latents times codes is held, in
    training for the gradient.

    Args:
        codebook_size: Number of codes k, at least 2.
        commitment_weight: Weight of the pull of latents towards their code (beta).
        decay: Fraction of the running usage counts kept per step, in [0, 1). They only serve to find dead codes.
        entropy_weight: Of both entropies; 0 leaves them out of the loss.
        temperature: Of the softmax in the entropies, positive.

    Call arguments:
        latents: Float tensor (batch, ..., latent_dim); few channels, 8 to 32, work best.
        training: Whether the usage counts move.

    Returns:
        Dict: `codes`, shaped as `latents`; `indices`, int32 (batch, ...) in [0, k); `losses`, name to per-image values (batch,).

    Raises:
        ValueError: If an argument is out of its range.

    Source: Shi et al. 2024, arXiv:2412.02692, section 3.2. vector-quantize-pytorch has none.
    """

    loss_names = ("codebook", "commitment", "entropy", "batch_entropy")
    codebook_is_trainable = True

    def __init__(
        self,
        codebook_size: int,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        entropy_weight: float = 0.05,
        temperature: float = 0.01,
        **kwargs: Any,
    ):
        for name in ("estimator", "regularisers"):
            check_range(name, kwargs.get(name), name not in kwargs, "not be given: it has its own gradient and entropies")
        super().__init__(codebook_size, commitment_weight, decay, **kwargs)
        check_range("entropy_weight", entropy_weight, entropy_weight >= 0, "not be negative")
        check_range("temperature", temperature, temperature > 0, "be positive")
        self.entropy_weight = entropy_weight
        self.temperature = temperature

    def call(self, latents: Tensor, training: bool = False) -> dict[str, Any]:
        latents = self.comparable(latents)
        codebook = self.codes()
        logits = self._logits(latents, codebook)
        indices = self._largest(logits)
        hard = gather_codes(codebook, indices)
        p = ops.softmax(logits, axis=-1)
        # p - sg[p] is exactly 0, so that the value is that of `hard`.
        soft = ops.matmul(p - ops.stop_gradient(p), codebook)
        codes = hard + soft
        target = ops.stop_gradient(latents)
        losses = {
            "codebook": mean_per_image(ops.square(codes - target)) + mean_per_image(ops.square(hard - target)),
            **self.loss_terms(latents, hard),
            **choice_entropies(logits / self.temperature, self.entropy_weight, 1.0),
        }
        if training and self.trainable:
            self.update_statistics(target, indices)
        return {"codes": ops.cast(codes, self.compute_dtype), "indices": indices, "losses": losses}

    def _logits(self, latents: Tensor, codebook: Tensor) -> Tensor:
        return ops.matmul(latents, ops.transpose(codebook))

    def _largest(self, logits: Tensor) -> Tensor:
        return lowest(-logits)

    def latents_to_indices(self, latents: Tensor) -> Tensor:
        return self._largest(self._logits(self.comparable(latents), self.codes()))

    def get_config(self) -> dict[str, Any]:
        config = {**super().get_config(), "entropy_weight": self.entropy_weight, "temperature": self.temperature}
        return {name: value for name, value in config.items() if name not in ("estimator", "regularisers")}
