"""A model without the codes that a set of images does not use."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from kvq import artifact
from kvq.artifact import ArtifactConfig
from kvq.atomic import new_folder, write_text
from kvq.build import build_model
from kvq.codebook_use import CodeUse, count_codes
from kvq.errors import ArtifactError
from kvq.evaluation import Images
from kvq.index_map import NAME, IndexMap
from kvq.model import VQVAE
from kvq.progress import Progress
from kvq.quantizers import Quantizer
from kvq.tensor_names import tensors
from kvq.tokenizer import Tokenizer


def prune(
    path: str | Path,
    out: str | Path,
    data: str | Path | None = None,
    split: str = "train",
    images: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes a model whose codebook holds only the codes that a collection of images uses, and the map of its indices.

    The same images get the same codes, so that their reconstructions stay as they were bit by bit; then all images go through
    both models, which is reported. Other images may have used a dropped code, and get the nearest of the others. Where the
    levels of a residual or product quantizer have codebooks of their own, all keep as many codes as the level that uses most.

    Args:
        path: Run folder or model folder.
        out: A new folder.
        data, split, images, batch_size: The images, as of `kvq.codebook`.
        progress: Told `start`, `step` and `stop` on the way, in batches; twice.

    Returns:
        `out`, `codebook_size` and `previous_size`, `images`, `skipped`, `changed_indices` (positions that got another code than
        before: a distance within rounding of another), `changed_pixels` (of the first images, decoded by both), `data`, `split`,
        `backend`, `weights_sha256`.

    Raises:
        ArtifactError: If the model has no codebook, or `out` exists.
        DataError: If the images cannot be had.
    """
    out = Path(out)
    if out.exists():
        raise ArtifactError(f"{out} must be a new folder. It exists.")
    before = Tokenizer.load(path)
    config = before.config
    _check_prunable(path, config.quantizer)
    collection = Images(path, config, data, split, images, batch_size)
    use = CodeUse(before.vocabulary_size, before.depth or 1)
    seen, skipped = count_codes(before, collection, use, progress)
    model, kept = pruned(before.model, config, use.counts > 0)
    config = smaller(config, len(kept[0]))
    index_map = IndexMap(
        from_weights_sha256=before.config.weights_sha256,
        to_weights_sha256="0" * 64,
        vocabulary=before.vocabulary_size,
        kept=[old.tolist() for old in kept],
    )
    changed_indices, changed_pixels = _compare(before, Tokenizer(model, config), index_map, collection, progress)
    try:
        with new_folder(out) as temporary:
            digest = artifact.save_loaded(model, config, temporary).weights_sha256
            write_text(temporary / NAME, index_map.model_copy(update={"to_weights_sha256": digest}).model_dump_json() + "\n")
    except OSError as error:
        raise ArtifactError(f"{out} cannot be written: {error.strerror or error}. Give another --out.") from None
    return {
        "out": str(out),
        "codebook_size": len(kept[0]),
        "previous_size": before.vocabulary_size,
        "images": seen,
        "skipped": skipped,
        "changed_indices": changed_indices,
        "changed_pixels": changed_pixels,
        "data": collection.source.name,
        "split": split,
        "backend": keras.backend.backend(),
        "weights_sha256": digest,
    }


def pruned(model: VQVAE, config: ArtifactConfig, used: NDArray[np.bool_]) -> tuple[VQVAE, list[NDArray[np.intp]]]:
    """A model with fewer codes, and the old index of each new one, for each index of a position.

    Args:
        used: (depth, codebook_size). At least two codes are kept.
    """
    quantizers = _with_codebooks(model.quantizer)
    if len(quantizers) < len(used):  # shared by all levels
        used = np.repeat(used.any(axis=0, keepdims=True), len(used), axis=0)
    size = max(2, int(used.sum(axis=1).max()))
    # The used ones first; where another level needs more, the first unused ones as well.
    kept = [np.sort(np.argsort(~row, kind="stable")[:size]) for row in used]
    after = smaller(config, size)
    result = build_model(after.model, after.quantizer, after.loss, after.images.channels)
    rows = {id(weight): old for member, old in zip(quantizers, kept, strict=False) for weight in member.weights}
    for (_, weight), (_, new) in zip(tensors(model), tensors(result), strict=True):
        values = np.asarray(keras.ops.convert_to_numpy(weight))
        for axis, (before, wanted) in enumerate(zip(values.shape, new.shape, strict=True)):
            if before != wanted:  # only the axis of codes has changed
                values = values.take(rows[id(weight)], axis=axis)
        new.assign(values)
    return result, kept


def smaller(config: ArtifactConfig, codebook_size: int) -> ArtifactConfig:
    """The same with another number of codes."""
    quantizer = _resized(config.quantizer, codebook_size)
    grids = [grid.model_copy(update={"vocabulary": codebook_size}) for grid in config.grids]
    return config.model_copy(update={"quantizer": quantizer, "grids": grids})


def _resized(section: Any, codebook_size: int) -> Any:
    if hasattr(section, "base"):
        return section.model_copy(update={"base": _resized(section.base, codebook_size)})
    return section.model_copy(update={"codebook_size": codebook_size})


def _check_prunable(path: str | Path, section: Any) -> None:
    while hasattr(section, "base"):
        section = section.base
    if "codebook_size" not in type(section).model_fields:
        raise ArtifactError(f"{path} has no codebook to prune: {section.kind} computes its codes from their indices.")


def _with_codebooks(quantizer: Any) -> list[Quantizer]:
    """The quantizers inside that have a codebook, the first index of a position first."""
    members = getattr(quantizer, "members", [])
    return [inner for member in members for inner in _with_codebooks(member)] if members else [quantizer]


def _compare(
    before: Tokenizer, after: Tokenizer, index_map: IndexMap, images: Images, progress: Progress | None
) -> tuple[int, int]:
    """Positions whose code changed, over all images, and pixels that did, over the first batch with images."""
    changed_indices, changed_pixels = 0, None
    progress = progress or Progress()
    progress.start(len(images), 0)
    for number, batch in enumerate(images, 1):
        if len(batch["images"]):
            old, new = (each.encode(batch["images"], images.batch_size) for each in (before, after))
            changed_indices += int((index_map.renumbered(old) != new).sum())
            if changed_pixels is None:
                pictures = before.decode(old, images.batch_size), after.decode(index_map.renumbered(old), images.batch_size)
                changed_pixels = int((pictures[0] != pictures[1]).sum())
        progress.step(number)
    progress.stop()
    return changed_indices, changed_pixels or 0
