"""Encoders and decoders by name: functional Keras models on images in [-1, 1], channels last, of any size that fits.

Every layer is named, since the names of the tensors in a saved model come from there: `down0_conv` holds
`down0.conv.kernel`. A Keras name may not contain a dot, hence the underscore.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable(package="kvq")
class InstanceNormalization(layers.Layer):
    """Normalises each channel of each image over its positions, then scales and shifts it: (batch, h, w, c), same out.

    Source: Ulyanov et al. 2016, arXiv:1607.08022. The same as `GroupNormalization(groups=-1)`, without its reshapes:
    with those a training step of `plain` took 1.4 times as long on TensorFlow (2 CPU cores).
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs: Any):
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.gamma = self.add_weight(name="gamma", shape=(shape[-1],), initializer="ones", autocast=False)
        self.beta = self.add_weight(name="beta", shape=(shape[-1],), initializer="zeros", autocast=False)

    def call(self, inputs: Any) -> Any:
        values = ops.cast(inputs, "float32")
        mean, variance = ops.moments(values, axes=(1, 2), keepdims=True)
        scale = ops.rsqrt(variance + self.epsilon) * self.gamma
        return ops.cast(values * scale + (self.beta - mean * scale), self.compute_dtype)

    def compute_output_shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon}


def _conv(name: str, filters: int, size: int, strides: int = 1) -> layers.Layer:
    return layers.Conv2D(filters, size, strides, padding="same", kernel_initializer="he_normal", name=f"{name}_conv")


def _transposed_conv(name: str, filters: int, size: int, strides: int = 1) -> layers.Layer:
    # He's variance for what an output really sums: with stride s, 1/s^2 of the kernel. Its inputs are what Keras calls
    # "fan_out" here, because the kernel of a transposed convolution is (height, width, filters, inputs).
    variance = keras.initializers.VarianceScaling(2.0 * strides**2, mode="fan_out", distribution="truncated_normal")
    return layers.Conv2DTranspose(filters, size, strides, padding="same", kernel_initializer=variance, name=f"{name}_conv")


def _leaky_relu(tensor: Any, name: str) -> Any:
    return layers.LeakyReLU(0.2, name=f"{name}_leaky_relu")(tensor)


def _relu(tensor: Any, name: str) -> Any:
    return layers.ReLU(name=f"{name}_relu")(tensor)


def _conv_norm_activation(tensor: Any, name: str, filters: int, strides: int) -> Any:
    tensor = _conv(name, filters, 3, strides)(tensor)
    tensor = InstanceNormalization(name=f"{name}_norm")(tensor)
    return _leaky_relu(tensor, name)


def plain_encoder(channels: int, latent_dim: int) -> keras.Model:
    """Encoder "without ResNet" of the original replication: images (b, h, w, channels) to (b, h/4, w/4, latent_dim).

    Three stages of D/4, D/2, D filters with strides 1, 2, 2, for D = `latent_dim`; each a 3x3 convolution of that stride,
    instance norm, leaky ReLU (0.2), and the same again with stride 1.
    """
    tensor = images = keras.Input((None, None, channels), name="images")
    for stage, (filters, strides) in enumerate(_stages(latent_dim)):
        tensor = _conv_norm_activation(tensor, f"stage{stage}_down", filters, strides)
        tensor = _conv_norm_activation(tensor, f"stage{stage}_same", filters, 1)
    return keras.Model(images, tensor, name="encoder")


def plain_decoder(channels: int, latent_dim: int) -> keras.Model:
    """Decoder "without ResNet" of the original replication: codes (b, h, w, latent_dim) to (b, 4h, 4w, channels) in [-1, 1].

    Three 3x3 transposed convolutions of D, D/2, D/4 filters with strides 1, 2, 2 and ReLU, each followed by a 3x3
    convolution and ReLU; then a 1x1 convolution to the image's channels and tanh.
    """
    tensor = codes = keras.Input((None, None, latent_dim), name="codes")
    for stage, (filters, strides) in enumerate(_mirrored_stages(latent_dim)):
        tensor = _relu(_transposed_conv(f"stage{stage}_up", filters, 3, strides)(tensor), f"stage{stage}_up")
        tensor = _relu(_conv(f"stage{stage}_same", filters, 3)(tensor), f"stage{stage}_same")
    return keras.Model(codes, _to_image(tensor, channels), name="decoder")


def resnet_encoder(channels: int, latent_dim: int) -> keras.Model:
    """Encoder "with ResNet" of the original replication: images (b, h, w, channels) to (b, h/4, w/4, latent_dim).

    The stages of `plain` without their second convolution, then two residual blocks: 3x3 convolution, leaky ReLU, 1x1
    convolution, added to the input, leaky ReLU.
    """
    tensor = images = keras.Input((None, None, channels), name="images")
    for stage, (filters, strides) in enumerate(_stages(latent_dim)):
        tensor = _conv_norm_activation(tensor, f"stage{stage}_down", filters, strides)
    for block in range(2):
        tensor = _residual_block(tensor, f"residual{block}", latent_dim)
    return keras.Model(images, tensor, name="encoder")


def resnet_decoder(channels: int, latent_dim: int) -> keras.Model:
    """Decoder "with ResNet" of the original replication: codes (b, h, w, latent_dim) to (b, 4h, 4w, channels) in [-1, 1].

    Two residual blocks as in the encoder, then the transposed convolutions of `plain` without the 3x3 convolution after
    each; then a 1x1 convolution to the image's channels and tanh.
    """
    tensor = codes = keras.Input((None, None, latent_dim), name="codes")
    for block in range(2):
        tensor = _residual_block(tensor, f"residual{block}", latent_dim)
    for stage, (filters, strides) in enumerate(_mirrored_stages(latent_dim)):
        tensor = _relu(_transposed_conv(f"stage{stage}_up", filters, 3, strides)(tensor), f"stage{stage}_up")
    return keras.Model(codes, _to_image(tensor, channels), name="decoder")


def paper_encoder(
    channels: int, latent_dim: int, hidden: int = 128, residual_blocks: int = 2, residual_hidden: int = 32
) -> keras.Model:
    """Encoder of van den Oord et al. 2017, section 4.1, as in Sonnet's example: (b, h, w, channels) to (b, h/4, w/4, latent_dim).

    Two 4x4 convolutions of stride 2 with `hidden`/2 and `hidden` filters and ReLU, a 3x3 convolution of `hidden` filters,
    `residual_blocks` times (ReLU, 3x3 to `residual_hidden`, ReLU, 1x1 to `hidden`, added), ReLU; 1x1 to `latent_dim`.
    """
    tensor = images = keras.Input((None, None, channels), name="images")
    tensor = _relu(_conv("down0", hidden // 2, 4, 2)(tensor), "down0")
    tensor = _relu(_conv("down1", hidden, 4, 2)(tensor), "down1")
    tensor = _conv("same", hidden, 3)(tensor)
    tensor = _preactivated_residual_stack(tensor, hidden, residual_blocks, residual_hidden)
    return keras.Model(images, _conv("latents", latent_dim, 1)(tensor), name="encoder")


def paper_decoder(
    channels: int, latent_dim: int, hidden: int = 128, residual_blocks: int = 2, residual_hidden: int = 32
) -> keras.Model:
    """Mirror of `paper_encoder`: codes (b, h, w, latent_dim) to (b, 4h, 4w, channels), unbounded.

    A 3x3 convolution of `hidden` filters, the residual stack, a 4x4 transposed convolution of stride 2 with `hidden`/2
    filters and ReLU, and one to the image's channels. No activation at the end, as in Sonnet's example.
    """
    tensor = codes = keras.Input((None, None, latent_dim), name="codes")
    tensor = _conv("same", hidden, 3)(tensor)
    tensor = _preactivated_residual_stack(tensor, hidden, residual_blocks, residual_hidden)
    tensor = _relu(_transposed_conv("up0", hidden // 2, 4, 2)(tensor), "up0")
    return keras.Model(codes, _transposed_conv("up1", channels, 4, 2)(tensor), name="decoder")


def _stages(latent_dim: int) -> list[tuple[int, int]]:
    return [(latent_dim // 4, 1), (latent_dim // 2, 2), (latent_dim, 2)]


def _mirrored_stages(latent_dim: int) -> list[tuple[int, int]]:
    return [(latent_dim, 1), (latent_dim // 2, 2), (latent_dim // 4, 2)]


def _to_image(tensor: Any, channels: int) -> Any:
    # Small at first: He's variance would start the tanh saturated, where its gradient is none.
    small = keras.initializers.VarianceScaling(0.1, distribution="truncated_normal")
    tensor = layers.Conv2D(channels, 1, kernel_initializer=small, name="image_conv")(tensor)
    return layers.Activation("tanh", name="image_tanh")(tensor)


def _residual_block(tensor: Any, name: str, filters: int) -> Any:
    branch = _leaky_relu(_conv(f"{name}_wide", filters, 3)(tensor), f"{name}_wide")
    branch = _conv(f"{name}_point", filters, 1)(branch)
    return _leaky_relu(layers.Add(name=f"{name}_add")([tensor, branch]), f"{name}_sum")


def _preactivated_residual_stack(tensor: Any, filters: int, blocks: int, hidden: int) -> Any:
    for block in range(blocks):
        name = f"residual{block}"
        branch = _conv(f"{name}_wide", hidden, 3)(_relu(tensor, f"{name}_in"))
        branch = _conv(f"{name}_point", filters, 1)(_relu(branch, f"{name}_wide"))
        tensor = layers.Add(name=f"{name}_add")([tensor, branch])
    return _relu(tensor, "residual_out")


ENCODERS: dict[str, Callable[..., keras.Model]] = {
    "plain": plain_encoder,
    "resnet": resnet_encoder,
    "paper": paper_encoder,
}
DECODERS: dict[str, Callable[..., keras.Model]] = {
    "plain": plain_decoder,
    "resnet": resnet_decoder,
    "paper": paper_decoder,
}


def build_encoder(name: str, channels: int, latent_dim: int, **kwargs: Any) -> keras.Model:
    """Encoder `name` for images of `channels` channels; `kwargs` are its own arguments.

    Raises:
        ValueError: If there is no encoder of that name, or the latent dimension is too small for it.
    """
    return _build(ENCODERS, name, channels, latent_dim, kwargs)


def build_decoder(name: str, channels: int, latent_dim: int, **kwargs: Any) -> keras.Model:
    """Decoder `name`, the mirror of the encoder of that name."""
    return _build(DECODERS, name, channels, latent_dim, kwargs)


def _build(
    members: dict[str, Callable[..., keras.Model]], name: str, channels: int, latent_dim: int, kwargs: dict[str, Any]
) -> keras.Model:
    if name not in members:
        raise ValueError(f"`name` must be one of {', '.join(members)}. Received: name={name!r}.")
    if latent_dim < 4:
        raise ValueError(f"`latent_dim` must be at least 4, since the stages have a quarter of it. Received: {latent_dim}.")
    return members[name](channels, latent_dim, **kwargs)
