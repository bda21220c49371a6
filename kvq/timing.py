"""`benchmark`: how long a training step of a configuration takes on each installed backend, side by side.

Every backend has a process of its own, in which Keras' `fit` runs on it, a block of steps each time it is told to. The processes
take turns, since other work on a machine comes and goes: compare ratios, not seconds.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from kvq import backends
from kvq.backends.memory import keep_freed_memory
from kvq.config import RunConfig, load_config
from kvq.data.places import GREY
from kvq.errors import BackendError, TrainingError, installing
from kvq.progress import Progress

BLOCK_SECONDS = 1.5
SETTLING = 0.1  # seconds for which the threads of the one before may finish
WORKER = "from kvq.timing import _work; _work()"


def benchmark(
    config: RunConfig | str | Path = "fashion_mnist_mini",
    *,
    names: Sequence[str] | None = None,
    rounds: int = 5,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Times a training step on each installed backend: forward, backward, optimizer and metrics, on noise of the right size.

    No image is loaded, nothing is logged, sampled or saved. Steps are taken one at a time, where `train` takes several at once if
    that is faster, as on a GPU.

    Args:
        config: A configuration, or what `load_config` takes.
        names: Backends. Default: all that are installed.
        rounds: How often each has its turn of about 1.5 seconds, or one step if that takes longer.
        progress: Told of each turn.

    Returns:
        Dict: `batch_size`, `precision`, `image_shape`, `cpus`, `rounds`; `backends`, by name with `version`, `device`,
        `parameters`, `first_step` (seconds, with what is compiled for it), `step` (median seconds), `step_quartiles`,
        `images_per_second`, `ratio` (median of step over the fastest one's step of the same round), or `error`; `fastest`.

    Raises:
        BackendError: If none is installed, or one that is named is not.
        TrainingError: If none of them could take a step.
    """
    config = config if isinstance(config, RunConfig) else load_config(config)
    for name in names or ():
        backends.check_name(name)
    names = list(names or backends.installed())
    if not names:
        raise BackendError(backends.NONE_INSTALLED)
    if missing := sorted(set(names) - set(backends.installed())):
        raise BackendError(f"Not installed: {', '.join(missing)}. Install with: {installing(*missing)}")
    progress = progress or Progress()
    channels = 1 if config.data.source in GREY else 3
    found: dict[str, dict[str, Any]] = {}
    turns: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        running: dict[str, _Worker] = {}
        for name in names:  # one after the other, so that each first step has the machine for itself
            progress.note(f"{name}: first step")
            worker = stack.enter_context(_worker(name))
            found[name] = {"version": backends.versions()[name], **worker.start(config, channels)}
            if "error" not in found[name]:
                running[name], turns[name] = worker, []
        progress.start(rounds * len(running), 0)
        for number in range(rounds * len(running)):
            name = list(running)[number % len(running)]
            time.sleep(SETTLING)
            turns[name].append(running[name].turn())
            progress.step(number + 1)
    if not running:
        raise TrainingError("; ".join(f"{name}: {facts['error']}" for name, facts in found.items()))
    fastest = min(turns, key=lambda name: statistics.median(turns[name]))
    for name, seconds in turns.items():
        found[name] |= _figures(seconds, turns[fastest], config.train.batch_size)
    return {
        "batch_size": config.train.batch_size,
        "precision": config.train.precision,
        "image_shape": [config.data.crop, config.data.crop, channels],
        "cpus": backends.cpus(),
        "rounds": rounds,
        "backends": found,
        "fastest": fastest,
    }


def _figures(seconds: list[float], fastest: list[float], batch_size: int) -> dict[str, Any]:
    step = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (step, step, step)
    return {
        "step": step,
        "step_quartiles": [low, high],
        "images_per_second": batch_size / step,
        "ratio": statistics.median(one / other for one, other in zip(seconds, fastest, strict=True)),
    }


class _Worker:
    """A process that takes training steps when told to. It answers in lines of JSON; what else it says goes to `said`."""

    def __init__(self, process: "subprocess.Popen[str]", said: IO[str]):
        self.process, self.said = process, said

    def start(self, config: RunConfig, channels: int) -> dict[str, Any]:
        """What is known after the first steps, or `error`."""
        try:
            return self._ask({"config": config.to_toml(), "channels": channels, "block_seconds": BLOCK_SECONDS})
        except TrainingError as error:
            return {"error": str(error)}

    def turn(self) -> float:
        """Seconds a step of one block."""
        return self._ask({})["step"]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            status = self.process.wait()
            if status == -signal.SIGKILL:  # by the system, and what it said last is about something else
                raise TrainingError("killed, probably for want of memory: make train.batch_size or data.crop smaller")
            self.said.seek(0)
            raise TrainingError((self.said.read().strip().splitlines() or [f"ended with status {status}"])[-1])
        facts = json.loads(answer)
        if "error" in facts:
            raise TrainingError(facts["error"])
        return facts


@contextlib.contextmanager
def _worker(name: str) -> Iterator[_Worker]:
    environment = backends.process_environment(name)
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", WORKER], env=environment, stdin=pipe, stdout=pipe, stderr=said, text=True
        )
        try:
            yield _Worker(process, said)
        finally:
            process.kill()
            process.communicate()


def _work() -> None:
    """The process of one backend."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # for whatever a backend prints

    def answer(**facts: Any) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    keep_freed_memory(os.environ["KERAS_BACKEND"])
    try:
        _take_steps(answer)
    except Exception as error:
        answer(error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _take_steps(answer: Callable[..., None]) -> None:
    import keras
    import numpy as np

    from kvq.config import parse_config
    from kvq.training import compiled

    asked = json.loads(sys.stdin.readline())
    config = parse_config(asked["config"], "the configuration")
    name, side = keras.backend.backend(), config.data.crop
    images = np.random.default_rng(0).integers(0, 256, (config.train.batch_size, side, side, asked["channels"]), np.uint8)
    keras.utils.set_random_seed(config.train.seed)
    model = compiled(config, asked["channels"])

    class Turns(keras.callbacks.Callback):
        """Answers after each block, and waits to be told to begin the next."""

        def on_train_begin(self, logs: Any = None) -> None:
            self.block, self.left = 1, 1
            self.seconds: list[float] = []
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.left -= 1
            if self.left:
                return
            float(logs["loss"])  # only then is the step done
            self.seconds.append((time.perf_counter() - self.start) / self.block)
            if len(self.seconds) == 3:  # the first is compiled, the second may be again; the third tells how many make a block
                self.block = max(round(asked["block_seconds"] / self.seconds[2]), 1)
                parameters = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
                device = backends.devices(name)[0]
                answer(first_step=self.seconds[0], parameters=parameters, device=device)
            elif len(self.seconds) > 3:
                answer(step=self.seconds[-1])
            if len(self.seconds) >= 3 and not sys.stdin.readline():
                raise SystemExit
            self.left, self.start = self.block, time.perf_counter()

    def endless() -> Iterator[Any]:
        while True:
            yield (images,)

    model.fit(endless(), steps_per_epoch=10**9, shuffle=False, verbose=0, callbacks=[Turns()])
