"""Which old index each index of a pruned model stands for: a file beside the model, with which stored tokens can follow."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import Field

from kvq.errors import ArtifactError
from kvq.quantizer_sections import LARGEST_CODEBOOK
from kvq.untrusted import read_bytes

NAME = "index_map.json"
_LIMIT = 2**28  # bytes

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class IndexMap(pydantic.BaseModel):
    """What pruning did to the indices.

    `kept`: for each index of a position (one, where there is only one) the old indices in ascending order; new index j stands for
    old index `kept[...][j]`.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["kvq index map"] = "kvq index map"
    format_version: Literal[1] = 1
    from_weights_sha256: Sha256
    to_weights_sha256: Sha256
    vocabulary: int = Field(ge=2, le=LARGEST_CODEBOOK)
    kept: list[list[int]] = Field(min_length=1, max_length=64)

    @pydantic.model_validator(mode="after")
    def _is_a_choice(self) -> "IndexMap":
        for old in self.kept:
            if not 2 <= len(old) == len(self.kept[0]) or old[0] < 0 or old[-1] >= self.vocabulary:
                raise ValueError(f"kept must be lists of one length, at least 2, of indices in [0, {self.vocabulary})")
            if any(first >= second for first, second in zip(old, old[1:], strict=False)):
                raise ValueError("kept must ascend")
        return self

    def renumbered(self, tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """New indices of old ones in [0, vocabulary), -1 where the code was dropped.

        Args:
            tokens: (...); (..., depth) where a position has several.
        """
        tables = np.full((len(self.kept), self.vocabulary), -1, np.int64)
        for table, old in zip(tables, self.kept, strict=True):
            table[old] = np.arange(len(old))
        return tables[0][tokens] if len(self.kept) == 1 else tables[np.arange(len(self.kept)), tokens]


def read_index_map(folder: Path) -> IndexMap:
    """The map beside a pruned model.

    Raises:
        ArtifactError: If there is none, or it is broken.
    """
    path = folder / NAME
    if not path.is_file() or path.is_symlink():
        raise ArtifactError(f"{folder} has no {NAME}. `kvq codebook --prune` writes one beside a pruned model.")
    try:
        return IndexMap.model_validate_json(read_bytes(path, _LIMIT))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path} is not what this kvq reads: {place + ': ' if place else ''}{first['msg']:.200}.") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from None
