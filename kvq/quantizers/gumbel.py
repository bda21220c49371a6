"""Categorical choice with Gumbel noise. Jang et al. 2016, arXiv:1611.01144; in DALL-E, Ramesh et al. 2021, arXiv:2102.12092."""

import math
from typing import Any

import keras
from keras import ops

from kvq.ops import Tensor, gather_codes, lowest, mean_per_image
from kvq.quantizers.quantizer import Quantizer, check_range, known_dim
from kvq.random_weights import Normal


@keras.saving.register_keras_serializable(package="kvq")
class GumbelQuantizer(Quantizer):
    """A linear layer scores the codes; training draws one in proportion, evaluation takes the best.

    With logits l = z A + b, in training y = softmax((l + g) / temperature) for g = -log(-log u), u uniform; the index is the
    largest of y, the code its row of the codebook, and the gradient that of y E (straight through). `losses["kl"]` is
    `kl_weight` times KL(softmax(l) || uniform), in nats per position. The temperature falls by the factor `annealing` a
    step, down to `final_temperature`, and is part of the weights.

    Args:
        codebook_size: Number of codes k, at least 2.
        kl_weight: Of the pull towards even use, not negative.
        temperature: At the start, positive.
        final_temperature: At the end, positive, at most `temperature`.
        annealing: In (0, 1].
        seed: Of the noise.

    Call arguments:
        latents: Float tensor (batch, ..., latent_dim).
        training: Whether noise is drawn and the temperature falls.

    Returns:
        Dict: `codes`, shaped as `latents`; `indices`, int32 (batch, ...) in [0, k), drawn at random in training; `losses`,
        name to per-image values (batch,).

    Raises:
        ValueError: If an argument is out of its range.

    Source: Jang et al. 2016, arXiv:1611.01144, section 2; the weight of the KL term is that of taming-transformers.
    """

    loss_names = ("kl",)
    learns_through_codes = True

    def __init__(
        self,
        codebook_size: int,
        kl_weight: float = 5e-4,
        temperature: float = 1.0,
        final_temperature: float = 0.0625,
        annealing: float = 0.9997,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_range("codebook_size", codebook_size, codebook_size >= 2, "be at least 2")
        check_range("kl_weight", kl_weight, kl_weight >= 0, "not be negative")
        check_range("temperature", temperature, temperature > 0, "be positive")
        check_range("final_temperature", final_temperature, 0 < final_temperature <= temperature, "be in (0, temperature]")
        check_range("annealing", annealing, 0 < annealing <= 1, "be in (0, 1]")
        self.codebook_size = codebook_size
        self.kl_weight = kl_weight
        self.temperature = temperature
        self.final_temperature = final_temperature
        self.annealing = annealing
        self.seed = seed
        self.noise = keras.random.SeedGenerator(seed)

    def build(self, latents_shape: tuple[int | None, ...]) -> None:
        latent_dim = known_dim(latents_shape)

        def weight(name: str, shape: tuple[int, ...], initializer: Any) -> Any:
            return self.add_weight(name=name, shape=shape, initializer=initializer, dtype="float32", autocast=False)

        normal = Normal(stddev=latent_dim**-0.5)
        self.codebook = weight("codebook", (self.codebook_size, latent_dim), normal)
        self.kernel = weight("kernel", (latent_dim, self.codebook_size), "glorot_uniform")
        self.bias = weight("bias", (self.codebook_size,), "zeros")
        self.current_temperature = self._add_statistic("temperature", (), keras.initializers.Constant(self.temperature))

    def call(self, latents: Tensor, training: bool = False) -> dict[str, Any]:
        logits = self._logits(latents)
        codebook = ops.convert_to_tensor(self.codebook)
        chosen = logits
        if training:
            # Away from 0, where the logarithm is infinite.
            uniform = keras.random.uniform(ops.shape(logits), 1e-7, 1.0, dtype="float32", seed=self.noise)
            chosen = logits - ops.log(-ops.log(ops.minimum(uniform, 1.0 - 1e-7)))
        # A copy: PyTorch changes weights in place, while the gradient still needs this value.
        temperature = ops.convert_to_tensor(self.current_temperature) * 1.0
        y = ops.softmax(chosen / temperature, axis=-1)
        indices = lowest(-chosen)
        # y - sg[y] is exactly 0; the codes used learn through the row, the choice through y.
        codes = gather_codes(codebook, indices) + ops.matmul(y - ops.stop_gradient(y), ops.stop_gradient(codebook))
        if training and self.trainable:
            self.current_temperature.assign(ops.maximum(temperature * self.annealing, self.final_temperature))
        return {
            "codes": ops.cast(codes, self.compute_dtype),
            "indices": indices,
            "losses": {"kl": self.kl_weight * self._divergence(logits)},
        }

    def _logits(self, latents: Tensor) -> Tensor:
        return ops.matmul(ops.cast(latents, "float32"), ops.convert_to_tensor(self.kernel)) + ops.convert_to_tensor(self.bias)

    def _divergence(self, logits: Tensor) -> Tensor:
        log_p = ops.log_softmax(logits, axis=-1)
        return mean_per_image(ops.sum(ops.exp(log_p) * (log_p + math.log(self.codebook_size)), axis=-1, keepdims=True))

    def latents_to_indices(self, latents: Tensor) -> Tensor:
        return lowest(-self._logits(latents))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        return ops.cast(gather_codes(self.codebook, indices), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        names = ("codebook_size", "kl_weight", "temperature", "final_temperature", "annealing", "seed")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
