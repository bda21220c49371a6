"""Training steps of kvq beside those of its peers, for two workloads, as one Markdown table.

    pip install -c constraints.txt ".[peers]" && python benchmarks/training_step.py --steps 40 --out docs/benchmarks.md

Each line is `benchmarks/train_step.py` in a process of its own: kvq and one peer of the same backend, in turn, from the same
weights, after a check that both have the same number of parameters and the same first loss. Between backends `kvq benchmark`
compares.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PEERS = {
    "plain PyTorch": ("torch", "torch_loop"),
    "PyTorch with vector-quantize-pytorch": ("torch", "torch_vector_quantize_pytorch"),
    "plain TensorFlow": ("tensorflow", "tensorflow_loop"),
    "TensorFlow with Sonnet's quantizer": ("tensorflow", "tensorflow_sonnet"),
    "plain JAX with optax": ("jax", "jax_loop"),
}
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


def main() -> None:
    arguments = _arguments()
    results = []
    for workload in arguments.workload or WORKLOADS:
        for peer in arguments.peer or PEERS:
            print(f"{workload}: {peer}", file=sys.stderr, flush=True)
            results.append({"workload": workload, "name": peer, **_measure(workload, peer, arguments)})
    if arguments.json or arguments.check:
        print(json.dumps(results))
        return
    print(_page(results, arguments), end="")
    if arguments.out:
        arguments.out.write_text(_page(results, arguments), "utf-8")


def _measure(workload: str, peer: str, arguments: argparse.Namespace) -> dict[str, Any]:
    (backend, module), (config, channels, overrides) = PEERS[peer], WORKLOADS[workload]
    command = [sys.executable, str(HERE / "train_step.py"), "--backend", backend, "--peer", module, "--config", config, "--json"]
    command += ["--channels", str(channels), "--steps", str(arguments.steps), "--block", str(arguments.block), "--warm-up", "2"]
    command += [word for override in overrides for word in ("--set", override)] + ["--check"] * arguments.check
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(f"{workload}, {peer}: {run.stderr.strip().splitlines()[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


HEAD = """# Benchmarks

## A training step beside its peers

kvq through `kvq train`'s own path, with pipeline, metrics and callbacks; the peers with their batches ready in memory, without
measures or logs. Same network, weights, images, precision (float32), number of parameters and first loss, which the benchmark
checks. The two take turns in one process; `ratio` is the median over pairs of neighbouring turns, with its quartiles. Compare
ratios, not seconds: other work on the machine slows both sides.

"""


def _page(results: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    versions = {name: number for one in results for name, number in one["versions"].items()}
    lines = [f"- {name}: {DESCRIPTIONS[name]}." for name in dict.fromkeys(one["workload"] for one in results)]
    columns = ("workload", "peer", "parameters", "kvq, s/step", "peer, s/step", "ratio kvq / peer", "quartiles", "pairs")
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for one in results:
        low, high = one["ratio_quartiles"]
        times = f"{one['kvq_s']:.3g} | {one['hand_s']:.3g} | {one['ratio']:.2f} | {low:.2f} to {high:.2f}"
        lines.append(f"| {one['workload']} | {one['name']} | {one['parameters']:,} | {times} | {len(one['kvq_s_all'])} |")
    chosen = "".join(f"--workload {name} " for name in arguments.workload or ())
    command = f"python benchmarks/training_step.py {chosen}--steps {arguments.steps} --block {arguments.block}"
    numbers = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    hardware = f"{results[0]['cores']} CPU cores ({results[0]['cpu']})"
    lines += ["", f"Made by `{command}` on {hardware},", f"Python {results[0]['python']}, {numbers}.", ""]
    return HEAD + "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="repeatable; default: both")
    parser.add_argument("--peer", action="append", choices=PEERS, help="repeatable; default: all")
    parser.add_argument("--steps", type=int, default=20, help="of each side")
    parser.add_argument("--block", type=int, default=1, help="steps before the other side has its turn")
    parser.add_argument("--check", action="store_true", help="compare parameters and first losses only")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout instead of the page")
    parser.add_argument("--out", type=Path, help="where the page goes as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
