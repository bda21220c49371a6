"""Images packed into ArrayRecord shards by `kvq data pack`: one sequential file instead of thousands of small ones.

A folder of shards holds `index.json` and the files that it lists. A record is a line of JSON with the image's name and label,
a newline, and the encoded image.
"""

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from kvq.data.contract import Element
from kvq.data.decoding import decode
from kvq.errors import BadImageError, DataError

INDEX = "index.json"
SUFFIX = ".array_record"


class _Closed(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Shard(_Closed):
    """One file: its name, which has no folder, and what it holds."""

    file: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$")
    records: int = pydantic.Field(ge=1)
    bytes: int = pydantic.Field(ge=1)
    sha256: str = pydantic.Field(pattern="^[0-9a-f]{64}$")


class Index(_Closed):
    """What index.json says. `size` is the shorter side in pixels that the images were shrunk to, None where they were not."""

    format: Literal["kvq shards"] = "kvq shards"
    format_version: Literal[1] = 1
    name: str
    size: int | None
    skipped: int = pydantic.Field(ge=0)
    splits: dict[Literal["train", "test", "all"], list[Shard]]


def read_index(folder: Path) -> Index:
    """The index of a folder of shards, each of whose files is there at its full size.

    Raises:
        DataError: If not; contents are not read here (`kvq data inspect` compares the checksums).
    """
    path = folder / INDEX
    try:
        index = Index.model_validate_json(path.read_bytes())
    except (OSError, pydantic.ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, pydantic.ValidationError) else error.strerror
        raise DataError(f"{path} cannot be read: {reason}. Pack the images anew with `kvq data pack`.") from error
    for shard in (shard for shards in index.splits.values() for shard in shards):
        file = folder / shard.file
        if file.is_symlink() or not file.is_file() or file.stat().st_size != shard.bytes:
            raise DataError(f"{file} is not the file of {shard.bytes} bytes that {INDEX} lists. Pack the images anew.")
    return index


def to_record(name: str, label: int, content: bytes) -> bytes:
    """One image as it lies in a shard."""
    return json.dumps({"name": name, "label": label}).encode() + b"\n" + content


class ShardSource:
    """Images of one split of a folder of shards, decoded when they are asked for, as RGB.

    Args:
        folder: With `index.json`.
        split: Which of `splits` this is.
        splits: What is offered; a part of the split "all" where the images had no splits of their own.

    Raises:
        DataError: If the folder is not whole; from `source[i]`, BadImageError, if a record is broken.
    """

    channels = 3

    def __init__(self, folder: Path, split: str = "all", splits: tuple[str, ...] = ("all",)) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        index = read_index(folder)
        self.name, self.split, self.splits = index.name, split, splits
        shards = index.splits["all" if "all" in index.splits else split]  # type: ignore[index]
        self.sha256 = [shard.sha256 for shard in shards]
        try:
            self._records = ArrayRecordDataSource([str(folder / shard.file) for shard in shards])
        except Exception as error:  # its errors have no common class
            raise DataError(f"{folder} cannot be read: {error}. Pack the images anew.") from error
        self._indices: Sequence[int] | NDArray[np.integer] = range(len(self._records))

    def where(self, chosen: NDArray[np.bool_]) -> "ShardSource":
        """The same with those images alone at which `chosen` (len(self),) is true."""
        part = copy.copy(self)
        part._indices = np.asarray(self._indices)[chosen]
        return part

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Element:
        number = int(self._indices[index])
        name = f"record {number}"
        try:
            head, _, content = self._records[number].partition(b"\n")
            described = json.loads(head)
            name, label = str(described["name"]), int(described["label"])
        except Exception as error:  # ArrayRecord's errors have no common class
            raise BadImageError(name, str(error)) from error
        return {"image": decode(content, name), "label": label, "name": name}

    def identity(self) -> Iterable[bytes]:
        return [json.dumps(self.sha256).encode()]
