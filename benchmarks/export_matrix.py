"""What exports, and what does not: the tables of docs/export.md, each cell a real export that was run and compared.

    python benchmarks/export_matrix.py --out runs/export_matrix

Needs the extras jax, tensorflow, torch and export together; `nox -s export` brings them. Every kind of quantizer is trained for a
few steps on the shipped images and exported to ONNX; one kind is trained on each backend and exported to every format, from a
process of the backend that trained. A row that is written in `--out` is not made again.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- begin of the matrix -->\n", "<!-- end of the matrix -->\n"
STEPS = 20
BACKENDS = ("jax", "tensorflow", "torch")
FORMATS = ("onnx", "saved_model", "litert", "openvino", "torch", "stablehlo", "keras", "web")
EMA16 = {"kind": "ema_vector", "codebook_size": 16}
# Every kind once, 256 codes a position or near it.
QUANTIZERS: dict[str, dict[str, Any]] = {
    **{kind: {"codebook_size": 256} for kind in ("vector", "ema_vector", "cosine_vector", "ema_cosine_vector", "sim_vector")},
    **{kind: {"codebook_size": 256} for kind in ("index_backprop", "gumbel")},
    "finite_scalar": {"levels": [5, 5, 4, 4]},
    "symmetric_finite_scalar": {"levels": [4, 4, 4, 4]},
    "lookup_free": {"bits": 4},
    "binary_spherical": {"bits": 4},
    "residual": {"levels": 2, "base": EMA16},
    "shared_residual": {"levels": 2, "base": EMA16},
    "product": {"groups": 2, "base": EMA16},
    "projected": {"code_dim": 3, "base": {"kind": "finite_scalar", "levels": [8, 8, 4]}},
}


def trained(quantizer: dict[str, Any], run: Path) -> Path:
    """A run of a few steps, unless it is there. In this process."""
    if not (run / "model").exists():
        from kvq import RunConfig, load_config, train

        settings = [f"train.steps={STEPS}", "model.latent_dim=4", "data.validation_images=16"]
        values = {**load_config("fashion_mnist_mini", settings).model_dump(), "quantizer": quantizer}
        train(RunConfig.model_validate(values), out=run, overwrite=True)
    return run


def exported(path: Path, run: Path, format: str, parts: list[str] | None = None) -> dict[str, Any]:
    """The report of an export, or of one that failed with what it said, made once. From this process."""
    if not path.exists():
        from kvq import export
        from kvq.errors import ExportError

        folder = path.with_suffix("")
        try:
            export(run, format, folder, parts)
        except ExportError:
            # One that fails is the last of its call.
            for part in parts or ["encoder", "decoder", "autoencoder"]:
                with contextlib.suppress(ExportError):
                    export(run, format, folder, [part])
        # Without one, nothing was tried: a package is missing, and no table should say something of the format.
        path.write_text((folder / "report.json").read_text("utf-8"), "utf-8")
        report = json.loads(path.read_text("utf-8"))
        print(path.stem, *(f"{name}: {said(entry)}" for name, entry in report["parts"].items()), sep="  ", flush=True)
    return json.loads(path.read_text("utf-8"))


def every_format(backend: str, out: Path) -> None:
    """A row of each format, for a model trained on `backend`, which this process runs."""
    run = trained({"kind": "ema_vector", "codebook_size": 64}, out / f"trained-{backend}")
    for format in FORMATS:
        exported(out / f"{format}-{backend}.json", run, format)


def every_quantizer(out: Path) -> None:
    """A row of each kind."""
    for kind, keys in QUANTIZERS.items():
        run = trained({"kind": kind, **keys}, out / f"trained-{kind}")
        exported(out / f"onnx-of-{kind}.json", run, "onnx", ["encoder", "decoder"])


def said(entry: dict[str, Any] | None) -> str:
    """A cell in words."""
    if entry is None:
        return "not tried"
    if "error" in entry:
        return entry["error"].splitlines()[0].replace("|", "\\|")
    if "different_indices" in entry:
        return f"runs; other indices: {entry['different_indices']}, near-ties: {entry['near_ties']}"
    return f"runs; grey levels: {entry['largest_difference']}"


def tables(kinds: dict[str, Any], formats: dict[tuple[str, str], Any]) -> str:
    """Both of them, in Markdown."""
    first = next(iter(kinds.values()))
    lines = [
        f"Compared on {first['compared_on']}, at their size and, where it is free, at a larger one that is not square. Models",
        f"trained for {STEPS} steps. Cells say how many indices are others than the tokenizer's, how many positions rounding may",
        "decide, and by how many grey levels pixels differ at most.",
        "",
        f"Every quantizer to ONNX, trained and written on {first['backend']}, opset {first['parts']['encoder']['opset']}:",
        "",
        "| quantizer | encoder | decoder |",
        "|---|---|---|",
    ]
    for kind, report in kinds.items():
        lines.append(f"| `{kind}` | {said(report['parts'].get('encoder'))} | {said(report['parts'].get('decoder'))} |")
    lines += [
        "",
        "`ema_vector` to every format, from each backend that trained, in a process of that backend:",
        "",
        "| format | trained on | written on | image size | encoder | decoder | autoencoder |",
        "|---|---|---|---|---|---|---|",
    ]
    for (format, backend), report in formats.items():
        parts = [report["parts"].get(name) for name in ("encoder", "decoder", "autoencoder")]
        words = [f"`{format}`", backend, report["backend"], report["image_size"], *map(said, parts)]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/export_matrix"))
    parser.add_argument("--rows", choices=["formats", "quantizers"], help="only make these, in a process of KERAS_BACKEND")
    parser.add_argument("--write", action="store_true", help="only write the page, of the rows that are there")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.rows == "formats":
        return every_format(os.environ["KERAS_BACKEND"], out)
    if arguments.rows == "quantizers":
        return every_quantizer(out)
    if not arguments.write:
        make_rows(out)
    write(out)


def make_rows(out: Path) -> None:
    """All rows that are not there, each group in a process of its backend."""
    for rows, backend in [*(("formats", backend) for backend in BACKENDS), ("quantizers", "torch")]:
        command = [sys.executable, __file__, "--out", str(out), "--rows", rows]
        subprocess.run(command, env={**os.environ, "KERAS_BACKEND": backend}, check=True)


def write(out: Path) -> None:
    """The rows that are there, into the page."""
    read = {path.stem: json.loads(path.read_text("utf-8")) for path in out.glob("*.json")}
    kinds = {kind: read[name] for kind in QUANTIZERS if (name := f"onnx-of-{kind}") in read}
    pairs = [(format, backend) for format in FORMATS for backend in BACKENDS]
    formats = {pair: read["-".join(pair)] for pair in pairs if "-".join(pair) in read}
    if missing := len(QUANTIZERS) + len(pairs) - len(kinds) - len(formats):
        print(f"{missing} rows are not made yet and left out of the page.", file=sys.stderr)
    page = DOCS / "export.md"
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    page.write_text(before + BEGIN + "\n" + tables(kinds, formats) + "\n" + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()
