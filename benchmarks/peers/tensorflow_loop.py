"""A VQ-VAE training step in plain TensorFlow, one `tf.function`: what kvq's is measured against."""

from typing import Any

import numpy as np
import tensorflow as tf
from peers.networks import decode, encode


class Loop:
    """One training step at a time, from kvq's weights.

    Args:
        config: kvq's configuration.
        weights: Name in a saved model to array.
        trainable: Names of those that Adam moves.
    """

    relu, tanh = staticmethod(tf.nn.relu), staticmethod(tf.tanh)

    def __init__(self, config: Any, weights: dict[str, np.ndarray], trainable: set[str]):
        self.config = config
        # Of the convolutions, and of what lies between them.
        self.dtype = tf.bfloat16 if config.train.precision == "mixed_bfloat16" else tf.float32
        self.w = {name: tf.Variable(array) for name, array in weights.items()}
        self.trained: list[Any] = []
        self.slots: list[tuple[Any, Any]] = []
        self.powers = tf.Variable(1.0), tf.Variable(1.0)
        for name in trainable:
            self.add(self.w[name])

    def add(self, variable: Any) -> None:
        """Lets Adam move a variable."""
        self.trained.append(variable)
        self.slots.append((tf.Variable(tf.zeros_like(variable)), tf.Variable(tf.zeros_like(variable))))

    def conv(self, name: str, x: Any, stride: int = 1) -> Any:
        kernel, bias = (tf.cast(self.w[f"{name}.conv.{part}"], self.dtype) for part in ("kernel", "bias"))
        return tf.nn.bias_add(tf.nn.conv2d(tf.cast(x, self.dtype), kernel, stride, "SAME"), bias)

    def up(self, name: str, x: Any, stride: int = 1) -> Any:
        kernel, bias = (tf.cast(self.w[f"{name}.conv.{part}"], self.dtype) for part in ("kernel", "bias"))
        x, shape = tf.cast(x, self.dtype), x.shape
        shape = [shape[0], shape[1] * stride, shape[2] * stride, kernel.shape[2]]
        return tf.nn.bias_add(tf.nn.conv2d_transpose(x, kernel, shape, stride), bias)

    def norm(self, name: str, x: Any) -> Any:
        values = tf.cast(x, tf.float32)
        mean, variance = tf.nn.moments(values, (1, 2), keepdims=True)
        gamma, beta = self.w[f"{name}.norm.gamma"], self.w[f"{name}.norm.beta"]
        return tf.cast(tf.nn.batch_normalization(values, mean, variance, beta, gamma, 1e-6), self.dtype)

    def leaky_relu(self, x: Any) -> Any:
        return tf.nn.leaky_relu(x, 0.2)

    def quantize(self, latents: Any, training: bool) -> tuple[Any, Any]:
        """Codes with the gradient passed straight through, and the quantizer's loss."""
        quantizer, codebook = self.config.quantizer, tf.convert_to_tensor(self.w["quantizer.codebook"])
        flat = tf.reshape(latents, (-1, codebook.shape[1]))
        distances = tf.reduce_sum(codebook**2, 1) - 2.0 * tf.matmul(flat, codebook, transpose_b=True)
        indices = tf.argmin(distances, -1, tf.int32)
        codes = tf.reshape(tf.gather(codebook, indices), latents.shape)
        loss = quantizer.commitment_weight * tf.reduce_mean((latents - tf.stop_gradient(codes)) ** 2)
        if quantizer.kind == "vector":
            loss += tf.reduce_mean((codes - tf.stop_gradient(latents)) ** 2)
        elif training:
            self.follow(tf.stop_gradient(flat), indices)
        return latents + tf.stop_gradient(codes - latents), loss

    def follow(self, latents: Any, indices: Any) -> None:
        """Moves the codebook of running means."""
        counts, sums, decay = self.w["quantizer.counts"], self.w["quantizer.sums"], self.config.quantizer.decay
        counts.assign(decay * counts + (1 - decay) * tf.math.bincount(indices, minlength=len(counts), dtype=tf.float32))
        sums.assign(decay * sums + (1 - decay) * tf.math.unsorted_segment_sum(latents, indices, len(counts)))
        self.w["quantizer.codebook"].assign(sums / tf.maximum(counts, 1e-3)[:, None])

    def loss(self, images: Any, training: bool) -> Any:
        x = tf.cast(images, tf.float32) / 127.5 - 1.0
        codes, loss = self.quantize(tf.cast(encode(self, self.config.model, x), tf.float32), training)
        return tf.reduce_mean((tf.cast(decode(self, self.config.model, tf.cast(codes, self.dtype)), tf.float32) - x) ** 2) + loss

    @tf.function
    def step(self, images: Any) -> None:
        with tf.GradientTape() as tape:
            loss = self.loss(images, True)
        first, second = (power.assign(power * beta) for power, beta in zip(self.powers, (0.9, 0.999), strict=True))
        rate = self.config.train.learning_rate
        # Before the update: a gathered codebook's gradient is a list of rows, repeated ones included.
        gradients = [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, self.trained)]
        for variable, (m, v), gradient in zip(self.trained, self.slots, gradients, strict=True):
            handles = variable.handle, m.handle, v.handle
            tf.raw_ops.ResourceApplyAdam(
                **dict(zip(("var", "m", "v"), handles, strict=True)),
                beta1_power=first, beta2_power=second, lr=rate, beta1=0.9, beta2=0.999, epsilon=1e-7, grad=gradient,
            )  # fmt: skip

    def parameters(self) -> int:
        return sum(int(tf.size(variable)) for variable in self.trained)

    def first_loss(self, images: np.ndarray) -> float:
        return float(self.loss(images, False))


def wait() -> None:
    """Until all that was queued is done: on a CPU nothing is, and a GPU answers in order."""
    if tf.config.list_physical_devices("GPU"):
        tf.test.experimental.sync_devices()
