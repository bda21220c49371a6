"""From files to batches: collections (`sources` and the like), crops and flips (`transforms`), Grain (`loader`). No keras.

The names load when first used, so that opening a collection does not wait for the import of Grain.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvq.data.inspection import inspect as inspect
    from kvq.data.loader import as_grain as as_grain
    from kvq.data.loader import evaluation_batches as evaluation_batches
    from kvq.data.loader import iterate as iterate
    from kvq.data.loader import training_batches as training_batches
    from kvq.data.packing import pack as pack
    from kvq.data.places import locate as locate
    from kvq.data.shards import ShardSource as ShardSource
    from kvq.data.sources import ArraySource as ArraySource
    from kvq.data.sources import FolderSource as FolderSource
    from kvq.data.sources import open_source as open_source
    from kvq.data.token_source import TokenSource as TokenSource
    from kvq.data.transforms import evaluation_transforms as evaluation_transforms
    from kvq.data.transforms import training_transforms as training_transforms

_HOME = {
    "as_grain": "loader",
    "evaluation_batches": "loader",
    "iterate": "loader",
    "training_batches": "loader",
    "ArraySource": "sources",
    "FolderSource": "sources",
    "ShardSource": "shards",
    "TokenSource": "token_source",
    "inspect": "inspection",
    "locate": "places",
    "open_source": "sources",
    "pack": "packing",
    "evaluation_transforms": "transforms",
    "training_transforms": "transforms",
}
__all__ = [*sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"kvq.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'kvq.data' has no attribute {name!r}. It has {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
