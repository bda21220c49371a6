"""Where codes start: k-means on a sample of latents, in NumPy, since it happens once, between steps."""

import numpy as np


def kmeans(vectors: np.ndarray, clusters: int, seed: int = 0, iterations: int = 20) -> np.ndarray:
    """Centres of k-means by Lloyd's iterations from a random sample of the vectors.

    Args:
        vectors: Float array (n, d), finite. Fewer vectors than clusters are drawn repeatedly and moved by a little noise.
        clusters: Number of centres.
        seed: Of the sample. The same vectors and seed give the same centres.
        iterations: Of Lloyd's algorithm.

    Returns:
        float32 array (clusters, d). A cluster that loses its last vector keeps its centre.

    Raises:
        ValueError: If a vector is not finite, or there is none.
    """
    if not len(vectors) or not np.isfinite(vectors).all():
        raise ValueError(f"`vectors` must be finite and at least one. Received: shape={vectors.shape}.")
    rng = np.random.default_rng(seed)
    centres = vectors[rng.choice(len(vectors), clusters, replace=len(vectors) < clusters)].astype("float64")
    # Equal centres would never part.
    centres += rng.normal(scale=1e-4 * (vectors.std() + 1e-12), size=centres.shape)
    for _ in range(iterations):
        nearest = np.argmin((centres**2).sum(1) - 2.0 * (vectors @ centres.T), axis=1)
        counts = np.bincount(nearest, minlength=clusters)
        sums = np.stack([np.bincount(nearest, weights=column, minlength=clusters) for column in vectors.T], axis=1)
        filled = counts > 0
        centres[filled] = sums[filled] / counts[filled, None]
    return centres.astype("float32")
