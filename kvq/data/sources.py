"""Image collections: IDX files (LeCun's MNIST format), one .npz, or a folder of images, opened by a known name or by path."""

import contextlib
import difflib
import gzip
import importlib.resources
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from kvq.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# The folders of a collection that are its splits; of several, the first that is there.
SPLIT_FOLDERS = {"train": ("train", "train2017"), "test": ("test", "val", "validation", "val2017")}
HOLD_OUT = 20
SYSTEM = Path("/usr/share/datasets")
# Each known name, and how its files can be had where kvq finds none.
KNOWN = {
    "fashion_mnist_mini": "It comes with kvq: install kvq anew.",
    "fashion_mnist": "Install Debian's package `dataset-fashion-mnist`, or put the four .gz files into $KVQ_DATA/fashion_mnist.",
    "mnist": "Put the four IDX files (train-images-idx3-ubyte.gz and so on), or mnist.npz, into $KVQ_DATA/mnist.",
    "cifar10": "Put one .npz with x_train, y_train, x_test and y_test into $KVQ_DATA/cifar10.",
}


class Element(TypedDict):
    """An image uint8 (height, width, channels), its label, -1 if there is none, and its name within the collection."""

    image: NDArray[np.uint8]
    label: int
    name: str


class Batch(TypedDict):
    """Images uint8 (batch, height, width, channels), labels int64 (batch,), -1 where there is none, and one name per image."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: list[str]


class Source(Protocol):
    """One split of a collection. `splits` are the names that the collection offers; only `("all",)` where it has none."""

    name: str
    split: str
    splits: tuple[str, ...]
    channels: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Element: ...

    def check(self, crop: int, pad: int = 0) -> None: ...

    def check_channels(self, channels: int) -> None: ...


@runtime_checkable
class VectorSource(Source, Protocol):
    """A source that gives many images at once, which the loader then asks for whole batches."""

    def fetch(self, indices: Sequence[int] | NDArray[np.integer]) -> Batch: ...


class ArraySource:
    """Images of one size, held in memory.

    Args:
        images: uint8 (n, height, width) or (n, height, width, channels), 1 to 4 channels, channels last.
        labels: Integers (n,) or (n, 1), or None.
        name: The data set's name.
        split: Which of `splits` this is.
        splits: What the collection offers.

    Raises:
        DataError: If an array is not as above.
    """

    def __init__(
        self,
        images: NDArray[Any],
        labels: NDArray[Any] | None = None,
        *,
        name: str = "arrays",
        split: str = "all",
        splits: tuple[str, ...] = ("all",),
    ) -> None:
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape or images.shape[3:] > (4,):
            raise DataError(
                "Images must be a uint8 array (count, height, width) or (count, height, width, channels) with 1 to 4 channels, "
                f"no side empty. Received: {images.dtype} {images.shape}."
            )
        if labels is None:
            labels = np.full(len(images), -1)
        if labels.dtype.kind not in "iu" or labels.shape not in ((len(images),), (len(images), 1)):
            raise DataError(f"{len(images)} images need as many integer labels. Received: {labels.dtype} {labels.shape}.")
        self.name, self.split, self.splits = name, split, splits
        self._images: NDArray[np.uint8] = images if images.ndim == 4 else images[..., None]
        self._labels = labels.reshape(-1).astype(np.int64)
        self.channels = self._images.shape[-1]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Element:
        return {"image": self._images[index], "label": int(self._labels[index]), "name": self._name(index)}

    def fetch(self, indices: Sequence[int] | NDArray[np.integer]) -> Batch:
        """The elements at `indices` (batch,), as one batch."""
        chosen = np.asarray(indices)
        return {"images": self._images[chosen], "labels": self._labels[chosen], "names": [self._name(i) for i in chosen]}

    def check(self, crop: int, pad: int = 0) -> None:
        """Raises DataError if an image, with `pad` pixels added on each side, is smaller than a square of side `crop`."""
        _, height, width, _ = self._images.shape
        _check_size(f"{self.name} ({self.split})", height, width, crop, pad)

    def check_channels(self, channels: int) -> None:
        """Raises DataError if the images do not have so many channels."""
        _check_channels(self, channels)

    def _name(self, index: int) -> str:
        return f"{self.split}/{index:05d}"


class FolderSource:
    """Image files, decoded when they are asked for, as RGB and upright; labels are -1.

    Args:
        folder: Where the collection lies.
        names: The files' paths below `folder`, with forward slashes; see `image_names`.
        name: The collection's name.
        split: Which of `splits` this is.
        splits: What the collection offers.

    Raises:
        DataError: If `names` is empty; from `source[i]`, if the file is broken, cut short or too large, with its name.
    """

    channels = 3

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        name: str | None = None,
        split: str = "all",
        splits: tuple[str, ...] = ("all",),
    ) -> None:
        if not names:
            raise DataError(f"No images in {folder}. Looked for {', '.join(IMAGE_SUFFIXES)}.")
        self.name, self.split, self.splits = name or folder.name, split, splits
        self._folder, self._names = folder, tuple(names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Element:
        name = self._names[index]
        return {"image": decode_image(self._folder / name), "label": -1, "name": name}

    def check(self, crop: int, pad: int = 0) -> None:
        """Reads every file's header, no pixels: the first that is unreadable or smaller than `crop` raises a DataError.

        Args:
            crop: Side of the square that must fit.
            pad: Pixels added on each side before.
        """
        for name in self._names:
            path = self._folder / name
            with _opened(path) as image:
                _check_size(str(path), image.height, image.width, crop, pad)

    def check_channels(self, channels: int) -> None:
        """Raises DataError if `channels` is not 3: files are read as RGB."""
        _check_channels(self, channels)


def _check_size(what: str, height: int, width: int, crop: int, pad: int) -> None:
    if min(height, width) + 2 * pad < crop:
        padded = f" and {pad} of padding" if pad else ""
        raise DataError(
            f"{what} is smaller than the crop. Received: {height} x {width} pixels (height x width){padded}, crop={crop}. "
            "Choose a smaller `data.crop` or leave such images out."
        )


def _check_channels(source: Source, channels: int) -> None:
    if source.channels != channels:
        raise DataError(
            f"{source.name} has images of {source.channels} channels. Received: a model for {channels}. "
            "Choose other images, or a configuration for such images."
        )


def open_source(source: str, split: str = "train", data: str | Path | None = None) -> ArraySource | FolderSource:
    """One split of a collection.

    A folder of images without folders for its splits still has `train` and `test`: of its files, sorted by path, every
    20th, from the first on, is held out for `test`, the others are `train`; a single image is both.

    Args:
        source: A known name or a path, see `locate`.
        split: `train`, `test`, or `all` for a collection that has no splits of its own.
        data: Where the user says the images are, see `locate`.

    Raises:
        DataError: If nothing is found there, a file is broken, or the collection does not offer the split.
    """
    path = locate(source, data)
    asked = source if data is None else str(data)
    name = asked if asked in KNOWN else Path(os.path.abspath(path)).name.removesuffix(".npz")
    kind = recognise(path)
    splits = _splits(path, kind)
    offered = ("train", "test", "all") if splits == ("all",) else splits
    if split not in offered:
        raise DataError(f"{name} offers the splits {', '.join(offered)}. Received: split={split}.")
    if kind == "images":
        return FolderSource(path, _split_names(path, split, splits), name=name, split=split, splits=splits)
    file, images, labels = _read_idx_split(path, split) if kind == "idx" else _read_npz(_npz_file(path), split)
    try:
        return ArraySource(images, labels, name=name, split=split, splits=splits)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def locate(source: str, data: str | Path | None = None) -> Path:
    """Where a collection lies: a folder, or an .npz file. Downloads a known one as the last resort.

    A known name is looked for in `$KVQ_DATA/NAME`, Keras' cache, `/usr/share/datasets`, and then downloaded; a folder that
    does not hold the whole set is passed over. Any other `source` is a path (a known name's namesake is `./NAME`).

    Args:
        source: A known name or a path.
        data: What the user says instead: another known name; or a path that holds the images, or holds them in a folder
            called `source`. Nothing else is then looked at.

    Raises:
        DataError: If nothing that kvq recognises is there.
    """
    if data is not None and str(data) not in KNOWN:
        path = Path(data).expanduser()
        inside = path / source
        return inside if source in KNOWN and not _holds_arrays(path) and _holds_arrays(inside) else _recognised(path)
    name = source if data is None else str(data)
    if name not in KNOWN:
        return _recognised(Path(name).expanduser())
    if name == "fashion_mnist_mini":
        return Path(str(importlib.resources.files("kvq.data") / name))
    from kvq.download import download, keras_cache  # may import keras, which this module must not need

    places = [Path(os.environ["KVQ_DATA"]).expanduser() / name] if os.environ.get("KVQ_DATA") else []
    dashed = name.replace("_", "-")
    places += [keras_cache() / f"{name}.npz", keras_cache() / dashed, keras_cache() / "kvq" / f"{name}.npz"]
    places += [SYSTEM / dashed, SYSTEM / name]
    for place in places:
        if _holds_arrays(place):
            return place
    try:
        return download(name)
    except DataError as error:
        looked = ", ".join(str(place) for place in dict.fromkeys(places))
        raise DataError(f"No {name}. Looked for it in {looked}. {error} {KNOWN[name]}") from error


def recognise(path: Path) -> str | None:
    """What lies at `path`: `idx`, `npz`, `images` or None, in this order where a folder holds several."""
    if any(_idx_file(path, images) for images, _ in IDX_FILES.values()):
        return "idx"
    npz = _npz_file(path)
    if npz.suffix == ".npz" and os.path.isfile(npz):
        return "npz"
    return "images" if next(_walk(path), None) else None


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if os.path.isfile(path)), None)


def _npz_file(path: Path) -> Path:
    """The one .npz of a folder, if there is one and it is not something else's; else the path itself."""
    found = sorted(path.glob("*.npz"))
    return found[0] if len(found) == 1 and (_npz_splits(found[0]) or not next(_walk(path), None)) else path


def _npz_splits(path: Path) -> tuple[str, ...]:
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(split for split in IDX_FILES if f"x_{split}.npy" in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return ()


def _splits(path: Path, kind: str | None) -> tuple[str, ...]:
    """What a collection offers, train before test; `("all",)` for images that lie in no folders called so."""
    if kind == "idx":
        return tuple(split for split, (images, _) in IDX_FILES.items() if _idx_file(path, images))
    if kind == "npz":
        return _npz_splits(_npz_file(path)) or ("train", "test")  # reading it then says what is wrong with the file
    return ("train", "test") if all(_split_folder(path, split) for split in SPLIT_FOLDERS) else ("all",)


def _split_folder(path: Path, split: str) -> str | None:
    return next((name for name in SPLIT_FOLDERS[split] if (path / name).is_dir()), None)


def _split_names(path: Path, split: str, splits: tuple[str, ...]) -> list[str]:
    if splits != ("all",):
        below = _split_folder(path, split)
        return [f"{below}/{name}" for name in image_names(path / str(below))]
    names = image_names(path)
    if split == "all" or len(names) == 1:
        return names
    return [name for i, name in enumerate(names) if (i % HOLD_OUT == 0) == (split == "test")]


def _holds_arrays(path: Path) -> bool:
    """Whether a folder or file holds both splits of a known set."""
    if all(_idx_file(path, name) for names in IDX_FILES.values() for name in names):
        return True
    return _npz_splits(_npz_file(path)) == ("train", "test")


def _recognised(path: Path) -> Path:
    if not os.path.exists(path):
        near = difflib.get_close_matches(str(path), KNOWN, n=1)
        hint = f"Did you mean `{near[0]}`?" if near else f"Known names: {', '.join(KNOWN)}."
        raise DataError(f"No file or folder {path}. {hint}")
    if os.path.isfile(path) and path.suffix != ".npz":
        raise DataError(f"A data file must be an .npz. Received: {path}. Name the folder that IDX files or images lie in.")
    if recognise(path) is None:
        idx = ", ".join(images for images, _ in IDX_FILES.values())
        raise DataError(
            f"No images in {path}. Looked for {idx} (also .gz), for one .npz with x_train or x_test, and for files ending in "
            f"{', '.join(IMAGE_SUFFIXES)}. `kvq configs` lists the built-in sets."
        )
    return path


def _read_idx_split(folder: Path, split: str) -> tuple[Path, NDArray[np.uint8], NDArray[np.uint8] | None]:
    images, labels = (_idx_file(folder, name) for name in IDX_FILES[split])
    assert images is not None  # `_splits` saw it
    return images, read_idx(images, ranks=(3, 4)), read_idx(labels, ranks=(1,)) if labels else None


def read_idx(path: Path, ranks: tuple[int, ...]) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes, gzipped or not, as a read-only array.

    Args:
        path: The file.
        ranks: How many dimensions are allowed.

    Raises:
        DataError: If the file is not such a one, is cut short, or holds more than its header says.

    Source: the format's description on http://yann.lecun.com/exdb/mnist/: two zero bytes, a type (8: unsigned byte), the number
    of dimensions, their sizes as big-endian 32-bit numbers, the values.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"  # the first bytes, since browsers unpack a .gz and keep its name
        with gzip.open(path) if zipped else path.open("rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:3] != b"\0\0\x08" or magic[3] not in ranks:
                allowed = " or ".join(f"0000080{rank}" for rank in ranks)
                raise DataError(f"{path} must be an IDX file that begins with {allowed}. Received: {magic.hex() or 'no bytes'}.")
            sizes = file.read(4 * magic[3])
            if len(sizes) < 4 * magic[3]:
                raise DataError(f"{path} ends inside its header. Download it anew.")
            shape = struct.unpack(f">{magic[3]}I", sizes)
            # Deflate packs at most 1032 to 1, so more than that is not in the file, and is not asked for.
            values = file.read(min(math.prod(shape), 1032 * path.stat().st_size))
            if len(values) != math.prod(shape) or file.read(1):
                came = "more" if len(values) == math.prod(shape) else str(len(values))
                raise DataError(f"{path} must hold {math.prod(shape)} values, as its header says. Received: {came}.")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Download it anew.") from error
    return np.frombuffer(values, np.uint8).reshape(shape)


def _read_npz(path: Path, split: str) -> tuple[Path, NDArray[Any], NDArray[Any] | None]:
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} must be an .npz, as `numpy.savez` writes it. Received: something else, or a part of one.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if f"x_{split}" not in arrays.files:
                raise DataError(f"{path} must hold x_train or x_test. Received: {', '.join(arrays.files) or 'no arrays'}.")
            labels = arrays[f"y_{split}"] if f"y_{split}" in arrays.files else None
            return path, arrays[f"x_{split}"], labels
    except (OSError, EOFError, ValueError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def image_names(folder: Path) -> list[str]:
    """All image files below `folder` as sorted relative paths with forward slashes.

    Hidden files and folders and `__MACOSX` are left out; links to folders are not followed, since they can form circles.
    """
    return sorted(_walk(folder))


def _walk(folder: Path) -> Iterator[str]:
    """Image files below a folder, as in `image_names`, in no promised order."""

    def fail(error: OSError) -> None:
        raise DataError(f"{folder} cannot be read: {error}.") from error

    for parent, folders, files in os.walk(folder, onerror=fail if folder.is_dir() else None):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        for file in files:
            if not file.startswith(".") and file.lower().endswith(IMAGE_SUFFIXES):
                yield Path(parent, file).relative_to(folder).as_posix()


def decode_image(path: Path) -> NDArray[np.uint8]:
    """An image file as uint8 (height, width, 3), upright by its EXIF orientation, the first frame of several.

    Transparency is dropped, 16 bits become 8 by scaling. Raises DataError for what is broken, cut short, or larger than
    `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    with _opened(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError("32 bits per pixel, 8 or 16 are allowed")
            # PIL's own conversion clips at 255 instead of scaling.
            return np.repeat(((values * 255 + 32767) // 65535).astype(np.uint8)[:, :, None], 3, axis=2)
        if image.mode == "F":
            raise ValueError("floating-point pixels, 8 or 16 bits are allowed")
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA")  # straight to RGB, PIL warns of transparent palette entries
        return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """PIL's image of a file whose header is sound; whatever goes wrong inside becomes a DataError with the file's name."""
    try:
        with Image.open(path) as image:
            limit = Image.MAX_IMAGE_PIXELS
            # Up to twice the limit PIL only warns. Turning warnings into errors is not safe in threads.
            if limit and image.width * image.height > limit:
                raise ValueError(f"{image.width} x {image.height} pixels, at most {limit} are allowed")
            yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{path} cannot be decoded: its bytes are of no known image format. Remove or replace it.") from error
    except Exception as error:  # on broken bytes PIL's readers raise nearly anything
        reason = str(error).rstrip(".") or type(error).__name__
        raise DataError(f"{path} cannot be decoded: {reason}. Remove or replace it.") from error
