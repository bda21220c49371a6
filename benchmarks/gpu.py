"""The stages of `gpu.sh`: each in processes of its own, under a time limit, and whatever one of them does, the others still run.

The JSON is written after every stage. A stage has `status` (done, failed with `error`, or skipped with `reason`), its `seconds`,
and what it found until then. `missing` names what could not be compared because a package is not installed.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gpu_commands import StageError
from gpu_stages import QUICK, Found, Skipped, environment, growth, memory, missing, quantizers, train_for, training_step

from kvq import backends

DEADLINE = time.monotonic() + float(os.environ.get("KVQ_GPU_SECONDS", "3600" if QUICK else "570"))
PATIENCE = 4 if QUICK else 1  # a quick look is taken where there is no GPU
LEAST = 10  # seconds under which no stage is begun


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu.json")
    everything: Found = {"quick": QUICK, "missing": missing(), "stages": {}}
    chosen = os.environ.get("KVQ_GPU_STAGES", "").split()
    # A command that is being waited for is then ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated."))
    with tempfile.TemporaryDirectory() as folder:
        for name, limit, stage in stages(Path(folder)):
            found = everything["stages"][name] = {}
            if chosen and name.split()[0] not in chosen:
                found |= {"status": "skipped", "reason": "not asked for"}
            else:
                run_stage(name, limit, stage, found)
            out.write_text(json.dumps(everything, indent=1) + "\n", "utf-8")
    print(f"Written: {out}", file=sys.stderr)


def run_stage(name: str, limit: float, stage: Callable[[Found, float], None], found: Found) -> None:
    """`stage` fills `found`, until a moment that it is told."""
    started = time.monotonic()
    if DEADLINE - started < LEAST:
        found |= {"status": "skipped", "reason": "no time was left"}
        return
    print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
    try:
        stage(found, min(started + limit * PATIENCE, DEADLINE))
        found["status"] = "done"
    except Skipped as reason:
        found |= {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        found |= {
            "status": "failed",
            "error": str(error) if isinstance(error, StageError) else f"{type(error).__name__}: {error}",
        }
    found["seconds"] = time.monotonic() - started
    print(found["status"], f"{found['seconds']:.0f} s", found.get("error", ""), file=sys.stderr, flush=True)


def stages(folder: Path) -> list[tuple[str, float, Callable[[Found, float], None]]]:
    """Name, limit in seconds, and function of each, the most important first."""

    def steps(workload: str, precision: str) -> list[tuple[str, float, Callable[[Found, float], None]]]:
        # On an H100 JAX was not ready for W2 in 110 seconds: a backend's slowness must not cost the others' figures.
        return [
            (
                f"training_step {workload} {precision} {name}",
                150,
                lambda found, until, name=name: training_step(found, until, workload, precision, name),
            )
            for name in backends.installed()
        ]

    def train(config: str, seconds: float) -> Callable[[Found, float], None]:
        return lambda found, until: train_for(found, until, config, seconds, folder)

    return [
        ("environment", 60, environment),
        *steps("W1", "float32"),
        ("train cifar10", 120, train("cifar10", 60)),
        ("train mscoco_resnet", 160, train("mscoco_resnet", 100)),
        *steps("W2", "float32"),
        ("memory", 90, memory),
        ("quantizers", 120, quantizers),
        *((f"growth {name}", 110, lambda found, until, name=name: growth(found, until, name)) for name in backends.installed()),
        *steps("W1", "mixed_bfloat16"),
        *steps("W2", "mixed_bfloat16"),
    ]


if __name__ == "__main__":
    main()
