"""What saving costs: seconds a checkpoint, and the share of training's time that it takes at a configuration's own settings.

    python benchmarks/checkpointing.py --backend torch --config fashion_mnist_mini

A short run saves often, so that the median of several saves and of many steps is known; the share is then that of one save in
`checkpoint.every_steps` steps or `checkpoint.every_minutes`, whichever comes first. Checkpoints after validation count as well.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

EVERY = 10  # steps between two saves of the short run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", required=True)
    parser.add_argument("--config", default="fashion_mnist_mini")
    parser.add_argument("--data", help="instead of the configuration's images")
    parser.add_argument("--saves", type=int, default=8)
    arguments = parser.parse_args()
    os.environ["KERAS_BACKEND"] = arguments.backend  # before anything imports Keras
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(arguments, Path(folder))))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from kvq import callbacks
    from kvq.config import load_config
    from kvq.progress import Progress
    from kvq.training import train

    steps: list[float] = []
    saves: list[float] = []
    save = callbacks.save_checkpoint

    class Clock(Progress):
        last = time.perf_counter()

        def step(self, step: int) -> None:
            now = time.perf_counter()
            if (step - 1) % EVERY:  # not the one that something was done after
                steps.append(now - self.last)
            self.last = now

    def timed(*given: Any, **named: Any) -> Path:
        started = time.perf_counter()
        folder = save(*given, **named)
        saves.append(time.perf_counter() - started)
        return folder

    callbacks.save_checkpoint = timed
    rare = [f"train.{name}={10**9}" for name in ("sample_every", "validate_every", "log_every")]
    short = [f"checkpoint.every_steps={EVERY}", f"train.steps={EVERY * arguments.saves}", "data.validation_images=8"]
    train(load_config(arguments.config, [*rare, *short]), folder / "run", data=arguments.data, progress=Clock())
    config = load_config(arguments.config)
    # The queue of a backend that dispatches ahead is emptied where something is due: a mean, not a median.
    step, saved = statistics.mean(steps[EVERY:]), statistics.median(saves)
    often = min(config.checkpoint.every_steps, config.train.validate_every)
    between = min(often * step, 60 * config.checkpoint.every_minutes)
    state = max((file.stat().st_size for file in folder.rglob("state.safetensors")), default=0)
    return {
        "backend": arguments.backend,
        "config": arguments.config,
        "save_s": saved,
        "step_s": step,
        "state_MB": state / 1e6,
        "share": saved / (saved + between),
    }


if __name__ == "__main__":
    main()
