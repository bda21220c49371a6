"""The user's door to a trained tokenizer: uint8 images to int32 indices and back, in NumPy."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from PIL import Image

from kvq import artifact, backends
from kvq.artifact import ArtifactConfig
from kvq.model import VQVAE, ImageDecoder, ImageEncoder

CODEBOOK_LIMIT = 2**28  # numbers, a GiB of them


class Tokenizer:
    """A trained tokenizer. It works on any backend, whichever one trained it.

    Images and indices may be arrays of any library that NumPy can read (NumPy, torch, JAX, TensorFlow, on the CPU or, of the
    backend that computes, on its device), or lists of them; results are NumPy's.

    Where the backend compiles a program for each shape (JAX, TensorFlow), a batch that is not full is filled up: to the batch
    size after others, else to the next power of two. So a call compiles once, and all calls on images of one size at most
    log2(batch_size) + 2 times. On PyTorch nothing is compiled and nothing filled up.

    Args:
        model: The model.
        config: What its artifact says about it.
    """

    def __init__(self, model: VQVAE, config: ArtifactConfig):
        self.model = model
        self.config = config
        # Keras compiles a model's `predict_on_batch` once for each shape; a bare call would run op by op.
        self._encoder = ImageEncoder(model.encoder, model.quantizer, name="image_encoder")
        self._decoder = ImageDecoder(model.quantizer, model.decoder, name="image_decoder")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a run folder (its `model/`) or of a model folder; of `"fashion_mnist_mini"`, one that comes with kvq.

        Raises:
            ArtifactError: If there is none, or it is broken.
        """
        return cls(*artifact.load(artifact.model_folder(path)))

    def save(self, folder: str | Path) -> None:
        """Writes a model folder, whole or not at all, that `load` takes. Unchanged weights give the same bytes.

        Raises:
            ArtifactError: If something else than a model is there.
        """
        artifact.save_loaded(self.model, self.config, Path(folder))

    def __repr__(self) -> str:
        size = f"vocabulary_size={self.vocabulary_size} grid={self.grid} depth={self.depth} downsampling={self.downsampling}"
        return f"<kvq.Tokenizer {self.config.quantizer.kind} {size} channels={self.config.images.channels}>"

    @property
    def downsampling(self) -> int:
        """Image side over grid side; heights and widths of images must be its multiples."""
        return self.config.model.downsampling

    @property
    def vocabulary_size(self) -> int:
        """How many values an index can take."""
        return self.config.grids[0].vocabulary

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns of indices that an image of the size it was trained on becomes."""
        return tuple(self.config.grids[0].shape)

    @property
    def depth(self) -> int | None:
        """How many indices a position has, as a last axis; None without that axis."""
        return self.model.quantizer.depth

    @property
    def codebook(self) -> np.ndarray:
        """The code of every index, float32 (vocabulary_size, latent_dim), as the decoder gets it.

        Where a position has q indices, (q, vocabulary_size, dim), in the space in which residual levels are added up and groups
        put one after the other, before a projection if there is one.

        Raises:
            ValueError: If it would hold more than 2**28 numbers. Codes of that many values are computed, not stored.
        """
        codes = (self.depth or 1) * self.vocabulary_size * self.config.model.latent_dim
        if codes > CODEBOOK_LIMIT:
            raise ValueError(
                f"`codebook` gives at most {CODEBOOK_LIMIT} numbers. Received: a vocabulary of {self.vocabulary_size}. "
                "`model.quantizer.indices_to_codes` gives the codes of chosen indices."
            )
        return np.array(keras.ops.convert_to_numpy(self.model.quantizer.all_codes()), "float32")

    def encode(self, images: Any, batch_size: int = 64) -> np.ndarray:
        """Indices of images.

        Args:
            images: uint8 (n, h, w, c), h and w multiples of `downsampling`; or a list of PIL images of one size.
            batch_size: How many go through the model at once, at least 1.

        Returns:
            int32 (n, h / downsampling, w / downsampling), in [0, vocabulary_size); where a position has several indices, they
            are a last axis.

        Raises:
            ValueError: If the images are of another dtype or shape, or there are none.
        """
        channels, step = self.config.images.channels, self.downsampling
        first = images[0] if isinstance(images, list | tuple) and images else images
        if isinstance(first, str | os.PathLike):
            raise ValueError(f"`images` must not be paths. Received: {first}. Open it with PIL.Image.open and give [image].")
        given, images = images, _as_array(images, channels)
        if not images.size:
            raise ValueError(f"`images` must hold at least one image. Received: {images.dtype} {images.shape}.")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != channels:
            hint = _hint(given, images.shape, channels)
            raise ValueError(f"`images` must be uint8 (n, h, w, {channels}). Received: {images.dtype} {images.shape}.{hint}")
        if images.shape[1] % step or images.shape[2] % step:
            raise ValueError(f"Height and width of `images` must be multiples of {step}. Received: {images.shape}.")
        return _by_batch(self._encoder, images, batch_size)

    def decode(self, indices: Any, batch_size: int = 64) -> np.ndarray:
        """Images of indices as `encode` gives them: integers in [0, vocabulary_size) to uint8 (n, h, w, c).

        Raises:
            ValueError: If the indices are of another dtype or shape, or out of range, or there are none.
        """
        indices, depth = _as_array(indices), self.depth
        fits = indices.ndim == 3 if depth is None else indices.ndim == 4 and indices.shape[3] == depth
        if not indices.size:
            raise ValueError(f"`indices` must hold at least one index. Received: {indices.dtype} {indices.shape}.")
        if not np.issubdtype(indices.dtype, np.integer) or not fits:
            shape = "(n, h', w')" if depth is None else f"(n, h', w', {depth})"
            raise ValueError(f"`indices` must be integers {shape}. Received: {indices.dtype} {indices.shape}.")
        # Checked here, because an index out of range is silently NaN on some backends.
        if indices.min() < 0 or indices.max() >= self.vocabulary_size:
            raise ValueError(f"`indices` must be in [0, {self.vocabulary_size}). Received: {indices.min()} to {indices.max()}.")
        return _by_batch(self._decoder, indices.astype("int32"), batch_size)


def _hint(given: Any, shape: tuple[int, ...], channels: int) -> str:
    """What would make images of what came, where that can be told."""
    if isinstance(given, Image.Image):
        return " One PIL image: [image]."
    if len(shape) == 3 and shape[2] == channels:
        return " One image: images[None]."
    if channels == 1 and len(shape) in (2, 3):
        return " One image: images[None, ..., None]." if len(shape) == 2 else " Several without channels: images[..., None]."
    return ""


def _as_array(values: Any, channels: int | None = None) -> np.ndarray:
    """What came as a NumPy array; of PIL images, (n, h, w, channels)."""
    if keras.ops.is_tensor(values):
        return np.asarray(keras.ops.convert_to_numpy(values))  # also from a GPU
    if not isinstance(values, Sequence) or not len(values):
        return np.asarray(values)
    if isinstance(values[0], Image.Image):
        modes = {1: "L", 3: "RGB"}
        if channels not in modes:
            raise ValueError(f"The model takes images of {channels} channels; give arrays. PIL images become 1 or 3.")
        values = [np.asarray(image.convert(modes[channels])) for image in values]
        values = [image[:, :, None] if image.ndim == 2 else image for image in values]
    elif not hasattr(values[0], "__array__"):
        return np.asarray(values)
    arrays = [_as_array(value) for value in values]
    if len({array.shape for array in arrays}) > 1:
        shapes = sorted({array.shape for array in arrays})
        raise ValueError(f"All must have one shape. Received: {shapes[0]} and {shapes[1]}.")
    return np.stack(arrays)


def _by_batch(model: keras.Model, array: np.ndarray, batch_size: int) -> np.ndarray:
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1. Received: batch_size={batch_size}.")
    size = min(batch_size, 1 << (len(array) - 1).bit_length())
    results = []
    for start in range(0, len(array), batch_size):
        batch = array[start : start + batch_size]
        missing = size - len(batch) if backends.compiles_each_shape(keras.backend.backend()) else 0
        filled = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)]) if missing > 0 else batch
        results.append(np.asarray(model.predict_on_batch(filled))[: len(batch)])
    return np.concatenate(results)
