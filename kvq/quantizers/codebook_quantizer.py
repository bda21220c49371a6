"""What quantizers with one learnt codebook and a nearest-neighbour search share: the search, its inverse, code statistics."""

from typing import Any

import keras
import numpy as np
from keras import ops

from kvq.ops import Tensor, code_counts, gather_codes, mean_per_image, nearest_code
from kvq.quantizers.estimators import ESTIMATORS
from kvq.quantizers.initialisers import kmeans, random_latents
from kvq.quantizers.quantizer import Quantizer, check_range, known_dim
from kvq.random_weights import Normal


class CodebookQuantizer(Quantizer):
    """Base of the nearest-neighbour quantizers. A member says what its loss terms are and how its codebook learns.

    Weights: `codebook` (codebook_size, latent_dim); `counts` (codebook_size,), the running mean of how many latents of a
    step fell to each code; `initialised`, a scalar, 1 once the codebook came from data. All float32 under every dtype policy.
    Where `trainable` is False, nothing of it moves in training.

    Args:
        codebook_size: Number of codes k, at least 2.
        commitment_weight: Weight of the pull of latents towards their code (beta), not negative.
        decay: Fraction of the running means kept per step, in [0, 1). 0.99 averages about 100 steps.
        estimator: How the gradient passes the choice, a name of `estimators.ESTIMATORS`.
        regularisers: Further loss terms, members of `regularisers`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    codebook_is_trainable = False

    def __init__(
        self,
        codebook_size: int,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        estimator: str = "straight_through",
        regularisers: Any = (),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_range("codebook_size", codebook_size, codebook_size >= 2, "be at least 2")
        check_range("commitment_weight", commitment_weight, commitment_weight >= 0, "not be negative")
        check_range("decay", decay, 0 <= decay < 1, "be in [0, 1)")
        check_range("estimator", estimator, estimator in ESTIMATORS, f"be one of {', '.join(ESTIMATORS)}")
        self.codebook_size = codebook_size
        self.commitment_weight = commitment_weight
        self.decay = decay
        self.estimator = estimator
        self.regularisers = tuple(regularisers)
        self.loss_names = (*type(self).loss_names, *(name for member in self.regularisers for name in member.loss_names))

    def build(self, latents_shape: tuple[int | None, ...]) -> None:
        latent_dim = known_dim(latents_shape)
        # Codes of about unit norm: distinct at any codebook size, unlike the customary uniform(-1/k, 1/k).
        self.codebook_initializer = Normal(stddev=latent_dim**-0.5)
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

    def call(self, latents: Tensor, training: bool = False) -> dict[str, Any]:
        # Distances, losses and statistics in float32 whatever the policy: rounding to bfloat16 changes most indices.
        latents = self.comparable(latents)
        codebook = self.codes()
        indices = nearest_code(latents, codebook, self.search_block)
        codes = gather_codes(codebook, indices)
        losses = self.loss_terms(latents, codes)
        for regulariser in self.regularisers:
            # A copy: PyTorch changes weights in place, while the gradient still needs these values.
            losses |= regulariser.loss_terms(latents, codebook * 1.0)
        if training and self.trainable:
            # Last, so that codes, indices and losses all belong to the codebook as it was before the call.
            self.update_statistics(ops.stop_gradient(latents), indices)
        codes = ops.cast(ESTIMATORS[self.estimator](latents, codes), self.compute_dtype)
        return {"codes": codes, "indices": indices, "losses": losses}

    def comparable(self, latents: Tensor) -> Tensor:
        """Latents in float32, in the form in which they are compared with the codes."""
        return ops.cast(latents, "float32")

    def codes(self) -> Tensor:
        """All codes as they are compared with latents and given to the decoder: float32 (codebook_size, latent_dim)."""
        return ops.convert_to_tensor(self.codebook)

    def loss_terms(self, latents: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Weighted loss terms (batch,) by name, from float32 latents and their codes, both (batch, ..., latent_dim)."""
        commitment = mean_per_image(ops.square(latents - ops.stop_gradient(codes)))
        return {"commitment": self.commitment_weight * commitment}

    def update_statistics(self, latents: Tensor, indices: Tensor) -> None:
        """Moves the running means by one step's latents (batch, ..., latent_dim) and indices (batch, ...)."""
        # Latents that are not finite would stay in the means for ever.
        self.move_means(ops.isfinite(ops.sum(latents)), latents, indices)

    def move_means(self, finite: Tensor, latents: Tensor, indices: Tensor) -> None:
        """The same, where `finite`, a bool scalar, says that all latents are; else nothing moves."""
        self.counts.assign(self._moved(self.counts, code_counts(indices, self.codebook_size), finite))

    def _moved(self, mean: Tensor, value: Tensor, finite: Tensor) -> Tensor:
        mean = ops.convert_to_tensor(mean)
        return ops.where(finite, self.decay * mean + (1.0 - self.decay) * value, mean)

    def latents_to_indices(self, latents: Tensor) -> Tensor:
        return nearest_code(self.comparable(latents), self.codes(), self.search_block)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        return ops.cast(gather_codes(self.codes(), indices), self.compute_dtype)

    def folded_into(self, kind: type["CodebookQuantizer"]) -> Any:
        """A quantizer of another class whose codebook is what `codes` gives here, computed once; for export."""
        folded = kind(self.codebook_size, self.commitment_weight, self.decay, name=self.name, dtype=self.dtype_policy)
        folded.build((None, self.codebook.shape[-1]))
        folded.codebook.assign(self.codes())
        folded.search_block = None
        return folded

    # Between steps.

    @property
    def is_initialised(self) -> bool:
        return bool(ops.convert_to_numpy(self.initialised))

    @property
    def is_replaceable(self) -> bool:
        return self.trainable

    def initialise(self, latents: np.ndarray, place: Any = kmeans, seed: int = 0) -> None:
        """Places the codes on latents (..., latent_dim), and remembers that they were placed.

        Source: Lancucki et al. 2020, arXiv:2005.08520, section 3, who found data-dependent codes to be used more evenly.
        """
        vectors = ops.convert_to_numpy(self.comparable(ops.convert_to_tensor(np.asarray(latents, "float32"))))
        codes = place(np.asarray(vectors).reshape(-1, vectors.shape[-1]), self.codebook_size, seed)
        self.replace(np.arange(self.codebook_size), codes)
        self.initialised.assign(1.0)

    def replace(self, rows: np.ndarray, codes: np.ndarray) -> None:
        """Puts codes (n, latent_dim) into the given rows (n,) of the codebook, each as if used as often as the mean code.

        From there an unused code takes log(threshold) / log(decay) steps to be dead again, 349 at the defaults: its cool-down.
        """
        self.codebook.assign(with_rows(self.codebook, rows, codes))
        counts = ops.convert_to_numpy(self.counts)
        self.counts.assign(with_rows(self.counts, rows, counts.mean()))

    def dead_codes(self, threshold: float) -> np.ndarray:
        """Rows (n,) used less than `threshold` times as often as the mean code, by the running counts."""
        counts = ops.convert_to_numpy(self.counts)
        return np.flatnonzero(counts < threshold * counts.mean())

    def replace_dead(self, latents: np.ndarray, threshold: float, rng: np.random.Generator) -> list[tuple[Any, np.ndarray]]:
        rows = self.dead_codes(threshold)
        finite = latents[np.isfinite(latents).all(axis=-1)]
        if not len(rows) or not len(finite) or not self.is_replaceable:
            return []
        vectors = np.asarray(ops.convert_to_numpy(self.comparable(ops.convert_to_tensor(finite))))
        self.replace(rows, random_latents(vectors, len(rows), rng))
        return [(self.codebook, rows)]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "codebook_size": self.codebook_size,
            "commitment_weight": self.commitment_weight,
            "decay": self.decay,
            "estimator": self.estimator,
            "regularisers": [keras.saving.serialize_keras_object(member) for member in self.regularisers],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CodebookQuantizer":
        if "regularisers" in config:
            members = [keras.saving.deserialize_keras_object(member) for member in config["regularisers"]]
            config = {**config, "regularisers": members}
        return cls(**config)


def with_rows(weight: Any, rows: np.ndarray, values: np.ndarray | float) -> np.ndarray:
    """The values of a weight, with others in some rows (n,)."""
    changed = np.array(ops.convert_to_numpy(weight))
    changed[rows] = values
    return changed
