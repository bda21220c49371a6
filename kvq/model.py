"""The model: an encoder, a quantizer and a decoder, trained by Keras' own loop. van den Oord et al. 2017, arXiv:1711.00937."""

from typing import Any

import keras
from keras import ops, tree

from kvq.metrics import CodebookUsage, ImageMeans
from kvq.ops import Tensor, mean_per_image, psnr_from_mse, rescale, to_uint8


class _Composite(keras.Model):
    """A model made of `parts`, attributes that are models or layers and that its configuration holds."""

    parts: tuple[str, ...] = ()

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **{name: keras.saving.serialize_keras_object(getattr(self, name)) for name in self.parts}}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        load = keras.saving.deserialize_keras_object
        return cls(**{**config, **{name: load(config[name], custom_objects=custom_objects) for name in cls.parts}})


@keras.saving.register_keras_serializable(package="kvq")
class VQVAE(_Composite):
    """Images to a grid of indices and back.

    Args:
        encoder: Keras model, images in [-1, 1] (batch, h, w, channels) to latents (batch, h', w', latent_dim).
        quantizer: A quantizer of `kvq.quantizers`, or any layer that keeps their contract.
        decoder: Keras model, codes (batch, h', w', latent_dim) to images (batch, h, w, channels) in [-1, 1].
        loss_weights: Positive weight of the model's own loss term: `{"reconstruction": 1.0}`. The quantizer weights its own.

    Call arguments:
        images: uint8 (batch, h, w, channels), of any size that the encoder takes.
        training: Whether running statistics move.

    Returns:
        Dict: `reconstruction`, float (batch, h, w, channels) in [-1, 1]; `indices`, int32 (batch, h', w'); `losses`, the
        quantizer's terms, name to per-image values (batch,).

    Raises:
        ValueError: If a loss weight is not positive, or there is no such term.

    `fit` minimises the mean over images of the sum of all terms; `y` and `sample_weight` are not used.
    """

    parts = ("encoder", "quantizer", "decoder")

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
        if {*self.loss_weights} != {"reconstruction"} or not self.loss_weights["reconstruction"] > 0:
            raise ValueError(f"`loss_weights` must be a positive `reconstruction` alone. Received: loss_weights={loss_weights}.")
        # A training step sees no target but its own input, so that these stand in for `compile(metrics=...)`.
        self.means = ImageMeans(("reconstruction", *quantizer.loss_names, "psnr"))
        self.codebook_usage = CodebookUsage(quantizer.codebook_size, quantizer.depth)

    def build(self, images_shape: tuple[int | None, ...]) -> None:
        _build_quantizer(self.quantizer, self.encoder.output_shape)

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
        losses = sum(terms.values())
        psnr = psnr_from_mse(terms["reconstruction"] / self.loss_weights["reconstruction"])
        # One image whose loss is not finite would make every mean so.
        self.means.update_state({**terms, "psnr": psnr}, sample_weight=ops.isfinite(losses))
        for indices in tree.flatten(y_pred["indices"]):
            self.codebook_usage.update_state(indices)
        return ops.mean(losses)

    def encode(self, images: Tensor) -> Any:
        """int32 indices of uint8 images (batch, h, w, channels): (batch, h', w'), or a tree of them for several grids."""
        return encode(self.encoder, self.quantizer, images)

    def decode(self, indices: Any) -> Tensor:
        """uint8 images (batch, h, w, channels) of int32 indices as `encode` gives them."""
        return decode(self.quantizer, self.decoder, indices)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "loss_weights": dict(self.loss_weights)}


@keras.saving.register_keras_serializable(package="kvq")
class ImageEncoder(_Composite):
    """The half of a tokenizer that turns uint8 images (batch, h, w, channels) into int32 indices (batch, h', w')."""

    parts = ("encoder", "quantizer")

    def __init__(self, encoder: keras.Model, quantizer: keras.layers.Layer, **kwargs: Any):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.quantizer = quantizer

    def build(self, images_shape: tuple[int | None, ...]) -> None:
        _build_quantizer(self.quantizer, self.encoder.output_shape)

    def call(self, images: Tensor) -> Any:
        return encode(self.encoder, self.quantizer, images)


@keras.saving.register_keras_serializable(package="kvq")
class ImageDecoder(_Composite):
    """The half of a tokenizer that turns int32 indices (batch, h', w') into uint8 images (batch, h, w, channels)."""

    parts = ("quantizer", "decoder")

    def __init__(self, quantizer: keras.layers.Layer, decoder: keras.Model, **kwargs: Any):
        super().__init__(**kwargs)
        self.quantizer = quantizer
        self.decoder = decoder

    def build(self, indices_shape: tuple[int | None, ...]) -> None:
        _build_quantizer(self.quantizer, self.decoder.input_shape)

    def call(self, indices: Tensor) -> Any:
        return decode(self.quantizer, self.decoder, indices)


@keras.saving.register_keras_serializable(package="kvq")
class ImageAutoencoder(_Composite):
    """Both halves in a row: uint8 images (batch, h, w, channels) to their uint8 reconstructions."""

    parts = ("encoder", "quantizer", "decoder")

    def __init__(self, encoder: keras.Model, quantizer: keras.layers.Layer, decoder: keras.Model, **kwargs: Any):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder

    def build(self, images_shape: tuple[int | None, ...]) -> None:
        _build_quantizer(self.quantizer, self.encoder.output_shape)

    def call(self, images: Tensor) -> Any:
        return decode(self.quantizer, self.decoder, encode(self.encoder, self.quantizer, images))


def encode(encoder: keras.Model, quantizer: keras.layers.Layer, images: Tensor) -> Any:
    """Indices of uint8 images. A lone quantizer and its grid are the tree of one leaf."""
    latents = encoder(rescale(images), training=False)
    return tree.map_structure(lambda member, grid: member.latents_to_indices(grid), quantizer, latents)


def decode(quantizer: keras.layers.Layer, decoder: keras.Model, indices: Any) -> Tensor:
    """uint8 images of indices as `encode` gives them."""
    codes = tree.map_structure(lambda member, grid: member.indices_to_codes(grid), quantizer, indices)
    return to_uint8(decoder(codes, training=False))


def _build_quantizer(quantizer: keras.layers.Layer, latents_shape: tuple[int | None, ...]) -> None:
    """Encoder and decoder come built; the quantizer learns its dimension from them."""
    if not quantizer.built:
        quantizer.build(latents_shape)


MODELS = {"vqvae": VQVAE}
