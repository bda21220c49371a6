"""A file of weights from anyone: every tensor's name, dtype, shape and place checked before anything of its size is allocated.

The format is safetensors: 8 bytes of length, so many bytes of JSON, the data. https://huggingface.co/docs/safetensors
"""

import hashlib
import math
import os
import reprlib
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kvq.errors import ArtifactError
from kvq.untrusted import open_regular, parse_json

_HEADER_LIMIT = 2**20  # bytes; config.json, which lists the same at more length, has no more
_PIECE = 2**22  # bytes read at once, a multiple of a float's
_ENTRY = {"dtype", "shape", "data_offsets"}


def check_weights(path: Path, shapes: dict[str, list[int]], sha256: str) -> None:
    """Finds out whether a file holds exactly these float32 tensors, all of them finite, in bytes of this checksum.

    Raises:
        ArtifactError: If not.
        OSError, ValueError: If it is no ordinary file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise ArtifactError(
                f"{path} is not a safetensors file, or was cut: it declares a header of {length} bytes in {size}."
            )
        text = file.read(length)
        names = _check_header(path, text, shapes, size - 8 - length)
        digest = hashlib.sha256(start + text)
        infinite = [name for name in names if not _finite(file, 4 * math.prod(shapes[name]), digest)]
    if digest.hexdigest() != sha256:
        raise ArtifactError(f"{path} is not the file that config.json describes: its sha256 is {digest.hexdigest()}.")
    if infinite:
        raise ArtifactError(f"{path}: {infinite[0]} has weights that are NaN or infinite. Its training went wrong.")


def _check_header(path: Path, text: bytes, shapes: dict[str, list[int]], size: int) -> list[str]:
    """The tensors' names in the order of their data, which fill `size` bytes without a hole."""
    try:
        header = parse_json(text)
    except ValueError as error:
        raise ArtifactError(f"{path} has a header that is not JSON: {error}.") from None
    if not isinstance(header, dict):
        raise ArtifactError(f"{path} has a header that is not a JSON object.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactError(f"{path} is not a safetensors file: its __metadata__ must be words.")
    if header.keys() != shapes.keys():
        names = sorted(header.keys() ^ shapes.keys())
        raise ArtifactError(
            f"{path} and config.json do not name the same tensors. In one of them only: {', '.join(names)[:200]}."
        )
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != _ENTRY or not _integers(entry["data_offsets"], 2):
            raise ArtifactError(f"{path}: {name} must have dtype, shape and two data_offsets.")
        if entry["dtype"] != "F32" or not _integers(entry["shape"]) or entry["shape"] != shapes[name]:
            received = f"{reprlib.repr(entry['dtype'])} {reprlib.repr(entry['shape'])}"
            raise ArtifactError(f"{path}: {name} is {received}; config.json says 'F32' {shapes[name]}.")
    names, end = sorted(header, key=lambda name: header[name]["data_offsets"]), 0
    for name in names:
        count = 4 * math.prod(shapes[name])
        if header[name]["data_offsets"] != [end, end + count]:
            raise ArtifactError(f"{path}: the data of {name} do not lie where {count} bytes from {end} would.")
        end += count
    if end != size:
        raise ArtifactError(f"{path} has {size} bytes of data; its tensors need {end}. It was cut or added to.")
    return names


def _integers(value: Any, count: int | None = None) -> bool:
    """Whether it is a list of integers; Python takes 8.0 and True as equal to some, other readers do not."""
    return isinstance(value, list) and count in (None, len(value)) and all(type(item) is int for item in value)


def _finite(file: BinaryIO, count: int, digest: Any) -> bool:
    """Whether the next `count` bytes are finite numbers; they are also added to the checksum."""
    finite = True
    while count and (piece := file.read(min(count, _PIECE))):
        digest.update(piece)
        # Of a file that is being cut meanwhile, the last piece may end within a number; then the checksum does not hold.
        finite &= len(piece) % 4 == 0 and bool(np.isfinite(np.frombuffer(piece, "<f4")).all())
        count -= len(piece)
    return finite
