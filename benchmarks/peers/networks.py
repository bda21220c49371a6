"""The networks of `kvq/networks.py` as straight-line functions, written once for all hand-written loops.

`layers` gives `conv(name, x, stride)`, `up(name, x, stride)` (transposed), `norm(name, x)` (instance norm), `relu`, `leaky_relu`
and `tanh` of one backend; `name` is that of the weights in a saved kvq model.
"""

from typing import Any

STRIDES = (1, 2, 2)


def encode(layers: Any, model: Any, x: Any) -> Any:
    """Latents of images in [-1, 1]; `model` is the section of kvq's configuration."""
    if model.network == "paper":
        x = layers.relu(layers.conv("encoder.down0", x, 2))
        x = layers.relu(layers.conv("encoder.down1", x, 2))
        x = _stack(layers, model, "encoder", layers.conv("encoder.same", x))
        return layers.conv("encoder.latents", x)
    for stage, stride in enumerate(STRIDES):
        name = f"encoder.stage{stage}"
        x = layers.leaky_relu(layers.norm(f"{name}.down", layers.conv(f"{name}.down", x, stride)))
        if model.network == "plain":
            x = layers.leaky_relu(layers.norm(f"{name}.same", layers.conv(f"{name}.same", x)))
    return _blocks(layers, "encoder", x) if model.network == "resnet" else x


def decode(layers: Any, model: Any, x: Any) -> Any:
    """Images in [-1, 1] of codes."""
    if model.network == "paper":
        x = _stack(layers, model, "decoder", layers.conv("decoder.same", x))
        return layers.up("decoder.up1", layers.relu(layers.up("decoder.up0", x, 2)), 2)
    x = _blocks(layers, "decoder", x) if model.network == "resnet" else x
    for stage, stride in enumerate(STRIDES):
        x = layers.relu(layers.up(f"decoder.stage{stage}.up", x, stride))
        if model.network == "plain":
            x = layers.relu(layers.conv(f"decoder.stage{stage}.same", x))
    return layers.tanh(layers.conv("decoder.image", x))


def _blocks(layers: Any, part: str, x: Any) -> Any:
    for block in range(2):
        wide = layers.leaky_relu(layers.conv(f"{part}.residual{block}.wide", x))
        x = layers.leaky_relu(x + layers.conv(f"{part}.residual{block}.point", wide))
    return x


def _stack(layers: Any, model: Any, part: str, x: Any) -> Any:
    for block in range(model.residual_blocks):
        wide = layers.relu(layers.conv(f"{part}.residual{block}.wide", layers.relu(x)))
        x = x + layers.conv(f"{part}.residual{block}.point", wide)
    return layers.relu(x)
