"""What quantizers made of other quantizers share."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kvq.ops import Tensor
from kvq.quantizers.quantizer import Quantizer, check_range


class CompositeQuantizer(Quantizer):
    """Base: several quantizers with codebooks of one size, whose indices lie along a last axis of `indices`.

    Args:
        members: The quantizers, at least one, all with the same `codebook_size` and loss terms and one index per position.
    """

    def __init__(self, members: Sequence[Quantizer], **kwargs: Any):
        super().__init__(**kwargs)
        sizes = [member.codebook_size for member in members]
        check_range("members", sizes, len(set(sizes)) == 1, "be at least one, of one `codebook_size`")
        check_range("members", [member.depth for member in members], not any(m.depth for m in members), "have an index each")
        terms = [member.loss_names for member in members]
        check_range("members", terms, len(set(terms)) == 1, "have the same loss terms")
        self.members = list(members)
        self.codebook_size = sizes[0]
        self.depth: int | None = len(members)
        self.loss_names = terms[0]
        self.learns_through_codes = any(member.learns_through_codes for member in members)

    def build(self, latents_shape: tuple[int | None, ...]) -> None:
        for member in self.members:
            build_once(member, latents_shape)

    @property
    def is_initialised(self) -> bool:
        return all(member.is_initialised for member in self.members)

    @property
    def is_replaceable(self) -> bool:
        return any(member.is_replaceable for member in self.members)

    @property
    def applied(self) -> list[Quantizer]:
        """The quantizer of each index of a position."""
        return self.members

    def all_codes(self) -> Tensor:
        return ops.stack([member.all_codes() for member in self.applied])

    def for_export(self) -> "Quantizer":
        # A layer that was built takes no other layers.
        exported = type(self)(**{**self.get_config(), "members": [member.for_export() for member in self.members]})
        exported.search_block = None
        return exported

    def _summed(self, outputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: sum(output["losses"][name] for output in outputs) for name in self.loss_names}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "members": [keras.saving.serialize_keras_object(member) for member in self.members]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        members = [keras.saving.deserialize_keras_object(member) for member in config["members"]]
        return cls(**{**config, "members": members})


def build_once(layer: keras.layers.Layer, shape: tuple[int | None, ...]) -> None:
    """Gives a layer its weights, unless it has them, as when it is part of a saved model."""
    if not layer.built:
        layer.build(shape)
        layer.built = True


def array_of(tensor: Any) -> np.ndarray:
    """float32 on the host."""
    return np.array(keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32")))
