"""The optimizer: Adam behind a door that no step with a loss or gradient that is not finite passes."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kvq.ops import Tensor


@keras.saving.register_keras_serializable(package="kvq")
class FiniteSteps(keras.optimizers.Optimizer):
    """Takes the steps of another optimizer whose loss and gradients are finite, and leaves everything as it is at the others.

    Decided inside the step, so that no weight is ever poisoned, however late somebody looks. As in `LossScaleOptimizer`, which
    does this for float16, but without a scale, and with a memory.

    Args:
        inner: What makes the steps.
        tolerated: How many steps may be left out. After one more nothing moves any longer: the weights stay what they were
            before that step, for whoever wants to find out what was wrong with it.

    `iterations` counts every step; that of `inner`, which its schedule follows, only those that were taken.
    """

    def __init__(self, inner: keras.optimizers.Optimizer, tolerated: int = 0, name: str = "finite_steps", **kwargs: Any):
        super().__init__(learning_rate=0.0, name=name, **kwargs)
        self.inner = inner
        self.tolerated = tolerated

    def build(self, variables: list[Any]) -> None:
        if self.built:
            return

        def number(name: str) -> Any:
            return self.add_variable(shape=(), dtype="int32", initializer="zeros", aggregation="none", name=name)

        self._skipped = number("skipped")
        self._last_skipped = number("last_skipped")
        self.inner.build(variables)
        super().build(variables)

    @property
    def variables(self) -> list[Any]:
        return [*super().variables, *self.inner.variables]

    @property
    def skipped(self) -> int:
        """Steps that were left out so far."""
        return int(ops.convert_to_numpy(self._skipped)) if self.built else 0

    @property
    def last_skipped(self) -> int:
        """The number of the last of them, from 1."""
        return int(ops.convert_to_numpy(self._last_skipped)) if self.built else 0

    @property
    def learning_rate(self) -> Any:
        return self.inner.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.inner.learning_rate = value

    def scale_loss(self, loss: Tensor) -> Tensor:
        # Of a loss that is not finite every gradient becomes NaN: apply sees only gradients.
        return loss * ops.where(ops.isfinite(ops.stop_gradient(loss)), 1.0, float("nan"))

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        if not self.built:
            self.build(list(trainable_variables))
        ops.cond(self.judge(grads), lambda: self.take(grads, trainable_variables), lambda: None)

    def judge(self, grads: Sequence[Any]) -> Tensor:
        """Counts a step with these gradients, and says, as a bool scalar, whether it is to be taken."""
        taken, bad = self._judge(grads, self._skipped)
        self.iterations.assign_add(1)
        self._skipped.assign_add(bad)
        self._last_skipped.assign(ops.where(bad > 0, ops.cast(self.iterations, "int32"), self._last_skipped))
        return taken

    def take(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Moves the weights by a step."""
        self.inner.apply(grads, trainable_variables)

    def stateless_apply(
        self, optimizer_variables: Sequence[Any], grads: Sequence[Any], trainable_variables: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """`apply` for JAX. A choice between values, not between branches: XLA fuses it into the step."""
        own = super().variables
        values = dict(zip((variable.path for variable in own), optimizer_variables, strict=False))
        inner = optimizer_variables[len(own) :]
        iterations, skipped, last = (values[v.path] for v in (self.iterations, self._skipped, self._last_skipped))
        taken, bad = self._judge(grads, skipped)
        values[self.iterations.path] = iterations + 1
        values[self._skipped.path] = skipped + bad
        values[self._last_skipped.path] = ops.where(bad > 0, ops.cast(iterations + 1, last.dtype), last)
        new_weights, new_inner = self.inner.stateless_apply(inner, grads, trainable_variables)
        weights = [ops.where(taken, new, old) for new, old in zip(new_weights, trainable_variables, strict=True)]
        inner = [ops.where(taken, new, old) for new, old in zip(new_inner, inner, strict=True)]
        return weights, [*values.values(), *inner]

    def _judge(self, grads: Sequence[Any], skipped: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the step is taken, and, int32, by how many those that were left out become more."""
        # A sum shows whether every number in a gradient is finite, and needs one pass.
        finite = ops.isfinite(sum(_sum(grad) for grad in grads if grad is not None))
        running = ops.convert_to_tensor(skipped) <= self.tolerated
        return ops.logical_and(running, finite), ops.cast(ops.logical_and(running, ops.logical_not(finite)), "int32")

    @property
    def averages(self) -> list[Any]:
        """Running averages of the weights, in the order of the weights; none where the inner optimizer keeps none."""
        return self.inner._model_variables_moving_average if self.inner.use_ema else []

    def forget(self, variable: Any, rows: np.ndarray) -> None:
        """Clears the running means of rows of a weight that were replaced, which would drag the new rows after the old; an
        average of the weight itself begins again at the new rows."""
        if not variable.trainable:
            return
        index = self.inner._get_variable_index(variable)
        for slots in vars(self.inner).values():
            if isinstance(slots, list) and len(slots) == len(self.inner._trainable_variables):
                slot = slots[index]
                if slot is not variable and tuple(slot.shape) == tuple(variable.shape):
                    values = np.array(ops.convert_to_numpy(slot))
                    values[rows] = ops.convert_to_numpy(variable)[rows] if slots is self.averages else 0.0
                    slot.assign(values)

    def get_config(self) -> dict[str, Any]:
        inner = keras.saving.serialize_keras_object(self.inner)
        return {"name": self.name, "inner": inner, "tolerated": self.tolerated}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "FiniteSteps":
        inner = keras.saving.deserialize_keras_object(config["inner"], custom_objects=custom_objects)
        return cls(**{**config, "inner": inner})


@keras.saving.register_keras_serializable(package="kvq")
class Constant(keras.optimizers.schedules.LearningRateSchedule):
    """The same rate at every step. As a bare number it would be a weight: state, so that a resumed run could have no other."""

    def __init__(self, learning_rate: float):
        self.learning_rate = learning_rate

    def __call__(self, step: Any) -> float:
        return self.learning_rate

    def get_config(self) -> dict[str, Any]:
        return {"learning_rate": self.learning_rate}


@keras.saving.register_keras_serializable(package="kvq")
class Warmup(keras.optimizers.schedules.LearningRateSchedule):
    """From zero, in a straight line, to where another schedule begins, which then follows.

    The warm-up of Keras' `CosineDecay` branches on the step, which costs a wait for the GPU, and a step that branches cannot be
    recorded (`kvq.backends.recorded_step`).

    Args:
        schedule: The other schedule.
        steps: How many the warm-up takes.
    """

    def __init__(self, schedule: keras.optimizers.schedules.LearningRateSchedule, steps: int):
        self.schedule = schedule
        self.steps = steps

    def __call__(self, step: Any) -> Tensor:
        step = ops.cast(step, "float32")
        return ops.minimum(step / self.steps, 1.0) * self.schedule(ops.maximum(step - self.steps, 0.0))

    def get_config(self) -> dict[str, Any]:
        return {"schedule": keras.saving.serialize_keras_object(self.schedule), "steps": self.steps}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Warmup":
        return cls(keras.saving.deserialize_keras_object(config["schedule"]), config["steps"])


def _sum(gradient: Tensor) -> Tensor:
    """In float32: that of many finite float16 numbers may not be finite."""
    # Asked first, since for nothing a cast costs PyTorch as much as the sum.
    is_float32 = keras.backend.standardize_dtype(gradient.dtype) == "float32"
    return ops.sum(gradient if is_float32 else ops.cast(gradient, "float32"))


@contextlib.contextmanager
def averaged(model: keras.Model) -> Iterator[None]:
    """The running averages in the place of the model's trained weights, where its optimizer keeps any."""
    averages = model.optimizer.averages
    if not averages:
        yield
        return
    before = [np.array(ops.convert_to_numpy(weight)) for weight in model.trainable_weights]
    try:
        for weight, average in zip(model.trainable_weights, averages, strict=True):
            weight.assign(np.array(ops.convert_to_numpy(average)))
        yield
    finally:
        for weight, value in zip(model.trainable_weights, before, strict=True):
            weight.assign(value)
