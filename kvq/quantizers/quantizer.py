"""What every quantizer is: a Keras layer that computes in float32, and what it promises to the model and to the callbacks."""

from typing import Any

import keras
import numpy as np
from keras import ops

from kvq.ops import DEVICES_OWN, Tensor

LARGEST_INDEX = 2**31 - 1
# Loss terms of the batch as a whole: their mean over batches is not that of the set, so that evaluation leaves them out.
BATCH_TERMS = {"batch_entropy"}


class Quantizer(keras.layers.Layer):
    """Base of all quantizers.

    A member returns `{"codes", "indices", "losses"}` from its call, as the module's docstring says, and sets:

    Attributes:
        codebook_size: How many values an index can take.
        depth: How many indices a position has, as a last axis of `indices`; None for one without that axis.
        loss_names: Keys of `losses`.
        learns_through_codes: Whether weights of it learn by the gradient of its codes alone.
        search_block: Distances that a search holds at once. Exporters set None, for all: a loop does not convert.
    """

    loss_names: tuple[str, ...] = ()
    learns_through_codes: bool = False
    codebook_size: int
    depth: int | None = None
    search_block: int | None = DEVICES_OWN

    def __init__(self, **kwargs: Any):
        # Keras would otherwise round the latents to the policy's type before they get here.
        super().__init__(autocast=False, **kwargs)

    def latents_to_indices(self, latents: Tensor) -> Tensor:
        """int32 indices (batch, ...) of latents (batch, ..., latent_dim)."""
        raise NotImplementedError

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes (batch, ..., latent_dim) of int32 indices (batch, ...), which must lie in [0, codebook_size)."""
        raise NotImplementedError

    def all_codes(self) -> Tensor:
        """The code of every index, (codebook_size, latent_dim); with `depth`, (depth, codebook_size, dim), as they are combined.

        Combined means: residual levels are added up, groups put one after the other, and both before a projection.
        """
        return self.indices_to_codes(ops.arange(self.codebook_size, dtype="int32"))

    def for_export(self) -> "Quantizer":
        """A quantizer that gives the same indices and codes, in the form that exporters take best."""
        self.search_block = None
        return self

    # Between steps, on the host: see kvq.codebook_callbacks. Quantizers without learnt codes have nothing to do there.

    @property
    def is_initialised(self) -> bool:
        """Whether the codes were placed from data, or need not be."""
        return True

    @property
    def is_replaceable(self) -> bool:
        """Whether there are codes that can die and be replaced."""
        return False

    def initialise(self, latents: np.ndarray, place: Any = None, seed: int = 0) -> None:
        """Places the codes by `place`, a function of `initialisers` (k-means without it), on latents (..., latent_dim)."""

    def replace_dead(self, latents: np.ndarray, threshold: float, rng: np.random.Generator) -> list[tuple[Any, np.ndarray]]:
        """Puts random latents (n, latent_dim) in the place of codes used less than `threshold` times as often as the mean.

        Returns:
            The weights that changed, each with its changed rows.
        """
        return []

    def _add_statistic(self, name: str, shape: tuple[int, ...], initializer: Any) -> Any:
        """A float32 weight that no gradient moves."""
        return self.add_weight(name=name, shape=shape, initializer=initializer, trainable=False, dtype="float32", autocast=False)


def check_range(name: str, value: Any, allowed: bool, rule: str) -> None:
    """Raises the ValueError that names an argument, what it must be, and what came."""
    if not allowed:
        raise ValueError(f"`{name}` must {rule}. Received: {name}={value}.")


def known_dim(latents_shape: tuple[int | None, ...]) -> int:
    """The last axis of the latents' shape."""
    latent_dim = latents_shape[-1]
    if latent_dim is None:
        raise ValueError(f"The last axis of the latents, their dimension, must be known. Received: shape={latents_shape}.")
    return latent_dim


def check_dim(latents_shape: tuple[int | None, ...], expected: int, what: str) -> None:
    """Raises ValueError unless latents have `expected` channels."""
    if known_dim(latents_shape) != expected:
        raise ValueError(
            f"Latents must have {expected} channels, {what}. Received: shape={latents_shape}. "
            "`ProjectedQuantizer` brings latents of another dimension there."
        )
