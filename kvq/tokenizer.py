"""The user's door to a trained tokenizer: uint8 images to int32 indices and back, in NumPy."""

from pathlib import Path
from typing import Any

import keras
import numpy as np

from kvq import artifact
from kvq.artifact import ArtifactConfig
from kvq.model import VQVAE, ImageDecoder, ImageEncoder


class Tokenizer:
    """A trained tokenizer. It works on any backend, whichever one trained it.

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
        """The tokenizer of a run folder (its `model/`) or of a model folder.

        Raises:
            ArtifactError: If there is none, or it is broken.
        """
        return cls(*artifact.load(artifact.model_folder(path)))

    @property
    def downsampling(self) -> int:
        """Image side over grid side: heights and widths of images must be its multiples."""
        return self.config.model.downsampling

    @property
    def vocabulary_size(self) -> int:
        """How many values an index can take."""
        return self.config.grids[0].vocabulary

    def encode(self, images: Any, batch_size: int = 64) -> np.ndarray:
        """Indices of images.

        Args:
            images: uint8 (n, h, w, c), h and w multiples of `downsampling`.
            batch_size: How many go through the model at once.

        Returns:
            int32 (n, h / downsampling, w / downsampling), in [0, vocabulary_size); where a position has several indices, they
            are a last axis.

        Raises:
            ValueError: If the images are of another dtype or shape.
        """
        images = np.asarray(images)
        channels, step = self.config.images.channels, self.downsampling
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != channels:
            raise ValueError(f"`images` must be uint8 (n, h, w, {channels}). Received: {images.dtype} {images.shape}.")
        if images.shape[1] % step or images.shape[2] % step or not images.size:
            raise ValueError(f"Height and width of `images` must be multiples of {step}. Received: {images.shape}.")
        return _by_batch(self._encoder, images, batch_size)

    def decode(self, indices: Any, batch_size: int = 64) -> np.ndarray:
        """Images of indices as `encode` gives them: integers in [0, vocabulary_size) to uint8 (n, h, w, c).

        Raises:
            ValueError: If the indices are of another dtype or shape, or out of range.
        """
        indices = np.asarray(indices)
        depth = self.model.quantizer.depth
        fits = indices.ndim == 3 if depth is None else indices.ndim == 4 and indices.shape[3] == depth
        if not np.issubdtype(indices.dtype, np.integer) or not fits or not indices.size:
            shape = "(n, h', w')" if depth is None else f"(n, h', w', {depth})"
            raise ValueError(f"`indices` must be integers {shape}. Received: {indices.dtype} {indices.shape}.")
        # Checked here, because an index out of range is silently NaN on some backends.
        if indices.min() < 0 or indices.max() >= self.vocabulary_size:
            raise ValueError(f"`indices` must be in [0, {self.vocabulary_size}). Received: {indices.min()} to {indices.max()}.")
        return _by_batch(self._decoder, indices.astype("int32"), batch_size)


def _by_batch(model: keras.Model, array: np.ndarray, batch_size: int) -> np.ndarray:
    starts = range(0, len(array), batch_size)
    return np.concatenate([model.predict_on_batch(array[start : start + batch_size]) for start in starts])
