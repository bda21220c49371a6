"""Everything that happens between training steps hangs on one Keras callback, `BetweenSteps`.

It runs when a step begins, so that Keras may queue steps ahead. Touching the model costs a synchronisation of its whole state on
JAX: it happens only when something is due.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import keras

from kvq.errors import TrainingError


class Action(Protocol):
    """Something to do after a number of finished steps. `ending` is the run's status once no further step will come."""

    def due(self, step: int, ending: str | None) -> bool: ...

    def act(self, model: keras.Model, step: int) -> None: ...


class BetweenSteps(keras.callbacks.Callback):
    """Runs what is due, in order, and ends the run where `should_stop` says so.

    Args:
        first_step: Steps that were done before this `fit`.
        last_step: Steps that will have been done after it.
        at_once: Steps that the model takes at a stretch; nothing may be due between them.
        should_stop: Asked between steps.
        on_step: Told the number of finished steps.
        on_resume: Called in the place of the actions where steps were done before this `fit`.
        check: Called before the actions; raises where what was trained must not be used.
        note: Told what could not be written, and that the run stops.

    `actions` run in their order. What cannot be written, as on a full disk, does not end training: the action tries again when
    it is due next. Only at the end it does, after every action had its turn. `seconds` is the time spent training so far,
    without that of the actions.
    """

    def __init__(
        self,
        first_step: int,
        last_step: int,
        at_once: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[int], None] = lambda step: None,
        on_resume: Callable[[keras.Model], None] = lambda model: None,
        check: Callable[[keras.Model], None] = lambda model: None,
        note: Callable[[str], None] = lambda text: None,
    ):
        super().__init__()
        self.actions: list[Action] = []
        self.first_step = first_step
        self.last_step = last_step
        self.at_once = at_once
        self.should_stop = should_stop
        self.on_step = on_step
        self.on_resume = on_resume
        self.check = check
        self.note = note
        self.step = first_step
        self.seconds = 0.0
        self._resumed = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == 0 and self.first_step:
            # What was due at this step was done before the checkpoint: done twice, it would be another run.
            self.step = self.first_step
            self.on_resume(self.model)
        else:
            self._run(self.first_step + batch, ending=None)
        if self.should_stop():
            self.note("stopping; a second Ctrl-C or SIGTERM leaves at once and loses the steps since the last checkpoint")
            # Keras asks for this after the steps that begin now.
            self.model.stop_training = True

    def on_train_end(self, logs: Any = None) -> None:
        step = self.step + self.at_once
        self._run(step, ending="finished" if step == self.last_step else "interrupted")

    def _run(self, step: int, ending: str | None) -> None:
        self.step = step
        self.on_step(step)
        due = [action for action in self.actions if action.due(step, ending)]
        if due:
            model = self.model
            # Waits for the steps that Keras has queued: their time is training's, not the actions'.
            keras.ops.convert_to_numpy(model.optimizer.iterations)
            self.seconds += time.perf_counter() - self._resumed
            self.check(model)
            failed: OSError | None = None
            for action in due:
                try:
                    action.act(model, step)
                except OSError as error:
                    again = "" if ending else "; it will try again"
                    self.note(f"step {step}: {type(action).__name__} could not write: {error}{again}")
                    failed = failed or error
            if failed and ending:
                raise TrainingError(
                    f"Training ended at step {step}, but what belongs into the run folder cannot be written: {failed}. Make room "
                    "there and give --resume-or-start: it goes on from the last checkpoint, if there is one."
                )
            self._resumed = time.perf_counter()
