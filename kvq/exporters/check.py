"""Whether an exported file says what the model says, on real images where they are at hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kvq.data import evaluation_batches, evaluation_transforms, iterate, open_source
from kvq.errors import ExportError, KvqError
from kvq.evaluation import trained_on
from kvq.exporters.parts import Part
from kvq.ops import rescale
from kvq.quantizers import CodebookQuantizer, Quantizer
from kvq.tokenizer import Tokenizer

COMPARED = 13  # images; not a power of two and not the 1 that exporters trace with, so that a fixed batch shows
NEAR_TIE = 1e-5  # relative size of what rounding may do


def sample_images(tokenizer: Tokenizer, path: str | Path) -> tuple[np.ndarray, str]:
    """uint8 images (n, h, w, c) to compare on, and where they come from: the model's own data set if it is at hand."""
    config = tokenizer.config
    try:
        source = open_source(trained_on(path, config.data.name), "test")
        batches = evaluation_batches(source, evaluation_transforms(config.images.pad, config.images.crop), COMPARED)
        images = next(iterate(batches, threads=0))["images"]
        if images.shape[-1] == config.images.channels:
            return images, f"{len(images)} images of {source.name}"
    except KvqError:
        pass
    rng = np.random.default_rng(0)
    side = config.images.crop
    return rng.integers(0, 256, (COMPARED, side, side, config.images.channels), np.uint8), f"{COMPARED} images of noise"


def compare(tokenizer: Tokenizer, part: Part, images: np.ndarray, run: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """Runs an exported part beside the model.

    Returns:
        `images`, `near_ties` (positions where rounding may decide), and `different_indices` or `largest_difference` in grey
        levels.

    Raises:
        ExportError: If indices differ where there is no near-tie, or pixels by more than one grey level.
    """
    ties = near_ties(tokenizer, images)
    inputs = images if part.input_name == "images" else tokenizer.encode(images)
    expected = np.asarray(part.model.predict_on_batch(inputs))
    try:
        actual = run(inputs)
    except Exception as error:
        raise ExportError(f"The exported {part.model.name} does not run: {type(error).__name__}: {error}") from error
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise ExportError(
            f"The exported {part.model.name} gives {actual.dtype} {actual.shape}, not {expected.dtype} {expected.shape}."
        )
    result = {"images": len(images), "near_ties": int(ties.sum())}
    if part.output_name == "indices":
        different = (actual != expected).reshape(*ties.shape, -1).any(-1)
        if (different & ~ties).any():
            raise ExportError(
                f"The exported {part.model.name} gives other indices at {(different & ~ties).mean():.2%} of positions."
            )
        return {**result, "different_indices": int(different.sum())}
    difference = np.abs(actual.astype(int) - expected.astype(int)).max(axis=(1, 2, 3))
    # An image with a near-tie may rightly come out of another code.
    certain = ~ties.any(axis=(1, 2)) if part.input_name == "images" else np.ones(len(images), bool)
    if (difference[certain] > 1).any():
        raise ExportError(f"The exported {part.model.name} differs from the model by {difference[certain].max()} grey levels.")
    return {**result, "largest_difference": int(difference[certain].max(initial=0))}


def near_ties(tokenizer: Tokenizer, images: np.ndarray) -> np.ndarray:
    """Where (n, h', w') rounding may decide an index.

    That is where the two nearest codes are equally far to 1e-5, or where one of a few moves of the latents by 1e-5 of their size
    changes the index, which can be asked of every quantizer.
    """
    quantizer = tokenizer.model.quantizer
    latents = np.asarray(tokenizer.model.encoder.predict_on_batch(keras.ops.convert_to_numpy(rescale(images))), "float32")
    rng, size = np.random.default_rng(0), np.sqrt(np.mean(np.square(latents), axis=-1, keepdims=True))
    expected = _indices(quantizer, latents)
    ties = _equally_far(quantizer, latents) if isinstance(quantizer, CodebookQuantizer) else np.zeros(latents.shape[:-1], bool)
    for _ in range(8):
        moved = latents + NEAR_TIE * size * rng.choice(np.array([-1, 1], "float32"), latents.shape)
        ties |= (_indices(quantizer, moved.astype("float32")) != expected).reshape(*ties.shape, -1).any(-1)
    return ties


def _indices(quantizer: Quantizer, latents: np.ndarray) -> np.ndarray:
    indices = quantizer.latents_to_indices(keras.ops.convert_to_tensor(latents))
    return np.asarray(keras.ops.convert_to_numpy(indices))


def _equally_far(quantizer: CodebookQuantizer, latents: np.ndarray) -> np.ndarray:
    compared = quantizer.comparable(keras.ops.convert_to_tensor(latents))
    flat, codes = (np.asarray(keras.ops.convert_to_numpy(tensor), "float64") for tensor in (compared, quantizer.codes()))
    flat = flat.reshape(-1, flat.shape[-1])
    gaps = []
    for start in range(0, len(flat), 1024):
        rows = flat[start : start + 1024]
        distances = (rows**2).sum(1, keepdims=True) - 2 * rows @ codes.T + (codes**2).sum(1)
        nearest, second = np.partition(distances, 1, axis=1)[:, :2].T
        gaps.append((second - nearest) / np.maximum(second, 1e-12))
    return (np.concatenate(gaps) < NEAR_TIE).reshape(latents.shape[:-1])
