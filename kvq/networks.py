"""Encoders and decoders by name: Keras models on images in [-1, 1], channels last, of any size that fits.

Every layer is named, since the names of the tensors in a saved model come from there: `down0_conv` holds
`down0.conv.kernel`. A Keras name may not contain a dot, hence the underscore.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras.layers import Activation, Layer, LeakyReLU, ReLU

from kvq.layers import Chain, Conv2D, Conv2DTranspose, InstanceNormalization, Residual
from kvq.random_weights import VarianceScaling


def plain_encoder(channels: int, latent_dim: int) -> keras.Model:
    """Encoder "without ResNet" of the original replication: images (b, h, w, channels) to (b, h/4, w/4, latent_dim).

    Three stages of D/4, D/2, D filters with strides 1, 2, 2, for D = `latent_dim`; each a 3x3 convolution of that stride,
    instance norm, leaky ReLU (0.2), and the same again with stride 1.
    """
    members = []
    for stage, (filters, strides) in enumerate(_stages(latent_dim)):
        members += _conv_norm_activation(f"stage{stage}_down", filters, strides)
        members += _conv_norm_activation(f"stage{stage}_same", filters, 1)
    return _encoder(channels, members)


def plain_decoder(channels: int, latent_dim: int) -> keras.Model:
    """Decoder "without ResNet" of the original replication: codes (b, h, w, latent_dim) to (b, 4h, 4w, channels) in [-1, 1].

    Three 3x3 transposed convolutions of D, D/2, D/4 filters with strides 1, 2, 2 and ReLU, each followed by a 3x3
    convolution and ReLU; then a 1x1 convolution to the image's channels and tanh.
    """
    members: list[Layer] = []
    for stage, (filters, strides) in enumerate(_mirrored_stages(latent_dim)):
        members += [_transposed_conv(f"stage{stage}_up", filters, 3, strides), _relu(f"stage{stage}_up")]
        members += [_conv(f"stage{stage}_same", filters, 3), _relu(f"stage{stage}_same")]
    return _decoder(latent_dim, members + _to_image(channels))


def resnet_encoder(channels: int, latent_dim: int) -> keras.Model:
    """Encoder "with ResNet" of the original replication: images (b, h, w, channels) to (b, h/4, w/4, latent_dim).

    The stages of `plain` without their second convolution, then two residual blocks: 3x3 convolution, leaky ReLU, 1x1
    convolution, added to the input, leaky ReLU.
    """
    members: list[Layer] = []
    for stage, (filters, strides) in enumerate(_stages(latent_dim)):
        members += _conv_norm_activation(f"stage{stage}_down", filters, strides)
    return _encoder(channels, members + _residual_blocks(latent_dim))


def resnet_decoder(channels: int, latent_dim: int) -> keras.Model:
    """Decoder "with ResNet" of the original replication: codes (b, h, w, latent_dim) to (b, 4h, 4w, channels) in [-1, 1].

    Two residual blocks as in the encoder, then the transposed convolutions of `plain` without the 3x3 convolution after
    each; then a 1x1 convolution to the image's channels and tanh.
    """
    members = _residual_blocks(latent_dim)
    for stage, (filters, strides) in enumerate(_mirrored_stages(latent_dim)):
        members += [_transposed_conv(f"stage{stage}_up", filters, 3, strides), _relu(f"stage{stage}_up")]
    return _decoder(latent_dim, members + _to_image(channels))


def paper_encoder(
    channels: int, latent_dim: int, hidden: int = 128, residual_blocks: int = 2, residual_hidden: int = 32
) -> keras.Model:
    """Encoder of van den Oord et al. 2017, section 4.1, as in Sonnet's example: (b, h, w, channels) to (b, h/4, w/4, latent_dim).

    Two 4x4 convolutions of stride 2 with `hidden`/2 and `hidden` filters and ReLU, a 3x3 convolution of `hidden` filters,
    `residual_blocks` times (ReLU, 3x3 to `residual_hidden`, ReLU, 1x1 to `hidden`, added), ReLU; 1x1 to `latent_dim`.
    """
    members = [_conv("down0", hidden // 2, 4, 2), _relu("down0"), _conv("down1", hidden, 4, 2), _relu("down1")]
    members += [_conv("same", hidden, 3), *_preactivated_residual_stack(hidden, residual_blocks, residual_hidden)]
    return _encoder(channels, [*members, _conv("latents", latent_dim, 1)])


def paper_decoder(
    channels: int, latent_dim: int, hidden: int = 128, residual_blocks: int = 2, residual_hidden: int = 32
) -> keras.Model:
    """Mirror of `paper_encoder`: codes (b, h, w, latent_dim) to (b, 4h, 4w, channels), unbounded.

    A 3x3 convolution of `hidden` filters, the residual stack, a 4x4 transposed convolution of stride 2 with `hidden`/2
    filters and ReLU, and one to the image's channels. No activation at the end, as in Sonnet's example.
    """
    members = [_conv("same", hidden, 3), *_preactivated_residual_stack(hidden, residual_blocks, residual_hidden)]
    members += [_transposed_conv("up0", hidden // 2, 4, 2), _relu("up0"), _transposed_conv("up1", channels, 4, 2)]
    return _decoder(latent_dim, members)


def _encoder(channels: int, members: list[Layer]) -> keras.Model:
    images = keras.Input((None, None, channels), name="images")
    return keras.Model(images, Chain(members, name="layers")(images), name="encoder")


def _decoder(latent_dim: int, members: list[Layer]) -> keras.Model:
    codes = keras.Input((None, None, latent_dim), name="codes")
    return keras.Model(codes, Chain(members, name="layers")(codes), name="decoder")


def _stages(latent_dim: int) -> list[tuple[int, int]]:
    return [(latent_dim // 4, 1), (latent_dim // 2, 2), (latent_dim, 2)]


def _mirrored_stages(latent_dim: int) -> list[tuple[int, int]]:
    return [(latent_dim, 1), (latent_dim // 2, 2), (latent_dim // 4, 2)]


def _conv(name: str, filters: int, size: int, strides: int = 1) -> Layer:
    return Conv2D(filters, size, strides, padding="same", kernel_initializer=VarianceScaling(2.0), name=f"{name}_conv")


def _transposed_conv(name: str, filters: int, size: int, strides: int = 1) -> Layer:
    # He's variance for what an output really sums: with stride s, 1/s^2 of the kernel. Its inputs are what is called
    # "out" here, because the kernel of a transposed convolution is (height, width, filters, inputs).
    variance = VarianceScaling(2.0 * strides**2, fan="out")
    return Conv2DTranspose(filters, size, strides, padding="same", kernel_initializer=variance, name=f"{name}_conv")


def _relu(name: str) -> Layer:
    return ReLU(name=f"{name}_relu")


def _leaky_relu(name: str) -> Layer:
    return LeakyReLU(0.2, name=f"{name}_leaky_relu")


def _conv_norm_activation(name: str, filters: int, strides: int) -> list[Layer]:
    return [_conv(name, filters, 3, strides), InstanceNormalization(name=f"{name}_norm"), _leaky_relu(name)]


def _to_image(channels: int) -> list[Layer]:
    # Small at first: He's variance would start the tanh saturated, where its gradient is none.
    small = VarianceScaling(0.1)
    return [Conv2D(channels, 1, kernel_initializer=small, name="image_conv"), Activation("tanh", name="image_tanh")]


def _residual_blocks(filters: int) -> list[Layer]:
    members: list[Layer] = []
    for name in ("residual0", "residual1"):
        branch = [_conv(f"{name}_wide", filters, 3), _leaky_relu(f"{name}_wide"), _conv(f"{name}_point", filters, 1)]
        members += [Residual(branch, name=name), _leaky_relu(f"{name}_sum")]
    return members


def _preactivated_residual_stack(filters: int, blocks: int, hidden: int) -> list[Layer]:
    members: list[Layer] = []
    for block in range(blocks):
        name = f"residual{block}"
        branch = [
            _relu(f"{name}_in"),
            _conv(f"{name}_wide", hidden, 3),
            _relu(f"{name}_wide"),
            _conv(f"{name}_point", filters, 1),
        ]
        members.append(Residual(branch, name=name))
    return [*members, _relu("residual_out")]


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
