"""How large the networks are, known without Keras: the kernels of every convolution, by the names that they have in a file.

A few bytes of configuration can ask for terabytes. What `networks` builds is held against a file by this before it is built.
"""

from collections.abc import Callable
from typing import Any

from kvq.config import ModelConfig

Shapes = dict[str, list[int]]


def kernels(model: ModelConfig, channels: int) -> Shapes:
    """Name and shape of every convolution's kernel, for images of `channels` channels."""
    return {f"{name}.conv.kernel": shape for name, shape in KERNELS[model.network](model, channels).items()}


def _plain(model: Any, channels: int) -> Shapes:
    shapes = _stages(model.latent_dim, channels)
    for stage, filters in enumerate(_filters(model.latent_dim)):
        shapes[f"encoder.stage{stage}.same"] = [3, 3, filters, filters]
        shapes[f"decoder.stage{2 - stage}.same"] = [3, 3, filters, filters]
    return shapes


def _resnet(model: Any, channels: int) -> Shapes:
    shapes, dim = _stages(model.latent_dim, channels), model.latent_dim
    for block in ("encoder.residual0", "encoder.residual1", "decoder.residual0", "decoder.residual1"):
        shapes |= {f"{block}.wide": [3, 3, dim, dim], f"{block}.point": [1, 1, dim, dim]}
    return shapes


def _paper(model: Any, channels: int) -> Shapes:
    hidden, inner, dim = model.hidden, model.residual_hidden, model.latent_dim
    shapes = {
        "encoder.down0": [4, 4, channels, hidden // 2],
        "encoder.down1": [4, 4, hidden // 2, hidden],
        "encoder.same": [3, 3, hidden, hidden],
        "encoder.latents": [1, 1, hidden, dim],
        "decoder.same": [3, 3, dim, hidden],
        "decoder.up0": [4, 4, hidden // 2, hidden],
        "decoder.up1": [4, 4, channels, hidden // 2],
    }
    for block in (f"{half}.residual{number}" for half in ("encoder", "decoder") for number in range(model.residual_blocks)):
        shapes |= {f"{block}.wide": [3, 3, hidden, inner], f"{block}.point": [1, 1, inner, hidden]}
    return shapes


KERNELS: dict[str, Callable[[Any, int], Shapes]] = {"plain": _plain, "resnet": _resnet, "paper": _paper}


def _stages(dim: int, channels: int) -> Shapes:
    """Of what `plain` and `resnet` share. A transposed convolution's kernel has its outputs before its inputs."""
    shapes, inputs = {}, channels
    for stage, filters in enumerate(_filters(dim)):
        shapes[f"encoder.stage{stage}.down"] = [3, 3, inputs, filters]
        inputs = filters
    for stage, filters in enumerate(reversed(_filters(dim))):
        shapes[f"decoder.stage{stage}.up"] = [3, 3, filters, inputs]
        inputs = filters
    return shapes | {"decoder.image": [1, 1, inputs, channels]}


def _filters(dim: int) -> list[int]:
    return [dim // 4, dim // 2, dim]
