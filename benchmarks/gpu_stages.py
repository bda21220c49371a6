"""What each stage of `gpu.py` does: it fills a dict, until a moment that it is told, by commands in processes of their own."""

import concurrent.futures
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_commands import StageError, run
from growth import BASE, settings
from training_step import NEEDS, PEERS, PRECISIONS, WORKLOADS

from kvq import backends
from kvq.config import load_config

HERE = Path(__file__).parent
QUICK = os.environ.get("KVQ_QUICK", "") not in ("", "0")
AT_ONCE = 2 if QUICK else 10  # processes that are asked for memory, not for time
# A short form of growth.AXES, whose other values the base of each has.
AXES = {"codebook": [2**6, 2**9, 2**12, 2**15, 2**18], "side": [64, 128, 256], "batch": [128, 512]}
QUICK_AXES = {"codebook": [2**6, 2**9], "batch": [8]}
PACKAGES = ("kvq", "keras", "torch", "jax", "jaxlib", "tensorflow", "numpy", "grain", "optax", "vector-quantize-pytorch")
QUERY = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]

Found = dict[str, Any]


class Skipped(Exception):
    """Why a stage has nothing to do here."""


def missing() -> dict[str, str]:
    """Each peer that cannot run here, with the reason."""
    found = {}
    for peer, (backend, _) in PEERS.items():
        lacking = [package for package in (backend, NEEDS.get(peer)) if package and importlib.util.find_spec(package) is None]
        if lacking:
            found[peer] = f"{' and '.join(lacking)} is not installed"
    return found


def environment(found: Found, until: float) -> None:
    """Versions and devices."""
    found["python"] = sys.version.split()[0]
    found["packages"] = {name: _version(name) for name in PACKAGES}
    try:
        found["gpu"] = subprocess.run(QUERY, capture_output=True, text=True, timeout=20, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        found["gpu"] = f"nvidia-smi gives nothing: {type(error).__name__}"
    found["doctor"] = json.loads(run([sys.executable, "-m", "kvq_cli", "doctor", "--json"], until).told())


def training_step(found: Found, until: float, workload: str, precision: str, backend: str) -> None:
    if QUICK and workload != "W1":
        raise Skipped("too large for a quick look")
    peers = [peer for peer, (whose, _) in PEERS.items() if whose == backend and peer not in missing()]
    if not peers:
        raise Skipped(f"no peer on {backend} is installed")
    steps, block = (1, 1) if QUICK else (120, 10)
    command = [
        sys.executable,
        str(HERE / "training_step.py"),
        "--workload",
        workload,
        "--precision",
        precision,
        "--json",
        "--together",
    ]
    command += ["--steps", str(steps), "--block", str(block), *(word for peer in peers for word in ("--peer", peer))]
    found["peers"] = results = json.loads(run(command, until).told())
    wrong = [f"{one['name']}: {one['error']}" for one in results if "error" in one]
    if wrong:
        raise StageError("; ".join(wrong))


def memory(found: Found, until: float) -> None:
    """Of each side of each workload and precision; several processes at once, since no time is taken."""
    sides = [(name, "kvq") for name in backends.installed()] + [PEERS[peer] for peer in PEERS if peer not in missing()]
    jobs = {}
    for workload, (config, channels, overrides) in WORKLOADS.items():
        if QUICK and workload != "W1":
            continue
        for precision in PRECISIONS:
            for backend, side in sides:
                name = f"{workload} {precision} {backend} {side}"
                jobs[name] = (backend, side, config, channels, [*overrides, f"train.precision={precision}"])
    _each_alone(found, jobs, until)


def growth(found: Found, until: float, backend: str) -> None:
    """Times in one process, then the memory that it could not tell, a process for each. Points as in docs/growth.json."""
    axes = QUICK_AXES if QUICK else AXES
    points: list[Found] = [{"axis": axis, "value": value} for axis, values in axes.items() for value in values]
    work = {number: settings({**BASE, point["axis"]: point["value"]}) for number, point in enumerate(points)}
    found["points"] = points
    said = run(_steps(backend, "kvq", "cifar10", 3, list(work.values())), until).told()
    for point, line in zip(points, said.splitlines(), strict=False):
        point |= json.loads(line)
    alone: Found = {}
    jobs = {
        str(number): (backend, "kvq", "cifar10", 3, work[number]) for number, one in enumerate(points) if "peak_mib" not in one
    }
    try:
        _each_alone(alone, jobs, until)
    finally:
        for number, one in alone.items():
            points[int(number)] |= {name: value for name, value in one.items() if name != "step"}
    if any("step" not in point for point in points):
        raise StageError("Not every point has a time.")


def quantizers(found: Found, until: float) -> None:
    """With latents all over the place, and with all of them at one code, where adding up their gradients can be slow."""
    able = [f"kvq {name}" for name in backends.installed()]
    if importlib.util.find_spec("torch"):
        able.append("torch.cdist")
        if "PyTorch with vector-quantize-pytorch" not in missing():
            able.append("vector-quantize-pytorch")
    command = [sys.executable, str(HERE / "quantizers.py"), "--json", "--rounds", "1"]
    command += [word for one in able for word in ("--contender", one)]
    found["cells"] = json.loads(run([*command, "--codes", *(["512"] if QUICK else ["8192", "65536"])], until).checked())
    found["collapsed"] = json.loads(run([*command, "--codes", "512", "--collapsed"], until).checked())
    if not all(cell["rounds"] for cell in found["cells"] + found["collapsed"]):
        raise StageError("Not every cell has a time.")


def train_for(found: Found, until: float, config: str, seconds: float, folder: Path) -> None:
    """`kvq train` for about so many seconds of steps, but not for more than the configuration's own, and `kvq evaluate`."""
    data = _data(config)
    backend = os.environ.get("KERAS_BACKEND") or backends.default()
    probe = json.loads(
        run(_steps(backend, "kvq", config, 3, [["codebook.replace_dead_every=0"]]), until).checked().splitlines()[-1]
    )
    if "error" in probe:
        raise StageError(probe["error"])
    # The images have to be read as well, and records to be written.
    steps = 6 if QUICK else max(int(seconds / (1.3 * probe["step"])) // 400 * 400, 400)
    steps = min(steps, load_config(config).train.steps)
    found |= {"backend": backend, "probe_step": probe["step"], "steps": steps}
    out = folder / config
    # A validation and pictures at the end, and a few in between.
    often = [f"train.{name}={max(steps // 4, 1)}" for name in ("validate_every", "sample_every")] + [
        f"train.log_every={max(steps // 20, 1)}"
    ]
    often += ["data.validation_images=32"] if QUICK else []
    command = [sys.executable, "-m", "kvq_cli", "train", config, "--backend", backend, "--out", str(out), "--steps", str(steps)]
    command += [*data, *(word for one in often for word in ("--set", one)), "--json"]
    started = time.monotonic()
    try:
        # A run that is told to stop keeps what it has; what is left of the time is for that and for the evaluation.
        ended = run(command, until - min(30.0, 0.3 * (until - started)), stop=signal.SIGINT)
    finally:
        found["train_seconds"] = time.monotonic() - started
        if (out / "run.json").exists():
            found["run"] = json.loads((out / "run.json").read_text("utf-8"))
        if (out / "metrics.jsonl").exists():
            found["metrics"] = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    if not (out / "model").exists():
        raise StageError(ended.error or "there is no model")
    command = [sys.executable, "-m", "kvq_cli", "evaluate", str(out), "--backend", backend, "--json"]
    found["evaluation"] = json.loads(run(command, until).checked())


def _data(config: str) -> list[str]:
    """Where the images of a configuration are, as options; Skipped, with the reason, where they are not."""
    root = Path(os.environ.get("KVQ_DATA") or "nowhere")
    if config == "cifar10":
        if not (root / "cifar10").exists():
            raise Skipped("$KVQ_DATA has no folder cifar10")
        return ["--data", str(root / "cifar10")]
    places = (
        [Path(os.environ["KVQ_PHOTOGRAPHS"])]
        if os.environ.get("KVQ_PHOTOGRAPHS")
        else [root / "mscoco", root / "imagenet_sample"]
    )
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise Skipped("neither $KVQ_PHOTOGRAPHS nor $KVQ_DATA/mscoco is there")
    return ["--data", str(found)]


def _steps(backend: str, side: str, config: str, channels: int, points: list[list[str]]) -> list[str]:
    command = [sys.executable, str(HERE / "device_steps.py"), "--backend", backend, "--side", side, "--config", config]
    command += ["--channels", str(channels), "--steps", "2" if QUICK else "20"]
    return command + [word for point in points for word in ("--point", json.dumps(point))]


def _each_alone(found: Found, jobs: dict[str, tuple[str, str, str, int, list[str]]], until: float) -> None:
    """A process of `device_steps.py` for each job; its memory, or `error`."""

    def one(job: tuple[str, str, str, int, list[str]]) -> Found:
        *what, overrides = job
        try:
            result = json.loads(run(_steps(*what, [overrides]), until).checked().splitlines()[-1])
        except StageError as error:
            return {"error": str(error)}
        result.pop("step", None)  # others ran at the same time
        return result

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for name, result in zip(jobs, pool.map(one, jobs.values()), strict=True):
            found[name] = result
    wrong = [f"{name}: {result['error']}" for name, result in found.items() if "error" in result]
    if wrong:
        raise StageError("; ".join(wrong))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
