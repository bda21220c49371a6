"""A VQ-VAE training step in plain TensorFlow with the quantizer of Sonnet (dm-sonnet): what kvq's is measured against."""

from typing import Any

import numpy as np
import sonnet as snt
from peers.tensorflow_loop import Loop as PlainLoop
from peers.tensorflow_loop import wait as wait


class Loop(PlainLoop):
    """`tensorflow_loop.Loop` with another quantizer; of configurations with `quantizer.kind` "vector"."""

    def __init__(self, config: Any, weights: dict[str, np.ndarray], trainable: set[str]):
        codebook = weights["quantizer.codebook"]
        self.quantizer = snt.nets.VectorQuantizer(codebook.shape[1], codebook.shape[0], config.quantizer.commitment_weight)
        # Sonnet's codes are columns.
        self.quantizer.embeddings.assign(codebook.T)
        others = {name: array for name, array in weights.items() if name != "quantizer.codebook"}
        super().__init__(config, others, set(trainable) - {"quantizer.codebook"})
        self.add(self.quantizer.embeddings)

    def quantize(self, latents: Any, training: bool) -> tuple[Any, Any]:
        quantized = self.quantizer(latents, training)
        return quantized["quantize"], quantized["loss"]
