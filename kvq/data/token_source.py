"""Tokens for those who train on them: a random-access source for Grain over a token data set, mapped into memory. No keras."""

import functools
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from kvq.data.listing import Listing
from kvq.data.token_set import DTYPES, check_range, check_sums, label_dtype, npy_offset, read_names, read_token_set

MAPPED = 128  # shards mapped at once: each keeps two files open, and a process may have about a thousand


class TokenElement(TypedDict):
    """Tokens int32, of shape `TokenSource.shape`; the image's label, -1 if there is none, and its name within its collection."""

    tokens: NDArray[np.int32]
    label: int
    name: str


class _Mapped(NamedTuple):
    tokens: NDArray[np.integer]
    labels: NDArray[np.integer] | None


class TokenSource:
    """The tokens of every image of a token data set, in the order in which they were encoded.

    When it is opened, tokens.json is checked, and that each file has the size, type and shape that it should have; when an
    element is read, that its indices are in the vocabulary. It can be pickled; workers open the files anew.

    Args:
        folder: What `kvq encode` wrote.
        verify: Read everything now: the sha256 of each file, all indices, all names.

    Attributes:
        description: What tokens.json says.

    Raises:
        TokensError: If the set is broken; from `source[i]`, if an index is outside of the vocabulary.
    """

    def __init__(self, folder: str | Path, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.description = read_token_set(self.folder)
        self._begins = np.cumsum([0, *(shard.images for shard in self.description.shards)])
        self._names: dict[int, Listing] = {}
        self._map = functools.lru_cache(MAPPED)(self._open)
        if verify:
            check_sums(self.folder, self.description)
            for number, shard in enumerate(self.description.shards):
                check_range(self.folder / shard.tokens.file, self._map(number).tokens, self.vocabulary_size)
                self._name(number, 0)

    @property
    def vocabulary_size(self) -> int:
        """How many values an index can take."""
        return self.description.vocabulary

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns) of the tokens of one image, and a last axis where a position has several."""
        return self.description.shape

    def __len__(self) -> int:
        return self.description.images

    def __getitem__(self, index: int) -> TokenElement:
        number, place = self._find(index)
        mapped = self._map(number)
        tokens = mapped.tokens[place]
        check_range(self.folder / self.description.shards[number].tokens.file, tokens, self.vocabulary_size)
        return {
            "tokens": tokens.astype(np.int32),
            "label": -1 if mapped.labels is None else int(mapped.labels[place]),
            "name": self._name(number, place),
        }

    def name(self, index: int) -> str:
        """Of an image within its collection. Reads no tokens."""
        return self._name(*self._find(index))

    def _find(self, index: int) -> tuple[int, int]:
        """Number of a shard and the place in it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"No image {index} among {len(self)}.")
        index = int(index) % len(self)
        number = int(np.searchsorted(self._begins, index, side="right")) - 1
        return number, index - int(self._begins[number])

    def _open(self, number: int) -> _Mapped:
        described, shard = self.description, self.description.shards[number]
        dtype, shape = DTYPES[described.dtype], (shard.images, *described.shape)
        offset = npy_offset(self.folder, shard.tokens, dtype, shape)  # again: the file may have changed
        # As a plain array: elements would else be of NumPy's class for mapped files, which is slow and is not what they are.
        tokens = np.asarray(np.memmap(self.folder / shard.tokens.file, dtype, "r", offset, shape))
        labels = None
        if shard.labels:
            dtype = label_dtype(self.folder, shard)
            begin = shard.labels.bytes - shard.images * dtype.itemsize
            labels = np.fromfile(self.folder / shard.labels.file, dtype, shard.images, offset=begin)
        return _Mapped(tokens, labels)

    def _name(self, number: int, place: int) -> str:
        shard = self.description.shards[number]
        if shard.names is None:
            # As arrays name their images.
            return f"{self.description.source.split}/{shard.first + place:05d}"
        if number not in self._names:
            self._names[number] = read_names(self.folder, shard)
        return self._names[number][place]

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array would be pickled with all that it maps.
        return {"folder": self.folder, "description": self.description, "_begins": self._begins}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._names = {}
        self._map = functools.lru_cache(MAPPED)(self._open)
