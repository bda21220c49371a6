"""Exports: a tokenizer's encoder, decoder and autoencoder as files for other runtimes, each run and compared before it counts.

`EXPORTERS` has an entry for each format: how to write a file, and how to run one in the format's own runtime.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvq import artifact, backends
from kvq.errors import BackendError, ExportError, KvqError
from kvq.exporters import keras_file, onnx
from kvq.exporters.check import compare, sample_images
from kvq.exporters.parts import PARTS, Exporter, build_parts

EXPORTERS: dict[str, Exporter] = {"onnx": onnx.EXPORTER, "keras": keras_file.EXPORTER}


def export(path: str | Path, format: str, out: str | Path, parts: list[str] | None = None) -> dict[str, Any]:
    """Writes parts of a saved tokenizer for another runtime, and runs each there against the Keras model.

    Args:
        path: Run folder or model folder, trained on any backend.
        format: A key of `EXPORTERS`.
        out: Folder for `encoder`, `decoder` and `autoencoder` with the format's extension.
        parts: Which of them. Default: all.

    Inputs and outputs are `images` (uint8 (n, h, w, c)), `indices` (int32 (n, h', w')) and `reconstruction` (uint8
    (n, h, w, c)); n is free. A file appears under its name only after it agreed with the model.

    Returns:
        `format`, `backend` (that wrote it) and `parts`: name to `file`, `bytes` and what the comparison found.

    Raises:
        KvqError: If a name is unknown, the model is broken, a package is missing, or a file does not agree with the model.
    """
    if format not in EXPORTERS:
        raise KvqError(f"`format` must be one of {', '.join(EXPORTERS)}. Received: {format}.")
    unknown = [part for part in parts or [] if part not in PARTS]
    if unknown:
        raise KvqError(f"Parts must be of {', '.join(PARTS)}. Received: {unknown[0]}.")
    wanted, exporter, out = parts or list(PARTS), EXPORTERS[format], Path(out)
    # Before anything is written, and before a backend has to be able.
    artifact.check(artifact.model_folder(path))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KvqError(f"{out} cannot be written: {error.strerror}. Give another --out.") from None
    backend = _able_backend(format, exporter)
    if backend != _current_backend():
        return _in_process_of(backend, path, format, out, wanted)

    from kvq.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    images, origin = sample_images(tokenizer, path)
    report: dict[str, Any] = {"format": format, "backend": backend, "compared_on": origin, "parts": {}}
    for name, part in build_parts(tokenizer).items():
        if name not in wanted:
            continue
        file = out / f"{name}.{exporter.extension}"
        with tempfile.TemporaryDirectory(dir=out, prefix=".") as folder:
            written = Path(folder) / file.name
            try:
                exporter.write(part, written)
            except KvqError:
                raise
            except Exception as error:
                raise ExportError(f"{format} could not be written on {backend}: {type(error).__name__}: {error}") from error
            compared = compare(tokenizer, part, images, functools.partial(exporter.run, written))
            os.replace(written, file)
        report["parts"][name] = {"file": str(file), "bytes": file.stat().st_size, **compared}
    return report


def _current_backend() -> str:
    import keras

    return keras.backend.backend()


def _able_backend(format: str, exporter: Exporter) -> str:
    """The backend to write with: the current one if it can, else another that is installed and can."""
    current = _current_backend()
    for name in [current, *(name for name in backends.installed() if name != current)]:
        if all(importlib.util.find_spec(package) for package in exporter.packages(name)):
            return name
    missing = [package for package in exporter.packages(current) if not importlib.util.find_spec(package)]
    raise BackendError(f'Export to {format} needs {", ".join(missing)}: pip install "kvq[{format}]".')


def _in_process_of(backend: str, path: str | Path, format: str, out: Path, parts: list[str]) -> dict[str, Any]:
    """The same call in a process of another backend: one process has one."""
    program = (
        "import json, sys\n"
        "from kvq.errors import KvqError\n"
        "from kvq.exporters import export\n"
        "path, format, out, parts = json.loads(sys.argv[1])\n"
        "try:\n    print('\\n' + json.dumps(export(path, format, out, parts)))\n"
        "except KvqError as error:\n    print('\\n' + json.dumps({'error': str(error), 'exit_code': error.exit_code}))\n"
    )
    arguments = json.dumps([str(path), format, str(out), parts])
    done = subprocess.run(
        [sys.executable, "-c", program, arguments],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ExportError(f"{format} could not be written in a process of {backend}:\n{done.stderr[-2000:]}")
    report = json.loads(done.stdout.strip().splitlines()[-1])
    if "error" in report:
        error = ExportError(report["error"])
        error.exit_code = report["exit_code"]
        raise error
    return report
