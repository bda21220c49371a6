"""Which codes of a tokenizer a set of images uses, how often, and where: in numbers and as a picture."""

import io
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from kvq import ops
from kvq.atomic import write_bytes
from kvq.code_atlas import CodeRow, code_atlas
from kvq.errors import DataError
from kvq.evaluation import Images
from kvq.progress import Progress
from kvq.tokenizer import Tokenizer

SHOWN = 16  # most and least used codes that are listed and drawn
PATCHES = 8  # of a code in the picture, at most one from an image


class CodeUse:
    """Counts codes.

    Args:
        codebook_size: Number of values an index can take.
        depth: Indices of a position, at least 1. Each has counts of its own.

    Attributes:
        counts: int64 (depth, codebook_size).
    """

    def __init__(self, codebook_size: int, depth: int):
        self.counts = np.zeros((depth, codebook_size), np.int64)

    def add(self, tokens: NDArray[np.integer], first: int) -> None:
        """Tokens (n, rows, columns), or (n, rows, columns, depth), of the images from number `first` on."""
        self.counts += np.bincount(self._rows(tokens).ravel(), minlength=self.counts.size).reshape(self.counts.shape)

    def _rows(self, tokens: NDArray[np.integer]) -> NDArray[np.integer]:
        """Of images (n, positions, depth): row of each token in the codebooks of all depths, one after the other."""
        depth, size = self.counts.shape
        return tokens.reshape(len(tokens), -1, depth) + np.arange(depth) * size

    def most_used(self) -> list[tuple[int, int]]:
        """Level and code, the most used first, up to `SHOWN`."""
        return self._used()[::-1][:SHOWN]

    def least_used(self) -> list[tuple[int, int]]:
        """Level and code of those that are used at all, the least used first, up to `SHOWN`."""
        return self._used()[:SHOWN]

    def _used(self) -> list[tuple[int, int]]:
        flat = self.counts.ravel()
        used = np.flatnonzero(flat)
        order = used[np.argsort(flat[used], kind="stable")]
        ends = order if len(order) <= 2 * SHOWN else np.concatenate([order[:SHOWN], order[-SHOWN:]])
        return [divmod(int(code), self.counts.shape[1]) for code in ends]


class CodePlaces(CodeUse):
    """Counts codes, and keeps for each code the first places that hold it, one from an image."""

    def __init__(self, codebook_size: int, depth: int):
        super().__init__(codebook_size, depth)
        self._places = np.zeros((depth * codebook_size, PATCHES, 2), np.int32)
        self._found = np.zeros(depth * codebook_size, np.int32)

    def add(self, tokens: NDArray[np.integer], first: int) -> None:
        super().add(tokens, first)
        for number, of_image in enumerate(self._rows(tokens), first):
            codes, at = np.unique(of_image, return_index=True)
            wanted = self._found[codes] < PATCHES
            codes, at = codes[wanted], at[wanted]
            self._places[codes, self._found[codes]] = np.stack([np.full(len(at), number), at // len(self.counts)], axis=1)
            self._found[codes] += 1

    def places(self, level: int, code: int) -> NDArray[np.int32]:
        """(n, 2): number of an image, and of a position in it, row by row; n up to `PATCHES`."""
        row = level * self.counts.shape[1] + code
        return self._places[row, : self._found[row]]


def codebook(
    path: str | Path,
    data: str | Path | None = None,
    split: str = "train",
    images: int | None = None,
    atlas: str | Path | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Counts how often each code is used by a collection of images, prepared as for evaluation.

    Args:
        path: Run folder or model folder.
        data: Known name, file or folder; without it, the data set that the model was trained on.
        split: Of the data: train, test or all.
        images: How many at most, from the first on.
        atlas: A PNG to write: the most and the least used codes, each with patches of images that it stands for and, where a
            position has one index, what the decoder makes of it alone.
        batch_size: How many go through the model at once, at least 1.
        progress: Told `start`, `step` and `stop` on the way, in batches.

    Returns:
        `images`, `skipped` (files that could not be used), `codebook_size`, `depth` (indices of a position), `used` and `dead`
        (codes, over all depths), `usage` and `perplexity` (means over depths), `most_used` and `least_used` (each of `level`,
        `code`, `count`), `atlas`, and what describes the measurement: `data`, `split`, `crop`, `backend`, `weights_sha256`.

    Raises:
        ArtifactError, DataError: If the model or the images cannot be had, or the picture not be written.
    """
    if atlas and Path(atlas).suffix.lower() != ".png":
        raise DataError(f"The picture of codes is a PNG. Received: {atlas}. Give an --atlas that ends in .png.")
    tokenizer = Tokenizer.load(path)
    collection = Images(path, tokenizer.config, data, split, images, batch_size)
    shape = tokenizer.vocabulary_size, tokenizer.depth or 1
    places = CodePlaces(*shape) if atlas else None
    use = places or CodeUse(*shape)
    seen, skipped = count_codes(tokenizer, collection, use, progress)
    if places and atlas:
        _draw(tokenizer, collection, places, Path(atlas))
    return {
        "images": seen,
        "skipped": skipped,
        "codebook_size": tokenizer.vocabulary_size,
        "depth": len(use.counts),
        "used": int((use.counts > 0).sum()),
        "dead": int((use.counts == 0).sum()),
        "usage": float(np.mean(use.counts > 0)),
        "perplexity": float(np.mean([perplexity(of_level) for of_level in use.counts])),
        "most_used": _described(use, use.most_used()),
        "least_used": _described(use, use.least_used()),
        "atlas": None if atlas is None else str(atlas),
        "data": collection.source.name,
        "split": split,
        "crop": tokenizer.config.images.crop,
        "backend": keras.backend.backend(),
        "weights_sha256": tokenizer.config.weights_sha256,
    }


def count_codes(tokenizer: Tokenizer, images: Images, use: CodeUse, progress: Progress | None = None) -> tuple[int, int]:
    """Adds the codes that images use; how many that were, and how many files could not be used."""
    seen, skipped = 0, []
    progress = progress or Progress()
    progress.start(len(images), 0)
    for number, batch in enumerate(images):
        if len(batch["images"]):
            use.add(tokenizer.encode(batch["images"], images.batch_size), number * images.batch_size)
        seen += len(batch["images"])
        skipped += batch["skipped"]
        progress.step(number + 1)
    progress.stop()
    if not seen:
        raise DataError(f"No image of {images.source.name} can be used. The first: {skipped[0][0]}: {skipped[0][1]}.")
    return seen, len(skipped)


def perplexity(counts: NDArray[np.int64]) -> float:
    """`kvq.ops.perplexity` of counts (codebook_size,)."""
    return float(keras.ops.convert_to_numpy(ops.perplexity(keras.ops.convert_to_tensor(counts, "float32"))))


def _described(use: CodeUse, codes: list[tuple[int, int]]) -> list[dict[str, int]]:
    return [{"level": level, "code": code, "count": int(use.counts[level, code])} for level, code in codes]


def _draw(tokenizer: Tokenizer, images: Images, use: CodePlaces, path: Path) -> None:
    lists = {"most used": use.most_used(), "least used": use.least_used()}
    wanted = {code: use.places(*code) for codes in lists.values() for code in codes}
    originals = images.chosen(int(number) for places in wanted.values() for number, _ in places)
    step = tokenizer.downsampling

    def row(level: int, code: int) -> CodeRow:
        name = f"{level}.{code}" if tokenizer.depth else str(code)
        cells = [(originals[int(number)], int(position)) for number, position in wanted[level, code]]
        alone = None if tokenizer.depth else tokenizer.decode(np.full((1, 3, 3), code))[0]
        return CodeRow(f"{name}: {use.counts[level, code]:,} times", cells, alone)

    drawn = code_atlas({title: [row(*code) for code in codes] for title, codes in lists.items()}, step)
    content = io.BytesIO()
    drawn.save(content, "PNG")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.getvalue())
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}. Give another --atlas.") from None
