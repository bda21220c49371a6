"""Is the codebook of a trained tokenizer healthy? What is measured, what it means, and which setting to change."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from kvq import artifact
from kvq.codebook_use import CodeUse, Images
from kvq.errors import DataError
from kvq.ops import rescale
from kvq.progress import Progress
from kvq.quantizers.codebook_quantizer import CodebookQuantizer
from kvq.run import Run
from kvq.tokenizer import Tokenizer

# Settings that bring codes back to where latents are.
_RESTART = ("codebook.initialise", "codebook.replace_dead_every", "codebook.dead_below", "train.learning_rate")
IMAGES = 512  # of each split: enough for means, and a minute on a CPU


@dataclass(frozen=True)
class Finding:
    """Something that is wrong: its name, what was found, what to do, and the configuration's keys for it."""

    name: str
    found: str
    remedy: str
    keys: tuple[str, ...]


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
        `measured`: `images`, `usage`, `perplexity`, `dead` (lists over the indices of a position), `latent_rms`, `code_rms` (of
        used codes; null for quantizers without one codebook), `relative_error` (distance to codes over the latents' variance),
        `quantization_share` (of the reconstruction error, what is gone where latents are not quantized; null without one
        codebook), `mse`, `validation_mse`, `code_shift` (Jensen-Shannon divergence of the codes of training and validation, in
        bits beyond that of two halves of training); and `findings`: each of `name`, `found`, `remedy`, `keys`; empty where all is
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
        "findings": [
            {**vars(finding), "keys": _existing(finding.keys, tokenizer.config.quantizer)}
            for finding in _findings(measured, train, codes, tokenizer)
        ],
        "backend": keras.backend.backend(),
        "weights_sha256": tokenizer.config.weights_sha256,
    }


def _existing(keys: tuple[str, ...], section: Any) -> list[str]:
    """Those of the settings that a quantizer of this section has, where it has them: of one inside, as `quantizer.base.decay`."""
    sections, found = _sections(section), []
    for key in keys:
        part, name = key.split(".")
        if part == "quantizer":
            found += [f"{path}.{name}" for path, each in sections.items() if name in type(each).model_fields][:1]
        elif part != "codebook" or _has_codebook(section):
            found.append(key)
    return found


def _sections(section: Any) -> dict[str, Any]:
    """A quantizer's section and those inside it, by the key that each has in a configuration."""
    sections = {"quantizer": section}
    while hasattr(section, "base"):
        section = section.base
        sections[f"{[*sections][-1]}.base"] = section
    return sections


def _has_codebook(section: Any) -> bool:
    """Whether there are codes that can be placed and replaced. Others are computed from their indices."""
    return any("codebook_size" in type(each).model_fields for each in _sections(section).values())


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
        "perplexity": [_perplexity(row) for row in counts],
        "dead": [int(value) for value in (counts == 0).sum(axis=1)],
        "latent_rms": train.latent_rms,
        "code_rms": None if codes is None else _rms(codes[used]),
        "relative_error": None if codes is None else train.relative_error,
        "quantization_share": None if codes is None or not train.mse else 1.0 - train.mse_unquantized / train.mse,
        "mse": train.mse,
        "validation_mse": validation.mse,
        "code_shift": max(_divergence(*rows) for rows in zip(counts, validation.use.counts, strict=True)),
    }


def _findings(
    measured: dict[str, Any], train: SplitUse, codes: NDArray[np.floating] | None, tokenizer: Tokenizer
) -> Iterator[Finding]:
    counts = train.use.counts
    if train.latent_deviation <= 1e-4 * max(train.latent_rms, 1e-8) or train.latent_rms < 1e-8:
        yield Finding(
            "constant latents",
            f"The encoder gives nearly the same latent for everything (deviation {train.latent_deviation:.2g}).",
            "Train again with a lower learning rate, a warm-up, or clipped gradients.",
            ("train.learning_rate", "train.warmup_steps", "train.clip_norm"),
        )
    placing = "Start codes from data and replace dead ones; a" if _has_codebook(tokenizer.config.quantizer) else "A"
    restart = f"{placing} lower learning rate keeps latents from running away."
    for level, row in enumerate(counts):
        yield from _of_one_code(row, _who(level, counts), level, restart)
    if any(section.kind == "shared_residual" for section in _sections(tokenizer.config.quantizer).values()):
        # Each level uses the codes of its scale, and all together the codebook.
        counts = counts.sum(axis=0, keepdims=True)
    for level, row in enumerate(counts):
        yield from _of_use(row, _who(level, counts), restart)
    if codes is not None:
        yield from _of_norms(measured, train, codes)
    if measured["relative_error"] is not None and measured["relative_error"] > 0.5 and train.latent_deviation:
        yield Finding(
            "coarse codes",
            f"Codes explain only {max(0.0, 1 - measured['relative_error']):.0%} of the latents' variance.",
            "Use more codes, several per position, or codes of fewer channels; a higher commitment weight holds latents close.",
            ("quantizer.codebook_size", "quantizer.kind", "quantizer.commitment_weight"),
        )
    if measured["validation_mse"] > 1.3 * measured["mse"]:
        yield Finding(
            "worse on validation",
            f"The error is {measured['validation_mse'] / measured['mse']:.2f} times that of training images.",
            "Train on more images or fewer steps; see that both are of the same kind.",
            ("data.source", "data.validation", "data.flip", "train.steps"),
        )
    if measured["code_shift"] > 0.1:
        yield Finding(
            "other codes on validation",
            f"Validation images use the codes differently: {measured['code_shift']:.2f} bits of 1.",
            "See that training and validation images are of the same kind and prepared alike.",
            ("data.source", "data.validation", "data.resize"),
        )


def _who(level: int, counts: NDArray[np.int64]) -> str:
    return f"Level {level}" if len(counts) > 1 else "The codebook"


def _of_one_code(counts: NDArray[np.int64], who: str, level: int, restart: str) -> Iterator[Finding]:
    if (counts > 0).sum() > 1:
        return
    if level:
        fewer = ("quantizer.levels", "quantizer.groups")
        yield Finding(
            "unused level", f"{who} uses one code: it adds nothing.", f"Take fewer levels. {restart}", (*fewer, *_RESTART)
        )
    else:
        yield Finding("one code", f"{who} uses one code of {len(counts)}: it tells nothing.", restart, _RESTART)


def _of_use(counts: NDArray[np.int64], who: str, restart: str) -> Iterator[Finding]:
    used, total, size = int((counts > 0).sum()), int(counts.sum()), len(counts)
    if used == 1:
        return
    # Of a few positions only so many codes could be used, were all used alike.
    possible = size * -np.expm1(-total / size)
    if used < 0.5 * possible:
        yield Finding(
            "dead codes",
            f"{who} uses {used} of {size} codes.",
            f"{restart} Or fewer codes.",
            (*_RESTART, "quantizer.codebook_size"),
        )
    if _perplexity(counts) < 0.15 * min(used, possible) or (used < 0.5 * possible and _perplexity(counts) < 2):
        yield Finding(
            "few codes carry all",
            f"{who} uses {used} codes, as unevenly as {_perplexity(counts):.1f} would be used evenly.",
            f"{restart} The entropy regulariser evens out.",
            (*_RESTART, "quantizer.regularisers"),
        )


def _of_norms(measured: dict[str, Any], train: SplitUse, codes: NDArray[np.floating]) -> Iterator[Finding]:
    if not train.latent_rms:
        return
    unused = codes[train.use.counts[0] == 0]
    keys = ("codebook.initialise", "codebook.replace_dead_every", "quantizer.decay")
    for who, rms in (("Used codes", measured["code_rms"]), ("Unused codes", _rms(unused) if len(unused) else None)):
        if rms is None:
            continue
        ratio = rms / train.latent_rms
        if ratio < 0.2:
            yield Finding(
                "codes at the origin",
                f"{who} are {ratio:.2g} times as long as latents: they shrank, or never left the start.",
                "Start codes from data; where they follow averages, a lower decay follows faster.",
                keys,
            )
        if ratio > 5:
            yield Finding(
                "codes far away",
                f"{who} are {ratio:.2g} times as long as latents: the latents left them, or they exploded.",
                "Start codes from data, replace dead ones, and lower the learning rate.",
                (*keys, "train.learning_rate"),
            )


def _perplexity(counts: NDArray[np.int64]) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def _rms(codes: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.mean(np.sum(codes.astype("float64") ** 2, axis=-1))))


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
