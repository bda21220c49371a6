"""The names that weights have in files: kvq's own, since those that Keras makes depend on what else a process has built."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvq.model import VQVAE


def tensors(model: "VQVAE") -> "Iterator[tuple[str, Any]]":
    """Every weight of encoder, quantizer and decoder under its name in the file: `encoder.stage0.down.conv.kernel`."""
    yield from _network_tensors(model.encoder)
    yield from _quantizer_tensors(model.quantizer, model.quantizer.name)
    yield from _network_tensors(model.decoder)


def _network_tensors(network: Any) -> "Iterator[tuple[str, Any]]":
    from kvq.layers import leaf_layers

    for layer in leaf_layers(network):
        for weight in layer.weights:
            yield f"{network.name}.{layer.name.replace('_', '.')}.{weight.name}", weight


def _quantizer_tensors(quantizer: Any, prefix: str) -> "Iterator[tuple[str, Any]]":
    """Its own weights, then those of the quantizers inside it."""
    members = getattr(quantizer, "members", [])
    inside = {id(weight) for member in members for weight in member.weights}
    for weight in quantizer.weights:
        if id(weight) not in inside:
            yield f"{prefix}.{weight.name}", weight
    for member in members:
        yield from _quantizer_tensors(member, f"{prefix}.{member.name}")
