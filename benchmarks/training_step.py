"""Training steps of kvq beside those of its peers, for two workloads, as one Markdown table.

    pip install -c constraints.txt ".[peers]" && python benchmarks/training_step.py --steps 40

Each peer is `benchmarks/beside_loop.py` in a process of its own, and so is kvq on each backend: from the same weights, after a
check that both have the same number of parameters and the same first loss. The processes of a workload take turns, a block of
steps each; `fastest kvq / peer` compares a peer with kvq on whichever backend was the fastest here.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PEERS = {
    "plain PyTorch": ("torch", "torch_loop"),
    "PyTorch with vector-quantize-pytorch": ("torch", "torch_vector_quantize_pytorch"),
    "plain TensorFlow": ("tensorflow", "tensorflow_loop"),
    "TensorFlow with Sonnet's quantizer": ("tensorflow", "tensorflow_sonnet"),
    "plain JAX with optax": ("jax", "jax_loop"),
}
# What each of them needs beside its backend.
NEEDS = {
    "PyTorch with vector-quantize-pytorch": "vector_quantize_pytorch",
    "TensorFlow with Sonnet's quantizer": "sonnet",
    "plain JAX with optax": "optax",
}
PRECISIONS = ("float32", "mixed_bfloat16")
PAPER = 'model={network="paper", latent_dim=64, hidden=128, residual_blocks=2, residual_hidden=32}'
VECTOR = 'quantizer={kind="vector", codebook_size=512, commitment_weight=0.25}'
WORKLOADS = {
    "W1": ("cifar10", 1, ["train.batch_size=128", PAPER, VECTOR]),
    "W2": ("mscoco_resnet", 3, []),
}
DESCRIPTIONS = {
    "W1": "32x32x1, batch 128, `paper` with 128 hidden units and two residual blocks of 32, K = 512, D = 64",
    "W2": "128x128x3, batch 16, `resnet`, K = 512, D = 128",
}
HERE = Path(__file__).parent
SETTLING = 0.1  # seconds for which the threads of the one before may finish


def main() -> None:
    arguments = _arguments()
    results = []
    for workload in arguments.workload or WORKLOADS:
        for precision in arguments.precision or ["float32"]:
            results += _measure(workload, precision, arguments)
    wrong = [f"{one['workload']}, {one['name']}, {one['precision']}: {one['error']}" for one in results if "error" in one]
    if arguments.json or arguments.check:
        print(json.dumps(results))
    else:
        print(_section([one for one in results if "error" not in one], arguments), end="")
    if wrong:
        raise SystemExit("\n".join(wrong))


class Measurement:
    """A process of `beside_loop.py`. `result` is what it found, or `error`."""

    def __init__(self, process: "subprocess.Popen[str]", said: IO[str]):
        self.process, self.said = process, said
        self.result: dict[str, Any] | None = None

    def go_on(self) -> None:
        """One turn; returns when it is done."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            print(file=self.process.stdin, flush=True)
        self.await_turn()

    def await_turn(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.strip() == "turn":
                return
            if line.startswith("{"):
                self.result = json.loads(line)
        status = self.process.wait()
        if status or self.result is None:
            self.said.seek(0)
            self.result = {"error": (self.said.read().strip().splitlines() or [f"ended with status {status}"])[-1]}


@contextlib.contextmanager
def _process(
    workload: str, backend: str, module: str | None, precision: str, arguments: argparse.Namespace
) -> Iterator[Measurement]:
    """Of a peer, or of kvq where `module` is None."""
    config, channels, overrides = WORKLOADS[workload]
    command = [sys.executable, str(HERE / "beside_loop.py"), "--backend", backend, "--config", config, "--json"]
    command += ["--side", "hand", "--peer", module] if module else ["--side", "kvq"]
    command += ["--channels", str(channels), "--precision", precision, "--warm-up", str(max(arguments.block, 2)), "--in-turn"]
    command += ["--steps", str(arguments.steps), "--block", str(arguments.block)]
    command += [word for override in overrides for word in ("--set", override)] + ["--check"] * arguments.check
    # Several of them share a GPU, of which JAX would take three quarters unasked, and TensorFlow all.
    alone = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **alone}
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=said, text=True)
        try:
            yield Measurement(process, said)
        finally:
            process.kill()
            process.communicate()


def _measure(workload: str, precision: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    peers = {name: PEERS[name] for name in arguments.peer or PEERS}
    processes: dict[str, tuple[str, str | None]] = {}
    for name, (backend, module) in peers.items():
        if not arguments.check:
            processes[backend] = backend, None
        processes[name] = backend, module
    with contextlib.ExitStack() as stack:
        running: dict[str, Measurement] = {}
        for name, (backend, module) in processes.items():
            print(f"{workload}, {precision}: {name if module else f'kvq on {backend}'}", file=sys.stderr, flush=True)
            running[name] = stack.enter_context(_process(workload, backend, module, precision, arguments))
            if not arguments.together:  # one after the other, since memory and cores may be few
                running[name].await_turn()
        if arguments.together:
            for one in running.values():
                one.await_turn()
        # The first turn is the warm-up, with what is compiled; after the last one the result is told.
        for _ in range(arguments.steps // arguments.block + 2):
            for one in running.values():
                if one.result is None:
                    time.sleep(SETTLING)
                    one.go_on()
        found = {name: one.result or {"error": "did not end"} for name, one in running.items()}
    if not arguments.check:
        measured = [found[backend] for backend, _ in peers.values() if "error" not in found[backend]]
        fastest = min(measured, key=lambda one: one["kvq_s"], default=None)
        for name, (backend, _) in peers.items():
            found[name] = _beside(found[name], found[backend], fastest)
    return [{"workload": workload, "name": name, "precision": precision, **found[name]} for name in peers]


def _beside(peer: dict[str, Any], kvq: dict[str, Any], fastest: dict[str, Any] | None) -> dict[str, Any]:
    """What a peer's process found, with what kvq's did on the same backend and on the fastest one."""
    for one in (kvq, peer):
        if "error" in one:
            return one
    assert fastest
    ratios = [ours / theirs for ours, theirs in zip(kvq["kvq_s_all"], peer["hand_s_all"], strict=True)]
    pairs = zip(fastest["kvq_s_all"], peer["hand_s_all"], strict=True)
    return {
        **kvq,
        **peer,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4, method="inclusive")[::2] if len(ratios) > 1 else ratios * 2,
        "fastest": fastest["backend"],
        "fastest_ratio": statistics.median(ours / theirs for ours, theirs in pairs),
    }


HEAD = """## A training step beside its peers

kvq through `kvq train`'s own path, with pipeline, metrics and callbacks; the peers with their batches ready in memory, without
measures or logs. Same network, weights, images, precision, number of parameters and first loss, which the benchmark checks. With
mixed_bfloat16 the networks of both compute in bfloat16, and the quantizer in float32. Each is a process of its own, and all take
turns; `ratio` is the median over rounds, with its quartiles. `fastest kvq / peer` has kvq on the backend where it was fastest. On
a CPU kvq's processes keep the memory that they free, as its command line does; the peers' are as Python starts them. `of peak`:
the convolutions of kvq's step, in FLOP a second, over what a large product of matrices in the same precision reached on that
backend in between. Compare ratios, not seconds: other work on the machine slows both sides.

"""


def _section(results: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    versions = {name: number for one in results for name, number in one["versions"].items()}
    lines = [f"- {name}: {DESCRIPTIONS[name]}." for name in dict.fromkeys(one["workload"] for one in results)]
    columns = ("workload", "precision", "peer", "parameters", "kvq, s/step", "of peak", "peer, s/step", "ratio kvq / peer")
    columns += ("quartiles", "fastest kvq / peer", "pairs")
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for one in results:
        low, high = one["ratio_quartiles"]
        times = f"{one['kvq_s']:.3g} | {one['kvq_of_peak']:.0%} | {one['hand_s']:.3g}"
        times += f" | {one['ratio']:.2f} | {low:.2f} to {high:.2f}"
        fastest = f"{one['fastest_ratio']:.2f} ({one['fastest']})"
        name = f"{one['workload']} | {one['precision']} | {one['name']} | {one['parameters']:,}"
        lines.append(f"| {name} | {times} | {fastest} | {len(one['kvq_s_all'])} |")
    chosen = "".join(f"--workload {name} " for name in arguments.workload or ())
    chosen += "".join(f"--precision {name} " for name in arguments.precision or ())
    command = f"python benchmarks/training_step.py {chosen}--steps {arguments.steps} --block {arguments.block}"
    numbers = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    gpus = dict.fromkeys(one["device"] for one in results if one["device"] != "cpu")
    hardware = ", ".join([*gpus, f"{results[0]['cores']} CPU cores ({results[0]['cpu']})"])
    lines += ["", f"Made by `{command}` on {hardware},", f"Python {results[0]['python']}, {numbers}.", ""]
    return HEAD + "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="repeatable; default: both")
    parser.add_argument("--peer", action="append", choices=PEERS, help="repeatable; default: all")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="repeatable; default: float32")
    parser.add_argument("--together", action="store_true", help="start the processes of a workload at once")
    parser.add_argument("--steps", type=int, default=20, help="of each side")
    parser.add_argument("--block", type=int, default=1, help="steps before the other side has its turn")
    parser.add_argument("--check", action="store_true", help="compare parameters and first losses only")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout instead of the section")
    return parser.parse_args()


if __name__ == "__main__":
    main()
