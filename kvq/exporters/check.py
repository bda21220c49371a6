"""Whether an exported part says what the model says."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from kvq.errors import ExportError
from kvq.exporters.parts import Part
from kvq.exporters.samples import of_another_size
from kvq.ops import rescale
from kvq.quantizers import CodebookQuantizer, Quantizer
from kvq.tokenizer import Tokenizer

Run = Callable[[np.ndarray], np.ndarray]
# 64 images come in four batches of 13 and one of 12: neither 1 or 2, which exporters trace with, nor always the same.
BATCH = 13
NEAR_TIE = 1e-5  # relative size of what rounding may do
LISTED = 100  # near-ties at most
TIMED = 5  # runs, of which the median counts


class Sample(NamedTuple):
    """A batch of images, what the tokenizer itself makes of it, and where (n, h', w') rounding may decide an index."""

    images: np.ndarray
    indices: np.ndarray
    reconstruction: np.ndarray
    ties: np.ndarray


def make_samples(tokenizer: Tokenizer, images: np.ndarray, other_size: bool) -> list[Sample]:
    """Batches of uint8 images (n, h, w, c); with `other_size` the first one again, larger and not square."""
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    if other_size:
        batches.append(of_another_size(batches[0], tokenizer.downsampling))
    indices = [tokenizer.encode(batch) for batch in batches]
    return [
        Sample(batch, grid, tokenizer.decode(grid), near_ties(tokenizer, batch))
        for batch, grid in zip(batches, indices, strict=True)
    ]


def compare(part: Part, samples: list[Sample], run: Run) -> dict[str, Any]:
    """Runs an exported part beside the model it comes from.

    Args:
        part: What was exported.
        samples: What to compare on.
        run: The part in its runtime.

    Returns:
        `images`, `batches` and `sizes` (what was compared), `near_ties` (how many positions where rounding may decide) and
        `near_tie_positions` (batch, image, row, column; the first 100), `different_indices` or `largest_difference` in grey
        levels, and `latency_ms`, batch size to the median of 5 runs: `exported` and `keras`.

    Raises:
        ExportError: If it does not run, indices differ where there is no near-tie, or pixels by more than one grey level.
    """
    differences = [_difference(part, sample, run) for sample in samples]
    ties = [[number, *map(int, place)] for number, sample in enumerate(samples) for place in np.argwhere(sample.ties)]
    first = getattr(samples[0], part.input_name)
    return {
        "images": sum(len(sample.images) for sample in samples),
        "batches": sorted({len(sample.images) for sample in samples}),
        "sizes": sorted({f"{sample.images.shape[1]}x{sample.images.shape[2]}" for sample in samples}),
        "near_ties": len(ties),
        "near_tie_positions": ties[:LISTED],
        **(
            {"different_indices": sum(differences)} if part.output_name == "indices" else {"largest_difference": max(differences)}
        ),
        "latency_ms": {
            str(len(batch)): {"exported": _milliseconds(run, batch), "keras": _milliseconds(part.model.predict_on_batch, batch)}
            for batch in (first[:1], first)
        },
    }


def _difference(part: Part, sample: Sample, run: Run) -> int:
    """How many indices differ, or by how many grey levels the pixels do at most."""
    name = part.model.name.replace("_", " ")
    inputs, expected = getattr(sample, part.input_name), getattr(sample, part.output_name)
    try:
        actual = run(inputs)
    except Exception as error:
        raise ExportError(f"The exported {name} does not run: {type(error).__name__}: {str(error).strip()}") from error
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise ExportError(
            f"The exported {name} gives {actual.dtype} {actual.shape}, not {expected.dtype} {expected.shape}, "
            f"for {inputs.dtype} {inputs.shape}."
        )
    size, ties = f"{sample.images.shape[1]}x{sample.images.shape[2]}", sample.ties
    if part.output_name == "indices":
        different = (actual != expected).reshape(*ties.shape, -1).any(-1)
        if (different & ~ties).any():
            raise ExportError(
                f"The exported {name} gives other indices at {(different & ~ties).mean():.2%} of the positions of {size} images."
            )
        return int(different.sum())
    difference = np.abs(actual.astype(int) - expected.astype(int)).max(axis=(1, 2, 3))
    # An image with a near-tie may rightly come out of another code.
    certain = ~ties.any(axis=(1, 2)) if part.input_name == "images" else np.ones(len(ties), bool)
    if (difference[certain] > 1).any():
        raise ExportError(
            f"The exported {name} differs from the model by {difference[certain].max()} grey levels on {size} images."
        )
    return int(difference[certain].max(initial=0))


def _milliseconds(run: Callable[[np.ndarray], Any], inputs: np.ndarray) -> float:
    run(inputs)
    times = []
    for _ in range(TIMED):
        start = time.perf_counter()
        run(inputs)
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)


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
