"""`nox` checks everything: lint, types, and the tests once per backend, each where no other backend is installed."""

import shutil
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_missing_interpreters = True

BACKENDS = ["jax", "tensorflow", "torch"]


def install(session: nox.Session, *packages: str) -> None:
    """Install what is asked for at the tested versions."""
    # setuptools reuses build/ and would pack files that the tree no longer has.
    shutil.rmtree("build", ignore_errors=True)
    session.install("--constraint", "constraints.txt", *packages)


def pytest(session: nox.Session, backend: str, *arguments: str, extra: str = "") -> None:
    """Run the tests on `backend`, against the installed kvq."""
    # JAX' ONNX exporter brings jax along, so it is tested on JAX alone.
    extras = f"{backend},test,onnx" if backend == "jax" else f"{backend},test"
    # The tests compare with it where its backend is.
    install(session, f".[{extras}{extra}]", *(["vector-quantize-pytorch"] if backend == "torch" else []))
    # For the page of `--format web`, whose test is skipped, with the reason, where this or Chromium is missing.
    code = "from kvq.exporters.web.runtime import find; find(None, print)"
    session.run("python", "-P", "-c", code, success_codes=[0, 1], env={"KERAS_BACKEND": backend})
    # The safe path keeps the checkout out of sys.path in the processes that tests start, too.
    # Two at a time: most of a test is compiling, on one core. A file's module-wide runs may be made once in each.
    session.run(
        "pytest",
        "-n",
        "2",
        "--dist",
        "worksteal",
        "--durations",
        "20",
        *arguments,
        *session.posargs,
        env={
            "KERAS_BACKEND": backend,
            "PYTHONSAFEPATH": "1",
            # Most of a test is compiling under JAX: what one process compiled serves the others, and the next run. 0.8 of the CPU
            # time where the folder is empty, 0.35 where it is full.
            "JAX_COMPILATION_CACHE_DIR": str(Path(session.invoked_from) / ".nox" / "jax_cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            # A program of a test runs a few times only: compiled plainly, a short run takes two thirds of the CPU time.
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        },
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Style and common mistakes."""
    install(session, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Static types."""
    install(session, "mypy", ".")
    # Folders, not the installed packages: mypy does not follow setuptools' mapping of names.
    session.run("mypy", "kvq", "cli")


@nox.session
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def tests(session: nox.Session, backend: str) -> None:
    """The quick tests on one backend."""
    pytest(session, backend)


@nox.session
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def slow(session: nox.Session, backend: str) -> None:
    """The tests that take minutes."""
    # Ray takes half a gigabyte, and its tests five minutes: once is enough.
    pytest(session, backend, "-m", "slow", extra=",ray" if backend == "torch" else "")


@nox.session
def docs(session: nox.Session) -> None:
    """The site of docs/, into docs/_build. A link or heading that leads nowhere is an error.

    Links to other hosts need a network: `nox -s docs -- linkcheck`.
    """
    install(session, ".[docs]")
    for builder in ["html", "linkcheck"] if "linkcheck" in session.posargs else ["html"]:
        # The safe path: what is described is the installed kvq.
        command = ["python", "-P", "-m", "sphinx", "--fail-on-warning", "--keep-going", "--fresh-env", "--builder", builder]
        session.run(*command, "docs", f"docs/_build/{builder}", env={"KERAS_BACKEND": "jax"})


@nox.session
def export(session: nox.Session) -> None:
    """The tables of docs/export.md, and the tests of every format, in one environment with all backends. Takes long."""
    install(session, ".[jax,tensorflow,torch,export,test]")
    session.run("pytest", "tests/test_exporters.py", env={"KERAS_BACKEND": "torch", "PYTHONSAFEPATH": "1"})
    session.run("python", "benchmarks/export_matrix.py", *session.posargs, env={"PYTHONSAFEPATH": "1"})
