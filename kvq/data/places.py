"""Where image collections lie and what lies there: the known names, their places, and the recognition of a path."""

import difflib
import importlib.resources
import os
import zipfile
from pathlib import Path
from typing import Literal

from kvq.data.decoding import IMAGE_SUFFIXES
from kvq.data.listing import Listing, list_images, walk_images
from kvq.data.shards import INDEX, SUFFIX, read_index
from kvq.errors import DataError

Kind = Literal["idx", "npz", "shards", "images"]
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# The folders of a collection that are its splits; of several, the first that is there.
SPLIT_FOLDERS = {"train": ("train", "train2017"), "test": ("test", "val", "validation", "val2017")}
HOLD_OUT = 20
SYSTEM = Path("/usr/share/datasets")
# Known names that are folders of photographs; the others are arrays.
PHOTOGRAPHS = {"mscoco"}
# All others have three channels.
GREY = {"fashion_mnist_mini", "fashion_mnist", "mnist"}
# Each known name, and how its files can be had where kvq finds none.
KNOWN = {
    "fashion_mnist_mini": "It comes with kvq: install kvq anew.",
    "fashion_mnist": "Install Debian's package `dataset-fashion-mnist`, or name the folder of its four .gz files by --data, or "
    "put them into $KVQ_DATA/fashion_mnist.",
    "mnist": "Name the folder of the four IDX files (train-images-idx3-ubyte.gz and so on), or mnist.npz, by --data, or put "
    "them into $KVQ_DATA/mnist.",
    "mscoco": "Unpack train2017.zip of cocodataset.org and name its folder by --data, or put it into $KVQ_DATA/mscoco.",
    "cifar10": "Name an .npz with x_train, y_train, x_test and y_test by --data, or put it into $KVQ_DATA/cifar10.",
}


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
    found = find(name)
    if found is not None:
        return found
    from kvq.download import download  # may import keras, which this module must not need

    try:
        return download(name)
    except DataError as error:
        looked = ", ".join(str(place) for place in dict.fromkeys(_places(name)))
        raise DataError(f"No {name}. Looked for it in {looked}. {error} {KNOWN[name]}") from error


def find(name: str) -> Path | None:
    """Where the files of a known name lie on this machine, or None. Downloads nothing."""
    holds = recognise if name in PHOTOGRAPHS else _holds_arrays
    return next((place for place in _places(name) if holds(place)), None)


def _places(name: str) -> list[Path]:
    if name == "fashion_mnist_mini":
        return [Path(str(importlib.resources.files("kvq.data") / name))]
    from kvq.download import keras_cache

    places = [Path(os.environ["KVQ_DATA"]).expanduser() / name] if os.environ.get("KVQ_DATA") else []
    dashed = name.replace("_", "-")
    places += [keras_cache() / f"{name}.npz", keras_cache() / dashed, keras_cache() / "kvq" / f"{name}.npz"]
    return places + [SYSTEM / dashed, SYSTEM / name]


def recognise(path: Path) -> Kind | None:
    """What lies at `path`, or None; where a folder holds several kinds, the first of them."""
    if any(idx_file(path, images) for images, _ in IDX_FILES.values()):
        return "idx"
    npz = npz_file(path)
    if npz.suffix == ".npz" and os.path.isfile(npz):
        return "npz"
    if next(path.glob("*" + SUFFIX), None) and (path / INDEX).is_file():
        return "shards"
    return "images" if next(walk_images(path), None) else None


def splits_of(path: Path, kind: Kind | None) -> tuple[str, ...]:
    """What a collection offers, train before test; `("all",)` for images that lie in no folders called so."""
    if kind == "idx":
        return tuple(split for split, (images, _) in IDX_FILES.items() if idx_file(path, images))
    if kind == "npz":
        return _npz_splits(npz_file(path)) or ("train", "test")  # reading it then says what is wrong with the file
    if kind == "shards":
        return tuple(read_index(path).splits)
    return ("train", "test") if all(_split_folder(path, split) for split in SPLIT_FOLDERS) else ("all",)


def list_split(path: Path, split: str, splits: tuple[str, ...]) -> Listing:
    """The image files of one split's folder; all there are where there are no such folders."""
    if splits == ("all",):
        return list_images(path)
    below = str(_split_folder(path, split))
    return Listing.of(f"{below}/{name}" for name in list_images(path / below))


def _split_folder(path: Path, split: str) -> str | None:
    return next((name for name in SPLIT_FOLDERS[split] if (path / name).is_dir()), None)


def idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if os.path.isfile(path)), None)


def npz_file(path: Path) -> Path:
    """The one .npz of a folder, if there is one and it is not something else's; else the path itself."""
    found = sorted(path.glob("*.npz"))
    return found[0] if len(found) == 1 and (_npz_splits(found[0]) or not next(walk_images(path), None)) else path


def _npz_splits(path: Path) -> tuple[str, ...]:
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(split for split in IDX_FILES if f"x_{split}.npy" in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return ()


def _holds_arrays(path: Path) -> bool:
    """Whether a folder or file holds both splits of a known set."""
    if all(idx_file(path, name) for names in IDX_FILES.values() for name in names):
        return True
    return _npz_splits(npz_file(path)) == ("train", "test")


def _recognised(path: Path) -> Path:
    if not os.path.exists(path):
        near = difflib.get_close_matches(str(path), KNOWN, n=1)
        hint = f"Did you mean `{near[0]}`?" if near else f"Known names: {', '.join(KNOWN)}."
        raise DataError(f"No file or folder {path}. {hint} Of images that were moved, --data gives the new place.")
    if os.path.isfile(path) and path.suffix != ".npz":
        raise DataError(f"A data file must be an .npz. Received: {path}. Name the folder that IDX files or images lie in.")
    if recognise(path) is None:
        idx = ", ".join(images for images, _ in IDX_FILES.values())
        raise DataError(
            f"No images in {path}. Looked for {idx} (also .gz), for one .npz with x_train or x_test, for packed "
            f"shards ({INDEX} and *{SUFFIX}), and for files ending in {', '.join(IMAGE_SUFFIXES)}. "
            "`kvq doctor` lists the known sets."
        )
    return path
