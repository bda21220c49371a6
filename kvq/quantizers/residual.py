"""Residual quantization: each level quantizes what the ones before left. Zeghidour et al. 2021, arXiv:2107.03312."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kvq.ops import Tensor, straight_through
from kvq.quantizers.codebook_quantizer import CodebookQuantizer
from kvq.quantizers.composite import CompositeQuantizer, array_of
from kvq.quantizers.initialisers import kmeans
from kvq.quantizers.quantizer import Quantizer, check_range


class _Residual(CompositeQuantizer):
    """The recursion r_1 = z, q_i = Q_i(r_i), r_{i+1} = r_i - sg[q_i]; codes are the sum of q_i, straight through to z.

    A level's losses are those of its quantizer on r_i, summed over levels. With probability `dropout` a batch uses only the
    first n levels, n drawn from 1 to all: codes and losses beyond are left out, indices are not.
    """

    def __init__(self, members: Sequence[Quantizer], dropout: float = 0.0, seed: int = 0, **kwargs: Any):
        super().__init__(members, **kwargs)
        # Codes of a level are constants here, and the gradient passes their sum.
        alone = not self.learns_through_codes
        check_range("members", [type(member).__name__ for member in members], alone, "learn by losses or averages of their own")
        estimators = [getattr(member, "estimator", "straight_through") for member in members]
        straight = {*estimators} == {"straight_through"}
        check_range("members", estimators, straight, 'have the estimator "straight_through": another would have no effect')
        check_range("dropout", dropout, 0 <= dropout <= 1, "be in [0, 1]")
        self.dropout = dropout
        self.seed = seed
        self.drawn = keras.random.SeedGenerator(seed)

    def call(self, latents: Tensor, training: bool = False) -> dict[str, Any]:
        latents = ops.cast(latents, "float32")
        residual, outputs, total = latents, [], 0.0
        kept = self._kept() if training and self.dropout else [1.0] * len(self.applied)
        inputs = []
        for level, member in enumerate(self.applied):
            output = self._quantize(member, residual, training)
            # The value, not the straight-through form: its gradient would cancel that of the commitment.
            codes = ops.stop_gradient(ops.cast(output["codes"], "float32"))
            inputs.append(residual)
            residual = residual - codes
            total = total + kept[level] * codes
            output["losses"] = {name: kept[level] * values for name, values in output["losses"].items()}
            outputs.append(output)
        indices = ops.stack([output["indices"] for output in outputs], axis=-1)
        if training and self.trainable:
            self._update(inputs, indices)
        return {
            "codes": ops.cast(straight_through(latents, total), self.compute_dtype),
            "indices": indices,
            "losses": self._summed(outputs),
        }

    def _kept(self) -> list[Tensor]:
        """For each level 1 where it is used by this batch, else 0."""
        draw, depth = ops.unstack(keras.random.uniform((2,), seed=self.drawn))
        levels = len(self.applied)
        used = ops.where(draw < self.dropout, ops.floor(depth * levels) + 1.0, float(levels))
        return [ops.cast(level < used, "float32") for level in range(levels)]

    def _quantize(self, member: Quantizer, residual: Tensor, training: bool) -> dict[str, Any]:
        return member(residual, training=training)

    def _update(self, residuals: list[Tensor], indices: Tensor) -> None:
        """Moves what all levels have in common."""

    def latents_to_indices(self, latents: Tensor) -> Tensor:
        residual, indices = ops.cast(latents, "float32"), []
        for member in self.applied:
            indices.append(member.latents_to_indices(residual))
            residual = residual - ops.cast(member.indices_to_codes(indices[-1]), "float32")
        return ops.stack(indices, axis=-1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        parts = [member.indices_to_codes(indices[..., level]) for level, member in enumerate(self.applied)]
        return ops.cast(sum(ops.cast(part, "float32") for part in parts), self.compute_dtype)

    def _levels(self, latents: np.ndarray) -> Any:
        """Each level with the residuals (n, latent_dim) that reach it; a level is used when the next is asked for."""
        residual = np.asarray(latents, "float32").reshape(-1, np.shape(latents)[-1])
        for member in self.applied:
            yield member, residual
            indices = member.latents_to_indices(ops.convert_to_tensor(residual))
            residual = residual - array_of(member.indices_to_codes(indices))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "dropout": self.dropout, "seed": self.seed}


@keras.saving.register_keras_serializable(package="kvq")
class ResidualQuantizer(_Residual):
    """Levels with a quantizer each: the first gives the rough code, each further one what is still missing.

    Codes are the sum of the levels' codes; `indices` have one per level, as a last axis. Losses are the levels' own, summed.

    Args:
        members: The quantizers, one per level, all with the same `codebook_size` and loss terms. A level gets no gradient
            of its codes: none that learns by it (`GumbelQuantizer`, `ProjectedQuantizer`), or has another `estimator` than
            "straight_through".
        dropout: Probability that a batch trains only the first n levels, n drawn evenly; in [0, 1]. Then any first part of the
            indices decodes.
        seed: Of that draw.

    Call arguments:
        latents: Float tensor (batch, ..., latent_dim).
        training: Whether running statistics move and levels drop out.

    Returns:
        Dict: `codes`, shaped as `latents`; `indices`, int32 (batch, ..., levels) in [0, codebook_size); `losses`, name to
        per-image values (batch,).

    Raises:
        ValueError: If an argument is out of its range.

    Source: Zeghidour et al. 2021, arXiv:2107.03312, section III.C; Lee et al. 2022, arXiv:2203.01941. Differs: statistics of
    levels that dropped out move, too. vector-quantize-pytorch: `ResidualVQ(num_quantizers=..., quantize_dropout=...)`.
    """

    def initialise(self, latents: np.ndarray, place: Any = kmeans, seed: int = 0) -> None:
        for level, (member, residual) in enumerate(self._levels(latents)):
            member.initialise(residual, place, seed + level)

    def replace_dead(self, latents: np.ndarray, threshold: float, rng: np.random.Generator) -> list[tuple[Any, np.ndarray]]:
        return [
            changed for member, residual in self._levels(latents) for changed in member.replace_dead(residual, threshold, rng)
        ]


@keras.saving.register_keras_serializable(package="kvq")
class SharedResidualQuantizer(_Residual):
    """Levels that share one codebook, as RQ-VAE has them.

    Args:
        members: One quantizer, as in `ResidualQuantizer`.
        levels: How often it is applied.
        dropout, seed: As in `ResidualQuantizer`.

    Call arguments:
        latents: Float tensor (batch, ..., latent_dim).
        training: Whether running statistics move and levels drop out.

    Returns:
        Dict: `codes`, shaped as `latents`; `indices`, int32 (batch, ..., levels) in [0, codebook_size); `losses`, name to
        per-image values (batch,).

    Raises:
        ValueError: If an argument is out of its range.

    Source: Lee et al. 2022, arXiv:2203.01941, section 3.1. The statistics of all levels are gathered and move the codebook once.
    """

    def __init__(self, members: Sequence[Quantizer], levels: int, dropout: float = 0.0, seed: int = 0, **kwargs: Any):
        check_range("levels", levels, levels >= 1, "be at least 1")
        check_range("members", len(members), len(members) == 1, "be one, which all levels share")
        super().__init__(members, dropout, seed, **kwargs)
        self.levels = levels
        self.depth = levels

    @property
    def applied(self) -> list[Quantizer]:
        return self.members * self.levels

    def _quantize(self, member: Quantizer, residual: Tensor, training: bool) -> dict[str, Any]:
        # Statistics move once, after the last level: in between, later levels would see another codebook.
        return member(residual, training=False)

    def _update(self, residuals: list[Tensor], indices: Tensor) -> None:
        (member,) = self.members
        if isinstance(member, CodebookQuantizer) and member.trainable:
            latents = ops.stop_gradient(member.comparable(ops.stack(residuals, axis=-2)))
            member.update_statistics(latents, indices)

    def initialise(self, latents: np.ndarray, place: Any = kmeans, seed: int = 0) -> None:
        """On the latents and, so that later levels find codes of their scale, on what a first placing leaves of them."""
        (member,) = self.members
        member.initialise(latents, place, seed)
        member.initialise(np.concatenate([residual for _, residual in self._levels(latents)]), place, seed)

    def replace_dead(self, latents: np.ndarray, threshold: float, rng: np.random.Generator) -> list[tuple[Any, np.ndarray]]:
        residuals = np.concatenate([residual for _, residual in self._levels(latents)])
        return self.members[0].replace_dead(residuals, threshold, rng)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "levels": self.levels}
