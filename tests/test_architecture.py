"""The house rules that a machine can check: who may import whom, who knows the backends, how long a file may get."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each part of kvq imports of the others, be it inside a function: no more, and no less. A part is a module or a sub-package.
# A new part needs a line here; one that needs more than its line says probably lies on the wrong floor.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "atomic": set(),
    "untrusted": set(),
    "weights_file": {"errors", "untrusted"},
    "ops": {"backends"},
    "winograd": {"ops"},
    "convolutions": {"ops", "backends", "winograd"},
    "layers": {"ops", "convolutions"},
    "random_weights": {"ops"},
    "networks": {"layers", "random_weights"},
    "progress": set(),
    "signals": set(),
    "quantizers": {"ops", "random_weights"},
    "metrics": {"ops"},
    "backends": {"errors"},
    "quantizer_sections": set(),
    "quantizer_config": {"quantizer_sections"},
    "validation": {"errors"},
    "config": {"errors", "untrusted", "validation", "quantizer_sections", "quantizer_config"},
    "network_shapes": {"config"},
    "download": {"errors"},
    "data": {"atomic", "errors", "untrusted", "download"},
    "timing": {"errors", "backends", "config", "data", "progress", "training"},
    "diagnosis": {"errors", "backends", "data"},
    "model": {"ops", "metrics"},
    "optimizer": {"ops"},
    "build": {"config", "networks", "quantizers", "model", "optimizer"},
    "run": {"atomic", "errors", "untrusted", "config"},
    "pages": set(),
    "run_report": {"atomic", "errors", "untrusted", "config", "run", "pages"},
    "tensorboard": {"errors", "progress", "run"},
    "tensor_names": {"layers", "model"},
    "artifact": {
        *("atomic", "errors", "untrusted", "validation", "weights_file", "config", "network_shapes"),
        *("tensor_names", "model", "build"),
    },
    "checkpoint": {"atomic", "errors", "untrusted", "run", "artifact"},
    "plots": {"progress"},
    "tokenizer": {"backends", "artifact", "model"},
    "tokens": {
        "atomic",
        "errors",
        "untrusted",
        "backends",
        "progress",
        "data",
        "artifact",
        "index_map",
        "tokenizer",
        "evaluation",
    },
    "index_map": {"errors", "untrusted", "quantizer_sections"},
    "code_atlas": set(),
    "codebook_use": {"atomic", "errors", "ops", "progress", "tokenizer", "evaluation", "code_atlas"},
    "findings": {"codebook_use"},
    "health": {"errors", "evaluation", "findings", "ops", "progress", "quantizers", "tokenizer", "codebook_use"},
    "pruning": {
        *("atomic", "errors", "progress", "artifact", "tensor_names", "index_map", "model", "build", "quantizers"),
        *("tokenizer", "codebook_use", "evaluation"),
    },
    "evaluation": {"errors", "ops", "metrics", "progress", "quantizers", "data", "run", "artifact", "model", "tokenizer"},
    "reconstruction": {"errors", "data", "tokenizer"},
    "codebook_callbacks": {"ops", "data"},
    "bad_files": {"errors", "data", "run"},
    "inputs": {"errors", "data"},
    "run_images": {"atomic", "errors", "config", "data", "run"},
    "nonfinite": {"atomic", "errors", "data", "run"},
    "between_steps": {"errors"},
    "callbacks": {"atomic", "ops", "progress", "data", "run", "checkpoint", "plots", "evaluation", "optimizer"},
    "resuming": {"errors", "config", "validation", "run", "checkpoint"},
    "training": {
        *("errors", "backends", "progress", "signals", "config", "data", "model", "build", "quantizers", "run", "tensorboard"),
        *("artifact", "checkpoint", "codebook_callbacks", "callbacks", "bad_files", "inputs", "run_images", "nonfinite"),
        *("between_steps", "optimizer", "resuming"),
    },
    "exporters": {
        *("atomic", "errors", "ops", "backends", "download", "data"),
        *("artifact", "quantizers", "model", "tokenizer", "evaluation", "pages"),
    },
}
# These may name a backend: inside a function, or in a file that nobody imports outside of one. Whoever imports kvq must not
# import a backend by that.
KNOW_BACKENDS = {"backends", "exporters"}
BACKENDS = {"jax", "tensorflow", "torch"}
# Of the command line alone.
NOT_FOR_THE_LIBRARY = {"typer", "rich", "kvq_cli", "nox", "pytest"}
LONGEST_FILE = 300
# Names of the literature that say less than ours: latents, codes, codebook_size.
FORBIDDEN_PARAMETERS = {"z", "z_e", "z_q", "num_embeddings"}
FORBIDDEN_FILES = {"helper", "helpers", "util", "utils", "manager", "common", "misc"}

LIBRARY = sorted((ROOT / "kvq").rglob("*.py"))
COMMANDS = sorted((ROOT / "cli").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "kvq").parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """The full names of what is imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: the library imports by full names, so that this test can follow."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_at_once(tree: ast.AST) -> set[str]:
    """What is imported outside of all functions, and the modules that hold it."""
    inside = {node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    outside = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and node not in inside]
    names = {name for node in outside for name in imports(node)}
    return names | {name.rpartition(".")[0] for name in names}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def identify(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def parts_used(paths: list[Path]) -> set[str]:
    return {name.split(".")[1] for path in paths for name in imports(parse(path)) if name.startswith("kvq.")} - {"__version__"}


WRITTEN_FOR_A_BACKEND = {
    module_of(path) for path in LIBRARY if {name.split(".")[0] for name in imports_at_once(parse(path))} & BACKENDS
}


def test_each_part_has_its_line() -> None:
    parts = {part_of(path) for path in LIBRARY} - {"__init__"}
    assert parts == set(MAY_IMPORT), "MAY_IMPORT must list exactly the parts of kvq."


def test_arrows_point_one_way() -> None:
    # Fails on a circle.
    graphlib.TopologicalSorter(MAY_IMPORT).prepare()


@pytest.mark.parametrize("path", LIBRARY, ids=identify)
def test_imports_follow_the_arrows(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return  # tests/test_packaging.py checks that it imports nothing until asked
    assert parts_used([path]) - {part} <= MAY_IMPORT[part]


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_each_arrow_is_used(part: str) -> None:
    used = parts_used([path for path in LIBRARY if part_of(path) == part])
    assert not MAY_IMPORT[part] - used, "A permission that nobody needs lets in what nobody looked at: take it from MAY_IMPORT."


@pytest.mark.parametrize("path", LIBRARY, ids=identify)
def test_the_library_knows_no_backend_and_no_command_line(path: Path) -> None:
    tree = parse(path)
    roots = {name.split(".")[0] for name in imports(tree)}
    assert not roots & NOT_FOR_THE_LIBRARY
    if part_of(path) not in KNOW_BACKENDS:
        assert not roots & BACKENDS
    assert not imports_at_once(tree) & WRITTEN_FOR_A_BACKEND


@pytest.mark.parametrize("path", [*LIBRARY, *COMMANDS, *BENCHMARKS], ids=identify)
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE, "It is asking to be two files."
    assert ast.get_docstring(ast.parse(text)), "A file opens with what it is."
    assert path.stem not in FORBIDDEN_FILES, "The name says nothing about what is inside."


@pytest.mark.parametrize("path", [*LIBRARY, *COMMANDS], ids=identify)
def test_parameters_have_the_names_of_this_project(path: Path) -> None:
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    for function in functions:
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        assert not {argument.arg for argument in arguments} & FORBIDDEN_PARAMETERS
