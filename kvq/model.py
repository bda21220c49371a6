"""The model: an encoder, a quantizer and a decoder, trained by Keras' own loop. van den Oord et al. 2017, arXiv:1711.00937."""

from typing import Any

import keras
from keras import ops, tree

from kvq.metrics import CodebookUsage
from kvq.ops import Tensor, mean_per_image, psnr_from_mse, rescale, to_uint8


@keras.saving.register_keras_serializable(package="kvq")
class VQVAE(keras.Model):
    """Images to a grid of indices and back.

    Args:
        encoder: Keras model, images in [-1, 1] (batch, h, w, channels) to latents (batch, h', w', latent_dim).
        quantizer: A quantizer of `kvq.quantizers`, or any layer that keeps their contract.
        decoder: Keras model, codes (batch, h', w', latent_dim) to images (batch, h, w, channels) in [-1, 1].
        loss_weights: Weight of each loss term of the model itself: `{"reconstruction": 1.0}`. The quantizer weights its own.

    Call arguments:
        images: uint8 (batch, h, w, channels), of any size that the encoder takes.
        training: Whether running statistics move.

    Returns:
        Dict: `reconstruction`, float (batch, h, w, channels) in [-1, 1]; `indices`, int32 (batch, h', w'); `losses`, the
        quantizer's terms, name to per-image values (batch,).

    `fit` minimises the mean over images of the sum of all terms; `y` is not used.
    """

    def __init__(
        self,
        encoder: keras.Model,
        quantizer: keras.layers.Layer,
        decoder: keras.Model,
        loss_weights: dict[str, float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder
        self.loss_weights = {"reconstruction": 1.0, **(loss_weights or {})}
        # A training step sees no target but its own input, so that these stand in for `compile(metrics=...)`.
        self.means = {
            name: keras.metrics.Mean(name=name) for name in ("reconstruction", *quantizer.loss_names, "psnr")
        }
        self.codebook_usage = CodebookUsage(quantizer.codebook_size)

    def build(self, images_shape: tuple[int | None, ...]) -> None:
        if not self.quantizer.built:
            self.quantizer.build(self.encoder.compute_output_shape(images_shape))
        self.built = True

    def call(self, images: Tensor, training: bool = False) -> dict[str, Any]:
        latents = self.encoder(rescale(images), training=training)
        quantized = self.quantizer(latents, training=training)
        reconstruction = self.decoder(quantized["codes"], training=training)
        return {"reconstruction": reconstruction, "indices": quantized["indices"], "losses": quantized["losses"]}

    def loss_terms(self, images: Tensor, outputs: dict[str, Any]) -> dict[str, Tensor]:
        """Every weighted term of the loss, name to per-image values (batch,), from uint8 images and the call's outputs."""
        error = ops.square(ops.cast(outputs["reconstruction"], "float32") - rescale(images))
        return {"reconstruction": self.loss_weights["reconstruction"] * mean_per_image(error), **outputs["losses"]}

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Tensor:
        terms = self.loss_terms(x, y_pred)
        for name, values in terms.items():
            self.means[name].update_state(values)
        self.means["psnr"].update_state(psnr_from_mse(terms["reconstruction"] / self.loss_weights["reconstruction"]))
        for indices in tree.flatten(y_pred["indices"]):
            self.codebook_usage.update_state(indices)
        return ops.mean(sum(terms.values()))

    def encode(self, images: Tensor) -> Any:
        """int32 indices of uint8 images (batch, h, w, channels): (batch, h', w'), or a tree of them for several grids."""
        return encode(self.encoder, self.quantizer, images)

    def decode(self, indices: Any) -> Tensor:
        """uint8 images (batch, h, w, channels) of int32 indices as `encode` gives them."""
        return decode(self.quantizer, self.decoder, indices)

    def get_config(self) -> dict[str, Any]:
        parts = {"encoder": self.encoder, "quantizer": self.quantizer, "decoder": self.decoder}
        return {**super().get_config(), **_serialized(parts), "loss_weights": dict(self.loss_weights)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "VQVAE":
        return cls(**_deserialized(config, ("encoder", "quantizer", "decoder"), custom_objects))


@keras.saving.register_keras_serializable(package="kvq")
class ImageEncoder(keras.Model):
    """The half of a tokenizer that turns uint8 images (batch, h, w, channels) into int32 indices (batch, h', w')."""

    def __init__(self, encoder: keras.Model, quantizer: keras.layers.Layer, **kwargs: Any):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.quantizer = quantizer

    def call(self, images: Tensor) -> Any:
        return encode(self.encoder, self.quantizer, images)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **_serialized({"encoder": self.encoder, "quantizer": self.quantizer})}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "ImageEncoder":
        return cls(**_deserialized(config, ("encoder", "quantizer"), custom_objects))


@keras.saving.register_keras_serializable(package="kvq")
class ImageDecoder(keras.Model):
    """The half of a tokenizer that turns int32 indices (batch, h', w') into uint8 images (batch, h, w, channels)."""

    def __init__(self, quantizer: keras.layers.Layer, decoder: keras.Model, **kwargs: Any):
        super().__init__(**kwargs)
        self.quantizer = quantizer
        self.decoder = decoder

    def call(self, indices: Tensor) -> Any:
        return decode(self.quantizer, self.decoder, indices)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **_serialized({"quantizer": self.quantizer, "decoder": self.decoder})}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "ImageDecoder":
        return cls(**_deserialized(config, ("quantizer", "decoder"), custom_objects))


def encode(encoder: keras.Model, quantizer: keras.layers.Layer, images: Tensor) -> Any:
    """Indices of uint8 images. A lone quantizer and its grid are the tree of one leaf."""
    latents = encoder(rescale(images), training=False)
    return tree.map_structure(lambda member, grid: member.latents_to_indices(grid), quantizer, latents)


def decode(quantizer: keras.layers.Layer, decoder: keras.Model, indices: Any) -> Tensor:
    """uint8 images of indices as `encode` gives them."""
    codes = tree.map_structure(lambda member, grid: member.indices_to_codes(grid), quantizer, indices)
    return to_uint8(decoder(codes, training=False))


def _serialized(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: keras.saving.serialize_keras_object(part) for name, part in parts.items()}


def _deserialized(config: dict[str, Any], parts: tuple[str, ...], custom_objects: Any) -> dict[str, Any]:
    load = keras.saving.deserialize_keras_object
    return {**config, **{name: load(config[name], custom_objects=custom_objects) for name in parts}}


MODELS = {"vqvae": VQVAE}
