"""Tokens of a model become tokens of its pruned form, without the images."""

from pathlib import Path
from typing import Any

import numpy as np

from kvq import __version__, artifact
from kvq.atomic import new_folder, write_bytes
from kvq.data.token_set import DTYPES, MANIFEST, File, TokenSet, TokenShard, smallest_dtype
from kvq.data.token_source import TokenSource
from kvq.errors import TokensError
from kvq.index_map import IndexMap, read_index_map
from kvq.progress import Progress
from kvq.tokens.shards import SKIPPED, described_file, to_npy
from kvq.untrusted import read_bytes

_SKIPPED_LIMIT = 2**30  # bytes


def migrate(tokens: str | Path, path: str | Path, out: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Writes a token data set with the indices of a pruned model. No image is read and nothing is computed on a backend.

    Args:
        tokens: Folder that `encode` wrote with the model before it was pruned. Its checksums are compared first.
        path: The pruned model, with the map that `prune` wrote.
        out: A new folder; it appears whole or not at all.
        progress: Told `start`, `step` and `stop` on the way, in images.

    Returns:
        `out`, `images`, `vocabulary` and `previous_vocabulary`, `dtype`, `bytes`, `weights_sha256`.

    Raises:
        ArtifactError: If the model or its map cannot be had.
        TokensError: If the set is broken or of another model, holds a code that was dropped, or `out` exists or cannot be
            written.
    """
    out, folder = Path(out), artifact.model_folder(path)
    config, index_map = artifact.check(folder), read_index_map(folder)
    source = TokenSource(tokens, verify=True)
    _check_same(source, config.weights_sha256, index_map, folder)
    if out.exists():
        raise TokensError(f"{out} must be a new folder. It exists.")
    skipped = _skipped(source.folder / SKIPPED)
    (grid,) = config.grids
    dtype = smallest_dtype(grid.vocabulary)
    progress = progress or Progress()
    progress.start(len(source), 0)
    try:
        with new_folder(out) as temporary:
            shards: list[TokenShard] = []
            done = 0
            for shard in source.description.shards:
                old = np.stack([source[done + index]["tokens"] for index in range(shard.images)])
                new = index_map.renumbered(old)
                if new.min() < 0:
                    image, *place = (int(number) for number in np.argwhere(new < 0)[0])
                    raise TokensError(
                        f"{source.name(done + image)} has the index {old[image][tuple(place)]}, which was pruned: other images "
                        "decided what to keep. Encode these with the pruned model, or prune with all of them."
                    )
                content = to_npy(new.astype(DTYPES[dtype]))
                write_bytes(temporary / shard.tokens.file, content)
                for file in (shard.names, shard.labels):
                    if file:
                        write_bytes(temporary / file.file, (source.folder / file.file).read_bytes())
                shards.append(shard.model_copy(update={"tokens": described_file(shard.tokens.file, content)}))
                done += shard.images
                progress.step(done)
            if skipped is not None:
                write_bytes(temporary / SKIPPED, skipped)
            changes = {
                "kvq_version": __version__,
                "weights_sha256": config.weights_sha256,
                "quantizer": config.quantizer.model_dump(mode="json"),
                "vocabulary": grid.vocabulary,
                "dtype": dtype,
                "shards": shards,
            }
            described = source.description.model_copy(update=changes)
            write_bytes(temporary / MANIFEST, (described.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise TokensError(f"{out} cannot be written: {error.strerror or error}. Give another --out.") from None
    progress.stop()
    return {
        "out": str(out),
        "images": done,
        "vocabulary": grid.vocabulary,
        "previous_vocabulary": index_map.vocabulary,
        "dtype": dtype,
        "bytes": _size(described),
        "weights_sha256": config.weights_sha256,
    }


def _skipped(path: Path) -> bytes | None:
    """The one file of a set that tokens.json does not list, None where there is none."""
    try:
        return read_bytes(path, _SKIPPED_LIMIT)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise TokensError(f"{path} cannot be read: {reason}. Put the file itself there, or remove it.") from None


def _check_same(source: TokenSource, weights_sha256: str, index_map: IndexMap, folder: Path) -> None:
    described = source.description
    if index_map.to_weights_sha256 != weights_sha256:
        raise TokensError(f"{folder} has another model than its index map belongs to. Prune again.")
    if described.weights_sha256 != index_map.from_weights_sha256 or described.vocabulary != index_map.vocabulary:
        raise TokensError(
            f"{source.folder} was encoded by other weights than those that were pruned: {described.weights_sha256[:16]}... "
            f"instead of {index_map.from_weights_sha256[:16]}... Give the set of the model before it was pruned."
        )
    if (described.depth or 1) != len(index_map.kept):
        raise TokensError(
            f"The index map is of {len(index_map.kept)} indices a position. Received: {described.depth or 1} in {source.folder}."
        )


def _size(described: TokenSet) -> int:
    files: list[File | None] = [file for shard in described.shards for file in (shard.tokens, shard.names, shard.labels)]
    return sum(file.bytes for file in files if file)
