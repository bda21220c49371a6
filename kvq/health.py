"""Is the codebook of a trained tokenizer healthy? What is measured, what it means, and which setting to change."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from kvq.codebook_use import CodeUse, perplexity
from kvq.errors import DataError
from kvq.evaluation import Images
from kvq.findings import findings, rms
from kvq.ops import rescale
from kvq.progress import Progress
from kvq.quantizers.codebook_quantizer import CodebookQuantizer
from kvq.tokenizer import Tokenizer

IMAGES = 512  # of each split: enough for means, and a minute on a CPU


class SplitUse:
    """What images of one split show of a tokenizer.

    Attributes:
        use: Counts of codes.
        images: How many there were.
        mse: Mean squared error of reconstructions, of images in [-1, 1].
        latent_rms, latent_deviation: Root of the mean square of latents, and of what is left of them without their mean, in the
            form in which they are compared with codes.
        mse_unquantized: As `mse`, decoded from latents that were not quantized; None of a quantizer without one codebook.
        relative_error: Mean squared distance of latents to their codes, over the latents' variance; None of the same.
    """

    def __init__(self, tokenizer: Tokenizer, images: Images, progress: Progress):
        self.model = tokenizer.model
        self.use = CodeUse(tokenizer.vocabulary_size, tokenizer.depth or 1)
        self.images = 0
        # Of images: summed errors. Of positions: how many, summed latents, squares, and squared distances to codes.
        self._errors = self._plain_errors = self._squares = self._distances = 0.0
        self._positions, self._sums = 0, np.zeros(self.model.decoder.input_shape[-1])
        progress.start(len(images), 0)
        for number, batch in enumerate(images, 1):
            if len(batch["images"]):
                self._add(batch["images"])
            progress.step(number)
        progress.stop()
        if not self.images:
            raise DataError(f"No image of {images.source.name} ({images.source.split}) can be used.")
        self.mse = self._errors / self.images
        square, mean = self._squares / self._positions, self._sums / self._positions
        self.latent_rms = float(np.sqrt(square))
        self.latent_deviation = float(np.sqrt(max(square - float(np.sum(mean**2)), 0.0)))
        self.mse_unquantized = self.relative_error = None
        if isinstance(self.model.quantizer, CodebookQuantizer):
            variance = self.latent_deviation**2
            self.mse_unquantized = self._plain_errors / self.images
            self.relative_error = self._distances / self._positions / variance if variance else float("inf")

    def _add(self, images: NDArray[np.uint8]) -> None:
        quantizer = self.model.quantizer
        shown = _array(rescale(ops.convert_to_tensor(images)))
        latents = _array(self.model.encoder.predict_on_batch(shown))
        indices = quantizer.latents_to_indices(ops.convert_to_tensor(latents))
        codes = _array(quantizer.indices_to_codes(indices))
        self.use.add(_array(indices), self.images)
        self._errors += self._error(codes, shown)
        if isinstance(quantizer, CodebookQuantizer):
            latents = _array(quantizer.comparable(ops.convert_to_tensor(latents)))
            self._plain_errors += self._error(latents, shown)
            self._distances += float(np.sum((latents.astype("float64") - codes) ** 2))
        self._squares += float(np.sum(latents.astype("float64") ** 2))
        self._sums += latents.sum(axis=(0, 1, 2), dtype="float64")
        self._positions += latents[..., 0].size
        self.images += len(images)

    def _error(self, codes: NDArray[np.floating], shown: NDArray[np.floating]) -> float:
        """Sum over images of the mean squared error of what the decoder makes of codes."""
        return float(np.sum(np.mean((self.model.decoder.predict_on_batch(codes) - shown) ** 2, axis=(1, 2, 3))))


def diagnose(
    path: str | Path,
    data: str | Path | None = None,
    images: int = IMAGES,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Looks for what commonly ails codebooks, on training and on validation images.

    Args:
        path: Run folder or model folder.
        data: Images with both splits; without it, those that the model was trained and validated on.
        images: How many of each split, from the first on.
        batch_size: How many go through the model at once, at least 1.
        progress: Told `start`, `step` and `stop` on the way, in batches; twice.

    Returns:
        `measured`: `images`, `usage`, `perplexity`, `dead` (lists over the indices of a position), `latent_rms`,
        `latent_deviation`, `code_rms` (of used codes; null for quantizers without one codebook), `relative_error` (distance to
        codes over the latents' variance), `quantization_share` (of the reconstruction error, what is gone where latents are not
        quantized; null without one codebook), `mse`, `validation_mse`, `code_shift` (Jensen-Shannon divergence of the codes of
        training and validation, in bits beyond that of two halves of training); and `findings`: each of `name`, `found`,
        `remedy`, `keys` (settings that this quantizer has, of one inside as `quantizer.base.decay`); empty where all is
        well. `backend`, `weights_sha256`.

    Raises:
        ArtifactError, DataError: If the model or the images cannot be had.
    """
    tokenizer, progress = Tokenizer.load(path), progress or Progress()
    # Both are opened first: that one of them cannot be had is found out before anything is computed.
    splits = [Images(path, tokenizer.config, data, split, images, batch_size) for split in ("train", "test")]
    train, validation = (SplitUse(tokenizer, collection, progress) for collection in splits)
    codes = _codes(tokenizer)
    measured = _measured(train, validation, codes)
    section, replaceable = tokenizer.config.quantizer, tokenizer.model.quantizer.is_replaceable
    return {
        "measured": measured,
        "findings": [vars(found) for found in findings(measured, train.use.counts, codes, section, replaceable)],
        "backend": keras.backend.backend(),
        "weights_sha256": tokenizer.config.weights_sha256,
    }


def _codes(tokenizer: Tokenizer) -> NDArray[np.floating] | None:
    quantizer = tokenizer.model.quantizer
    return _array(quantizer.codes()) if isinstance(quantizer, CodebookQuantizer) else None


def _measured(train: SplitUse, validation: SplitUse, codes: NDArray[np.floating] | None) -> dict[str, Any]:
    counts = train.use.counts
    used = counts[0] > 0
    return {
        "images": train.images,
        "validation_images": validation.images,
        "usage": [float(value) for value in (counts > 0).mean(axis=1)],
        "perplexity": [perplexity(row) for row in counts],
        "dead": [int(value) for value in (counts == 0).sum(axis=1)],
        "latent_rms": train.latent_rms,
        "latent_deviation": train.latent_deviation,
        "code_rms": None if codes is None else rms(codes[used]),
        "relative_error": train.relative_error,
        "quantization_share": None if train.mse_unquantized is None or not train.mse else 1.0 - train.mse_unquantized / train.mse,
        "mse": train.mse,
        "validation_mse": validation.mse,
        "code_shift": max(_divergence(*rows) for rows in zip(counts, validation.use.counts, strict=True)),
    }


def _array(tensor: Any) -> NDArray[Any]:
    return np.asarray(ops.convert_to_numpy(tensor))


def _divergence(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Jensen-Shannon divergence in bits, less what two samples of these sizes from one source would show, about."""
    p, q = first / first.sum(), second / second.sum()
    m = (p + q) / 2

    def relative(a: NDArray[np.floating]) -> float:
        some = a > 0
        return float(np.sum(a[some] * np.log2(a[some] / m[some])))

    # Miller and Madow: an entropy estimated from n counts of k codes is about (k - 1) / 2n nats too low.
    codes = int((m > 0).sum())
    excess = (codes - 1) / (8 * np.log(2)) * (1 / first.sum() + 1 / second.sum())
    return max(0.0, (relative(p) + relative(q)) / 2 - float(excess))
