"""What happens between training steps: measuring, drawing, saving. What is done to the codebook is in `codebook_callbacks`.

All of it hangs on one Keras callback, `BetweenSteps`, and runs when a step begins, so that Keras may queue steps ahead.
Touching the model costs a synchronisation of its whole state on JAX: it happens only when something is due.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import keras
import numpy as np

from kvq import plots
from kvq.checkpoint import save_checkpoint
from kvq.data.contract import Batch
from kvq.errors import TrainingError
from kvq.evaluation import measure
from kvq.ops import to_uint8
from kvq.progress import Progress
from kvq.run import Run

Batches = Callable[[], Iterator[Batch]]


class Action(Protocol):
    """Something to do after a number of finished steps. `ending` is the run's status once no further step will come."""

    def due(self, step: int, ending: str | None) -> bool: ...

    def act(self, model: keras.Model, step: int) -> None: ...


class BetweenSteps(keras.callbacks.Callback):
    """Runs what is due, in order, and ends the run where `should_stop` says so.

    Args:
        first_step: Steps that were done before this `fit`.
        last_step: Steps that will have been done after it.
        should_stop: Asked between steps.
        on_step: Told the number of finished steps.

    `actions` run in their order. `seconds` is the time spent training so far, without that of the actions.
    """

    def __init__(
        self,
        first_step: int,
        last_step: int,
        should_stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[int], None] = lambda step: None,
    ):
        super().__init__()
        self.actions: list[Action] = []
        self.first_step = first_step
        self.last_step = last_step
        self.should_stop = should_stop
        self.on_step = on_step
        self.step = first_step
        self.seconds = 0.0
        self._resumed = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._run(self.first_step + batch, ending=None)
        if self.should_stop():
            # Keras asks for this after the step that begins now.
            self.model.stop_training = True

    def on_train_end(self, logs: Any = None) -> None:
        self._run(self.step + 1, ending="finished" if self.step + 1 == self.last_step else "interrupted")

    def _run(self, step: int, ending: str | None) -> None:
        self.step = step
        self.on_step(step)
        due = [action for action in self.actions if action.due(step, ending)]
        if due:
            model = self.model
            # Waits for the steps that Keras has queued: their time is training's, not the actions'.
            keras.ops.convert_to_numpy(model.optimizer.iterations)
            self.seconds += time.perf_counter() - self._resumed
            for action in due:
                action.act(model, step)
            self._resumed = time.perf_counter()


class RestoreSums:
    """Puts the metrics' sums back that `fit` sets to zero when it begins, so that the first record after a resume is whole.

    Args:
        model: As it was restored.
    """

    def __init__(self, model: keras.Model):
        self.sums: list[np.ndarray] | None = [keras.ops.convert_to_numpy(variable) for variable in model.metrics_variables]

    def due(self, step: int, ending: str | None) -> bool:
        return self.sums is not None

    def act(self, model: keras.Model, step: int) -> None:
        assert self.sums is not None
        for variable, value in zip(model.metrics_variables, self.sums, strict=True):
            variable.assign(value)
        self.sums = None


class LogMetrics:
    """Writes the means since the last record to metrics.jsonl.

    Args:
        run: The run.
        every: Steps between two records; the first and the last step always have one.
        batch_size: Images a step.
        waited: Seconds that training has waited for data so far.
        trained: Seconds that it has trained so far.
        watchers: Given each record.
    """

    def __init__(
        self,
        run: Run,
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
        self._since: tuple[int, float, float] | None = None

    def due(self, step: int, ending: str | None) -> bool:
        if self._since is None:
            self._since = (step, self.waited(), self.trained())
        return step > self._since[0] and (step == 1 or step % self.every == 0 or ending is not None)

    def act(self, model: keras.Model, step: int) -> None:
        assert self._since is not None
        result = {name: float(value) for name, value in model.get_metrics_result().items()}
        waited, trained = self.waited(), self.trained()
        steps, seconds = step - self._since[0], max(trained - self._since[2], 1e-9)
        self.last = {
            "step": step,
            "split": "train",
            "loss": result.pop("loss"),
            **result,
            "images_per_second": steps * self.batch_size / seconds,
            "input_wait": min((waited - self._since[1]) / seconds, 1.0),
        }
        self._since = (step, waited, trained)
        model.reset_metrics()
        if not np.isfinite(self.last["loss"]):
            raise TrainingError(
                f"The loss became {self.last['loss']} by step {step}: {_in_words(self.last)}. Lower train.learning_rate, or "
                "add train.warmup_steps."
            )
        self.run.append_metrics(self.last)
        for watcher in self.watchers:
            watcher.log(self.last)


class Validate:
    """Measures the model on validation images.

    Args:
        run: The run.
        batches: The validation images, once through.
        every: Steps between two measurements; the end of a run always has one.
        watchers: Given each record.
    """

    def __init__(self, run: Run, batches: Batches, every: int, watchers: Sequence[Progress]):
        self.run = run
        self.batches = batches
        self.every = every
        self.watchers = watchers
        self.last: dict[str, Any] = {}

    def due(self, step: int, ending: str | None) -> bool:
        return ending == "finished" or (not ending and 0 < step and step % self.every == 0)

    def act(self, model: keras.Model, step: int) -> None:
        measured = measure(model, self.batches())
        losses = measured.pop("losses")
        kept = {name: measured[name] for name in ("psnr", "ssim", "usage", "perplexity", "images_per_second")}
        self.last = {"step": step, "split": "validation", "loss": sum(losses.values()), **losses, **kept}
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
        for name, images in self.images.items():
            outputs = model.predict_on_batch(images)
            restored = keras.ops.convert_to_numpy(to_uint8(outputs["reconstruction"]))
            picture = plots.image_grid(images, restored)
            picture.save(self.run.samples / f"{name}_{step:08d}.png")
            for watcher in self.watchers:
                watcher.picture(name, step, picture)
        plots.loss_curves(self.run.read_metrics(), self.run.loss_plot)


class SaveCheckpoint:
    """Saves the whole training state.

    Args:
        run: The run.
        every_steps, every_minutes: Whichever comes first; the end of a run always has one, and so has a new best.
        keep: How many of the newest stay, beside the best.
        validate: Whose measurements say which is the best.
    """

    def __init__(self, run: Run, every_steps: int, every_minutes: float, keep: int, validate: Validate):
        self.run = run
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.keep = keep
        self.validate = validate
        self._saved = time.monotonic()

    def due(self, step: int, ending: str | None) -> bool:
        late = time.monotonic() - self._saved >= 60 * self.every_minutes
        return ending is not None or (0 < step and (step % self.every_steps == 0 or late or self.validate.due(step, ending)))

    def act(self, model: keras.Model, step: int) -> None:
        measured = self.validate.last.get("psnr") if self.validate.last.get("step") == step else None
        save_checkpoint(self.run, model, step, self.keep, measured)
        self._saved = time.monotonic()


def _in_words(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in record.items() if isinstance(value, float))
