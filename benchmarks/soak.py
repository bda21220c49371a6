"""One run of the smallest configuration, killed again and again at random moments, beside one that is left alone.

    python benchmarks/soak.py --backend torch --kills 50

Kills with SIGKILL, resumes with `--resume-or-start`, and at the end compares the last checkpoints bit by bit, the records of
metrics.jsonl apart from what a clock decides, and reads every file of the run folder.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

CLOCK = {"images_per_second", "input_wait"}


def command(arguments: argparse.Namespace, run: Path) -> list[str]:
    often = {
        "train.steps": arguments.steps,
        "train.log_every": 7,
        "train.sample_every": 50,
        "train.validate_every": 50,
        "checkpoint.every_steps": 5,
        "data.validation_images": 64,
    }
    settings = [word for key, value in often.items() for word in ("--set", f"{key}={value}")]
    program = [sys.executable, "-m", "kvq_cli", "train", "fashion_mnist_mini", "--backend", arguments.backend]
    return [*program, "--out", str(run), "--resume-or-start", *settings]


def kill_again_and_again(arguments: argparse.Namespace, run: Path) -> int:
    """Kills until there were enough or the run is finished, then lets it finish; how many kills there were."""
    rng, kills = random.Random(arguments.seed), 0
    while kills < arguments.kills:
        process = subprocess.Popen(command(arguments, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = newest(run)
        while process.poll() is None and newest(run) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, arguments.longest))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        print(f"kill {kills} at checkpoint {newest(run)}", flush=True)
    subprocess.run(command(arguments, run), check=True, capture_output=True)
    return kills


def newest(run: Path) -> str:
    return max((path.name for path in run.glob("checkpoints/step_*")), default="none")


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def check_files(run: Path) -> int:
    """Reads every file that has a name; how many."""
    files = [path for path in run.rglob("*") if path.is_file() and not any(part.startswith(".") for part in path.parts[-3:])]
    for path in files:
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
    return len(files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--longest", type=float, default=0.5, help="seconds from a new checkpoint to the kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"
        subprocess.run(command(arguments, straight), check=True, capture_output=True)
        kills = kill_again_and_again(arguments, killed)
        one, other = (load_file(run / "checkpoints" / newest(run) / "state.safetensors") for run in (straight, killed))
        different = [name for name in one if not np.array_equal(one[name], other[name])]
        result = {
            "backend": arguments.backend,
            "kills": kills,
            "steps": arguments.steps,
            "tensors": len(one),
            "different_tensors": different,
            "records_equal": records(straight) == records(killed),
            "files_read": check_files(killed),
        }
    print(json.dumps(result))
    raise SystemExit(bool(different) or not result["records_equal"])


if __name__ == "__main__":
    main()
