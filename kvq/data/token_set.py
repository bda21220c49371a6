"""The format of a token data set, a folder of `tokens.json` and the `.npy` files that it lists, and the check at its door.

A set holds one grid of one model; a model of several grids writes a set for each. Nothing that a file says is believed before it
was held against something else: sizes against the files, shapes against sizes, names against what a name may be.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import Field

from kvq.data.listing import Listing
from kvq.errors import TokensError

MANIFEST = "tokens.json"
PLAN = ".encoding.json"  # what is being encoded; there while it is
DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype("|u1"), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
MOST_SHARDS = 30_000
_MANIFEST_LIMIT = 2**24  # bytes: a shard takes up to about 530
_HEADER_LIMIT = 2**10  # bytes; NumPy writes 128
_NAME_LIMIT = 2**12  # bytes, as long as a path can be

Text = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=0, le=2**40)]
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Closed(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class File(_Closed):
    """A file of the set: its name, which has no folder, its size, and the sha256 of its bytes."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$")
    bytes: Count
    sha256: Sha256


class TokenShard(_Closed):
    """`images` images of the source, from number `first` on; of those that could not be used, nothing is here.

    `tokens`: integers (images, *shape). `names`: UTF-8, each ended by a zero byte; without it, image i is number `first` + i of
    its split. `labels`: integers (images,), where there are any.
    """

    first: Count
    images: Size
    tokens: File
    names: File | None
    labels: File | None


class Preprocessing(_Closed):
    """Of uint8 images: shorter side scaled to `resize`, margins of `pad`, the middle square of `crop`; in pixels.

    `small` says whether images below that were enlarged or left out; sets of an older kvq enlarged them and do not say.
    """

    channels: Size
    resize: Size | None
    pad: Count
    crop: Size
    small: Literal["enlarge", "skip"] = "enlarge"


class TokenSetSource(_Closed):
    """Where the images came from. `sha256` is of the names of files, of arrays, or of packed shards' checksums."""

    name: Text
    split: Text
    images: Count
    sha256: Sha256


class TokenPlan(_Closed):
    """What a set is made of: everything that decides its bytes, known before the first image is encoded."""

    format: Literal["kvq tokens"] = "kvq tokens"
    format_version: Literal[1] = 1
    kvq_version: Text
    weights_sha256: Sha256
    backend: Text
    quantizer: dict[str, Any]
    vocabulary: Size
    grid: list[Size] = Field(min_length=1, max_length=4)
    depth: Size | None
    dtype: Literal["uint8", "uint16", "uint32"]
    preprocessing: Preprocessing
    source: TokenSetSource
    batch_size: Size
    shard_size: Size

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tokens of one image: the grid, and a last axis where a position has several."""
        return (*self.grid, *([self.depth] if self.depth else []))


class TokenSet(TokenPlan):
    """Everything that tokens.json says."""

    images: Size
    skipped: Count
    shards: list[TokenShard] = Field(min_length=1, max_length=MOST_SHARDS)


def smallest_dtype(vocabulary: int) -> str:
    """Name of the narrowest unsigned integers that hold [0, vocabulary)."""
    return next(name for name, dtype in DTYPES.items() if vocabulary <= 2 ** (8 * dtype.itemsize))


def read_token_set(folder: Path) -> TokenSet:
    """What a token data set holds, each of whose files is there with the size, type and shape that it should have.

    Contents are not read: their checksums by `check_sums`, indices where they are used.

    Raises:
        TokensError: If not.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise TokensError(f"There is no {folder}. Give a folder that `kvq encode` wrote.")
    if not path.exists() and (folder / PLAN).exists():
        raise TokensError(f"{folder} is not complete yet: {MANIFEST} is missing. Run the same `kvq encode` again; it goes on.")
    if path.is_symlink() or not path.is_file():
        raise TokensError(f"{folder} is not a token data set: it has no file {MANIFEST}. `kvq encode` writes one.")
    if path.stat().st_size > _MANIFEST_LIMIT:
        raise TokensError(f"{path} is larger than {_MANIFEST_LIMIT} bytes, which no token data set needs.")
    try:
        described = TokenSet.model_validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise TokensError(f"{path} is not what this kvq reads: {place + ': ' if place else ''}{first['msg']}.") from None
    _check_consistent(path, described)
    for shard in described.shards:
        npy_offset(folder, shard.tokens, DTYPES[described.dtype], (shard.images, *described.shape))
        if shard.labels:
            label_dtype(folder, shard)
        if shard.names:
            file = _regular_file(folder, shard.names)
            if shard.names.bytes > shard.images * _NAME_LIMIT:
                raise TokensError(f"{file} has more bytes than {shard.images} names can have.")
    return described


def _check_consistent(path: Path, described: TokenSet) -> None:
    """Holds what is said twice against itself."""
    dtype, total = smallest_dtype(described.vocabulary), sum(shard.images for shard in described.shards)
    if described.dtype != dtype:
        raise TokensError(f"{path}: a vocabulary of {described.vocabulary} is stored as {dtype}, not as {described.dtype}.")
    if total != described.images:
        raise TokensError(f"{path} says {described.images} images, its shards {total}.")


def npy_offset(folder: Path, file: File, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Where the values of an .npy begin whose header and size are those of an array of that type and shape.

    Raises:
        TokensError: If it is another file. Nothing of the size that a header names is allocated.
    """
    found, offset = _npy_header(folder, file, shape)
    if found != dtype:
        raise TokensError(f"{folder / file.file} must hold {dtype.name}, as {MANIFEST} says. Received: {found.name}.")
    return offset


def label_dtype(folder: Path, shard: TokenShard) -> np.dtype[Any]:
    """Of the labels of a shard: any integers."""
    assert shard.labels
    dtype, _ = _npy_header(folder, shard.labels, (shard.images,))
    if dtype.kind not in "iu":
        raise TokensError(f"{folder / shard.labels.file} must hold integers. Received: {dtype.name}.")
    return dtype


def _npy_header(folder: Path, file: File, shape: tuple[int, ...]) -> tuple[np.dtype[Any], int]:
    path = _regular_file(folder, file)
    with path.open("rb") as opened:
        try:
            if np.lib.format.read_magic(opened) != (1, 0):
                raise ValueError("it is of another version of the format than 1.0")
            found, fortran, dtype = np.lib.format.read_array_header_1_0(opened, max_header_size=_HEADER_LIMIT)
        # What NumPy's reader raises on garbage has no common class.
        except Exception as error:
            raise TokensError(f"{path} has no proper .npy header: {str(error).splitlines()[0]:.200}.") from None
        offset = opened.tell()
    if found != shape or fortran or dtype.hasobject:
        order = " in Fortran's order" if fortran else ""
        raise TokensError(f"{path} must be of shape {shape}, as {MANIFEST} says. Received: {str(found):.100} {dtype}{order}.")
    expected = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if file.bytes != expected:
        raise TokensError(f"{path} must have {expected} bytes by its header. Received: {file.bytes}. It was cut or added to.")
    return dtype, offset


def read_names(folder: Path, shard: TokenShard) -> Listing:
    """The names of the images of a shard that has names.

    Raises:
        TokensError: If they are not as many, or one is not a relative path that stays below where it starts.
    """
    assert shard.names
    path = _regular_file(folder, shard.names)
    names = Listing(path.read_bytes())
    if len(names) != shard.images or not names.content.endswith(b"\0"):
        raise TokensError(f"{path} must hold {shard.images} names. Received: {len(names)}.")
    for name in names:
        if not name or len(name) > _NAME_LIMIT or any(part in ("", ".", "..") for part in name.split("/")):
            raise TokensError(f"{path} must hold paths below a folder, such as a/b.jpg. Received: {name!r:.200}.")
    return names


def check_sums(folder: Path, described: TokenSet) -> None:
    """Reads every file of a set whole. Raises TokensError if one is not what its sha256 says."""
    for shard in described.shards:
        for file in (shard.tokens, shard.names, shard.labels):
            if file is None:
                continue
            with _regular_file(folder, file).open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            if digest != file.sha256:
                raise TokensError(f"{folder / file.file} is not the file that {MANIFEST} lists: its sha256 is {digest}.")


def check_range(path: Path, tokens: NDArray[np.integer], vocabulary: int) -> None:
    """Raises TokensError if one of the tokens (...) of a file is not in [0, vocabulary)."""
    if tokens.size and int(tokens.max()) >= vocabulary:
        raise TokensError(f"{path} must hold indices below {vocabulary}. Received: {int(tokens.max())}. Encode the images anew.")


def _regular_file(folder: Path, file: File) -> Path:
    path = folder / file.file
    if path.is_symlink() or not path.is_file():
        raise TokensError(f"{path} is listed in {MANIFEST} and is no file there. Copy the set again, or encode the images anew.")
    if path.stat().st_size != file.bytes:
        raise TokensError(f"{path} must have {file.bytes} bytes. Received: {path.stat().st_size}. It was cut or added to.")
    return path
