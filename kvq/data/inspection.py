"""What a collection of images holds: counts, sizes, formats, bad files, colours, and a sheet to look at."""

import collections
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from kvq.data.contract import Source
from kvq.data.decoding import decode, read_bytes
from kvq.data.packing import sha256
from kvq.data.places import locate, recognise, splits_of
from kvq.data.shards import read_index
from kvq.data.sources import ArraySource, FolderSource, open_source
from kvq.errors import BadImageError, DataError

SHEET = (10, 8)  # columns and rows of the contact sheet
TILE = 96  # pixels


class _Seen(NamedTuple):
    """What is kept of one image; `height` is 0 of a bad one, and `bad` then its name and the reason."""

    height: int = 0
    width: int = 0
    format: str = ""
    sums: Any = None
    squares: Any = None
    thumbnail: Any = None
    bad: tuple[str, str] | None = None


def inspect(
    path: str | Path,
    sheet: str | Path | None = None,
    threads: int = 2,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Decodes every image of a collection and says what is there.

    Args:
        path: What `kvq train --data` takes.
        sheet: File to write a contact sheet to, a PNG of up to 80 images at equal distances through the collection; not among
            them.
        threads: Images decoded at the same time.
        on_progress: Told how many images are done, and of how many.

    Returns:
        `path`, `kind` (idx, npz, shards or images), `splits` (name to images, bad ones included), `images` (good ones),
        `channels`, `formats` (name to count), `height` and `width` (each smallest, median, largest), `mean` and `variance` (per
        channel, of all pixels in [-1, 1], the range in which the loss lives), `bad` (name and reason of each), and `sheet`.

    Raises:
        DataError: If nothing is there, a shard is not what its checksum says, no image can be decoded, or `sheet` is no place
            for it.
    """
    place = locate(str(path))
    kind = recognise(place)
    if sheet is not None:
        _check_sheet(Path(sheet), place, kind)
    offered = splits_of(place, kind)
    if kind == "shards":
        _check_sums(place)
    sources = [open_source(str(place), split) for split in offered]
    total = sum(len(source) for source in sources)
    shown = set(np.linspace(0, total - 1, min(SHEET[0] * SHEET[1], total)).round().astype(int).tolist())
    sizes, formats = [], collections.Counter[str]()
    sums, squares, pixels = 0.0, 0.0, 0
    tiles, bad = [], []
    with ThreadPoolExecutor(threads) as pool:
        for done, seen in enumerate(_ahead(pool, _jobs(sources, shown), 4 * threads), 1):
            on_progress(done, total)
            if seen.bad:
                bad.append({"name": seen.bad[0], "reason": seen.bad[1]})
                continue
            sizes.append((seen.height, seen.width))
            formats[seen.format] += 1
            sums, squares, pixels = sums + seen.sums, squares + seen.squares, pixels + seen.height * seen.width
            if seen.thumbnail is not None:
                tiles.append(seen.thumbnail)
    if not sizes:
        raise DataError(f"No image of {place} can be decoded. The first: {bad[0]['name']}: {bad[0]['reason']}.")
    mean = sums / pixels
    if sheet is not None:
        _draw(tiles, Path(sheet))
    return {
        "path": str(place),
        "kind": kind,
        "splits": {split: len(source) for split, source in zip(offered, sources, strict=True)},
        "images": len(sizes),
        "channels": sources[0].channels,
        "formats": dict(formats.most_common()),
        **{name: _spread([size[axis] for size in sizes]) for axis, name in enumerate(("height", "width"))},
        "mean": np.round(mean / 127.5 - 1, 6).tolist(),
        "variance": np.round((squares / pixels - mean**2) / 127.5**2, 6).tolist(),
        "bad": bad,
        "sheet": None if sheet is None else str(sheet),
    }


def _check_sheet(sheet: Path, place: Path, kind: str | None) -> None:
    if sheet.suffix.lower() != ".png":
        raise DataError(f"The contact sheet is a PNG. Received: {sheet}. Give a --sheet that ends in .png.")
    if kind == "images" and sheet.resolve().is_relative_to(place.resolve()):
        raise DataError(f"{sheet} would lie among the images of {place}, and be one of them. Give another --sheet.")


def _jobs(sources: list[Any], shown: set[int]) -> Iterator[Callable[[], _Seen]]:
    number = 0
    for source in sources:
        for index in range(len(source)):
            yield lambda source=source, index=index, kept=number in shown: _look(source, index, kept)  # type: ignore[misc]
            number += 1


def _ahead(pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], _Seen]], depth: int) -> Iterator[_Seen]:
    """The jobs' results in order, with at most `depth` of them waiting: a million must not be queued at once."""
    waiting: collections.deque[Any] = collections.deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _look(source: Source, index: int, kept: bool) -> _Seen:
    try:
        format = "array" if isinstance(source, ArraySource) else "packed"
        if isinstance(source, FolderSource):
            name = source.names[index]
            content = read_bytes(source.folder / name, name)
            image = decode(content, name)
            with Image.open(io.BytesIO(content)) as opened:
                format = (opened.format or "unknown").lower()
        else:
            image = source[index]["image"]
    except BadImageError as error:
        return _Seen(bad=(error.name, error.reason))
    height, width, channels = image.shape
    values = image.reshape(-1, channels).astype(np.float64)
    return _Seen(height, width, format, values.sum(0), (values**2).sum(0), _thumbnail(image) if kept else None)


def _thumbnail(image: np.ndarray) -> Image.Image:
    small = Image.fromarray(image[:, :, 0] if image.shape[2] in (1, 2) else image[:, :, :3]).convert("RGB")
    scale = TILE / max(small.size)
    width, height = (max(1, round(side * scale)) for side in small.size)
    return small.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)


def _draw(tiles: list[Image.Image], path: Path) -> None:
    columns = min(SHEET[0], len(tiles))
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (columns * (TILE + 4) + 4, rows * (TILE + 4) + 4), "white")
    for number, tile in enumerate(tiles):
        left, top = (4 + place * (TILE + 4) for place in (number % columns, number // columns))
        canvas.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.save(path, "PNG")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}. Give another --sheet.") from error


def _spread(values: list[int]) -> dict[str, int]:
    return {"smallest": min(values), "median": int(np.median(values)), "largest": max(values)}


def _check_sums(folder: Path) -> None:
    for shard in (shard for shards in read_index(folder).splits.values() for shard in shards):
        if sha256(folder / shard.file) != shard.sha256:
            raise DataError(f"{folder / shard.file} is not what its checksum says. Pack the images anew.")
