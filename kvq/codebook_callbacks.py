"""What is done to the codebook between training steps: a start from data, and new places for codes that nobody uses.

Between steps, because an assignment to a trained weight inside a step is silently dropped on JAX.
"""

from collections.abc import Callable, Iterator

import keras
import numpy as np

from kvq.data.contract import Batch
from kvq.ops import rescale


class InitialiseCodebook:
    """Places the codes on the latents of the first batches, unless they were placed before.

    Args:
        batches: Training batches from the given step on.
        place: A function of `kvq.quantizers.initialisers`.
        seed: Of the placing.
    """

    # Enough vectors for every centre to be a mean of several; and no more than k-means takes in seconds.
    VECTORS_PER_CODE = 16
    MOST_VECTORS = 2**18

    def __init__(self, batches: Callable[[], Iterator[Batch]], place: Callable[..., np.ndarray], seed: int):
        self.batches = batches
        self.place = place
        self.seed = seed

    def due(self, step: int, ending: str | None) -> bool:
        return step == 0 and not ending

    def act(self, model: keras.Model, step: int) -> None:
        quantizer = model.quantizer
        if quantizer.is_initialised:
            return
        latents: list[np.ndarray] = []
        for batch in self.batches():
            latents.extend(_latents(model, batch["images"]))
            if len(latents) >= min(self.VECTORS_PER_CODE * quantizer.codebook_size, self.MOST_VECTORS):
                break
        quantizer.initialise(np.stack(latents), self.place, self.seed)


class ReplaceDeadCodes:
    """Puts random latents of the current batch in the place of codes that are hardly used.

    Args:
        batch: The batch of a step.
        every: Steps between two looks.
        below: How much less than the mean code a dead one is used.
        until: No code is replaced after this step, so that training ends on a codebook that has settled.
        seed: Of the choice of latents.
        note: Told how many were replaced.

    Source: Dhariwal et al. 2020, arXiv:2005.00341 (Jukebox), section 3.1. Differs: the threshold is relative to the mean.
    """

    def __init__(
        self,
        batch: Callable[[int], Batch],
        every: int,
        below: float,
        until: int,
        seed: int,
        note: Callable[[str], None],
    ):
        self.batch = batch
        self.every = every
        self.below = below
        self.until = until
        self.seed = seed
        self.note = note

    def due(self, step: int, ending: str | None) -> bool:
        return ending != "finished" and 0 < step <= self.until and step % self.every == 0

    def act(self, model: keras.Model, step: int) -> None:
        if not model.quantizer.is_replaceable:
            return
        latents = _latents(model, self.batch(step)["images"])
        changed = model.quantizer.replace_dead(latents, self.below, np.random.default_rng((self.seed, step)))
        for variable, rows in changed:
            model.optimizer.forget(variable, rows)
        if changed:
            replaced, codes = sum(len(rows) for _, rows in changed), sum(variable.shape[0] for variable, _ in changed)
            self.note(f"step {step}: {replaced} of {codes} codes were dead and replaced")


def _latents(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Latents (n, latent_dim) of a batch of uint8 images, in float32 on the host."""
    latents = model.encoder.predict_on_batch(keras.ops.convert_to_numpy(rescale(images)))
    return np.asarray(latents, "float32").reshape(-1, latents.shape[-1])
