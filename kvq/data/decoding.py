"""Encoded images to uint8 RGB: libjpeg-turbo for JPEG (simplejpeg, strict), Pillow for the rest. What is broken is refused.

Every image is decoded whole, also where only a crop of it is wanted, so that whether a file is good never depends on the crop.
(Of the maintained bindings none decodes a part of a JPEG without a GPU's libraries.)
"""

import io
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from kvq.errors import BadImageError
from kvq.untrusted import open_regular

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_JPEG = b"\xff\xd8\xff"
_APP1, _START_OF_SCAN = 0xE1, 0xDA
_ORIENTATION = 0x0112
# From the EXIF standard's value to what turns the stored picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(path: Path, name: str | None = None) -> NDArray[np.uint8]:
    """The image in a file, see `decode`. BadImageError also where it cannot be read; `name` is what the file is called there."""
    return decode(read_bytes(path, name), name or str(path))


def read_bytes(path: Path, name: str | None = None) -> bytes:
    """The content of a file; BadImageError where there is none to be had."""
    try:
        with open_regular(path, links=True) as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise BadImageError(name or str(path), (isinstance(error, OSError) and error.strerror) or str(error)) from error


def decode(content: bytes, name: str) -> NDArray[np.uint8]:
    """An encoded image as uint8 (height, width, 3), upright by its EXIF orientation, the first frame of several.

    Transparency is dropped, grey becomes three equal channels, CMYK and palettes become RGB, 16 bits become 8 by scaling.

    Raises:
        BadImageError: If the image is broken, cut short, or larger than `PIL.Image.MAX_IMAGE_PIXELS`; `name` is in its message.
    """
    try:
        pixels = _decode_jpeg(content) if content.startswith(_JPEG) else None
        return _decode_by_pillow(content) if pixels is None else pixels
    except UnidentifiedImageError as error:
        raise BadImageError(name, "its bytes are of no known image format" if content else "the file is empty") from error
    except Exception as error:  # on broken bytes Pillow's readers raise nearly anything
        # libjpeg-turbo names its function first: tjDecompress2(): ...
        raise BadImageError(name, str(error).rpartition("(): ")[2].rstrip(".") or type(error).__name__) from error


def _decode_jpeg(content: bytes) -> NDArray[np.uint8] | None:
    """A JPEG's pixels; None for colours that only Pillow converts."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    _check_pixels(width, height)
    if colours in ("CMYK", "YCCK"):
        return None
    pixels = simplejpeg.decode_jpeg(content)
    if _has_exif(content):  # most photographs have not, and Pillow would take a while to find out
        with Image.open(io.BytesIO(content)) as image:
            turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
        if turn is not None:
            pixels = np.asarray(Image.fromarray(pixels).transpose(turn))
    return pixels


def _has_exif(content: bytes) -> bool:
    """Whether one of a JPEG's segments before the picture is EXIF's."""
    at = 2
    while content[at : at + 1] == b"\xff" and content[at + 1] != _START_OF_SCAN:
        if content[at + 1] == _APP1 and content[at + 4 : at + 10] == b"Exif\0\0":
            return True
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return False


def _decode_by_pillow(content: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(content)) as stored:
        _check_pixels(stored.width, stored.height)
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


def _check_pixels(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    # Up to twice the limit PIL only warns. Turning warnings into errors is not safe in threads.
    if limit and width * height > limit:
        raise ValueError(f"{width} x {height} pixels, at most {limit} are allowed")
