"""A VQ-VAE training step in plain PyTorch with the quantizer of vector-quantize-pytorch: what kvq's is measured against.

Its learnable codebook, without moving averages and rotation. One weight pulls latents and codes alike there, so that both get
1 + beta: the loss is that of the paper, its share for the latents is larger.
"""

from typing import Any

import numpy as np
import torch
from peers.torch_loop import Loop as PlainLoop
from peers.torch_loop import wait as wait
from vector_quantize_pytorch import VectorQuantize


class Loop(PlainLoop):
    """`torch_loop.Loop` with another quantizer; of configurations with `quantizer.kind` "vector"."""

    def __init__(self, config: Any, weights: dict[str, np.ndarray], trainable: set[str]):
        super().__init__(config, weights, trainable)
        size, dim = weights["quantizer.codebook"].shape
        self.quantizer = VectorQuantize(
            dim,
            size,
            learnable_codebook=True,
            ema_update=False,
            rotation_trick=False,
            commitment_weight=1.0 + config.quantizer.commitment_weight,
        ).to(self.device)
        self.quantizer._codebook.embed.data.copy_(torch.tensor(weights["quantizer.codebook"])[None])
        own = [tensor for tensor in self.trained if tensor is not self.w["quantizer.codebook"]]
        self.trained = [*own, *self.quantizer.parameters()]
        self.adam = torch.optim.Adam(self.trained, config.train.learning_rate, eps=1e-7)

    def quantize(self, latents: Any) -> tuple[Any, Any]:
        codes, _, loss = self.quantizer(latents.flatten(1, 2))
        return codes.reshape(latents.shape), loss.sum()
