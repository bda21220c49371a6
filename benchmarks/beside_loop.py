"""How long a step of `kvq train` takes, beside a minimal loop written for the same backend without kvq.

    python benchmarks/beside_loop.py --backend torch --config cifar10 --steps 200 --json

The loops are the pages of `peers/`: by hand, or with `--peer` one that takes its quantizer from a library. `--check` compares the
number of parameters and the loss at step 0, from the same weights, and measures nothing.

Both train the same network from the same weights on the same images, in one process, in turn: a block of kvq's steps, a block
of the hand-written ones, and so on. kvq's side is `kvq.training.train` itself, with its data pipeline, metrics and callbacks;
it hands over between two steps, where it reports progress. The loop by hand has its batches ready in memory, measures nothing
and logs nothing. `ratio` is the median over pairs of neighbouring blocks, since other work on a machine slows both.

With `--side` one of them alone: kvq's then keeps the memory that it frees, as the command line does; a loop by hand does not,
and in one process both would.

Beside both, in each pair of blocks, a large product of matrices on the same backend in the same precision: how fast the hardware
is here at its best. `of_peak` is what a step, counted by `step_flop`, uses of that.

With `--in-turn` a line `turn` on stdout says that a pair of blocks, or what comes before the first, is done, and the next waits
for a line on stdin: so `training_step.py` lets several of these processes take turns.

Without `--data` the images are noise of the configuration's size: no step takes longer or shorter for it.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flop import Product, step_flop

from kvq import backends
from kvq.backends.memory import keep_freed_memory
from kvq.progress import Progress

BATCHES = 16  # that the hand-written loop goes round in
SETTLING = 0.05  # seconds for which read-ahead threads may finish before the other side is timed
# How far the first losses of the two may lie apart, relatively. bfloat16 has 8 bits where float32 has 24, and each side rounds at
# other places: 5e-5 apart for W1 and 2e-5 for W2 on a CPU, where the loss in float32 is 1.5e-3 away from W1's. TF32, which GPUs
# use for float32 unasked, has 11 bits.
TOLERANCES = {"float32": 1e-4, "tf32": 1e-3, "mixed_bfloat16": 1e-3}


class InTurn(Progress):
    """Watches a kvq run, and does a block of hand-written steps after each block of kvq's. Or does without one of the two.

    Args:
        loop: The hand-written loop; None where kvq is alone.
        wait: Waits until all that was queued is done.
        batches: Its images.
        product: The matrix product beside them.
        block: Steps in a block.
        warm_up: Steps of either side before the first block.
        told: Whether to wait for a line on stdin before each pair of blocks.

    `kvq` and `hand` hold the seconds a step of each block, by the clock and of all threads together; `peak` FLOP a second.
    """

    def __init__(self, loop: Any, wait: Any, batches: list[Any], product: Product, block: int, warm_up: int, told: bool):
        self.loop, self.wait, self.batches, self.product = loop, wait, batches, product
        self.block, self.warm_up, self.told = block, warm_up, told
        self.peak: list[float] = []
        self.kvq: list[tuple[float, float]] = []
        self.hand: list[tuple[float, float]] = []

    def start(self, total_steps: int, first_step: int) -> None:
        self._await_turn()
        if self.loop:
            self._by_hand(self.warm_up)

    def by_hand_alone(self, steps: int) -> None:
        """All blocks of the hand-written loop."""
        self.start(steps, 0)
        for _ in range(steps // self.block):
            self._await_turn()
            self._end_turn()
        self._await_turn()

    def step(self, step: int) -> None:
        done = step - self.warm_up
        if done < 0 or done % self.block:
            return
        self.wait()
        if done:
            self.kvq.append(self._since_start(step - self.begun))  # of several steps at once it may be more than a block
            self._end_turn()
        self._await_turn()
        self.begun = step
        self._start()

    def _end_turn(self) -> None:
        if self.loop:
            self._start()
            self._by_hand(self.block)
            self.hand.append(self._since_start(self.block))
        time.sleep(SETTLING)
        self.peak.append(self.product.measure())

    def _await_turn(self) -> None:
        if self.told:
            print("turn", flush=True)
            if not sys.stdin.readline():
                raise SystemExit("Nobody waits for the next turn.")

    def _by_hand(self, steps: int) -> None:
        for number in range(steps):
            self.loop.step(self.batches[number % BATCHES])
        self.wait()

    def _start(self) -> None:
        time.sleep(SETTLING)
        self.started = time.perf_counter(), time.process_time()

    def _since_start(self, steps: int) -> tuple[float, float]:
        seconds, of_threads = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        return seconds / steps, of_threads / steps


def main() -> None:
    arguments = _arguments()
    backends.choose(arguments.backend)  # before anything imports Keras
    if arguments.side == "kvq":
        keep_freed_memory(arguments.backend)
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
    # Nothing but steps and their records: pictures, validation and checkpoints come after the last block. And kvq places no code,
    # since the other side does not: how many of them are used can decide how long a step takes, on a GPU with JAX.
    rare = [f"train.{name}={10**9}" for name in ("sample_every", "validate_every")] + [f"checkpoint.every_steps={10**9}"]
    rare += ['codebook.initialise="none"', "codebook.replace_dead_every=0"]
    total = arguments.warm_up + steps
    fixed = [f"train.steps={total}", f"train.precision={arguments.precision}", "data.validation_images=1"]
    config = load_config(arguments.config, [*rare, *arguments.set, *fixed])
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
    loss_hand, device = loop.first_loss(batches[0]), backends.devices(arguments.backend)[0]
    rounds = train.precision == "float32" and device != "cpu" and backends.tf32(arguments.backend)
    tolerance = TOLERANCES["tf32" if rounds else train.precision]
    if abs(loss_hand - loss_kvq) > tolerance * loss_kvq:
        raise SystemExit(f"The two do not compute the same: the first loss is {loss_kvq} in kvq and {loss_hand} by hand.")

    same = {
        "backend": arguments.backend,
        "peer": arguments.peer or f"{arguments.backend}_loop",
        "config": arguments.config,
        "precision": train.precision,
        "device": device,
        "batch_size": train.batch_size,
        "parameters": parameters,
        "loss_kvq": loss_kvq,
        "loss_hand": loss_hand,
        "tolerance": tolerance,
        "flop": step_flop(model, batches[0].shape),
    }
    if arguments.check:
        return same

    del model
    product = Product(arguments.backend, train.precision, module.wait)
    beside = None if arguments.side == "kvq" else loop
    turns = InTurn(beside, module.wait, batches, product, block, arguments.warm_up, arguments.in_turn)
    if arguments.side == "hand":
        turns.by_hand_alone(steps)
    else:
        training.train(config, folder / "run", data=images, progress=turns)
    if turns.kvq and len(turns.kvq) != steps // block:
        raise SystemExit("kvq takes several steps at once here, up to ten: --block and --steps must be multiples of ten.")
    if arguments.side == "both":
        (kvq, kvq_cpu), (hand, hand_cpu) = np.transpose(turns.kvq), np.transpose(turns.hand)
        same |= {
            "ratio": float(np.median(kvq / hand)),
            "ratio_quartiles": np.percentile(kvq / hand, (25, 75)).tolist(),
            # Of all blocks together: with the records and whatever else came between steps.
            "ratio_of_sums": float(kvq.sum() / hand.sum()),
            # Of the seconds of all threads, which other work on the machine disturbs less. Threads that wait busily count, too.
            "ratio_of_cpu": float(np.median(kvq_cpu / hand_cpu)),
        }
    for side, measured in (("kvq", turns.kvq), ("hand", turns.hand)):
        if measured:
            seconds = np.array(measured)[:, 0]
            same[f"{side}_s"] = float(np.median(seconds))
            same[f"{side}_of_peak"] = float(np.median(same["flop"] / (seconds * turns.peak)))
            same[f"{side}_s_all"] = seconds.tolist()
    return {
        **same,
        "peak_flop_s": float(np.median(turns.peak)),
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
    parser.add_argument("--side", choices=("both", "kvq", "hand"), default="both", help="which of the two takes steps")
    parser.add_argument("--check", action="store_true", help="compare parameters and first losses, and stop")
    parser.add_argument("--channels", type=int, help="of the noise; default: 1 where the configuration pads, else 3")
    parser.add_argument("--config", default="fashion_mnist_mini", help="what `kvq train` takes")
    parser.add_argument("--precision", choices=("float32", "mixed_bfloat16"), default="float32", help="of both sides")
    parser.add_argument("--in-turn", action="store_true", help="wait for a line on stdin before each pair of blocks")
    parser.add_argument("--steps", type=int, default=200, help="of each side, after the warm-up")
    parser.add_argument("--block", type=int, default=10, help="steps before the other side has its turn")
    parser.add_argument("--warm-up", type=int, default=10, help="steps that are not timed")
    parser.add_argument("--data", help="images instead of noise, as `kvq train` takes them")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `kvq train`")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    main()
