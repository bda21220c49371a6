"""What is exported: the parts of a tokenizer as Keras models, and what a format has to offer."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kvq.artifact import ArtifactConfig
from kvq.model import ImageAutoencoder, ImageDecoder, ImageEncoder
from kvq.tokenizer import Tokenizer

PARTS = ("encoder", "decoder", "autoencoder")


@dataclass(frozen=True)
class Part:
    """A model with one input and one output.

    Attributes:
        model: Called once already, since some exporters only take a model that was.
        input_name: `images` or `indices`.
        output_name: `indices` or `reconstruction`.
        sample: An input (2, ...) of zeros, of the size that the model was trained on. Exporters trace it: what depends on whether
            a side is even, as padding does, is then right for every multiple of `step`.
        step: Of which number height and width must be multiples.
    """

    model: keras.Model
    input_name: str
    output_name: str
    sample: np.ndarray
    step: int

    @property
    def fixed_shape(self) -> tuple[int | None, ...]:
        """The input's shape with a free batch size."""
        return (None, *self.sample.shape[1:])

    @property
    def free_shape(self) -> tuple[int | None, ...]:
        """The input's shape with a free batch size, height and width."""
        return (None, None, None, *self.sample.shape[3:])


@dataclass(frozen=True)
class Loaded:
    """An exported part in its runtime: `run` maps an array to an array.

    The runtime says itself what goes in and comes out: `inputs` and `outputs` have `name`, `dtype` and `shape`. `facts` are what
    else belongs into the report.
    """

    run: Callable[[np.ndarray], np.ndarray]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """What makes a format's folder a whole, of which no part can be left out.

    Attributes:
        parts: That it has.
        entry: The file that uses all others: written last, and taken away before any of them changes.
        check: Raises an error for a model that it cannot hold.
        runtime: Finds the archive of the runtime that goes into the folder: the file that was given, else one of its own. Tells
            the function it gets what takes long.
        write: Writes everything beside the parts: to a folder, of a tokenizer, from that archive; whether the size of images is
            free comes last. Gives what else belongs into the report.
    """

    parts: tuple[str, ...]
    entry: str
    check: Callable[[ArtifactConfig], None]
    runtime: Callable[[Path | None, Callable[[str], None]], Path]
    write: Callable[[Path, Tokenizer, Path, bool], dict[str, Any]]


@dataclass(frozen=True)
class Exporter:
    """A format.

    Attributes:
        extension: Of its files. A format of folders has one as well.
        backends: That can write it, the best one first; none for all of them alike.
        write: Writes a part to a path. Files that belong to it have its stem.
        load: Opens what was written in the format's own runtime.
        example: Two texts for `example.py`: what it imports, and lines that make `output` of `file` and `array`.
        packages: Name of a backend to the packages that writing and running need beside it.
        fixed_size: Backends that write files for one image size.
        bundle: Where the files are no choice but a whole.
    """

    extension: str
    backends: tuple[str, ...]
    write: Callable[[Part, Path], None]
    load: Callable[[Path], Loaded]
    example: tuple[str, str]
    packages: Callable[[str], Sequence[str]] = lambda backend: ()
    fixed_size: frozenset[str] = frozenset()
    bundle: Bundle | None = None


def described(name: str, dtype: Any, shape: Any) -> dict[str, Any]:
    """An input or output as the report has it; sizes that are free are null, or have the name that the file gives them."""
    sizes = [size if isinstance(size, int) and size >= 0 else size if isinstance(size, str) else None for size in shape]
    return {"name": name, "dtype": str(dtype), "shape": sizes}


def build_parts(tokenizer: Tokenizer) -> dict[str, Part]:
    """The parts by name."""
    model, config = tokenizer.model, tokenizer.config
    quantizer = model.quantizer.for_export()
    side = config.images.crop
    images = np.zeros((2, side, side, config.images.channels), np.uint8)
    indices = np.zeros((2, *config.grids[0].shape, *([quantizer.depth] if quantizer.depth else [])), np.int32)
    step = tokenizer.downsampling
    encoder = ImageEncoder(model.encoder, quantizer, name="image_encoder")
    decoder = ImageDecoder(quantizer, model.decoder, name="image_decoder")
    autoencoder = ImageAutoencoder(model.encoder, quantizer, model.decoder, name="image_autoencoder")
    parts = {
        "encoder": Part(encoder, "images", "indices", images, step),
        "decoder": Part(decoder, "indices", "reconstruction", indices, 1),
        "autoencoder": Part(autoencoder, "images", "reconstruction", images, step),
    }
    for part in parts.values():
        part.model(part.sample)
    return parts


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The converters talk a lot; whether one succeeded is decided by running its file."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
