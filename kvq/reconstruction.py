"""Images through a tokenizer and back, at their own size."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kvq.data.decoding import decode_image
from kvq.errors import DataError, RunError
from kvq.tokenizer import Tokenizer


def reconstruct(path: str | Path, images: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Writes what a saved tokenizer makes of each image, as PNG of the image's size.

    Args:
        path: Run folder or model folder.
        images: Image files, of any size.
        out: Folder to write `NAME.png` into, made if it is not there; not one that an image lies in. No file is replaced.

    Returns:
        The files written, in the order of `images`.

    Raises:
        ArtifactError, DataError, RunError: If the model is broken, an image cannot be read, or the folder not written, one
            that an image lies in, or one with a file of such a name. All images are read before the first is written.
    """
    tokenizer = Tokenizer.load(path)
    files = [Path(image) for image in images]
    names = [file.stem for file in files]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise DataError(f"Images must have different names, since each is written as NAME.png. Received twice: {doubles[0]}.")
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is {'a folder' if file.is_dir() else 'not there'}. Give image files, such as FOLDER/*.jpg.")
        target = Path(out) / f"{file.stem}.png"
        if Path(out).resolve() in (file.parent.resolve(), file.resolve().parent):
            raise RunError(f"{out} holds {file.name} itself, which {target.name} could replace. Give another --out.")
        if os.path.lexists(target):
            raise RunError(f"{target} is there already, and may be somebody's. Remove it, or give another --out.")
        decode_image(file)
    out, written = Path(out), []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            restored = reconstruct_image(tokenizer, _with_channels(decode_image(file), tokenizer.config.images.channels))
            written.append(out / f"{file.stem}.png")
            Image.fromarray(restored[:, :, 0] if restored.shape[2] == 1 else restored).save(written[-1])
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror or error}. Give another --out.") from None
    return written


def reconstruct_image(tokenizer: Tokenizer, image: np.ndarray) -> np.ndarray:
    """One uint8 image (h, w, c) of any size; the result has the same shape."""
    height, width, _ = image.shape
    step = tokenizer.downsampling
    # The border is continued to the next multiple, and what was added is cut off again.
    padded = np.pad(image, ((0, -height % step), (0, -width % step), (0, 0)), mode="edge")
    return tokenizer.decode(tokenizer.encode(padded[None]))[0, :height, :width]


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """A colour image (h, w, 3) as the model's number of channels: as it is, or grey by the weights of ITU-R 601."""
    if channels == image.shape[2]:
        return image
    if channels != 1:
        raise DataError(f"The model takes images of {channels} channels; files give 1 or 3.")
    return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
