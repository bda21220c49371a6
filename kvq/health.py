"""Is the codebook of a trained tokenizer healthy? What is measured, what it means, and which setting to change."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from kvq import artifact
from kvq.codebook_use import CodeUse, Images, perplexity
from kvq.errors import DataError
from kvq.findings import findings, rms
from kvq.ops import rescale
from kvq.progress import Progress
from kvq.quantizers.codebook_quantizer import CodebookQuantizer
from kvq.run import Run
from kvq.tokenizer import Tokenizer

IMAGES = 512  # of each split: enough for means, and a minute on a CPU


class SplitUse:
    """What images of one split show of a tokenizer.

    Attributes:
        use: Counts of codes.
        mse: Mean squared error of reconstructions, of images in [-1, 1].
        mse_unquantized: The same, decoded from latents that were not quantized.
        latent_rms, latent_deviation: Root of the mean square of latents, and of what is left of them without their mean, in the
            form in which they are compared with codes.
        relative_error: Mean squared distance of latents to their codes, over the latents' variance.
    """

    def __init__(self, tokenizer: Tokenizer, images: Images, progress: Progress):
        model, quantizer = tokenizer.model, tokenizer.model.quantizer
        compared = quantizer.comparable if isinstance(quantizer, CodebookQuantizer) else lambda latents: latents
        self.use = CodeUse(tokenizer.vocabulary_size, tokenizer.depth or 1)
        errors, plain, squares, distances, sums, count = 0.0, 0.0, 0.0, 0.0, 0.0, 0
        seen = 0
        progress.start(len(images), 0)
        for number, batch in enumerate(images, 1):
            if len(batch["images"]):
                shown = np.asarray(ops.convert_to_numpy(rescale(ops.convert_to_tensor(batch["images"]))))
                latents = np.asarray(model.encoder.predict_on_batch(shown))
                indices = quantizer.latents_to_indices(ops.convert_to_tensor(latents))
                codes = np.asarray(ops.convert_to_numpy(quantizer.indices_to_codes(indices)))
                self.use.add(np.asarray(ops.convert_to_numpy(indices)), seen)
                errors += float(np.sum(np.mean((model.decoder.predict_on_batch(codes) - shown) ** 2, axis=(1, 2, 3))))
                inside = np.asarray(ops.convert_to_numpy(compared(ops.convert_to_tensor(latents))), "float64")
                plain += float(
                    np.sum(np.mean((model.decoder.predict_on_batch(inside.astype("float32")) - shown) ** 2, axis=(1, 2, 3)))
                )
                squares, distances = squares + float(np.sum(inside**2)), distances + float(np.sum((inside - codes) ** 2))
                sums, count = sums + inside.sum(axis=(0, 1, 2)), count + inside[..., 0].size
                seen += len(shown)
            progress.step(number)
        progress.stop()
        if not seen:
            raise DataError(f"No image of {images.source.name} ({images.source.split}) can be used.")
        mean = sums / count
        self.images = seen
        self.mse, self.mse_unquantized = errors / seen, plain / seen
        self.latent_rms = float(np.sqrt(squares / count))
        self.latent_deviation = float(np.sqrt(max(squares / count - float(np.sum(mean**2)), 0.0)))
        self.relative_error = distances / count / self.latent_deviation**2 if self.latent_deviation else float("inf")


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
    place = data if data is not None else _validated_on(path)
    # Both are opened first: that one of them cannot be had is found out before anything is computed.
    splits = [Images(path, tokenizer.config, *each, images, batch_size) for each in ((data, "train"), (place, "test"))]
    train, validation = (SplitUse(tokenizer, collection, progress) for collection in splits)
    codes = _codes(tokenizer)
    measured = _measured(train, validation, codes)
    return {
        "measured": measured,
        "findings": [vars(found) for found in findings(measured, train.use.counts, codes, tokenizer.config.quantizer)],
        "backend": keras.backend.backend(),
        "weights_sha256": tokenizer.config.weights_sha256,
    }


def _validated_on(path: str | Path) -> str | None:
    run = Run(artifact.model_folder(path).parent)
    return run.config.data.validation if run.exists else None


def _codes(tokenizer: Tokenizer) -> NDArray[np.floating] | None:
    quantizer = tokenizer.model.quantizer
    return np.asarray(ops.convert_to_numpy(quantizer.codes())) if isinstance(quantizer, CodebookQuantizer) else None


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
        "relative_error": None if codes is None else train.relative_error,
        "quantization_share": None if codes is None or not train.mse else 1.0 - train.mse_unquantized / train.mse,
        "mse": train.mse,
        "validation_mse": validation.mse,
        "code_shift": max(_divergence(*rows) for rows in zip(counts, validation.use.counts, strict=True)),
    }


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
