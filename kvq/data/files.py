"""Image file formats: IDX (LeCun's MNIST), .npz, and what PIL decodes, read with every check; and the image files of a folder."""

import contextlib
import gzip
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from kvq.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


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


def read_npz(path: Path, split: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The arrays `x_SPLIT` and, if there is one, `y_SPLIT` of an .npz. Raises DataError if it is broken or lacks the first."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} must be an .npz, as `numpy.savez` writes it. Received: something else, or a part of one.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if f"x_{split}" not in arrays.files:
                raise DataError(f"{path} must hold x_train or x_test. Received: {', '.join(arrays.files) or 'no arrays'}.")
            labels = arrays[f"y_{split}"] if f"y_{split}" in arrays.files else None
            return arrays[f"x_{split}"], labels
    # RuntimeError: an encrypted archive, or a compression that Python lacks
    except (OSError, EOFError, ValueError, MemoryError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def image_names(folder: Path) -> list[str]:
    """All image files below `folder` as sorted relative paths with forward slashes.

    Hidden files and folders and `__MACOSX` are left out; links to folders are not followed, since they can form circles.
    """
    return sorted(walk_images(folder))


def walk_images(folder: Path) -> Iterator[str]:
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
    with opened_image(path) as stored:
        image = ImageOps.exif_transpose(stored)
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
def opened_image(path: Path) -> Iterator[Image.Image]:
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
