"""How good a tokenizer is on a set of images."""

import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from kvq import artifact
from kvq.artifact import ArtifactConfig
from kvq.data import evaluation_batches, evaluation_transforms, iterate, open_source
from kvq.data.contract import Batch, Source
from kvq.data.places import KNOWN
from kvq.data.sources import check_images
from kvq.errors import DataError
from kvq.metrics import CodebookUsage, psnr, ssim
from kvq.model import VQVAE
from kvq.ops import to_uint8
from kvq.progress import Progress
from kvq.quantizers.quantizer import BATCH_TERMS
from kvq.tokenizer import Tokenizer


def evaluate(
    path: str | Path,
    data: str | Path | None = None,
    split: str = "test",
    images: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a saved tokenizer.

    Args:
        path: Run folder or model folder.
        data: Known name, file or folder; without it, the images that the model was trained or, as test images, validated on.
        split: Of the data: train, test or all.
        images: How many at most, from the first on.
        batch_size: How many go through the model at once. The result does not depend on it.
        progress: Told `start(total, 0)`, `step(done)` and `stop()` on the way, in batches.

    Returns:
        `images` (how many), `skipped` (how many files could not be used), `mse` (in [-1, 1]), `psnr` in dB and `ssim` (from uint8
        images, means of per-image values), `losses` (weighted terms, means over images; none that only a batch has), `usage` and
        `perplexity` (of the whole set), `images_per_second`, and what describes the measurement: `data`, `split`, `crop`,
        `backend`, `weights_sha256`.

    Raises:
        ArtifactError, DataError: If the model or the images cannot be had.
    """
    tokenizer = Tokenizer.load(path)
    config = tokenizer.config
    collection = Images(path, config, data, split, images, batch_size)
    progress = progress or Progress()
    progress.start(len(collection), 0)
    result = measure(tokenizer.model, collection, progress)
    progress.stop()
    return {
        **result,
        "data": collection.source.name,
        "split": split,
        "crop": config.images.crop,
        "backend": keras.backend.backend(),
        "weights_sha256": config.weights_sha256,
    }


class Images:
    """The images of a collection, prepared for a tokenizer, in batches that can be had again.

    Args:
        path: Run folder or model folder.
        config: What its artifact says.
        data, split: As of `kvq.evaluate`.
        limit: How many at most, from the first on.
        batch_size: At least 1.
    """

    def __init__(
        self, path: str | Path, config: ArtifactConfig, data: str | Path | None, split: str, limit: int | None, batch_size: int
    ):
        self.source: Source = images_for(path, config, data, split)
        self.batch_size = batch_size
        prepare = config.images
        transforms = evaluation_transforms(prepare.pad, prepare.crop, prepare.resize, prepare.small)
        self._batches = evaluation_batches(self.source, transforms, batch_size, limit=limit)

    def __len__(self) -> int:
        """How many batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iterate(self._batches)

    def chosen(self, numbers: Iterable[int]) -> dict[int, NDArray[np.uint8]]:
        """Images (h, w, c) by number: that of their batch times `batch_size`, plus their place there. Each batch is read once."""
        images: dict[int, NDArray[np.uint8]] = {}
        for batch, of_batch in itertools.groupby(sorted({*numbers}), lambda number: number // self.batch_size):
            read = self._batches[batch]["images"]
            # Copies: a view would keep its whole batch.
            images |= {number: read[number % self.batch_size].copy() for number in of_batch}
        return images


def images_for(path: str | Path, config: ArtifactConfig, data: str | Path | None, split: str) -> Source:
    """The images that a tokenizer is asked to work on, after a look at whether it can.

    Args:
        path: Run folder or model folder.
        config: What its artifact says.
        data: Known name, file or folder; without it, the images that the model was trained or, as test images, validated on.
        split: Of the data: train, test or all.

    Raises:
        DataError: If there are none, or they do not fit the model.
    """
    source = own_images(path, config.data.name, split) if data is None else open_source(str(data), split)
    check_images(source, config.images.crop, config.images.pad, config.images.resize)
    if source.channels != config.images.channels:
        takes = "1 channel" if config.images.channels == 1 else f"{config.images.channels} channels"
        raise DataError(f"{path} takes images of {takes}. Received: {source.channels} in {source.name}. Give other data.")
    return source


def measure(model: VQVAE, batches: Iterable[Batch], progress: Progress | None = None) -> dict[str, Any]:
    """The measurements of `evaluate` on batches of images that are already cropped."""
    codes = CodebookUsage(model.quantizer.codebook_size, model.quantizer.depth)
    values: dict[str, list[np.ndarray]] = {}
    skipped = 0
    started = time.perf_counter()
    for done, batch in enumerate(batches, 1):
        images = batch["images"]
        skipped += len(batch["skipped"])
        if not len(images):
            continue
        outputs = model.predict_on_batch(images)
        restored = np.asarray(keras.ops.convert_to_numpy(to_uint8(outputs["reconstruction"])))
        error = np.asarray(outputs["reconstruction"], "float64") - (images / 127.5 - 1.0)
        measured = {"mse": np.mean(error**2, axis=(1, 2, 3)), "psnr": psnr(images, restored), "ssim": ssim(images, restored)}
        terms = {name: per_image for name, per_image in outputs["losses"].items() if name not in BATCH_TERMS}
        for name, per_image in {**measured, **terms}.items():
            values.setdefault(name, []).append(np.asarray(per_image, "float64"))
        codes.update_state(outputs["indices"])
        if progress:
            progress.step(done)
    seconds = time.perf_counter() - started
    if not values:
        raise DataError(f"No image is left to measure: {skipped} could not be used.")
    means = {name: float(np.mean(np.concatenate(parts))) for name, parts in values.items()}
    count = sum(len(part) for part in values["mse"])
    losses = {name: mean for name, mean in means.items() if name in model.quantizer.loss_names}
    return {
        "images": count,
        "skipped": skipped,
        "mse": means["mse"],
        "psnr": means["psnr"],
        "ssim": means["ssim"] if np.isfinite(means["ssim"]) else None,
        "losses": {"reconstruction": model.loss_weights["reconstruction"] * means["mse"], **losses},
        **{name: float(value) for name, value in codes.result().items()},
        "images_per_second": count / seconds,
    }


def own_images(path: str | Path, name: str, split: str) -> Source:
    """A split of the images of the run that a model lies in, which may be at a path; else of the known set that it names.

    The run keeps the names of its files: those that came later are not taken for held-out ones, nor do they move the border
    between the splits.

    Raises:
        DataError: If that is no known name: what a model says is not taken for a path. Or if they cannot be had.
    """
    from kvq.run import Run

    run = Run(artifact.run_folder(path))
    if run.exists:
        return open_source(run.config.data.place(split), split, listing=run.listing_file(split))
    if name not in KNOWN:
        raise DataError(f"{path} was trained on {name!r}, which kvq does not know by name. Give --data, the images' place.")
    return open_source(name, split)
