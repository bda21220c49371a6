"""What a token data set will be, known before the first image is encoded."""

import keras

from kvq import __version__
from kvq.artifact import ArtifactConfig
from kvq.data.contract import Source
from kvq.data.sources import fingerprint
from kvq.data.token_set import Preprocessing, TokenPlan, TokenSetSource, smallest_dtype


def plan_of(config: ArtifactConfig, source: Source, batch_size: int, shard_size: int) -> TokenPlan:
    """Everything that decides the bytes of a set."""
    (grid,) = config.grids
    return TokenPlan(
        kvq_version=__version__,
        weights_sha256=config.weights_sha256,
        backend=keras.backend.backend(),
        quantizer=config.quantizer.model_dump(mode="json"),
        vocabulary=grid.vocabulary,
        grid=grid.shape,
        depth=config.quantizer.depth,
        dtype=smallest_dtype(grid.vocabulary),
        preprocessing=Preprocessing(**dict(config.images)),
        source=TokenSetSource(name=source.name, split=source.split, **fingerprint(source)),
        batch_size=batch_size,
        shard_size=shard_size,
    )
