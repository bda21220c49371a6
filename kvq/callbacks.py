"""What happens between training steps: looking after the codebook, measuring, drawing, saving.

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
from kvq.errors import TrainingError
from kvq.evaluation import measure
from kvq.ops import rescale, to_uint8
from kvq.run import Run

Batches = Callable[[], Iterator[dict[str, Any]]]


class Action(Protocol):
    """Something to do after a number of finished steps. `ending` is the run's status once no further step will come."""

    def due(self, step: int, ending: str | None) -> bool: ...

    def act(self, model: keras.Model, step: int) -> None: ...


class BetweenSteps(keras.callbacks.Callback):
    """Runs what is due, in order, and ends the run where `should_stop` says so.

    Args:
        actions: In the order in which they run.
        first_step: Steps that were done before this `fit`.
        last_step: Steps that will have been done after it.
        should_stop: Asked between steps.
        on_step: Told the number of finished steps.

    `seconds` is the time spent training so far, without that of the actions.
    """

    def __init__(
        self,
        actions: Sequence[Action],
        first_step: int,
        last_step: int,
        should_stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[int], None] = lambda step: None,
    ):
        super().__init__()
        self.actions = actions
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


class InitialiseCodebook:
    """Places the codes by k-means on the latents of the first batches, unless they were placed before.

    Args:
        batches: Training batches from the given step on.
        seed: Of the k-means.
    """

    # Enough vectors for every centre to be a mean of several.
    VECTORS_PER_CODE = 16

    def __init__(self, batches: Batches, seed: int):
        self.batches = batches
        self.seed = seed

    def due(self, step: int, ending: str | None) -> bool:
        return step == 0 and not ending

    def act(self, model: keras.Model, step: int) -> None:
        quantizer = model.quantizer
        if float(keras.ops.convert_to_numpy(quantizer.initialised)):
            return
        latents: list[np.ndarray] = []
        for batch in self.batches():
            latents.extend(_latents(model, batch["images"]))
            if len(latents) >= self.VECTORS_PER_CODE * quantizer.codebook_size:
                break
        quantizer.initialise(np.stack(latents), self.seed)


class ReplaceDeadCodes:
    """Puts random latents of the current batch in the place of codes that are hardly used.

    Args:
        batch: The batch of a step.
        every: Steps between two looks.
        below: How much less than the mean code a dead one is used.
        until: No code is replaced after this step, so that training ends on a codebook that has settled.
        seed: Of the choice of latents.
        note: Told how many were replaced.

    Source: Dhariwal et al. 2020, arXiv:2005.00341 (Jukebox), section 3.1. Differs: the threshold is relative to the mean.
    """

    def __init__(
        self,
        batch: Callable[[int], dict[str, Any]],
        every: int,
        below: float,
        until: int,
        seed: int,
        note: Callable[[str], None],
    ):
        self.batch = batch
        self.every = every
        self.below = below
        self.until = until
        self.seed = seed
        self.note = note

    def due(self, step: int, ending: str | None) -> bool:
        return not ending and 0 < step <= self.until and step % self.every == 0

    def act(self, model: keras.Model, step: int) -> None:
        rows = model.quantizer.dead_codes(self.below)
        if not len(rows):
            return
        rng = np.random.default_rng((self.seed, step))
        latents = _latents(model, self.batch(step)["images"])
        chosen = latents[rng.choice(len(latents), len(rows), replace=len(latents) < len(rows))]
        model.quantizer.replace(rows, chosen)
        _clear_slots(model.optimizer, model.quantizer.codebook, rows)
        self.note(f"step {step}: {len(rows)} of {model.quantizer.codebook_size} codes were dead and replaced")


class LogMetrics:
    """Writes the means since the last record to metrics.jsonl.

    Args:
        run: The run.
        every: Steps between two records; the first and the last step always have one.
        batch_size: Images a step.
        waited: Seconds that training has waited for data so far.
        trained: Seconds that it has trained so far.
        log: Given each record.
    """

    def __init__(
        self,
        run: Run,
        every: int,
        batch_size: int,
        waited: Callable[[], float],
        trained: Callable[[], float],
        log: Callable[[dict[str, Any]], None],
    ):
        self.run = run
        self.every = every
        self.batch_size = batch_size
        self.waited = waited
        self.trained = trained
        self.log = log
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
        self.log(self.last)


class Validate:
    """Measures the model on validation images.

    Args:
        run: The run.
        batches: The validation images, once through.
        every: Steps between two measurements; the end of a run always has one.
        log: Given each record.
    """

    def __init__(self, run: Run, batches: Batches, every: int, log: Callable[[dict[str, Any]], None]):
        self.run = run
        self.batches = batches
        self.every = every
        self.log = log
        self.last: dict[str, Any] = {}
        self.best_psnr = float("-inf")

    def due(self, step: int, ending: str | None) -> bool:
        return ending == "finished" or (not ending and 0 < step and step % self.every == 0)

    def act(self, model: keras.Model, step: int) -> None:
        measured = measure(model, self.batches())
        losses = measured.pop("losses")
        kept = {name: measured[name] for name in ("psnr", "ssim", "usage", "perplexity", "images_per_second")}
        self.last = {"step": step, "split": "validation", "loss": sum(losses.values()), **losses, **kept}
        self.best_psnr = max(self.best_psnr, measured["psnr"])
        self.run.append_metrics(self.last)
        self.log(self.last)


class DrawSamples:
    """Draws originals above reconstructions of the same few images, and the loss curves.

    Args:
        run: The run.
        images: Name (`train`, `validation`) to uint8 images (n, h, w, c).
        every: Steps between two pictures; the end of a run always has one.
        log_pictures: Given the step and each picture by name.
    """

    def __init__(
        self,
        run: Run,
        images: dict[str, np.ndarray],
        every: int,
        log_pictures: Callable[[int, dict[str, Any]], None] = lambda step, pictures: None,
    ):
        self.run = run
        self.images = images
        self.every = every
        self.log_pictures = log_pictures

    def due(self, step: int, ending: str | None) -> bool:
        return ending is not None or (0 < step and step % self.every == 0)

    def act(self, model: keras.Model, step: int) -> None:
        pictures = {}
        for name, images in self.images.items():
            outputs = model.predict_on_batch(images)
            restored = keras.ops.convert_to_numpy(to_uint8(outputs["reconstruction"]))
            pictures[name] = plots.image_grid(images, restored)
            pictures[name].save(self.run.samples / f"{name}_{step:08d}.png")
        plots.loss_curves(self.run.read_metrics(), self.run.loss_plot)
        self.log_pictures(step, pictures)


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
        self._best_psnr = validate.best_psnr

    def due(self, step: int, ending: str | None) -> bool:
        late = time.monotonic() - self._saved >= 60 * self.every_minutes
        return ending is not None or (0 < step and (step % self.every_steps == 0 or late or self.validate.due(step, ending)))

    def act(self, model: keras.Model, step: int) -> None:
        measured = self.validate.last.get("psnr") if self.validate.last.get("step") == step else None
        save_checkpoint(self.run, model, step, self.keep, measured)
        self._saved = time.monotonic()


def _latents(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Latents (n, latent_dim) of a batch of uint8 images, in float32 on the host."""
    latents = model.encoder.predict_on_batch(keras.ops.convert_to_numpy(rescale(images)))
    return np.asarray(latents, "float32").reshape(-1, latents.shape[-1])


def _clear_slots(optimizer: keras.optimizers.Optimizer, variable: Any, rows: np.ndarray) -> None:
    """Forgets the optimizer's running means of rows of a trained variable: they would drag the new rows after the old."""
    if not variable.trainable:
        return
    for slots in vars(optimizer).values():
        if isinstance(slots, list) and len(slots) == len(optimizer._trainable_variables):
            slot = slots[optimizer._get_variable_index(variable)]
            if slot is not variable and tuple(slot.shape) == tuple(variable.shape):
                values = np.array(keras.ops.convert_to_numpy(slot))
                values[rows] = 0.0
                slot.assign(values)


def _in_words(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in record.items() if isinstance(value, float))
