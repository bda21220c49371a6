"""Draws docs/quantizers.png: what each quantizer makes of the same latents in two dimensions.

    python docs/draw_quantizers.py

Dots are latents, coloured by their index (the first, where a position has several); crosses are codes, of which codebooks have
learnt theirs for 300 steps from the latents. Runs on whatever backend is chosen.
"""

from pathlib import Path
from typing import Any

import keras
import matplotlib
import numpy as np
from keras import ops

from kvq.quantizers import QUANTIZERS
from kvq.quantizers.initialisers import kmeans

matplotlib.use("Agg")

K = 16
ARGUMENTS: dict[str, Any] = {
    **{kind: {"codebook_size": K} for kind in ("vector", "ema_vector", "cosine_vector", "ema_cosine_vector", "sim_vector")},
    "index_backprop": {"codebook_size": K},
    "gumbel": {"codebook_size": K},
    "finite_scalar": {"levels": [5, 4]},
    "symmetric_finite_scalar": {"levels": [4, 4]},
    "lookup_free": {"bits": 2},
    "binary_spherical": {"bits": 2},
    "residual": {"members": lambda: [QUANTIZERS["ema_vector"](4, name=f"level{level}") for level in range(2)]},
    "shared_residual": {"members": lambda: [QUANTIZERS["ema_vector"](8, name="level")], "levels": 2},
    "product": {"members": lambda: [QUANTIZERS["ema_vector"](4, name=f"group{group}") for group in range(2)]},
    "projected": {"base": lambda: QUANTIZERS["ema_vector"](8, name="base"), "code_dim": 1},
}


class Fit(keras.Model):
    """Only the quantizer learns, from its own losses and from the error of its codes."""

    def __init__(self, quantizer: keras.layers.Layer):
        super().__init__()
        self.quantizer = quantizer

    def call(self, latents: Any, training: bool = False) -> Any:
        outputs = self.quantizer(latents, training=training)
        error = ops.mean(ops.square(outputs["codes"] - latents))
        nothing = 0.0 * sum(ops.sum(weight) for weight in self.trainable_weights)
        return error + nothing + sum((ops.mean(term) for term in outputs["losses"].values()), 0.0)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        return y_pred


def latents(count: int) -> np.ndarray:
    """Three unequal clusters, (count, 2)."""
    rng = np.random.default_rng(0)
    centres = np.array([[-0.9, -0.3], [0.7, 0.9], [0.6, -0.8]])
    chosen = rng.choice(3, count, p=[0.5, 0.3, 0.2])
    return (centres[chosen] + 0.28 * rng.normal(size=(count, 2))).astype("float32")


def main() -> None:
    import matplotlib.pyplot as plt

    points = latents(3000)
    rows = -(-len(QUANTIZERS) // 5)
    figure, axes = plt.subplots(rows, 5, figsize=(15, 3 * rows), constrained_layout=True)
    for axis in axes.flat[len(QUANTIZERS) :]:
        axis.axis("off")
    for kind, axis in zip(QUANTIZERS, axes.flat, strict=False):
        keras.utils.set_random_seed(0)
        arguments = {name: value() if callable(value) else value for name, value in ARGUMENTS[kind].items()}
        quantizer = QUANTIZERS[kind](**arguments, name="quantizer")
        quantizer.build((None, 2))
        quantizer.initialise(points, kmeans)
        model = Fit(quantizer)
        if quantizer.weights:
            model.compile(optimizer=keras.optimizers.Adam(0.02), jit_compile=False)
            model.fit(np.tile(points, (10, 1)), batch_size=100, verbose=0)
        outputs = keras.tree.map_structure(lambda tensor: np.array(ops.convert_to_numpy(tensor)), quantizer(points))
        indices = outputs["indices"] if quantizer.depth is None else outputs["indices"][..., 0]
        axis.scatter(*points.T, c=indices % 20, cmap="tab20", s=3, alpha=0.5)
        axis.plot(*np.unique(outputs["codes"].round(4), axis=0).T, "kx", markersize=7, markeredgewidth=1.6)
        axis.set_title(kind, fontsize=11)
        axis.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    figure.savefig(Path(__file__).with_name("quantizers.png"), dpi=70)


if __name__ == "__main__":
    main()
