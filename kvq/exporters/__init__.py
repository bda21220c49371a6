"""Exports: a tokenizer's encoder, decoder and autoencoder as files for other runtimes, each run and compared before it counts.

`EXPORTERS` has an entry for each format: how to write a file, and how to run one in the format's own runtime.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvq import __version__, artifact, backends
from kvq.atomic import holds_files, write_text
from kvq.errors import ExportError, KvqError
from kvq.exporters import keras_file, litert, onnx, openvino, saved_model, stablehlo, torch_program, web
from kvq.exporters.check import compare, make_samples
from kvq.exporters.example import example
from kvq.exporters.parts import PARTS, Exporter, Loaded, Part, build_parts, quiet
from kvq.exporters.samples import sample_images
from kvq.exporters.writers import choose_backend, current_backend, in_process_of

EXPORTERS: dict[str, Exporter] = {
    "onnx": onnx.EXPORTER,
    "saved_model": saved_model.EXPORTER,
    "litert": litert.EXPORTER,
    "openvino": openvino.EXPORTER,
    "torch": torch_program.EXPORTER,
    "stablehlo": stablehlo.EXPORTER,
    "keras": keras_file.EXPORTER,
    "web": web.EXPORTER,
}
REPORT = "report.json"


def export(
    path: str | Path,
    format: str,
    out: str | Path,
    parts: list[str] | None = None,
    backend: str | None = None,
    runtime: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Writes parts of a saved tokenizer for another runtime, and runs each there against the Keras model.

    Args:
        path: Run folder or model folder, trained on any backend.
        format: A key of `EXPORTERS`.
        out: Folder for `encoder`, `decoder` and `autoencoder` with the format's extension, `report.json` and `example.py`: new,
            empty, or of an earlier export to this format.
        parts: Which of them. Default: all. The format `web` is a whole, of a page and what it needs, and leaves no choice.
        backend: To write with, where the format leaves a choice. Default: what suits the format best of what is installed.
        runtime: The file with the runtime that goes into the folder, of the format `web` alone. Default: fetched once.
        say: Told what takes long, and when another process does the work.

    Inputs and outputs are `images` (uint8 (n, h, w, c)), `indices` (int32 (n, h', w')) and `reconstruction` (uint8
    (n, h, w, c)); n is free, and h and w where `image_size` of the report says so. A file appears under its name only after it
    agreed with the model.

    Returns:
        What `report.json` says: `format`, `backend` (that wrote it), `compared_on`, `image_size` and more; `parts`, name to
        `file`, `bytes`, `inputs`, `outputs`, facts of the runtime, and what the comparison found.

    Raises:
        KvqError: If a name is unknown, the model is broken, a package is missing, or a file does not agree with the model; the
            report then says of the part what was wrong.
    """
    if format not in EXPORTERS:
        by_ending = [name for name, exporter in EXPORTERS.items() if exporter.extension == format.lstrip(".")]
        hint = f" {by_ending[0]} writes .{format.lstrip('.')}." if by_ending else ""
        raise KvqError(f"`format` must be one of {', '.join(EXPORTERS)}. Received: {format}.{hint}")
    unknown = [part for part in parts or [] if part not in PARTS]
    if unknown:
        raise KvqError(f"Parts must be of {', '.join(PARTS)}. Received: {unknown[0]}.")
    exporter, out = EXPORTERS[format], Path(out)
    bundle = exporter.bundle
    if bundle and parts and {*parts} != {*bundle.parts}:
        raise KvqError(f"{format} is a whole of {' and '.join(bundle.parts)}: leave out --part. Received: {', '.join(parts)}.")
    if runtime and not bundle:
        raise KvqError(f"Only {' and '.join(_bundles())} takes a runtime along. Received: --runtime with {format}.")
    wanted = list(bundle.parts) if bundle else parts or list(PARTS)
    # Before anything is written, and before a backend has to be able.
    config = artifact.check(artifact.model_folder(path))
    writer = choose_backend(format, exporter, backend)
    archive = None
    if bundle:
        bundle.check(config)
        archive = bundle.runtime(Path(runtime) if runtime else None, say)
    with _writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
    earlier = _earlier_report(out, format)
    if not earlier and holds_files(out):
        raise KvqError(f"{out} holds files, and no {REPORT} of an export. Give another --out, a new folder.")
    of_this_model = bool(earlier) and earlier.get("weights_sha256") == config.weights_sha256
    others = [] if of_this_model else [name for name in earlier.get("parts", {}) if name not in wanted]
    if others:
        raise KvqError(f"{out} holds {' and '.join(others)} of another model. Give another --out, or leave out --part.")
    # On a GPU's device some files would keep its name, and products are rounded.
    if writer != current_backend() or backends.gpu_found():
        say(f"{format} is written on {writer}, in a process of its own")
        return in_process_of(writer, path, format, out, wanted, archive)

    from kvq.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    images, origin = sample_images(path, config)
    free, step, side = writer not in exporter.fixed_size, tokenizer.downsampling, config.images.crop
    report: dict[str, Any] = {
        "format": format,
        "backend": writer,
        "kvq_version": __version__,
        "weights_sha256": config.weights_sha256,
        "compared_on": origin,
        "image_size": f"free, multiples of {step}" if free else f"{side}x{side}",
        "parts": {},
    }
    with _writing_to(out):
        if of_this_model:
            report["parts"] = {name: entry for name, entry in earlier["parts"].items() if name not in wanted}
        else:
            for name in wanted:
                _remove(out / f"{name}.{exporter.extension}")
        with quiet():
            samples = make_samples(tokenizer, images, free)
        if bundle:
            _remove(out / bundle.entry)
        _write_report(out, report)
        write_text(out / "example.py", example(exporter, config))
        for name, part in build_parts(tokenizer).items():
            if name not in wanted:
                continue
            file = out / f"{name}.{exporter.extension}"
            entry: dict[str, Any] = {"file": None}
            report["parts"][name] = entry
            try:
                with tempfile.TemporaryDirectory(dir=out, prefix=".") as folder, quiet():
                    written = Path(folder) / file.name
                    loaded = _write_and_load(format, exporter, part, written)
                    entry |= {"bytes": _bytes(Path(folder)), "inputs": loaded.inputs, "outputs": loaded.outputs, **loaded.facts}
                    entry |= compare(part, samples, loaded.run)
                    del loaded
                    for made in Path(folder).iterdir():
                        _move(made, out / made.name)
                entry["file"] = str(file)
            except (ExportError, OSError) as error:
                entry["error"] = str(error)
                # Nor may one of an earlier export stand for it.
                _remove(file)
                raise
            finally:
                _write_report(out, report)
        if bundle and archive:
            report |= bundle.write(out, tokenizer, archive, free)
            _write_report(out, report)
    return report


@contextlib.contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    """Tells of a folder that cannot be written, as on a full disk."""
    try:
        yield
    except OSError as error:
        raise KvqError(f"{out} cannot be written: {error.strerror or error}. Give another --out.") from None


def _bundles() -> list[str]:
    return [format for format, exporter in EXPORTERS.items() if exporter.bundle]


def _write_and_load(format: str, exporter: Exporter, part: Part, path: Path) -> Loaded:
    name = part.model.name.replace("_", " ")
    try:
        exporter.write(part, path)
    except OSError:
        raise  # no other backend has a larger disk
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        message = f"The {name} could not be written to {format} on {current_backend()}: {type(error).__name__}: {reason}."
        others = [other for other in sorted(exporter.backends or backends.BACKENDS) if other != current_backend()]
        way_out = f" Another backend may do it, where it is installed: --backend {' or '.join(others)}." if others else ""
        raise ExportError(message + way_out) from error
    try:
        return exporter.load(path)
    except Exception as error:
        message = f"The runtime of {format} refuses the {name} that {current_backend()} wrote: {type(error).__name__}: "
        raise ExportError(message + str(error).strip()) from error


def _write_report(out: Path, report: dict[str, Any]) -> None:
    write_text(out / REPORT, json.dumps(report, indent=2) + "\n")


def _earlier_report(out: Path, format: str) -> dict[str, Any]:
    """What an earlier export to the same folder reported."""
    try:
        report = json.loads((out / REPORT).read_text("utf-8"))
        earlier = report["format"]
        report["parts"].items()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise KvqError(f"{out / REPORT} is not a report of kvq. Give another --out.") from None
    if earlier != format:
        raise KvqError(f"{out} holds an export to {earlier}. Give another --out: each format has a folder of its own.")
    return report


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _move(source: Path, target: Path) -> None:
    # A folder cannot be renamed onto one that is not empty.
    _remove(target)
    os.replace(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
