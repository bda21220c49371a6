"""What quantizers with one codebook and a nearest-neighbour search share: the search, its inverse, and code statistics."""

from typing import Any

import keras
import numpy as np
from keras import ops

from kvq.ops import SEARCH_BLOCK, Tensor, code_counts, gather_codes, nearest_code, straight_through
from kvq.quantizers.initialisers import kmeans


class CodebookQuantizer(keras.layers.Layer):
    """Base of the nearest-neighbour quantizers. A member says what its loss terms are and how its codebook learns.

    Weights: `codebook` (codebook_size, latent_dim); `counts` (codebook_size,), the running mean of how many latents of a
    step fell to each code; `initialised`, a scalar, 1 once the codebook came from data. All float32 under every dtype policy.

    Args:
        codebook_size: Number of codes k, at least 2.
        commitment_weight: Weight of the pull of latents towards their code (beta), not negative.
        decay: Fraction of the running means kept per step, in [0, 1). 0.99 averages about 100 steps.

    Raises:
        ValueError: If an argument is out of its range.
    """

    loss_names: tuple[str, ...] = ()
    codebook_is_trainable = False
    # Distances held at once; exporters set None, since a loop over a batch of unknown size does not convert.
    search_block: int | None = SEARCH_BLOCK

    def __init__(self, codebook_size: int, commitment_weight: float = 0.25, decay: float = 0.99, **kwargs: Any):
        # Keras would otherwise round the latents to the policy's type before they get here.
        super().__init__(autocast=False, **kwargs)
        if codebook_size < 2:
            raise ValueError(f"`codebook_size` must be at least 2. Received: codebook_size={codebook_size}.")
        if commitment_weight < 0:
            raise ValueError(f"`commitment_weight` must not be negative. Received: commitment_weight={commitment_weight}.")
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1). Received: decay={decay}.")
        self.codebook_size = codebook_size
        self.commitment_weight = commitment_weight
        self.decay = decay

    def build(self, latents_shape: tuple[int | None, ...]) -> None:
        latent_dim = latents_shape[-1]
        if latent_dim is None:
            raise ValueError(f"The last axis of the latents, their dimension, must be known. Received: shape={latents_shape}.")
        # Codes of about unit norm: distinct at any codebook size, unlike the customary uniform(-1/k, 1/k).
        self.codebook_initializer = keras.initializers.RandomNormal(stddev=latent_dim**-0.5)
        self.codebook = self.add_weight(
            name="codebook",
            shape=(self.codebook_size, latent_dim),
            initializer=self.codebook_initializer,
            trainable=self.codebook_is_trainable,
            dtype="float32",
            autocast=False,
        )
        self.counts = self._add_statistic("counts", (self.codebook_size,), "ones")
        self.initialised = self._add_statistic("initialised", (), "zeros")

    def _add_statistic(self, name: str, shape: tuple[int, ...], initializer: Any) -> Any:
        return self.add_weight(name=name, shape=shape, initializer=initializer, trainable=False, dtype="float32", autocast=False)

    def call(self, latents: Tensor, training: bool = False) -> dict[str, Any]:
        # Distances, losses and statistics in float32 whatever the policy: rounding to bfloat16 changes most indices.
        latents = ops.cast(latents, "float32")
        indices = nearest_code(latents, self.codebook, self.search_block)
        codes = gather_codes(self.codebook, indices)
        losses = self.loss_terms(latents, codes)
        if training:
            # Last, so that codes, indices and losses all belong to the codebook as it was before the call.
            self.update_statistics(ops.stop_gradient(latents), indices)
        codes = ops.cast(straight_through(latents, codes), self.compute_dtype)
        return {"codes": codes, "indices": indices, "losses": losses}

    def loss_terms(self, latents: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Weighted loss terms (batch,) by name, from float32 latents and their codes, both (batch, ..., latent_dim)."""
        raise NotImplementedError

    def update_statistics(self, latents: Tensor, indices: Tensor) -> None:
        """Moves the running means by one step's latents (batch, ..., latent_dim) and indices (batch, ...)."""
        self.counts.assign(self._moved(self.counts, code_counts(indices, self.codebook_size)))

    def _moved(self, mean: Tensor, value: Tensor) -> Tensor:
        return self.decay * mean + (1.0 - self.decay) * value

    def latents_to_indices(self, latents: Tensor) -> Tensor:
        """int32 indices (batch, ...) of latents (batch, ..., latent_dim)."""
        return nearest_code(latents, self.codebook, self.search_block)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes (batch, ..., latent_dim) of int32 indices (batch, ...), which must lie in [0, codebook_size)."""
        return ops.cast(gather_codes(self.codebook, indices), self.compute_dtype)

    # Between steps, on the host: see kvq.callbacks.

    def initialise(self, latents: np.ndarray, seed: int = 0) -> None:
        """Places the codes by k-means on latents (..., latent_dim), and remembers that they were placed.

        Source: Lancucki et al. 2020, arXiv:2005.08520, section 3, who found data-dependent codes to be used more evenly.
        """
        codes = kmeans(np.asarray(latents, "float32").reshape(-1, self.codebook.shape[-1]), self.codebook_size, seed)
        self.replace(np.arange(self.codebook_size), codes)
        self.initialised.assign(1.0)

    def replace(self, rows: np.ndarray, codes: np.ndarray) -> None:
        """Puts codes (n, latent_dim) into the given rows (n,) of the codebook, each as if used as often as the mean code."""
        self.codebook.assign(_with_rows(self.codebook, rows, codes))
        counts = ops.convert_to_numpy(self.counts)
        self.counts.assign(_with_rows(self.counts, rows, counts.mean()))

    def dead_codes(self, threshold: float) -> np.ndarray:
        """Rows (n,) used less than `threshold` times as often as the mean code, by the running counts."""
        counts = ops.convert_to_numpy(self.counts)
        return np.flatnonzero(counts < threshold * counts.mean())

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "codebook_size": self.codebook_size,
            "commitment_weight": self.commitment_weight,
            "decay": self.decay,
        }


def _with_rows(weight: Any, rows: np.ndarray, values: np.ndarray | float) -> np.ndarray:
    changed = np.array(ops.convert_to_numpy(weight))
    changed[rows] = values
    return changed
