"""The contract of the command line: what goes to stdout, what to stderr, and which exit code says what."""

import ast
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from kvq_cli import __main__, computing, output
from kvq_cli.__main__ import run
from kvq_cli.main import app
from kvq_cli.progress import LineProgress, LiveProgress
from PIL import Image
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner, Result

import kvq
from kvq import backends
from kvq.errors import TrainingError, installing

BACKEND = keras.backend.backend()
SHORT = ["--steps", "3", "--set", "train.batch_size=8", "--set", "data.validation_images=32"]
RECORD = {"step": 2, "split": "train", "loss": 0.5, "reconstruction": 0.4, "codebook": 0.1, "psnr": 12.345, "usage": 0.5}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvq_cli", *arguments]


def kvq_in_process(*arguments: str) -> Result:
    """Runs a command in this process: quick, since Keras is already there."""
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    """A short run, trained by a real process, and what that process said."""
    folder = tmp_path_factory.mktemp("cli")
    arguments = command("train", "fashion_mnist_mini", *SHORT, "--backend", BACKEND, "--json")
    process = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return folder / "runs" / "fashion_mnist_mini", process


# What costs nothing


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from kvq_cli.main import app
try:
    app(["--help"])
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0 and "train" in process.stdout
    assert not {"keras", "grain", "numpy", "pydantic", "jax", "tensorflow", "torch"} & set(process.stderr.split())


def test_help_is_quick(tmp_path: Path) -> None:
    def seconds() -> float:
        # Of the processor, all of it spent on imports: a clock on the wall would measure how busy the machine is.
        before = os.times()
        subprocess.run(command("--help"), cwd=tmp_path, capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.6


def commands(group: Any, path: str = "kvq") -> Iterator[tuple[str, Any]]:
    for name, one in group.commands.items():
        yield from commands(one, f"{path} {name}") if hasattr(one, "commands") else [(f"{path} {name}", one)]


def test_help_names_arguments_alike_and_says_a_default_once() -> None:
    arguments: dict[str, set[str]] = {}
    for path, one in commands(get_command(app)):
        for parameter in one.params:
            if parameter.param_type_name == "argument":
                arguments.setdefault(parameter.metavar, set()).add(path)
            says_so = "Default:" in (parameter.help or "")
            assert not (says_so and parameter.show_default and parameter.default), (path, parameter.name)
    # Typer adds brackets and dots.
    assert {*arguments} == {"CONFIG", "RUN_OR_MODEL", "RUN", "MODEL", "DATA", "TOKENS", "IMAGES", "OUT"}
    assert arguments["DATA"] == {"kvq encode", "kvq data inspect", "kvq data pack"}


def test_version_and_console_script() -> None:
    assert kvq_in_process("--version").stdout == f"kvq {kvq.__version__}\n"
    script = shutil.which("kvq", path=str(Path(sys.executable).parent))
    assert script
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout == f"kvq {kvq.__version__}\n"


# Wrong input: one message, exit 2, nothing on stdout, nothing written


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "fashion_mnist_mimi"], ["fashion_mnist_mimi", "fashion_mnist_mini"]),
        (["train", "mnist", "--set", "train.stepps=3"], ["train.stepps", "train.steps"]),
        (["train", "mnist", "--set", "quantizer.kind=vektor"], ["quantizer.kind", "ema_vector", "vektor"]),
        (["train", "mnist", "--set", "train.steps='many'"], ["train.steps", "many"]),
        (["train", "mnist", "--steps", "0"], ["train.steps", "0"]),
        (["train", "mnist", "--set", "train.steps"], ["train.steps", "="]),
        (["train", "mnist", "--steps", "9" * 30], ["error: train.steps: an integer", "too large"]),
        (["train", "mnist", "--set", f"data={{crop={'9' * 30}}}"], ["error: data: an integer", "too large"]),
        (["train", "mnist", "--backend", "theano"], ["theano", "jax, tensorflow, torch"]),
        (["train", "fashion_mnist_mini", "--data", "no/such/folder"], ["no/such/folder"]),
        (["train", "fashion_mnist_mini", "--resume"], ["--resume"]),
        (["train", "fashion_mnist_mini", "--set", "train.batch_size=4000"], ["train.batch_size", "2000", "4000"]),
        (["train", "fashion_mnist_mini", "--dry-run", "--set", "data.crop=32", "--set", "data.pad=0"], ["crop=32"]),
        (["evaluate", "no/such/run"], ["no/such/run"]),
        (["reconstruct", "no/such/run", "picture.png", "--out", "out"], ["no/such/run"]),
        (["encode", "no/such/run", "mnist", "--out", "out"], ["no/such/run"]),
        (["decode", "no/such/run", "tokens", "--out", "out"], ["no/such/run"]),
        (["export", "no/such/run", "--format", "onnx", "--out", "out"], ["no/such/run"]),
        (["configs", "nope"], ["nope", "mnist"]),
    ],
    ids=" ".join,
)
def test_wrong_input(tmp_path: Path, monkeypatch, arguments: list[str], words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    result = kvq_in_process(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    message = result.stderr.removeprefix(f"backend: {BACKEND} (Keras already runs on it)\n")
    assert message.startswith("error: ") and message.endswith("\n")
    assert all(word in message for word in words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["train", "mnist", "--resume", "--overwrite"],
        ["train", "mnist", "--steps", "x"],
        ["nope"],
        ["evaluate", "x", "--no"],
    ],
    ids=" ".join,
)
def test_wrong_usage(tmp_path: Path, monkeypatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    result = kvq_in_process(*arguments)
    assert result.exit_code == 2
    assert result.stdout == "" and "Usage: " in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_is_not_installed_names_its_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    missing = next(name for name in backends.BACKENDS if name != BACKEND)
    monkeypatch.setattr(backends, "installed", lambda: [BACKEND])
    result = kvq_in_process("train", "fashion_mnist_mini", "--backend", missing)
    assert result.exit_code == 2 and installing(missing) in result.stderr


def test_output_folder_that_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    result = kvq_in_process("train", "fashion_mnist_mini", *SHORT, "--out", str(tmp_path / "file" / "run"))
    assert result.exit_code == 2 and str(tmp_path / "file" / "run") in result.stderr


# What ends otherwise


def failing(error: BaseException) -> Any:
    def train(*arguments: Any, **options: Any) -> None:
        raise error

    return train


@pytest.mark.parametrize(("error", "code"), [(TrainingError("The loss is not finite."), 1), (KeyboardInterrupt(), 130)])
def test_exit_codes_of_what_fails_on_the_way(monkeypatch, error: BaseException, code: int) -> None:
    monkeypatch.setattr("kvq.training.train", failing(error))
    result = kvq_in_process("train", "fashion_mnist_mini", "--json")
    assert result.exit_code == code
    assert result.stdout == ""
    assert str(error) in result.stderr


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch) -> None:
    monkeypatch.setattr("kvq.training.train", failing(ZeroDivisionError()))
    assert isinstance(kvq_in_process("train", "fashion_mnist_mini").exception, ZeroDivisionError)


def test_interrupted_training_ends_cleanly(tmp_path: Path) -> None:
    arguments = command("train", "fashion_mnist_mini", "--steps", "1000000", "--set", "train.log_every=1", "--backend", BACKEND)
    with subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert any(line.startswith("step ") for line in process.stderr)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "--resume" in stdout
    run = tmp_path / "runs" / "fashion_mnist_mini"
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert len(list((run / "checkpoints").glob("step_*"))) == 1
    assert (run / "model" / "config.json").exists()


# What works


def test_train_prints_one_json_object(finished) -> None:
    run, process = finished
    result = json.loads(process.stdout)
    assert Path(result["run"]) == Path("runs/fashion_mnist_mini")
    assert (result["status"], result["steps"], result["metrics"]["step"]) == ("finished", 3, 3)
    assert "error:" not in process.stderr


def test_train_says_what_happens_line_by_line(finished) -> None:
    lines = finished[1].stderr.splitlines()
    assert lines[0] == f"backend: {BACKEND} (--backend)"
    assert any(line.startswith("step 3/3  train  loss ") and "psnr" in line for line in lines)
    assert any(line.startswith("step 3/3  validation  loss ") for line in lines)


def test_train_writes_all_files_of_the_run(finished) -> None:
    run, _ = finished
    for name in ("config.toml", "run.json", "metrics.jsonl", "loss.png", "model/config.json", "model/model.safetensors"):
        assert (run / name).stat().st_size > 0
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["train_00000003.png", "validation_00000003.png"]
    assert "kvq train fashion_mnist_mini" in json.loads((run / "run.json").read_text())["command"]


def test_a_run_is_replaced_or_continued_only_when_told(finished, tmp_path: Path) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run")
    again = ["train", "fashion_mnist_mini", *SHORT, "--out", str(run)]
    refused = kvq_in_process(*again)
    assert refused.exit_code == 2 and "--resume" in refused.stderr and "--overwrite" in refused.stderr
    # A run folder brings its own configuration, and is where the run goes on.
    continued = kvq_in_process("train", str(run), "--resume", "--steps", "4", "--json")
    assert continued.exit_code == 0, continued.stderr
    assert json.loads(continued.stdout)["steps"] == 4
    replaced = kvq_in_process(*again, "--overwrite")
    assert replaced.exit_code == 0, replaced.stderr
    assert "finished after 3 steps" in replaced.stdout and str(run / "loss.png") in replaced.stdout


def without_null(section: dict) -> dict:
    return {key: value for key, value in section.items() if value is not None}


def test_dry_run_writes_nothing_and_prints_a_configuration(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "fashion_mnist_mini", "--dry-run", "--seed", "7", "--set", "quantizer.codebook_size=32"]
    result = kvq_in_process(*arguments)
    assert result.exit_code == 0, result.stderr
    config = tomllib.loads(result.stdout)
    assert config["train"]["seed"] == 7 and config["quantizer"]["codebook_size"] == 32
    described = json.loads(kvq_in_process(*arguments, "--json").stdout)
    # TOML has no null, so what is not set is absent there.
    assert {name: without_null(section) for name, section in described["config"].items()} == config
    assert described["tokens_per_image"] == 49 and described["bits_per_image"] == 49 * 5
    assert f"# parameters: {described['parameters']:,}" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_evaluate(finished) -> None:
    result = kvq_in_process("evaluate", str(finished[0]), "--images", "20", "--json")
    assert result.exit_code == 0, result.stderr
    measured = json.loads(result.stdout)
    assert {"images", "mse", "psnr", "ssim", "losses", "usage", "perplexity", "images_per_second"} <= set(measured)
    assert (measured["images"], measured["split"], measured["backend"]) == (20, "test", BACKEND)
    table = kvq_in_process("evaluate", str(finished[0] / "model"), "--images", "20").stdout
    assert "losses.reconstruction" in table and f"{measured['psnr']:.4g}" in table


def test_evaluate_keeps_what_it_measured_on_all_test_images(finished, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    kept = folder / "evaluation.json"
    for arguments in (["--images", "5"], ["--split", "train", "--images", "5"], ["--data", "fashion_mnist_mini"]):
        assert kvq_in_process("evaluate", str(folder), *arguments).exit_code == 0
        assert not kept.exists()
    result = kvq_in_process("evaluate", str(folder), "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(kept.read_text("utf-8")) == json.loads(result.stdout) and json.loads(result.stdout)["images"] == 500

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    before = kept.read_bytes()
    monkeypatch.setattr("kvq.atomic.os.replace", full)
    result = kvq_in_process("evaluate", str(folder), "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["images"] == 500
    assert "evaluation.json could not be written: No space left on device" in result.stderr
    assert kept.read_bytes() == before and not list(folder.glob(".evaluation*"))


def test_reconstruct_keeps_sizes(finished, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(np.arange(30 * 45, dtype="uint32").reshape(30, 45).astype("uint8")).save(picture)
    result = kvq_in_process("reconstruct", str(finished[0]), str(picture), "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
    (written,) = result.stdout.splitlines()
    with Image.open(written) as image:
        assert image.size == (45, 30)


def test_export_refuses_an_unknown_format(finished, tmp_path: Path) -> None:
    result = kvq_in_process("export", str(finished[0]), "--format", "nope", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "nope" in result.stderr and "onnx" in result.stderr
    assert not (tmp_path / "out").exists()


def test_data_inspect_and_pack(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(photos / f"{number}.png")
    (photos / "broken.png").write_bytes(b"")
    sheet = tmp_path / "sheet.png"
    inspected = kvq_in_process("data", "inspect", str(photos), "--sheet", str(sheet), "--json")
    assert inspected.exit_code == 0 and sheet.exists()
    assert json.loads(inspected.stdout)["bad"] == [{"name": "broken.png", "reason": "the file is empty"}]
    shown = kvq_in_process("data", "inspect", str(photos), "--sheet", str(sheet)).stdout
    assert "images    3\n" in shown and "broken.png: the file is empty" in shown
    packed = kvq_in_process("data", "pack", str(photos), str(tmp_path / "packed"), "--shard-size", "2", "--size", "20", "--json")
    assert json.loads(packed.stdout) == json.loads(packed.stdout) | {"images": 3, "skipped": 1, "shards": 2}
    refused = kvq_in_process("data", "pack", str(photos), str(photos))
    assert refused.exit_code == 2 and "must be a new folder" in refused.stderr and len(list(photos.iterdir())) == 4


def test_quantizers() -> None:
    from kvq.quantizers import QUANTIZERS

    listed = json.loads(kvq_in_process("quantizers", "--json").stdout)
    assert list(listed) == list(QUANTIZERS)
    lines = kvq_in_process("quantizers").stdout.splitlines()
    assert len(lines) == len(QUANTIZERS)
    for line, (kind, described) in zip(lines, listed.items(), strict=True):
        assert line.split()[0] == kind and described["summary"] in line and described["paper"] in line
        assert "arXiv:" in line or "doi:" in line


def test_configs() -> None:
    listed = json.loads(kvq_in_process("configs", "--json").stdout)
    assert set(listed) == set(kvq.list_configs())
    lines = kvq_in_process("configs").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(listed)
    for name in listed:
        resolved = json.loads(kvq_in_process("configs", name, "--json").stdout)
        assert resolved["train"]["steps"] > 0
        assert tomllib.loads(kvq_in_process("configs", name).stdout)["train"] == without_null(resolved["train"])


@pytest.mark.parametrize(("problems", "code"), [([], 0), (["Something is wrong."], 1)])
def test_doctor(monkeypatch, problems: list[str], code: int) -> None:
    facts = {"version": "1.0", "devices": ["gpu: H200"], "threads": 2, "tf32": True}
    report = {"kvq": "0", "gpu_found": True, "backends": {"jax": facts}, "data": {"mnist": None}, "problems": problems}
    monkeypatch.setattr("kvq.diagnosis.doctor", lambda: report)
    result = kvq_in_process("doctor")
    assert result.exit_code == code
    assert "1.0; gpu: H200; 2 threads; TF32 on" in result.stdout
    assert ("Something is wrong." in result.stdout) == bool(problems)
    assert "kvq benchmark" not in result.stdout
    monkeypatch.setattr("kvq.diagnosis.doctor", lambda: {**report, "gpu_found": False})
    assert "What is the fastest here: kvq benchmark" in kvq_in_process("doctor").stdout
    monkeypatch.setattr("kvq.diagnosis.doctor", lambda: report)
    assert json.loads(kvq_in_process("doctor", "--json").stdout) == report


# The parts


def test_stdout_is_kept_for_the_result() -> None:
    code = """
import os
from kvq_cli.computing import only_results_on_stdout
with only_results_on_stdout():
    os.write(1, b"from C\\n")
    print("from Python")
print("result")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "result\n"
    assert sorted(process.stderr.splitlines()) == ["from C", "from Python"]


def test_only_chatter_of_the_import_is_dropped(monkeypatch, tmp_path: Path, capfd) -> None:
    chatter = "WARNING: All log messages before absl::InitializeLog() is called\\nI0000 00:00:1 port.cc:1] hello"
    (tmp_path / "keras.py").write_text(f'import os\nos.write(2, b"{chatter}\\nE0000 broken\\n")\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "keras")
    computing.import_keras()
    assert capfd.readouterr().err == "E0000 broken\n"


def test_json_knows_no_nan(capsys) -> None:
    output.print_json({"a": float("nan"), "b": [np.float32(0.5), np.int64(3), Path("x")], "c": {"d": None, "e": True}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [0.5, 3, "x"], "c": {"d": None, "e": True}}


def test_lines(capsys) -> None:
    progress = LineProgress()
    progress.start(4, 0)
    progress.step(1)
    progress.log(RECORD)
    progress.stop()
    line = capsys.readouterr().err
    assert line.startswith("step 2/4  train  loss 0.5  reconstruction 0.4  codebook 0.1  psnr 12.35  usage 50%")


@pytest.mark.parametrize("width", [30, 40, 200])
def test_live_display_fits_the_terminal(width: int) -> None:
    progress = LiveProgress()
    console = progress.console = Console(file=io.StringIO(), width=width, height=30, force_terminal=True, no_color=True)
    progress.start(4, 0)
    progress.log(RECORD)
    progress.log({**RECORD, "split": "validation"})
    progress.note("A note.")
    lines = ["".join(segment.text for segment in line) for line in console.render_lines(progress.display.get_renderable())]
    progress.stop()
    progress.stop()
    assert max(len(line) for line in lines) <= width
    assert any(line.split()[:2] == ["loss", "0.5"] for line in lines)
    assert "A note." in console.file.getvalue()


def test_the_bar_reaches_its_end(monkeypatch) -> None:
    progress = LiveProgress("image")
    progress.console = Console(file=io.StringIO(), force_terminal=True)
    progress.start(100, 0)
    for image in range(1, 101):  # within one period
        progress.step(image)
    assert progress.display.tasks[0].completed == 100
    progress.stop()


def test_figures_have_no_exponents() -> None:
    figures = {12345.6: "12,346", 36864.0: "36,864", 999.96: "1000", 0.012345: "0.01235", 1500: "1,500", -2500.4: "-2,500"}
    assert {value: output.number(value) for value in figures} == figures


# Cells of a length that no terminal of 40 columns has room for.
CELLS = [("losses.a_term_of_the_loss_with_a_long_name", "short"), ("weights_sha256", "0123456789abcdef" * 8), ("[b]:fire:", "x")]


def test_a_table_in_a_pipe_is_whole(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    output.print_table(CELLS)
    width = max(len(name) for name, _ in CELLS)
    assert capsys.readouterr().out.splitlines() == [f"{name:{width}}  {value}" for name, value in CELLS]
    output.print_table([("torch", "it failed"), ("jax", "1", "2")], headings=("backend", "ratio", "s"))
    assert capsys.readouterr().out.split("\n") == ["backend  ratio      s", "torch    it failed", "jax      1          2", ""]


def test_a_table_folds_on_a_narrow_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.print_table(CELLS)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 40 and "…" not in shown
    (name, short), (sha256, value) = CELLS[:2]
    whole = "".join(shown.split()).replace(short, "")
    assert name in whole and sha256 + value in whole


def test_lines_estimate_from_the_second_record_on(monkeypatch, capsys) -> None:
    seconds = iter([1000.0, 1001.0, 1002.0])
    monkeypatch.setattr("kvq_cli.progress.time.monotonic", lambda: next(seconds))
    progress = LineProgress()
    progress.start(10, 0)
    progress.log({**RECORD, "step": 1})
    progress.log({**RECORD, "step": 1, "split": "validation"})
    progress.log({**RECORD, "step": 2})
    first, validation, second = capsys.readouterr().err.splitlines()
    assert " left" not in first + validation and second.endswith("  16 s left")


def test_a_line_now_and_then_where_there_are_no_records(monkeypatch, capsys) -> None:
    now = 1000.0
    monkeypatch.setattr("kvq_cli.progress.time.monotonic", lambda: now)
    progress = LineProgress("batch")
    progress.start(40, 0)
    for step in range(31):
        progress.step(step)
        now += 60.0 if step == 0 else 1.0  # to compile
    assert capsys.readouterr().err.splitlines() == [f"batch {n}/40  {40 - n} s left" for n in (11, 21)]
    progress.log({**RECORD, "step": 30})
    now += 60.0
    progress.step(31)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_things_are_counted() -> None:
    assert [output.count(number, "shard") for number in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]


def test_small_sizes_are_more_than_nothing() -> None:
    assert [output.size(number) for number in (240, 99_900, 123_456, 2 * 10**9)] == ["0.2 kB", "99.9 kB", "0.1 MB", "2000.0 MB"]


def test_a_reader_that_goes_does_not_end_training(tmp_path: Path) -> None:
    options = ["--set", "train.batch_size=4", "--set", "data.validation_images=8", "--set", "train.log_every=1"]
    arguments = command("train", "fashion_mnist_mini", "--steps", "12", *options, "--backend", BACKEND)
    # As in a shell: PYTHONUNBUFFERED=1 kvq train ... 2>&1 | head -2
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": os.environ | {"PYTHONUNBUFFERED": "1"}}
    with subprocess.Popen(arguments, cwd=tmp_path, **pipe) as process:
        try:
            assert process.stdout
            assert [process.stdout.readline().split()[0] for _ in range(2)] == [b"backend:", b"step"]
            process.stdout.close()
            assert process.wait(timeout=120) == 0
        finally:
            process.kill()
    run = tmp_path / "runs" / "fashion_mnist_mini"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 13))
    # Nothing was worth a note.
    assert not (run / "log.txt").exists()


# Python writes to a pipe when it ends, and complains on stderr then; unbuffered, as it goes. An empty PYTHONUNBUFFERED is none.
BUFFERING = pytest.mark.parametrize("unbuffered", ["", "1"])
OUTPUTS = pytest.mark.parametrize("arguments", [["configs"], ["--help"], ["train", "--help"], ["--version"]], ids=" ".join)


@BUFFERING
@OUTPUTS
def test_a_reader_that_is_gone_at_the_end_is_no_failure(arguments: list[str], unbuffered: str) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    with subprocess.Popen(command(*arguments), **pipe) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@BUFFERING
@OUTPUTS
def test_an_output_that_cannot_be_written_is_one_line_and_status_1(arguments: list[str], unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command(*arguments), stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize("closed", ["", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stdout_or_stderr_goes_nowhere(closed: str) -> None:
    code = """
import sys
from kvq_cli import __main__, computing, output

def work(**_):
    with computing.only_results_on_stdout():
        output.say("progress")
    print("result")

sys.modules["kvq_cli.main"] = type("Main", (), {"app": work})
__main__.run()
"""
    shell = ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code]
    done = subprocess.run(shell, capture_output=True, text=True)
    assert done.returncode == 0
    assert (done.stdout, done.stderr) == ("" if " >&-" in f" {closed}" else "result\n", "" if "2>&-" in closed else "progress\n")


def test_nothing_is_imported_before_ctrl_c_is_looked_after() -> None:
    assert __main__.__file__
    top = ast.parse(Path(__main__.__file__).read_text("utf-8")).body
    imports = [ast.unparse(node) for node in top if isinstance(node, ast.Import | ast.ImportFrom)]
    # Python has the first two before it begins.
    assert imports == ["import os", "import sys", "from . import INTERRUPTED, OutputError"]


def test_ctrl_c_while_modules_are_imported_is_quiet(monkeypatch, capsys) -> None:
    class Importing:
        @property
        def app(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "kvq_cli.main", Importing())
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"


COLLECTS_GARBAGE = """
import gc, os, signal, sys, time, types
from kvq_cli.__main__ import run

def press(phase, info):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)  # interrupted at once; what that raises is dropped

def work(**_):
    gc.callbacks.append(press)
    gc.collect()
    time.sleep(20)
    print("nobody stopped it")

sys.modules["kvq_cli.main"] = types.SimpleNamespace(app=work)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
run()
"""


def test_ctrl_c_while_python_collects_garbage_counts() -> None:
    # JAX, which Keras imports where it is installed, has a function called there.
    started = time.monotonic()
    process = subprocess.run([sys.executable, "-c", COLLECTS_GARBAGE], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "interrupted\n")
    assert time.monotonic() - started < 15


def test_dry_run_names_the_images_that_the_run_would_take(tmp_path: Path) -> None:
    images = np.zeros((200, 28, 28, 1), np.uint8)
    np.savez(tmp_path / "images.npz", x_train=images, x_test=images)
    result = kvq_in_process("train", "fashion_mnist_mini", "--dry-run", "--data", str(tmp_path / "images.npz"))
    assert tomllib.loads(result.stdout)["data"]["source"] == str(tmp_path / "images.npz")
    assert "# training images: 200" in result.stdout
    # Those to validate on, too; the training set need not have any then.
    np.savez(tmp_path / "train.npz", x_train=images)
    both = ["--data", str(tmp_path / "train.npz"), "--validation-data", str(tmp_path / "images.npz")]
    result = kvq_in_process("train", "fashion_mnist_mini", "--dry-run", *both)
    assert result.exit_code == 0 and tomllib.loads(result.stdout)["data"]["validation"] == str(tmp_path / "images.npz")


UNKNOWN_MODEL = """
import sys
from typer.testing import CliRunner
from kvq_cli.main import app

for words in (
    ["evaluate"], ["doctor"], ["codebook"], ["encode", "IMAGES", "--out", "x"], ["decode", "SET", "--out", "x"],
    ["reconstruct", "IMAGE", "--out", "x"], ["export", "--format", "keras", "--out", "x"],
):
    result = CliRunner().invoke(app, [words[0], "nosuch", *words[1:]])
    assert result.exit_code == 2 and "There is no nosuch." in result.stderr, (words, result.output)
assert "keras" not in sys.modules
"""


def test_a_model_that_is_not_there_is_refused_before_a_backend_is_imported(tmp_path):
    done = subprocess.run([sys.executable, "-c", UNKNOWN_MODEL], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
