"""Sections `quantizer` of a configuration: a class for each kind that stands alone, with the arguments of the quantizer itself.

A field's bounds live here; its default too, equal to that of the class (tests/test_config.py).
"""

import math
from typing import Annotated, Literal

import pydantic
from pydantic import Field

# Usage is counted code by code, in training and in evaluation.
LARGEST_CODEBOOK = 2**22


class Section(pydantic.BaseModel):
    """Part of a configuration: unknown keys are refused, types are taken as they are, nothing changes afterwards."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class EntropyConfig(Section):
    kind: Literal["entropy"]
    weight: float = Field(0.1, ge=0, le=1e6)
    diversity: float = Field(1.0, ge=0, le=1e6)
    temperature: float = Field(0.01, gt=0, le=1e6)


class OrthogonalityConfig(Section):
    kind: Literal["orthogonality"]
    weight: float = Field(10.0, ge=0, le=1e6)


RegulariserConfig = Annotated[EntropyConfig | OrthogonalityConfig, Field(discriminator="kind")]


class QuantizerSection(Section):
    """What the rest of kvq asks of a kind."""

    kind: str

    @property
    def depth(self) -> int | None:
        """Indices of a position, as a last axis; None for one without that axis."""
        return None

    def mistake(self, latent_dim: int) -> str:
        """What the latents' dimension must be, if it does not fit."""
        return ""

    def codebooks(self, latent_dim: int) -> dict[str, list[int]]:
        """Name and shape of the tensors whose size the configuration decides: known before anything is built."""
        return {}


class _Codebook(QuantizerSection):
    codebook_size: int = Field(ge=2, le=2**20)

    def codebooks(self, latent_dim: int) -> dict[str, list[int]]:
        return {"codebook": [self.codebook_size, latent_dim]}


class _NearestCode(_Codebook):
    commitment_weight: float = Field(0.25, ge=0, le=1e6)
    decay: float = Field(0.99, ge=0, lt=1)
    estimator: Literal["straight_through", "rotation"] = "straight_through"
    regularisers: tuple[RegulariserConfig, ...] = Field((), max_length=4, strict=False)


class VectorQuantizerConfig(_NearestCode):
    """One codebook that learns by gradient; the plain choice for up to some thousand codes.

    van den Oord et al. 2017, arXiv:1711.00937.
    """

    kind: Literal["vector"]


class EMAVectorQuantizerConfig(_NearestCode):
    """One codebook that follows averages of the latents; steadier than the gradient, and no second loss to weigh.

    van den Oord et al. 2017, arXiv:1711.00937, appendix A.1.
    """

    kind: Literal["ema_vector"]


class CosineVectorQuantizerConfig(_NearestCode):
    """Codes compared by angle; with few channels (8 to 32) keeps large codebooks in use.

    Yu et al. 2021, arXiv:2110.04627.
    """

    kind: Literal["cosine_vector"]


class EMACosineVectorQuantizerConfig(_NearestCode):
    """Codes compared by angle, that follow averages of the directions.

    Yu et al. 2021, arXiv:2110.04627.
    """

    kind: Literal["ema_cosine_vector"]


class SimVectorQuantizerConfig(_NearestCode):
    """Fixed codes under a learnt linear map: all move at each step, none can die; for large codebooks.

    Zhu et al. 2024, arXiv:2411.02038.
    """

    kind: Literal["sim_vector"]


class IndexBackpropQuantizerConfig(_Codebook):
    """Every code learns at each step through a softmax; for large codebooks of few channels, at the price of memory.

    Shi et al. 2024, arXiv:2412.02692.
    """

    kind: Literal["index_backprop"]
    commitment_weight: float = Field(0.25, ge=0, le=1e6)
    decay: float = Field(0.99, ge=0, lt=1)
    entropy_weight: float = Field(0.05, ge=0, le=1e6)
    temperature: float = Field(0.01, gt=0, le=1e6)


class GumbelQuantizerConfig(_Codebook):
    """Codes drawn at random in training, with a temperature that falls; where a distribution over codes is wanted.

    Jang et al. 2016, arXiv:1611.01144.
    """

    kind: Literal["gumbel"]
    kl_weight: float = Field(5e-4, ge=0, le=1e6)
    temperature: float = Field(1.0, gt=0, le=1e6)
    final_temperature: float = Field(0.0625, gt=0, le=1e6)
    annealing: float = Field(0.9997, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**31)

    @pydantic.model_validator(mode="after")
    def _cools(self) -> "GumbelQuantizerConfig":
        if self.final_temperature > self.temperature:
            raise ValueError(
                "quantizer.final_temperature must be at most quantizer.temperature. Received: "
                f"{self.final_temperature} and {self.temperature}."
            )
        return self


class _Levels(QuantizerSection):
    levels: tuple[Annotated[int, Field(ge=2, le=2**16)], ...] = Field(min_length=1, max_length=64, strict=False)

    @pydantic.model_validator(mode="after")
    def _countable(self) -> "_Levels":
        if self.codebook_size > LARGEST_CODEBOOK:
            raise ValueError(
                f"The product of quantizer.levels must be at most {LARGEST_CODEBOOK}. Received: {list(self.levels)}. "
                'Split them into groups: quantizer.kind = "product".'
            )
        return self

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)

    def mistake(self, latent_dim: int) -> str:
        return _must_be(len(self.levels), "one channel for each of quantizer.levels", latent_dim)


class FiniteScalarQuantizerConfig(_Levels):
    """Each channel rounded to a few levels: no codebook, no loss, nothing to collapse; the first to try.

    Mentzer et al. 2023, arXiv:2309.15505.
    """

    kind: Literal["finite_scalar"]
    levels: tuple[Annotated[int, Field(ge=3, le=2**16)], ...] = Field(min_length=1, max_length=64, strict=False)


class SymmetricFiniteScalarQuantizerConfig(_Levels):
    """The same with levels that lie symmetrically around 0; for even level counts, and for two levels.

    Parker et al. 2024, arXiv:2411.19842.
    """

    kind: Literal["symmetric_finite_scalar"]


class _Bits(QuantizerSection):
    bits: int = Field(ge=1, le=22)
    entropy_weight: float = Field(0.1, ge=0, le=1e6)
    diversity: float = Field(1.0, ge=0, le=1e6)
    temperature: float = Field(1.0, gt=0, le=1e6)
    group_bits: int = Field(8, ge=1, le=12)

    @property
    def codebook_size(self) -> int:
        return 2**self.bits

    def mistake(self, latent_dim: int) -> str:
        return _must_be(self.bits, "one channel for each of quantizer.bits", latent_dim)


class LookupFreeQuantizerConfig(_Bits):
    """One bit per channel with an entropy term; for vocabularies of 2^10 and far more.

    Yu et al. 2023, arXiv:2310.05737.
    """

    kind: Literal["lookup_free"]
    commitment_weight: float = Field(0.25, ge=0, le=1e6)


class BinarySphericalQuantizerConfig(_Bits):
    """One bit per channel of the direction; its error is bounded, so that it needs no commitment.

    Zhao et al. 2024, arXiv:2406.07548.
    """

    kind: Literal["binary_spherical"]


Single = (
    VectorQuantizerConfig
    | EMAVectorQuantizerConfig
    | CosineVectorQuantizerConfig
    | EMACosineVectorQuantizerConfig
    | SimVectorQuantizerConfig
    | IndexBackpropQuantizerConfig
    | GumbelQuantizerConfig
    | FiniteScalarQuantizerConfig
    | SymmetricFiniteScalarQuantizerConfig
    | LookupFreeQuantizerConfig
    | BinarySphericalQuantizerConfig
)
Base = Annotated[Single, Field(discriminator="kind")]


def _must_be(expected: int, what: str, latent_dim: int) -> str:
    return "" if latent_dim == expected else f'must be {expected}, {what} (or wrap the quantizer: kind = "projected")'
