"""The section `quantizer` of a configuration: the kinds made of other quantizers, and the choice among all kinds."""

import inspect
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import Field

from kvq.quantizer_sections import Base, GumbelQuantizerConfig, QuantizerSection, Single


class _Residual(QuantizerSection):
    levels: int = Field(ge=1, le=64)
    base: Base
    dropout: float = Field(0.0, ge=0, le=1)
    seed: int = Field(0, ge=0, lt=2**31)

    @pydantic.model_validator(mode="after")
    def _learns(self) -> "_Residual":
        if isinstance(self.base, GumbelQuantizerConfig):
            raise ValueError(
                "quantizer.base.kind must be one that learns by losses or averages of its own: a level of residual quantizers "
                'gets no gradient of its codes. Received: "gumbel". quantizer.kind = "product" takes it.'
            )
        if (estimator := getattr(self.base, "estimator", "straight_through")) != "straight_through":
            raise ValueError(
                'quantizer.base.estimator must be "straight_through" inside of residual quantizers, where another would have no '
                f"effect. Received: {estimator!r}."
            )
        return self

    @property
    def codebook_size(self) -> int:
        return self.base.codebook_size

    @property
    def depth(self) -> int:
        return self.levels

    def mistake(self, latent_dim: int) -> str:
        return self.base.mistake(latent_dim)


class ResidualQuantizerConfig(_Residual):
    """Levels that refine each other, several indices a position; for high rates and for rates chosen afterwards.

    Zeghidour et al. 2021, arXiv:2107.03312.
    """

    kind: Literal["residual"]

    def codebooks(self, latent_dim: int) -> dict[str, list[int]]:
        return _inside([f"level{level}" for level in range(self.levels)], self.base.codebooks(latent_dim))


class SharedResidualQuantizerConfig(_Residual):
    """Residual levels that share one codebook; fewer parameters, one vocabulary.

    Lee et al. 2022, arXiv:2203.01941.
    """

    kind: Literal["shared_residual"]

    def codebooks(self, latent_dim: int) -> dict[str, list[int]]:
        return _inside(["level"], self.base.codebooks(latent_dim))


class ProductQuantizerConfig(QuantizerSection):
    """Groups of channels with an index each; for high rates without an order among the indices.

    Jegou et al. 2011, doi:10.1109/TPAMI.2010.57.
    """

    kind: Literal["product"]
    groups: int = Field(ge=1, le=64)
    base: Base

    @property
    def codebook_size(self) -> int:
        return self.base.codebook_size

    @property
    def depth(self) -> int:
        return self.groups

    def mistake(self, latent_dim: int) -> str:
        if latent_dim % self.groups:
            return f"must be a multiple of {self.groups}, quantizer.groups"
        mistake = self.base.mistake(latent_dim // self.groups)
        return f"over quantizer.groups {mistake}" if mistake else ""

    def codebooks(self, latent_dim: int) -> dict[str, list[int]]:
        return _inside([f"group{group}" for group in range(self.groups)], self.base.codebooks(latent_dim // self.groups))


class ProjectedQuantizerConfig(QuantizerSection):
    """Any of them in a space of another dimension, reached by linear maps.

    Yu et al. 2021, arXiv:2110.04627, section 3.2.
    """

    kind: Literal["projected"]
    code_dim: int = Field(ge=1, le=4096)
    base: Annotated[
        Single | ResidualQuantizerConfig | SharedResidualQuantizerConfig | ProductQuantizerConfig, Field(discriminator="kind")
    ]

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "ProjectedQuantizerConfig":
        if mistake := self.base.mistake(self.code_dim):
            raise ValueError(f"quantizer.code_dim {mistake}. Received: {self.code_dim}.")
        return self

    @property
    def codebook_size(self) -> int:
        return self.base.codebook_size

    @property
    def depth(self) -> int | None:
        return self.base.depth

    def codebooks(self, latent_dim: int) -> dict[str, list[int]]:
        return {"kernel_in": [latent_dim, self.code_dim], **_inside(["base"], self.base.codebooks(self.code_dim))}


QuantizerConfig = Annotated[
    Single | ResidualQuantizerConfig | SharedResidualQuantizerConfig | ProductQuantizerConfig | ProjectedQuantizerConfig,
    Field(discriminator="kind"),
]


def _inside(names: list[str], shapes: dict[str, list[int]]) -> dict[str, Any]:
    return {f"{member}.{name}": shape for member in names for name, shape in shapes.items()}


def describe_quantizers() -> list[dict[str, str]]:
    """Every kind with what it is for and its paper, in the order in which they are documented."""
    described = []
    for section in get_args(get_args(QuantizerConfig)[0]):
        summary, paper = (part.strip() for part in inspect.cleandoc(section.__doc__).split("\n\n"))
        (kind,) = get_args(section.model_fields["kind"].annotation)
        described.append({"kind": kind, "summary": summary, "paper": paper.removesuffix(".")})
    return described
