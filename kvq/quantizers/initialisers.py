"""Where codes start: functions of latents (n, d), a number of codes and a seed. In NumPy, since it happens once."""

from collections.abc import Callable

import numpy as np


def random_latents(vectors: np.ndarray, count: int, seed: int | np.random.Generator = 0) -> np.ndarray:
    """Vectors drawn at random, each at most once while there are enough, and moved by a little noise.

    Args:
        vectors: Float array (n, d), finite.
        count: Number of codes.
        seed: The same vectors and seed give the same codes.

    Returns:
        float32 array (count, d).

    Raises:
        ValueError: If a vector is not finite, or there is none.
    """
    _check(vectors)
    rng = np.random.default_rng(seed)
    return _apart(vectors[rng.choice(len(vectors), count, replace=len(vectors) < count)], vectors, rng).astype("float32")


def kmeans(vectors: np.ndarray, count: int, seed: int = 0, iterations: int = 20) -> np.ndarray:
    """Centres of k-means by Lloyd's iterations from a k-means++ start.

    Args:
        vectors: Float array (n, d), finite. Fewer vectors than centres are drawn repeatedly and moved by a little noise.
        count: Number of centres.
        seed: The same vectors and seed give the same centres.
        iterations: Of Lloyd's algorithm; fewer where they would multiply more than 10^11 times, a minute or so.

    Returns:
        float32 array (count, d). A cluster that loses its last vector keeps its centre.

    Raises:
        ValueError: If a vector is not finite, or there is none.

    Source: Arthur and Vassilvitskii 2007, "k-means++: The Advantages of Careful Seeding"; Lloyd 1982.
    """
    _check(vectors)
    rng = np.random.default_rng(seed)
    # Above that the start alone would take n k d operations; random vectors are about as good where centres are many.
    spread = _plus_plus if count <= 1024 and len(vectors) > count else lambda v, k, r: v[r.choice(len(v), k, len(v) < k)]
    centres = _apart(spread(vectors, count, rng), vectors, rng)
    for _ in range(min(iterations, max(10**11 // (len(vectors) * count * vectors.shape[1]), 1))):
        nearest = _nearest(vectors, centres)
        counts = np.bincount(nearest, minlength=count)
        sums = np.stack([np.bincount(nearest, weights=column, minlength=count) for column in vectors.T], axis=1)
        filled = counts > 0
        centres[filled] = sums[filled] / counts[filled, None]
    return centres.astype("float32")


def _nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index (n,) of the centre nearest to each vector, a part of the vectors at once: all distances may be gigabytes."""
    squares = (centres**2).sum(1)
    rows = max(2**22 // len(centres), 1)
    parts = [vectors[start : start + rows] for start in range(0, len(vectors), rows)]
    return np.concatenate([np.argmin(squares - 2.0 * (part @ centres.T), axis=1) for part in parts])


def _plus_plus(vectors: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Each centre a vector, with a probability that grows with the squared distance to those chosen before."""
    chosen = [int(rng.integers(len(vectors)))]
    distances = np.full(len(vectors), np.inf)
    while len(chosen) < count:
        distances = np.minimum(distances, np.square(vectors - vectors[chosen[-1]], dtype="float64").sum(1))
        total = distances.sum()
        chosen.append(int(rng.choice(len(vectors), p=distances / total if total > 0 else None)))
    return vectors[chosen]


def _apart(codes: np.ndarray, vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Equal codes would never part.
    return codes.astype("float64") + rng.normal(scale=1e-4 * (vectors.std() + 1e-12), size=codes.shape)


def _check(vectors: np.ndarray) -> None:
    if not len(vectors) or not np.isfinite(vectors).all():
        raise ValueError(f"`vectors` must be finite and at least one. Received: shape={vectors.shape}.")


INITIALISERS: dict[str, Callable[..., np.ndarray]] = {"kmeans": kmeans, "latents": random_latents}
