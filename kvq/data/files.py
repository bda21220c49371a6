"""Files of many images at once, read with every check: IDX (LeCun's MNIST) and .npz."""

import gzip
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvq.errors import DataError


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
