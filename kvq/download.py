"""Fetches what kvq does not ship: named data sets, through keras.datasets, kept as one .npz in Keras' cache, and single files."""

import contextlib
import http.client
import os
import sys
import urllib.request
from pathlib import Path

import numpy as np

from kvq.errors import DataError

DOWNLOADS = ("mnist", "fashion_mnist", "cifar10")
TIMEOUT = 30  # seconds without an answer


def keras_cache() -> Path:
    """Where Keras keeps what it downloads: `$KERAS_HOME/datasets`, or `~/.keras/datasets`."""
    return Path(os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras")) / "datasets"


def download(name: str) -> Path:
    """The data set as `NAME.npz` (x_train, y_train, x_test, y_test; all uint8) in the folder `kvq` of Keras' cache.

    The file is complete or absent, whatever happens on the way. Imports keras, so KERAS_BACKEND must be settled before.

    Args:
        name: One of `DOWNLOADS`.

    Raises:
        DataError: If the name is not one of these, or the data set cannot be fetched or written.
    """
    if name not in DOWNLOADS:
        raise DataError(f"Only {', '.join(DOWNLOADS)} can be downloaded.")
    target = keras_cache() / "kvq" / f"{name}.npz"
    part = target.with_name(f".{name}.{os.getpid()}.part")
    try:
        # Keras prints its progress on stdout, which belongs to the command's result.
        with contextlib.redirect_stdout(sys.stderr):
            import keras

            (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                np.savez(
                    file,
                    x_train=_channels_last(x_train),
                    y_train=y_train.reshape(-1),
                    x_test=_channels_last(x_test),
                    y_test=y_test.reshape(-1),
                )
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except Exception as error:  # no network, no disk, no keras, a changed server: the user can do the same about each
        # Keras says "URL fetch failure on URL: None -- reason", with a status instead of None where an answer came.
        reason = str(error).removeprefix("URL fetch failure on ").replace(": None -- ", ": ").rstrip(".")
        raise DataError(f"Could not download {name}: {reason}.") from error
    return target


def fetch(url: str, size: int) -> bytes:
    """A file of `size` bytes from the network. Whether it is the right one is for the caller to find out by a hash.

    Raises:
        OSError: If it does not come, or is longer or shorter.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content = answer.read(size + 1)
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    if len(content) != size:
        raise OSError(f"{'more than ' if len(content) > size else ''}{min(len(content), size)} bytes came instead of {size}")
    return content


def _channels_last(images: np.ndarray) -> np.ndarray:
    """Keras turns CIFAR-10 around where keras.json says `channels_first`."""
    return images.transpose(0, 2, 3, 1) if images.ndim == 4 and images.shape[1] == 3 else images
