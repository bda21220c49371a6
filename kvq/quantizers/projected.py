"""A quantizer in a space of another dimension, reached and left by linear maps. Yu et al. 2021, arXiv:2110.04627, section 3.2."""

from typing import Any

import keras
import numpy as np
from keras import ops

from kvq.ops import Tensor
from kvq.quantizers.composite import array_of, build_once
from kvq.quantizers.quantizer import Quantizer, check_range, known_dim


@keras.saving.register_keras_serializable(package="kvq")
class ProjectedQuantizer(Quantizer):
    """Latents mapped linearly to `code_dim` channels, quantized there, and their codes mapped back.

    Low-dimensional codes (8 to 32) keep a large codebook in use; finite scalar, lookup-free and spherical quantizers need as
    many channels as they have levels or bits, whatever the network gives.

    Args:
        base: The quantizer inside.
        code_dim: Channels that it gets, at least 1.

    Call arguments:
        latents: Float tensor (batch, ..., latent_dim).
        training: Passed on to the quantizer inside.

    Returns:
        Dict: `codes`, shaped as `latents`, the mapped codes; `indices` and `losses` of the quantizer inside, in its own space.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Yu et al. 2021, arXiv:2110.04627, section 3.2. vector-quantize-pytorch: the argument `codebook_dim`.
    """

    learns_through_codes = True

    def __init__(self, base: Quantizer, code_dim: int, **kwargs: Any):
        super().__init__(**kwargs)
        check_range("code_dim", code_dim, code_dim >= 1, "be at least 1")
        self.members = [base]
        self.code_dim = code_dim
        self.codebook_size = base.codebook_size
        self.depth = base.depth
        self.loss_names = base.loss_names

    @property
    def base(self) -> Quantizer:
        return self.members[0]

    def build(self, latents_shape: tuple[int | None, ...]) -> None:
        latent_dim = known_dim(latents_shape)

        def weight(name: str, shape: tuple[int, ...], initializer: str) -> Any:
            return self.add_weight(name=name, shape=shape, initializer=initializer, dtype="float32", autocast=False)

        self.kernel_in = weight("kernel_in", (latent_dim, self.code_dim), "glorot_uniform")
        self.bias_in = weight("bias_in", (self.code_dim,), "zeros")
        self.kernel_out = weight("kernel_out", (self.code_dim, latent_dim), "glorot_uniform")
        self.bias_out = weight("bias_out", (latent_dim,), "zeros")
        build_once(self.base, (*latents_shape[:-1], self.code_dim))

    def call(self, latents: Tensor, training: bool = False) -> dict[str, Any]:
        outputs = self.base(self._inside(latents), training=training)
        return {**outputs, "codes": self._outside(outputs["codes"])}

    def _inside(self, latents: Tensor) -> Tensor:
        return ops.matmul(ops.cast(latents, "float32"), ops.convert_to_tensor(self.kernel_in)) + ops.convert_to_tensor(
            self.bias_in
        )

    def _outside(self, codes: Tensor) -> Tensor:
        mapped = ops.matmul(ops.cast(codes, "float32"), ops.convert_to_tensor(self.kernel_out))
        return ops.cast(mapped + ops.convert_to_tensor(self.bias_out), self.compute_dtype)

    def latents_to_indices(self, latents: Tensor) -> Tensor:
        return self.base.latents_to_indices(self._inside(latents))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        return self._outside(self.base.indices_to_codes(indices))

    def all_codes(self) -> Tensor:
        return self.base.all_codes() if self.depth else super().all_codes()

    def for_export(self) -> Quantizer:
        # A layer that was built takes no other layers.
        exported = ProjectedQuantizer(self.base.for_export(), self.code_dim, name=self.name, dtype=self.dtype_policy)
        exported.build((None, self.kernel_in.shape[0]))
        for mine, weight in zip(self._maps(), exported._maps(), strict=True):
            weight.assign(mine)
        exported.search_block = None
        return exported

    def _maps(self) -> list[Any]:
        return [self.kernel_in, self.bias_in, self.kernel_out, self.bias_out]

    @property
    def is_initialised(self) -> bool:
        return self.base.is_initialised

    @property
    def is_replaceable(self) -> bool:
        return self.base.is_replaceable

    def initialise(self, latents: np.ndarray, place: Any = None, seed: int = 0) -> None:
        inside = array_of(self._inside(ops.convert_to_tensor(np.asarray(latents, "float32"))))
        self.base.initialise(inside, **({} if place is None else {"place": place}), seed=seed)

    def replace_dead(self, latents: np.ndarray, threshold: float, rng: np.random.Generator) -> list[tuple[Any, np.ndarray]]:
        return self.base.replace_dead(array_of(self._inside(ops.convert_to_tensor(latents))), threshold, rng)

    def get_config(self) -> dict[str, Any]:
        base = keras.saving.serialize_keras_object(self.base)
        return {**super().get_config(), "base": base, "code_dim": self.code_dim}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ProjectedQuantizer":
        return cls(**{**config, "base": keras.saving.deserialize_keras_object(config["base"])})
