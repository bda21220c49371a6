"""A VQ-VAE training step in plain PyTorch with the quantizer of vector-quantize-pytorch: what kvq's is measured against.

Of `quantizer.kind` "vector" its learnable codebook, without moving averages: one weight pulls latents and codes alike there, so
that both get 1 + beta; the loss is that of the paper, its share for the latents is larger. Of "ema_vector" its moving averages.
"""

import copy
from typing import Any

import numpy as np
import torch
from peers.torch_loop import Loop as PlainLoop
from peers.torch_loop import wait as wait
from vector_quantize_pytorch import VectorQuantize


class Loop(PlainLoop):
    """`torch_loop.Loop` with another quantizer."""

    def __init__(self, config: Any, weights: dict[str, np.ndarray], trainable: set[str]):
        super().__init__(config, weights, trainable)
        quantizer, (size, dim) = config.quantizer, weights["quantizer.codebook"].shape
        if quantizer.kind == "vector":
            own = {"learnable_codebook": True, "ema_update": False, "commitment_weight": 1.0 + quantizer.commitment_weight}
        else:
            own = {"decay": quantizer.decay, "commitment_weight": quantizer.commitment_weight}
        rotation = quantizer.estimator == "rotation"
        self.quantizer = VectorQuantize(dim, size, rotation_trick=rotation, **own).to(self.device)
        codebook = self.quantizer._codebook
        codebook.embed.data.copy_(torch.tensor(weights["quantizer.codebook"])[None])
        if quantizer.kind == "ema_vector":
            codebook.embed_avg.data.copy_(codebook.embed.data)
            codebook.cluster_size.data.fill_(1.0)
        self.trained = [tensor for tensor in self.trained if tensor is not self.w["quantizer.codebook"]]
        self.trained += self.quantizer.parameters()
        self.adam = torch.optim.Adam(self.trained, config.train.learning_rate, eps=1e-7)

    def quantize(self, latents: Any) -> tuple[Any, Any]:
        codes, _, loss = self.quantizer(latents.flatten(1, 2))
        return codes.reshape(latents.shape), loss.sum()

    def first_loss(self, images: np.ndarray) -> float:
        before = copy.deepcopy(self.quantizer.state_dict())  # a loss, which only training has, moves the averages
        loss = super().first_loss(images)
        self.quantizer.load_state_dict(before)
        return loss
