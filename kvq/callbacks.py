"""Actions between training steps: measuring, drawing, saving. What is done to the codebook is in `codebook_callbacks`."""

import io
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kvq import plots
from kvq.atomic import write_bytes
from kvq.checkpoint import save_checkpoint
from kvq.data.contract import Batch
from kvq.evaluation import measure
from kvq.ops import to_uint8
from kvq.optimizer import averaged
from kvq.progress import Progress
from kvq.run import Run

Batches = Callable[[], Iterator[Batch]]


class RestoreSums:
    """Puts the metrics' sums back that `fit` sets to zero when it begins, so that the first record after a resume is whole.

    Args:
        model: As it was restored.
    """

    def __init__(self, model: keras.Model):
        self.sums = [keras.ops.convert_to_numpy(variable) for variable in model.metrics_variables]

    def __call__(self, model: keras.Model) -> None:
        for variable, value in zip(model.metrics_variables, self.sums, strict=True):
            variable.assign(value)


class LogMetrics:
    """Writes the means since the last record to metrics.jsonl.

    Args:
        run: The run.
        first_step: Steps that were done before.
        every: Steps between two records; the first step (of several at once, the last of those) and the last always have one.
        batch_size: Images a step.
        waited: Seconds that training has waited for data so far.
        trained: Seconds that it has trained so far.
        watchers: Given each record.
    """

    def __init__(
        self,
        run: Run,
        first_step: int,
        every: int,
        batch_size: int,
        waited: Callable[[], float],
        trained: Callable[[], float],
        watchers: Sequence[Progress],
    ):
        self.run = run
        self.every = every
        self.batch_size = batch_size
        self.waited = waited
        self.trained = trained
        self.watchers = watchers
        self.last: dict[str, Any] = {}
        self.first_step = first_step
        self._since = (first_step, 0.0, 0.0)

    def due(self, step: int, ending: str | None) -> bool:
        first = self.first_step == 0 and not self.last
        return step > self._since[0] and (first or step % self.every == 0 or ending is not None)

    def act(self, model: keras.Model, step: int) -> None:
        result = {name: float(value) for name, value in model.get_metrics_result().items()}
        waited, trained = self.waited(), self.trained()
        steps, seconds = step - self._since[0], max(trained - self._since[2], 1e-9)
        # The terms leave out images whose loss is not finite; Keras' own mean of the loss does not.
        del result["loss"]
        self.last = {
            "step": step,
            "split": "train",
            "loss": sum(result[name] for name in ("reconstruction", *model.quantizer.loss_names)),
            **result,
            "images_per_second": steps * self.batch_size / seconds,
            "input_wait": min((waited - self._since[1]) / seconds, 1.0),
        }
        self._since = (step, waited, trained)
        model.reset_metrics()
        self.run.append_metrics(self.last)
        for watcher in self.watchers:
            watcher.log(self.last)


class LogBatches:
    """Writes the SHA-256 of every batch to metrics.jsonl, so that two runs can be compared. No step is queued then.

    Args:
        run: The run.
        first_step: Steps that were done before.
        hashes: Of the batches that were handed out and not yet written, oldest first; the first belongs to the next step.
    """

    def __init__(self, run: Run, first_step: int, hashes: deque[str]):
        self.run = run
        self.hashes = hashes
        self._step = first_step

    def due(self, step: int, ending: str | None) -> bool:
        return True

    def act(self, model: keras.Model, step: int) -> None:
        for number in range(self._step + 1, step + 1):
            self.run.append_metrics({"step": number, "split": "batch", "sha256": self.hashes.popleft()})
        self._step = step


class Validate:
    """Measures the model on validation images.

    Args:
        run: The run.
        batches: The validation images, once through.
        every: Steps between two measurements; the end of a finished run always has one.
        watchers: Given each record.
    """

    def __init__(self, run: Run, batches: Batches, every: int, watchers: Sequence[Progress]):
        self.run = run
        self.batches = batches
        self.every = every
        self.watchers = watchers
        self.last: dict[str, Any] = {}

    def due(self, step: int, ending: str | None) -> bool:
        return ending == "finished" or (0 < step and step % self.every == 0)

    def act(self, model: keras.Model, step: int) -> None:
        with averaged(model):
            measured = measure(model, self.batches())
        losses = measured.pop("losses")
        kept = {name: measured[name] for name in ("psnr", "ssim", "usage", "perplexity", "images_per_second")}
        # A sum without the terms that only a batch has would lie below that of training images for no other reason.
        whole = {"loss": sum(losses.values())} if {*model.quantizer.loss_names} <= {*losses} else {}
        self.last = {"step": step, "split": "validation", **whole, **losses, **kept}
        self.run.append_metrics(self.last)
        for watcher in self.watchers:
            watcher.log(self.last)


class DrawSamples:
    """Draws originals above reconstructions of the same few images, and the loss curves.

    Args:
        run: The run.
        images: Name (`train`, `validation`) to uint8 images (n, h, w, c).
        every: Steps between two pictures; the end of a run always has one.
        watchers: Given each picture.
    """

    def __init__(
        self,
        run: Run,
        images: dict[str, np.ndarray],
        every: int,
        watchers: Sequence[Progress],
    ):
        self.run = run
        self.images = images
        self.every = every
        self.watchers = watchers

    def due(self, step: int, ending: str | None) -> bool:
        return ending is not None or (0 < step and step % self.every == 0)

    def act(self, model: keras.Model, step: int) -> None:
        self.run.samples.mkdir(exist_ok=True)
        for name, images in self.images.items():
            with averaged(model):
                outputs = model.predict_on_batch(images)
            restored = keras.ops.convert_to_numpy(to_uint8(outputs["reconstruction"]))
            picture = plots.image_grid(images, restored)
            content = io.BytesIO()
            picture.save(content, "PNG")
            write_bytes(self.run.samples / f"{name}_{step:08d}.png", content.getvalue())
            for watcher in self.watchers:
                watcher.picture(name, step, picture)
        plots.loss_curves(self.run.read_metrics(), self.run.loss_plot)


class SaveCheckpoint:
    """Saves the whole training state; where that fails, again after a while, and nothing that was saved before is touched.

    Args:
        run: The run.
        config: Of the run, kept with the state.
        every_steps, every_minutes: Whichever comes first; the end of a run always has one, and so has a new best.
        keep: How many of the newest stay, beside the best.
        validate: Whose measurements say which is the best.
        write_model: Writes the model as it is after a number of steps into a folder.
    """

    RETRY = 60.0  # seconds

    def __init__(
        self,
        run: Run,
        config: dict[str, Any],
        every_steps: int,
        every_minutes: float,
        keep: int,
        validate: Validate,
        write_model: Callable[[Path, int], None],
    ):
        self.run = run
        self.config = config
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.keep = keep
        self.validate = validate
        self.write_model = write_model
        self._next = time.monotonic() + 60 * every_minutes

    def due(self, step: int, ending: str | None) -> bool:
        late = time.monotonic() >= self._next
        return ending is not None or (0 < step and (step % self.every_steps == 0 or late or self.validate.due(step, ending)))

    def act(self, model: keras.Model, step: int) -> None:
        measured = self.validate.last.get("psnr") if self.validate.last.get("step") == step else None
        self._next = time.monotonic() + self.RETRY
        save_checkpoint(self.run, model, step, self.keep, self.config, measured, self.write_model)
        self._next = time.monotonic() + 60 * self.every_minutes
