"""How long a step of `kvq train` takes, beside a minimal loop written for the same backend without kvq.

    python benchmarks/train_step.py --backend torch --config cifar10 --steps 200 --json

The loops are the pages of `peers/`: by hand, or with `--peer` one that takes its quantizer from a library. `--check` compares the
number of parameters and the loss at step 0, from the same weights, and measures nothing.

Both train the same network from the same weights on the same images, in one process, in turn: a block of kvq's steps, a block
of the hand-written ones, and so on. kvq's side is `kvq.training.train` itself, with its data pipeline, metrics and callbacks;
it hands over between two steps, where it reports progress. The loop by hand has its batches ready in memory, measures nothing
and logs nothing. `ratio` is the median over pairs of neighbouring blocks, since other work on a machine slows both.

Without `--data` the images are noise of the configuration's size: no step takes longer or shorter for it.
"""

import argparse
import importlib
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvq.progress import Progress

BATCHES = 16  # that the hand-written loop goes round in
SETTLING = 0.05  # seconds for which read-ahead threads may finish before the other side is timed


class InTurn(Progress):
    """Watches a kvq run, and does a block of hand-written steps after each block of kvq's.

    Args:
        loop: The hand-written loop.
        wait: Waits until all that was queued is done.
        batches: Its images.
        block: Steps in a block.
        warm_up: Steps of either side before the first block.

    `kvq` and `hand` hold the seconds a step of each block, by the clock and of all threads together.
    """

    def __init__(self, loop: Any, wait: Any, batches: list[Any], block: int, warm_up: int):
        self.loop, self.wait, self.batches, self.block, self.warm_up = loop, wait, batches, block, warm_up
        self.kvq: list[tuple[float, float]] = []
        self.hand: list[tuple[float, float]] = []

    def start(self, total_steps: int, first_step: int) -> None:
        self._by_hand(self.warm_up)

    def step(self, step: int) -> None:
        done = step - self.warm_up
        if done < 0 or done % self.block:
            return
        self.wait()
        if done:
            self.kvq.append(self._since_start())
            self._start()
            self._by_hand(self.block)
            self.hand.append(self._since_start())
        self._start()

    def _by_hand(self, steps: int) -> None:
        for number in range(steps):
            self.loop.step(self.batches[number % BATCHES])
        self.wait()

    def _start(self) -> None:
        time.sleep(SETTLING)
        self.started = time.perf_counter(), time.process_time()

    def _since_start(self) -> tuple[float, float]:
        seconds, of_threads = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        return seconds / self.block, of_threads / self.block


def main() -> None:
    arguments = _arguments()
    os.environ["KERAS_BACKEND"] = arguments.backend  # before anything imports Keras
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:12} {value}")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import keras
    import numpy as np

    from kvq import artifact, training
    from kvq.config import load_config
    from kvq.data import iterate, open_source, training_batches, training_transforms

    steps, block = arguments.steps, arguments.block
    # Nothing but steps and their records: pictures, validation and checkpoints come after the last block.
    rare = [f"train.{name}={10**9}" for name in ("sample_every", "validate_every")] + [f"checkpoint.every_steps={10**9}"]
    total = arguments.warm_up + steps
    config = load_config(arguments.config, [*rare, *arguments.set, f"train.steps={total}", "data.validation_images=1"])
    train, data = config.train, config.data
    images = arguments.data or _noise(folder, config, arguments.channels)
    source = open_source(str(images), "train")
    made = training_batches(source, training_transforms(data.pad, data.crop, data.flip), train.batch_size, train.seed)
    batches = [batch["images"] for batch, _ in zip(iterate(made), range(BATCHES), strict=False)]

    keras.utils.set_random_seed(train.seed)  # the weights that `train` will start from
    model = training.compiled(config, source.channels)
    weights = {name: keras.ops.convert_to_numpy(weight) for name, weight in artifact.tensors(model)}
    trainable = [name for name, weight in artifact.tensors(model) if weight.trainable]
    loss_kvq = float(keras.ops.convert_to_numpy(model.compute_loss(x=batches[0], y_pred=model(batches[0]))))
    module = importlib.import_module(f"peers.{arguments.peer or arguments.backend + '_loop'}")
    loop = module.Loop(config, weights, trainable)
    parameters = sum(int(np.prod(weights[name].shape)) for name in trainable)
    if loop.parameters() != parameters:
        raise SystemExit(f"Not the same model: {parameters:,} parameters in kvq and {loop.parameters():,} by hand.")
    loss_hand = loop.first_loss(batches[0])
    if abs(loss_hand - loss_kvq) > 1e-4 * loss_kvq:
        raise SystemExit(f"The two do not compute the same: the first loss is {loss_kvq} in kvq and {loss_hand} by hand.")

    same = {
        "backend": arguments.backend,
        "peer": arguments.peer or f"{arguments.backend}_loop",
        "config": arguments.config,
        "batch_size": train.batch_size,
        "parameters": parameters,
        "loss_kvq": loss_kvq,
        "loss_hand": loss_hand,
    }
    if arguments.check:
        return same

    turns = InTurn(loop, module.wait, batches, block, arguments.warm_up)
    training.train(config, folder / "run", data=images, progress=turns)
    (kvq, kvq_cpu), (hand, hand_cpu) = np.transpose(turns.kvq), np.transpose(turns.hand)
    return {
        **same,
        "kvq_s": float(np.median(kvq)),
        "hand_s": float(np.median(hand)),
        "ratio": float(np.median(kvq / hand)),
        "ratio_quartiles": np.percentile(kvq / hand, (25, 75)).tolist(),
        # Of all blocks together: with the records and whatever else came between steps.
        "ratio_of_sums": float(kvq.sum() / hand.sum()),
        # Of the seconds of all threads, which other work on the machine disturbs less. Threads that wait busily count, too.
        "ratio_of_cpu": float(np.median(kvq_cpu / hand_cpu)),
        "kvq_s_all": kvq.tolist(),
        "hand_s_all": hand.tolist(),
        "block": block,
        "versions": {name: version(name) for name in ("keras", "numpy", "grain", _distribution(arguments.backend))},
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
    }


def _noise(folder: Path, config: Any, channels: int | None) -> Path:
    """Random images of the crop's size; grey where the configuration pads, as only the MNIST family does."""
    import numpy as np

    rng, side = np.random.default_rng(0), config.data.crop
    channels, count = channels or (1 if config.data.pad else 3), max(8 * config.train.batch_size, 16)
    arrays = {name: rng.integers(0, 256, (count, side, side, channels), np.uint8) for name in ("x_train", "x_test")}
    np.savez(folder / "noise.npz", **arrays)
    return folder / "noise.npz"


def _distribution(backend: str) -> str:
    from kvq.backends import DISTRIBUTIONS

    names = {distribution.metadata["Name"].lower() for distribution in importlib.metadata.distributions()}
    return next(name for name in DISTRIBUTIONS[backend] if {name, name.replace("-", "_")} & names)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=("jax", "tensorflow", "torch"), required=True)
    parser.add_argument("--peer", help="a module of peers/ other than BACKEND_loop, such as tensorflow_sonnet")
    parser.add_argument("--check", action="store_true", help="compare parameters and first losses, and stop")
    parser.add_argument("--channels", type=int, help="of the noise; default: 1 where the configuration pads, else 3")
    parser.add_argument("--config", default="fashion_mnist_mini", help="what `kvq train` takes")
    parser.add_argument("--steps", type=int, default=200, help="of each side, after the warm-up")
    parser.add_argument("--block", type=int, default=10, help="steps before the other side has its turn")
    parser.add_argument("--warm-up", type=int, default=10, help="steps that are not timed")
    parser.add_argument("--data", help="images instead of noise, as `kvq train` takes them")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `kvq train`")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    main()
