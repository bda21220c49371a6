"""`doctor`: what this installation has, what it would use, and what is wrong with it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvq import __version__, backends
from kvq.errors import BackendError, installing

WITH_CUDA = {"jax": "jax-cuda", "tensorflow": "tensorflow-cuda"}  # extras
OLDEST_KERAS = (3, 15)
# Importing TensorFlow takes up to a minute on a machine that is busy or reads from a network disk.
PROBE_SECONDS = 120
PROBE = """
import json, sys
from kvq import backends
name = sys.argv[1]
print(json.dumps({"devices": backends.devices(name), "threads": backends.threads(name), "tf32": backends.tf32(name)}))
"""


def doctor() -> dict[str, Any]:
    """Describe the installation.

    Returns:
        Dict: versions; `backends`, by name with `version`, `devices`, `threads` and `tf32` (null without a GPU), or `error`;
        `default`, the backend used where none is named; `gpu_found`; `cpus`; `memory_gb`; `data`, the named data sets with the
        folder where each was found, or null; `problems`, sentences, none where all is well.
    """
    found = {name: {"version": version, **probe(name)} for name, version in backends.versions().items()}
    try:
        default = backends.default()
    except BackendError:
        default = None
    return {
        "kvq": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in ("keras", "numpy", "grain")},
        "backends": found,
        "default": default,
        "gpu_found": backends.gpu_found(),
        "cpus": backends.cpus(),
        "memory_gb": _memory_gb(),
        "data": data_sets(),
        "problems": list(problems(found)),
    }


def probe(name: str) -> dict[str, Any]:
    """Ask a backend about its devices, in a process of its own: three backends in one process get in each other's way."""
    environment = backends.process_environment(name)
    command = [sys.executable, "-P", "-c", PROBE, name]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PROBE_SECONDS} seconds"}
    if answer.returncode != 0:
        return {"error": (answer.stderr.strip().splitlines() or [f"ended with status {answer.returncode}"])[-1]}
    facts = json.loads(answer.stdout.splitlines()[-1])
    if facts["devices"] == ["cpu"]:
        facts["tf32"] = None
    return facts


def problems(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What should be mended, each with the way to do it.

    Args:
        found: The installed backends, as `doctor` returns them.
    """
    if not found:
        yield backends.NONE_INSTALLED
    for name, facts in found.items():
        if "error" in facts:
            yield f"{name} is installed and cannot be used: {facts['error']}"
        elif backends.gpu_found() and facts["devices"] == ["cpu"]:
            way_out = f" Install its GPU version with: {installing(WITH_CUDA[name])}" if name in WITH_CUDA else ""
            yield f"{name} sees no GPU, although this machine has one.{way_out}"
        if len(backends.distributions(name)) > 1:
            both = " and ".join(backends.distributions(name))
            yield f"{both} are installed and overwrite each other's files. Uninstall both, then install one."
    keras = _version("keras")
    if keras is not None and tuple(int(part) for part in keras.split(".")[:2]) < OLDEST_KERAS:
        yield f"Keras {keras} is too old. Install {'.'.join(map(str, OLDEST_KERAS))} or later with: {installing()}"
    yield from _unmet_requirements([d for name in found for d in backends.distributions(name)])


def data_sets() -> dict[str, str | None]:
    """The named data sets, each with the folder or file where it is, or None. Downloads nothing."""
    from kvq.data.places import KNOWN, find

    return {name: str(place) if (place := find(name)) else None for name in KNOWN}


def _unmet_requirements(distributions: list[str]) -> Iterator[str]:
    """Packages that are missing or of the wrong version, among all that kvq and the backends need."""
    from packaging.requirements import Requirement

    waiting, seen = ["kvq", *distributions], set()
    while waiting:
        name = waiting.pop()
        if name in seen or _version(name) is None:
            continue
        seen.add(name)
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            version = _version(requirement.name)
            if version is None:
                yield f"{name} needs {requirement.name}{requirement.specifier}, which is not installed."
            elif not requirement.specifier.contains(version, prereleases=True):
                yield f"{name} needs {requirement.name}{requirement.specifier}. Installed: {requirement.name} {version}."
            else:
                waiting.append(requirement.name)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gb() -> float | None:
    """The memory that this process may use, in 10^9 bytes; None where the system does not say."""
    if not hasattr(os, "sysconf"):
        return None
    bytes_ = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        bytes_ = min(bytes_, int(text))
    return round(bytes_ / 1e9, 1)
