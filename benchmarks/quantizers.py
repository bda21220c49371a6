"""Forward and backward of a gradient codebook, kvq on each backend beside vector-quantize-pytorch and plain `torch.cdist`.

    python benchmarks/quantizers.py --python jax=PYTHON --python tensorflow=PYTHON --python torch=PYTHON

16,384 latents of 64 channels, one process per cell, cells in turn for some rounds. Prints a Markdown table: medians, how many
times faster than vector-quantize-pytorch (learnable_codebook=True, ema_update=False) in the same round, and what a process (with
a GPU: the GPU, for its tensors) holds at most above what it held before the first pass, compiling included. `--memory` instead
shows how that grows with the number of codes at 16 channels, without the results: the gradients of latents and codebook. With
`--collapsed` all latents lie at one code, as when a codebook has collapsed: their gradients then add up in one place.
Without `--python`, every contender runs on the Python that runs this; give one for each backend where they live apart.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from device_steps import peak, reset_peak

N = 16_384
CONTENDERS = {
    "kvq tensorflow": "tensorflow",
    "kvq jax": "jax",
    "kvq torch": "torch",
    "vector-quantize-pytorch": "torch",
    "torch.cdist": "torch",
}
REFERENCE = "vector-quantize-pytorch"


def kvq_pass(backend: str, latents: Any, codebook: Any) -> Callable[[], Any]:
    """One forward and backward of `VectorQuantizer` as Keras' training step on the backend compiles it."""
    import keras
    from keras import ops

    from kvq.quantizers import VectorQuantizer

    quantizer = VectorQuantizer(len(codebook))
    quantizer.build((None, latents.shape[1]))
    quantizer.codebook.assign(codebook)
    grid = latents.reshape(16, 32, 32, -1)

    def loss(outputs: Any, given: Any) -> Any:
        return ops.sum(outputs["codes"] * given) + sum(ops.mean(term) for term in outputs["losses"].values())

    if backend == "jax":
        import jax

        others = [variable.value for variable in quantizer.non_trainable_variables]

        def whole(z: Any, weights: Any) -> Any:
            outputs, after = quantizer.stateless_call(weights, others, z, training=True)
            return loss(outputs, z), after

        step = jax.jit(jax.grad(whole, argnums=(0, 1), has_aux=True))
        arguments = jax.numpy.asarray(grid), [variable.value for variable in quantizer.trainable_variables]
        return lambda: jax.block_until_ready(step(*arguments))
    if backend == "tensorflow":
        import tensorflow as tf

        # The batch is of unknown size, as in `fit`.
        @tf.function(input_signature=[tf.TensorSpec((None, 32, 32, latents.shape[1]))])
        def graph(z: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(z)
                value = loss(quantizer(z, training=True), z)
            return tape.gradient(value, [z, quantizer.codebook.value])

        tensor = tf.constant(grid)
        return lambda: graph(tensor)[0][0, 0, 0, 0].numpy()  # a GPU is done when a number comes back
    tensor = keras.ops.convert_to_tensor(grid).requires_grad_()

    def eager() -> None:
        tensor.grad = quantizer.codebook.value.grad = None
        loss(quantizer(tensor, training=True), tensor.detach()).backward()
        _wait_for_torch()

    return eager


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _wait_for_torch() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def their_pass(latents: Any, codebook: Any) -> Callable[[], Any]:
    import torch
    from vector_quantize_pytorch import VectorQuantize

    device, dim = _torch_device(), latents.shape[1]
    module = VectorQuantize(dim, len(codebook), learnable_codebook=True, ema_update=False, rotation_trick=False).to(device)
    module.train()._codebook.embed.data.copy_(torch.tensor(codebook)[None])
    tensor = torch.tensor(latents.reshape(16, 1024, -1), device=device, requires_grad=True)

    def eager() -> None:
        tensor.grad = module._codebook.embed.grad = None
        codes, _, loss = module(tensor)
        ((codes * tensor.detach()).sum() + loss).backward()
        _wait_for_torch()

    return eager


def cdist_pass(latents: Any, codebook: Any) -> Callable[[], Any]:
    import torch
    import torch.nn.functional as F

    z, e = (torch.tensor(array, device=_torch_device(), requires_grad=True) for array in (latents, codebook))

    def eager() -> None:
        z.grad = e.grad = None
        with torch.no_grad():
            indices = torch.cdist(z, e).argmin(-1)
        codes = e[indices]
        loss = F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(z, codes.detach())
        (((z + (codes - z).detach()) * z.detach()).sum() + loss).backward()
        _wait_for_torch()

    return eager


def cell(contender: str, codes: int, dim: int, passes: int, collapsed: int) -> dict[str, float]:
    import numpy as np

    rng = np.random.default_rng(0)
    latents, codebook = (rng.normal(size=(rows, dim)).astype("float32") for rows in (N, codes))
    if collapsed:
        latents = codebook[0] + 0.001 * latents
    if contender.startswith("kvq"):
        run = kvq_pass(CONTENDERS[contender], latents, codebook)
    else:
        run = {"vector-quantize-pytorch": their_pass, "torch.cdist": cdist_pass}[contender](latents, codebook)
    reset_peak(CONTENDERS[contender])
    before = peak(CONTENDERS[contender])["peak_mib"]
    seconds = []
    for _ in range(passes):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[1:] or seconds), "mebibytes": peak(CONTENDERS[contender])["peak_mib"] - before}


def in_a_process(contender: str, numbers: list[int], pythons: dict[str, str]) -> dict[str, float] | None:
    """`cell` with those numbers."""
    backend = CONTENDERS[contender]
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [pythons.get(backend, sys.executable), __file__, "--cell", contender, *map(str, numbers)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cell", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--collapsed", action="store_true", help="all latents at one code")
    parser.add_argument("--codes", type=int, nargs="+", default=[512, 8192, 65536])
    parser.add_argument("--contender", action="append", choices=CONTENDERS, help="repeatable; default: all")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout instead of the table")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="memory against the number of codes, kvq alone")
    parser.add_argument("--python", action="append", default=[], metavar="BACKEND=PYTHON")
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(cell(arguments.cell[0], *map(int, arguments.cell[1:]))))
        return
    pythons = dict(pair.split("=", 1) for pair in arguments.python)
    kvq_alone = [contender for contender in CONTENDERS if contender.startswith("kvq")]
    contenders, sizes = (
        (kvq_alone, [2**10, 2**14, 2**18]) if arguments.memory else (arguments.contender or list(CONTENDERS), arguments.codes)
    )
    dim = 16 if arguments.memory else 64
    measured: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for codes in sizes:
            for contender in contenders:
                numbers = [codes, dim, 6 if codes < 10_000 else 3, int(arguments.collapsed)]
                result = in_a_process(contender, numbers, pythons)
                if result:
                    measured.setdefault((contender, codes), []).append(result)
    if arguments.json:
        cells = [
            {"contender": one, "codes": codes, "rounds": measured.get((one, codes))} for one in contenders for codes in sizes
        ]
        print(json.dumps(cells))
        return
    where = ", all at one code" if arguments.collapsed else ""
    print(f"{N} latents of {dim} channels{where}, forward and backward; {os.cpu_count()} cores, {_cpu()}\n")
    print("| | " + " | ".join(f"K = {codes:,}: s | faster | MiB" for codes in sizes) + " |")
    print("|---" * (1 + 3 * len(sizes)) + "|")
    for contender in contenders:
        columns = []
        for codes in sizes:
            own, reference = measured.get((contender, codes)), measured.get((REFERENCE, codes))
            if not own:
                columns += ["not finished", "", ""]
                continue
            ratios = [other["seconds"] / mine["seconds"] for mine, other in zip(own, reference or [], strict=False)]
            columns.append(f"{statistics.median(mine['seconds'] for mine in own):.3f}")
            columns.append(f"{statistics.median(ratios):.1f}x" if ratios else "")
            results = (N + codes) * dim * 4 / 2**20 if arguments.memory else 0
            columns.append(f"{statistics.median(mine['mebibytes'] for mine in own) - results:.0f}")
        print(f"| {contender} | " + " | ".join(columns) + " |")


def _cpu() -> str:
    try:
        lines = open("/proc/cpuinfo").read().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
