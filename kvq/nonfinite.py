"""Steps whose loss or gradient was not finite: named, and beyond what is allowed the end of the run."""

import io
from collections.abc import Callable

import keras
import numpy as np

from kvq.atomic import write_bytes
from kvq.data.contract import Batch
from kvq.errors import TrainingError
from kvq.run import Run


class CheckFinite:
    """Looks whether `FiniteSteps` left steps out, before anything else is done between steps: no checkpoint is made past it.

    Args:
        run: The run; the batch of the step that ends it is kept there.
        known: Steps that were left out before.
        batch: The batch that a step trained on, by the number of steps before it.
        note: Told of steps that were left out.
    """

    def __init__(self, run: Run, known: int, batch: Callable[[int], Batch], note: Callable[[str], None]):
        self.run = run
        self.batch = batch
        self.note = note
        self.known = known

    def __call__(self, model: keras.Model) -> None:
        optimizer = model.optimizer
        skipped = optimizer.skipped
        new, self.known = skipped - self.known, skipped
        if skipped > optimizer.tolerated:
            raise TrainingError(self._why(model, optimizer.last_skipped, optimizer.tolerated))
        if new:
            self.note(
                f"step {optimizer.last_skipped}: the loss or the gradient was not finite; {new} of the last steps left out, "
                f"{skipped} of at most {optimizer.tolerated} in all"
            )

    def _why(self, model: keras.Model, step: int, tolerated: int) -> str:
        """What was wrong with a step, from the weights before it, which are still there, and its batch."""
        batch = self.batch(step - 1)
        file = self.run.nonfinite_file(step)
        content = io.BytesIO()
        np.savez(content, images=batch["images"], labels=batch["labels"], names=np.asarray(batch["names"], dtype=str))
        write_bytes(file, content.getvalue())
        images = keras.ops.convert_to_tensor(batch["images"])
        with keras.StatelessScope():  # running statistics stay where they are
            terms = model.loss_terms(images, model(images, training=True))
            values = {name: np.asarray(keras.ops.convert_to_numpy(term), "float64") for name, term in terms.items()}
        bad = {name: value for name, value in values.items() if not np.isfinite(value).all()}
        what = "the gradient is not finite, although every term of the loss is"
        if bad:
            what = "the loss is not finite: " + ", ".join(_in_words(name, value) for name, value in bad.items())
        before = f" {tolerated} such steps were left out before it." if tolerated else ""
        return (
            f"Step {step}: {what}.{before} The step was not taken; its batch is in {file}. Lower train.learning_rate, add "
            'train.warmup_steps or train.clip_norm, or set train.on_nonfinite = "skip", and give --resume.'
        )


def _in_words(name: str, values: np.ndarray) -> str:
    bad = values[~np.isfinite(values)]
    return f"{name} is {bad[0]} in {len(bad)} of {len(values)} images"
