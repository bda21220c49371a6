"""A VQ-VAE training step in plain JAX with optax, one `jax.jit`: what kvq's is measured against."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from peers.networks import decode, encode

AXES = ("NHWC", "HWIO", "NHWC")


class Layers:
    """The layers, on a dictionary of weights. Convolutions are in `dtype`, and what lies between them."""

    relu, tanh = staticmethod(jax.nn.relu), staticmethod(jnp.tanh)

    def __init__(self, w: dict[str, Any], dtype: str):
        self.w, self.dtype = w, dtype

    def conv(self, name: str, x: Any, stride: int = 1) -> Any:
        kernel = self.w[f"{name}.conv.kernel"].astype(self.dtype)
        x = lax.conv_general_dilated(x.astype(self.dtype), kernel, (stride, stride), "SAME", dimension_numbers=AXES)
        return x + self.w[f"{name}.conv.bias"].astype(self.dtype)

    def up(self, name: str, x: Any, stride: int = 1) -> Any:
        kernel, x = self.w[f"{name}.conv.kernel"].astype(self.dtype), x.astype(self.dtype)
        x = lax.conv_transpose(x, kernel, (stride, stride), _padding(kernel.shape[0], stride), None, AXES, transpose_kernel=True)
        return x + self.w[f"{name}.conv.bias"].astype(self.dtype)

    def norm(self, name: str, x: Any) -> Any:
        values = x.astype("float32")
        mean, variance = values.mean((1, 2), keepdims=True), values.var((1, 2), keepdims=True)
        # One product with x, not two: 0.85 times the step.
        scale = lax.rsqrt(variance + 1e-6) * self.w[f"{name}.norm.gamma"]
        return (values * scale + (self.w[f"{name}.norm.beta"] - mean * scale)).astype(self.dtype)

    def leaky_relu(self, x: Any) -> Any:
        return jax.nn.leaky_relu(x, 0.2)


class Loop:
    """One training step at a time, from kvq's weights.

    Args:
        config: kvq's configuration.
        weights: Name in a saved model to array.
        trainable: Names of those that Adam moves.
    """

    def __init__(self, config: Any, weights: dict[str, np.ndarray], trainable: set[str]):
        self.config = config
        self.trained = {name: jnp.array(weights[name]) for name in trainable}
        self.rest = {name: jnp.array(array) for name, array in weights.items() if name not in trainable}
        self.adam = optax.adam(config.train.learning_rate, eps=1e-7)
        self.slots = self.adam.init(self.trained)

    def loss(self, trained: dict[str, Any], rest: dict[str, Any], images: Any) -> tuple[Any, dict[str, Any]]:
        """The loss, and the weights that no gradient moves."""
        dtype = "bfloat16" if self.config.train.precision == "mixed_bfloat16" else "float32"
        quantizer, layers = self.config.quantizer, Layers({**trained, **rest}, dtype)
        x = images.astype("float32") / 127.5 - 1.0
        latents = encode(layers, self.config.model, x).astype("float32")
        codebook = layers.w["quantizer.codebook"]
        # Two minima, because `argmin` is slow under XLA on CPUs.
        distances = (codebook**2).sum(1) - 2.0 * latents @ codebook.T
        nearest = jnp.where(distances == distances.min(-1, keepdims=True), jnp.arange(len(codebook)), len(codebook) - 1)
        indices = nearest.min(-1)
        codes = codebook[indices]
        loss = quantizer.commitment_weight * ((latents - lax.stop_gradient(codes)) ** 2).mean()
        if quantizer.kind == "vector":
            loss += ((codes - lax.stop_gradient(latents)) ** 2).mean()
        else:
            rest = self.follow(rest, lax.stop_gradient(latents).reshape(-1, codebook.shape[1]), indices.ravel())
        restored = decode(layers, self.config.model, latents + lax.stop_gradient(codes - latents))
        return ((restored.astype("float32") - x) ** 2).mean() + loss, rest

    def follow(self, rest: dict[str, Any], latents: Any, indices: Any) -> dict[str, Any]:
        """The codebook of running means, moved."""
        decay, size = self.config.quantizer.decay, len(rest["quantizer.codebook"])
        counts = decay * rest["quantizer.counts"] + (1 - decay) * jnp.bincount(indices, length=size)
        sums = decay * rest["quantizer.sums"] + (1 - decay) * jax.ops.segment_sum(latents, indices, size)
        codebook = sums / jnp.maximum(counts, 1e-3)[:, None]
        return {**rest, "quantizer.counts": counts, "quantizer.sums": sums, "quantizer.codebook": codebook}

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2, 3))
    def next(self, trained: Any, rest: Any, slots: Any, images: Any) -> tuple[Any, Any, Any]:
        gradients, rest = jax.grad(self.loss, has_aux=True)(trained, rest, images)
        updates, slots = self.adam.update(gradients, slots)
        return optax.apply_updates(trained, updates), rest, slots

    def step(self, images: np.ndarray) -> None:
        self.trained, self.rest, self.slots = self.next(self.trained, self.rest, self.slots, images)

    def parameters(self) -> int:
        return sum(array.size for array in jax.tree.leaves(self.trained))

    def first_loss(self, images: np.ndarray) -> float:
        return float(jax.jit(self.loss)(self.trained, self.rest, images)[0])


def wait() -> None:
    """Until all that was queued is done, whoever queued it."""
    jax.block_until_ready(jax.live_arrays())


def _padding(size: int, stride: int) -> list[tuple[int, int]]:
    """Of the dilated input, so that the output has `stride` times the input's side and lies as in TensorFlow."""
    before = size - 1 - max(size - stride, 0) // 2
    return [(before, size + stride - 2 - before)] * 2
