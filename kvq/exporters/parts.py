"""What is exported: the parts of a tokenizer as Keras models, and what a format has to offer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from kvq.model import ImageAutoencoder, ImageDecoder, ImageEncoder
from kvq.tokenizer import Tokenizer

PARTS = ("encoder", "decoder", "autoencoder")


@dataclass(frozen=True)
class Part:
    """A model with one input and one output. `shape` is the input's, with None where any size will do."""

    model: keras.Model
    input_name: str
    output_name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Exporter:
    """A format.

    Attributes:
        extension: Of its files.
        packages: Name of a backend to the packages that writing and running need there.
        write: Writes a part to a path.
        run: Runs a file in the format's own runtime on an array.
    """

    extension: str
    packages: Callable[[str], Sequence[str]]
    write: Callable[[Part, Path], None]
    run: Callable[[Path, np.ndarray], np.ndarray]


def build_parts(tokenizer: Tokenizer) -> dict[str, Part]:
    """The parts by name, called once each, since some exporters only take a model that was."""
    model, config = tokenizer.model, tokenizer.config
    quantizer = model.quantizer.for_export()
    side, channels = config.images.crop, config.images.channels
    image_shape = (None, side, side, channels)
    grid_shape = (None, *config.grids[0].shape, *([quantizer.depth] if quantizer.depth else []))
    parts = {
        "encoder": Part(ImageEncoder(model.encoder, quantizer, name="image_encoder"), "images", "indices", image_shape, "uint8"),
        "decoder": Part(
            ImageDecoder(quantizer, model.decoder, name="image_decoder"), "indices", "reconstruction", grid_shape, "int32"
        ),
        "autoencoder": Part(
            ImageAutoencoder(model.encoder, quantizer, model.decoder, name="image_autoencoder"),
            "images",
            "reconstruction",
            image_shape,
            "uint8",
        ),
    }
    for part in parts.values():
        part.model(np.zeros([size or 1 for size in part.shape], part.dtype))
    return parts
