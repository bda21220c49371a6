"""Seconds and peak memory of the training steps of one side alone, kvq or a peer, of several configurations in one process.

    python benchmarks/device_steps.py --backend torch --config cifar10 --point '["train.batch_size=8"]' --point '[]'

A line of JSON for each point, a list of what `kvq train --set` takes. Memory is what the backend says that its tensors held at
most on the GPU, and without a GPU the most that the process held. Where the record cannot be reset (JAX on a GPU, and processes
outside Linux), it is told for the first point only: give each point a process of its own there. The images are noise; kvq goes
through Keras' `fit`, one step at a time, where `kvq train` takes several at once on a GPU.
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import resource
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=("jax", "tensorflow", "torch"), required=True)
    parser.add_argument("--side", default="kvq", help="kvq, or a module of peers/ such as torch_loop")
    parser.add_argument("--config", default="cifar10")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--point", action="append", required=True, help="JSON list of KEY=VALUE; repeatable")
    parser.add_argument("--steps", type=int, default=20, help="timed, after three that are not")
    arguments = parser.parse_args()
    os.environ["KERAS_BACKEND"] = arguments.backend  # before anything imports Keras
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    for number, point in enumerate(arguments.point):
        resettable = reset_peak(arguments.backend)
        try:
            found = {"step": take_steps(arguments, json.loads(point))}
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}), flush=True)
            continue
        known = resettable or not number
        print(json.dumps({**found, **(peak(arguments.backend) if known else {})}), flush=True)


def take_steps(arguments: argparse.Namespace, overrides: list[str]) -> float:
    """Seconds of a step."""
    import keras
    import numpy as np

    from kvq import artifact, training
    from kvq.config import load_config

    config = load_config(arguments.config, overrides)
    shape = (config.train.batch_size, config.data.crop, config.data.crop, arguments.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    keras.utils.clear_session()
    model = training.compiled(config, arguments.channels)
    warm_up, steps = 3, arguments.steps
    if arguments.side != "kvq":
        weights = {name: keras.ops.convert_to_numpy(weight) for name, weight in artifact.tensors(model)}
        trainable = [name for name, weight in artifact.tensors(model) if weight.trainable]
        del model
        module = importlib.import_module(f"peers.{arguments.side}")
        loop = module.Loop(config, weights, trainable)
        started = 0.0
        for number in range(warm_up + steps):
            if number == warm_up:
                module.wait()
                started = time.perf_counter()
            loop.step(images)
        module.wait()
        return (time.perf_counter() - started) / steps

    times: list[float] = []

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch + 1 in (warm_up, warm_up + steps):
                float(logs["loss"])  # only then is the step done
                times.append(time.perf_counter())

    batches = ((images,) for _ in range(warm_up + steps + 8))
    model.fit(batches, steps_per_epoch=warm_up + steps, shuffle=False, verbose=0, callbacks=[Clock()])
    return (times[1] - times[0]) / steps


def reset_peak(backend: str) -> bool:
    """Begins the record of memory anew; whether that is possible."""
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return True
    if backend == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            tf.config.experimental.reset_memory_stats("GPU:0")
            return True
    if backend == "jax":
        import jax

        if jax.local_devices()[0].memory_stats():
            return False
    return _reset_peak_of_process()


def _reset_peak_of_process() -> bool:
    """On Linux with glibc, after what was freed has been given back."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def peak(backend: str) -> dict[str, Any]:
    """The most memory since the last reset, in MiB, and whose it is."""
    used = None
    if backend == "torch":
        import torch

        used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    elif backend == "jax":
        import jax

        used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    else:
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            used = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    if used is None:
        return {"peak_mib": _peak_of_process(), "memory": "process"}
    return {"peak_mib": used / 2**20, "memory": "device"}


def _peak_of_process() -> float:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    main()
