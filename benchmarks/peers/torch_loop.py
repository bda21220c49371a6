"""A VQ-VAE training step in plain PyTorch: what kvq's is measured against."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peers.networks import decode, encode


class Loop:
    """One training step at a time, from kvq's weights.

    Args:
        config: kvq's configuration.
        weights: Name in a saved model to array.
        trainable: Names of those that Adam moves.
    """

    relu, tanh = staticmethod(F.relu), staticmethod(torch.tanh)

    def __init__(self, config: Any, weights: dict[str, np.ndarray], trainable: set[str]):
        self.config, self.device = config, "cuda" if torch.cuda.is_available() else "cpu"
        self.w = {name: torch.tensor(_torch_layout(name, array), device=self.device) for name, array in weights.items()}
        self.trained = [self.w[name].requires_grad_() for name in trainable]
        self.adam = torch.optim.Adam(self.trained, config.train.learning_rate, eps=1e-7)

    def networks(self) -> Any:
        """Where the precision of encoder and decoder holds; the quantizer, between them, is in float32."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.config.train.precision == "mixed_bfloat16")

    def conv(self, name: str, x: Any, stride: int = 1) -> Any:
        kernel = self.w[f"{name}.conv.kernel"]
        # "Same" padding that puts the odd pixel after, as in TensorFlow and kvq; PyTorch itself has none for strides.
        total = kernel.shape[-1] - stride
        if total % 2:
            x = F.pad(x, (total // 2, total - total // 2) * 2)
        return F.conv2d(x, kernel, self.w[f"{name}.conv.bias"], stride, padding=0 if total % 2 else total // 2)

    def up(self, name: str, x: Any, stride: int = 1) -> Any:
        kernel, height, width = self.w[f"{name}.conv.kernel"], x.shape[2] * stride, x.shape[3] * stride
        x = F.conv_transpose2d(x, kernel, self.w[f"{name}.conv.bias"], stride, padding=(kernel.shape[-1] - stride) // 2)
        return x[:, :, :height, :width]

    def norm(self, name: str, x: Any) -> Any:
        # `F.instance_norm` leaves the channels-last layout, and then every convolution after it is slower (1.5 times the step).
        values = x.float()
        variance, mean = torch.var_mean(values, (2, 3), correction=0, keepdim=True)
        scale = torch.rsqrt(variance + 1e-6) * self.w[f"{name}.norm.gamma"][:, None, None]
        return (values * scale + (self.w[f"{name}.norm.beta"][:, None, None] - mean * scale)).to(x.dtype)

    def leaky_relu(self, x: Any) -> Any:
        return F.leaky_relu(x, 0.2)

    def quantize(self, latents: Any) -> tuple[Any, Any]:
        """Codes with the gradient passed straight through, and the quantizer's loss."""
        quantizer, codebook = self.config.quantizer, self.w["quantizer.codebook"]
        with torch.no_grad():
            distances = codebook.square().sum(1) - 2.0 * latents @ codebook.T
            indices = distances.argmin(-1)
        codes = F.embedding(indices, codebook)
        loss = quantizer.commitment_weight * F.mse_loss(latents, codes.detach())
        if quantizer.kind == "vector":
            loss = loss + F.mse_loss(codes, latents.detach())
        elif torch.is_grad_enabled():
            self.follow(latents.detach().flatten(0, -2), indices.flatten())
        return latents + (codes - latents).detach(), loss

    def follow(self, latents: Any, indices: Any) -> None:
        """Moves the codebook of running means."""
        counts, sums, decay = self.w["quantizer.counts"], self.w["quantizer.sums"], self.config.quantizer.decay
        counts.lerp_(torch.bincount(indices, minlength=len(counts)).to(counts.dtype), 1 - decay)
        sums.lerp_(torch.zeros_like(sums).index_add_(0, indices, latents), 1 - decay)
        self.w["quantizer.codebook"] = sums / counts.clamp_min(1e-3)[:, None]

    def loss(self, images: np.ndarray) -> Any:
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with self.networks():
            latents = encode(self, self.config.model, x)
        codes, loss = self.quantize(latents.float().permute(0, 2, 3, 1))
        with self.networks():
            restored = decode(self, self.config.model, codes.permute(0, 3, 1, 2))
        return F.mse_loss(restored.float(), x) + loss

    def step(self, images: np.ndarray) -> None:
        self.adam.zero_grad()
        self.loss(images).backward()
        self.adam.step()

    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.trained)

    def first_loss(self, images: np.ndarray) -> float:
        with torch.no_grad():
            return float(self.loss(images))


def wait() -> None:
    """Until all that was queued is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _torch_layout(name: str, array: np.ndarray) -> np.ndarray:
    # A transposed convolution's kernel is (h, w, filters, inputs) in kvq and (inputs, filters, h, w) here: the same axes.
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else np.array(array)
