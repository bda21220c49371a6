"""The run folder: what it refuses, that files are whole or absent, and that one process holds it."""

import os
import subprocess
import sys

import pytest

from kvq import load_config
from kvq.atomic import new_folder, write_bytes, write_text
from kvq.errors import RunError
from kvq.run import Run

CONFIG = load_config("fashion_mnist_mini")


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "runs" / "mine")
    run.create(CONFIG, {"status": "running", "seed": 0})
    return run


def tree(folder):
    """Every file below a folder with its content, hidden ones too; a folder has none."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# Making a run.


def test_new_run_has_its_configuration_and_record(run):
    assert run.exists and run.config == CONFIG
    assert run.record == {"format_version": 1, "status": "running", "seed": 0}
    assert run.samples.is_dir() and run.checkpoints.is_dir()
    assert sorted(path.name for path in run.folder.iterdir()) == ["checkpoints", "config.toml", "run.json", "samples"]


def test_naming_a_run_creates_nothing(tmp_path):
    run = Run(tmp_path / "mine")
    assert not run.exists and not run.folder.exists() and run.read_metrics() == []


def test_existing_run_is_refused_and_left_alone(run):
    run.append_metrics({"step": 1})
    before = tree(run.folder)
    with pytest.raises(RunError, match="holds a run. Give --resume .* --overwrite .* --out"):
        run.create(CONFIG, {"status": "new"})
    assert tree(run.folder) == before


def test_existing_run_is_replaced_whole_where_asked(run):
    run.append_metrics({"step": 1})
    (run.samples / "train_00000001.png").write_bytes(b"old")
    run.create(CONFIG, {"status": "new"}, overwrite=True)
    assert run.record == {"format_version": 1, "status": "new"} and run.read_metrics() == [] and not list(run.samples.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "run.json"])
def test_folder_of_someone_else_is_refused_and_left_alone(tmp_path, overwrite, name):
    (tmp_path / name).write_text("years of work")
    with pytest.raises(RunError, match="exists and is not a run folder. Give another --out."):
        Run(tmp_path).create(CONFIG, {}, overwrite)
    assert tree(tmp_path) == {name: b"years of work"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_in_the_place_of_the_run_is_refused_and_left_alone(tmp_path, overwrite):
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(RunError, match="is not a run folder"):
        Run(tmp_path / "mine").create(CONFIG, {}, overwrite)
    assert tree(tmp_path) == {"mine": b"a file"}


def test_empty_folder_becomes_a_run(tmp_path):
    Run(tmp_path).create(CONFIG, {"status": "running"})
    assert Run(tmp_path).exists


def test_place_that_cannot_be_written_is_refused(tmp_path):
    # Below a file nobody can write, not even the superuser.
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"mine cannot be written: Not a directory. Give another --out."):
        Run(tmp_path / "file" / "runs" / "mine").create(CONFIG, {})
    assert tree(tmp_path) == {"file": b"x"}


def test_a_run_that_another_process_writes_is_not_replaced(run):
    run.append_metrics({"step": 1})
    with run.locked(), pytest.raises(RunError, match="is being written by another process"):
        Run(run.folder).create(CONFIG, {"status": "new"}, overwrite=True)
    assert run.record["status"] == "running" and run.read_metrics() == [{"step": 1}]


# The record.


def test_record_is_updated_key_by_key(run):
    run.update_record(status="finished", steps=7)
    assert run.record == {"format_version": 1, "status": "finished", "seed": 0, "steps": 7}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]"], ids=["empty", "cut", "not text", "a list"])
def test_broken_record_is_named(run, content):
    run.record_file.write_bytes(content)
    with pytest.raises(RunError, match="run.json"):
        run.record  # noqa: B018


def test_folder_without_record_says_what_a_run_has(tmp_path):
    with pytest.raises(RunError, match="A run folder has a run.json"):
        Run(tmp_path).record  # noqa: B018


# Metrics.


def test_metrics_come_back_in_order(run):
    records = [{"step": step, "split": "train", "loss": 0.5 / step} for step in (1, 2, 3)]
    for record in records:
        run.append_metrics(record)
    assert run.read_metrics() == records


def test_metrics_line_that_a_killed_process_left_is_passed_over(run):
    run.append_metrics({"step": 1, "loss": 0.5})
    run.append_metrics({"step": 2, "loss": 0.25})
    whole = run.metrics_file.read_bytes()
    for cut in range(1, len(b'{"step": 2, "loss": 0.25}')):
        run.metrics_file.write_bytes(whole[: -1 - cut])
        assert run.read_metrics() == [{"step": 1, "loss": 0.5}]


def test_metrics_after_the_checkpoint_are_taken_back(run):
    for step in (1, 5, 6, 10):
        run.append_metrics({"step": step})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 11, "lo')
    run.drop_metrics_after(5)
    run.append_metrics({"step": 6, "again": True})
    assert run.read_metrics() == [{"step": 1}, {"step": 5}, {"step": 6, "again": True}]


def test_taking_back_metrics_of_a_run_that_has_none_is_nothing(run):
    run.drop_metrics_after(5)
    assert run.read_metrics() == []


# Whole or absent.


def fail(*arguments, **keywords):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
def test_file_that_could_not_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch, function):
    write_text(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, function, fail)
    for name in ("a.json", "b.json"):
        with pytest.raises(OSError, match="No space"):
            write_bytes(tmp_path / name, b"new")
    monkeypatch.undo()
    assert tree(tmp_path) == {"a.json": b"old"}


def test_written_file_is_whole_and_readable_by_others(tmp_path):
    write_text(tmp_path / "a.json", "gr\u00fc\u00dfe")
    write_text(tmp_path / "a.json", "z\u00fcrich")
    assert tree(tmp_path) == {"a.json": "z\u00fcrich".encode()}
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def fill(path, content):
    with new_folder(path) as folder:
        assert folder.parent == path.parent, "Only within a file system a rename is at once."
        (folder / "weights").write_bytes(content)


def test_folder_appears_whole(tmp_path):
    fill(tmp_path / "deep" / "model", b"1")
    fill(tmp_path / "deep" / "model", b"2")
    assert tree(tmp_path) == {"deep": None, "deep/model": None, "deep/model/weights": b"2"}
    assert (tmp_path / "deep" / "model").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_folder_that_was_not_filled_leaves_the_old_one_and_nothing_else(tmp_path, error):
    fill(tmp_path / "model", b"old")
    for name in ("model", "other"):
        with pytest.raises(error), new_folder(tmp_path / name) as folder:
            (folder / "weights").write_bytes(b"half")
            raise error
    assert tree(tmp_path) == {"model": None, "model/weights": b"old"}


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_folder_that_could_not_be_renamed_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch, fails_at):
    """The old one has to step aside first: it must come back when the new one cannot take its place."""
    fill(tmp_path / "model", b"old")
    replace, calls = os.replace, []

    def fail_once(source, target):
        calls.append(target)
        if len(calls) == fails_at:
            fail()
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    try:
        fill(tmp_path / "model", b"new")
    except OSError:
        expected = b"old"
    else:
        expected = b"new"
    monkeypatch.undo()
    assert calls
    assert tree(tmp_path) == {"model": None, "model/weights": expected}


# The lock.

HOLD = (
    "import sys\nfrom kvq.run import Run\nwith Run(sys.argv[1]).locked():\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


def test_lock_excludes_another_process_until_it_ends_however_it_ends(run):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(RunError, match="is being written by another process"), run.locked():
                pass
        holder.kill()
    with run.locked():
        pass


def test_lock_is_let_go_after_an_error(run):
    with pytest.raises(KeyError), run.locked():
        raise KeyError
    with run.locked(), pytest.raises(RunError), Run(run.folder).locked():
        pass
