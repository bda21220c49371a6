"""Which backend writes a format, and how another than the running one does: in a process of its own."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvq import backends
from kvq.errors import BackendError, ExportError, installing
from kvq.exporters.parts import Exporter

# Which extra brings a package, where it has not the package's name.
_EXTRAS = {"onnxruntime": "onnx", "tf2onnx": "onnx", "jax2onnx": "onnx", "ai_edge_litert": "litert"}
_PROGRAM = """\
import json, sys
from kvq.errors import KvqError
from kvq.exporters import export
try:
    answer = export(*json.loads(sys.argv[1]))
except KvqError as error:
    answer = {'error': str(error), 'exit_code': error.exit_code}
print('\\n' + json.dumps(answer))
"""


def current_backend() -> str:
    """The backend of this process."""
    import keras

    return keras.backend.backend()


def choose_backend(format: str, exporter: Exporter, wish: str | None) -> str:
    """The backend to write with: the one wished for if it can, else the best one that is installed and can.

    Raises:
        BackendError: If none can. It names what to install.
    """
    current = current_backend()
    if wish:
        backends.check_name(wish)
    able = exporter.backends or (current, *backends.BACKENDS)
    candidates = sorted(able, key=lambda name: name != wish)
    installed = [name for name in candidates if name in (current, *backends.installed())]
    for name in installed:
        if not _missing(exporter, name):
            return name
    name = installed[0] if installed else candidates[0]
    needed = [*([] if installed else [name]), *_missing(exporter, name)]
    extras = dict.fromkeys(_EXTRAS.get(package, package) for package in needed)
    raise BackendError(f"Export to {format} needs {' and '.join(needed)}: {installing(*extras)}.")


def ready(exporters: dict[str, Exporter]) -> str:
    """The first format that this process' own backend can write and check with what is installed."""
    current = current_backend()
    able = (name for name, one in exporters.items() if current in (one.backends or (current,)) and not _missing(one, current))
    return next(able)


def _missing(exporter: Exporter, backend: str) -> list[str]:
    return [package for package in exporter.packages(backend) if not importlib.util.find_spec(package)]


def in_process_of(
    backend: str, path: str | Path, format: str, out: Path, parts: list[str], runtime: Path | None
) -> dict[str, Any]:
    """`export` in a process of another backend, without GPUs: one process has one."""
    arguments = [str(path), format, str(out), parts, backend, str(runtime) if runtime else None]
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PROGRAM, json.dumps(arguments)],
        env={**backends.process_environment(backend), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ExportError(f"{format} could not be written in a process of {backend}:\n{done.stderr[-2000:]}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    if "error" in answer:
        error = ExportError(answer["error"])
        error.exit_code = answer["exit_code"]
        raise error
    return answer
