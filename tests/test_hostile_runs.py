"""Run folders and configurations from strangers: reading is bounded, waits for nothing, and nothing outside is touched."""

import os
import signal
import threading

import pytest

from kvq import load_config
from kvq.config import parse_config
from kvq.data.listing import Listing
from kvq.data.skipped import read_names
from kvq.errors import ConfigError, DataError, RunError
from kvq.plots import loss_curves
from kvq.run import Run
from kvq.run_images import check_unchanged

CONFIG = load_config("fashion_mnist_mini")
RECORDS = [{"step": 1, "split": "train", "loss": 0.5}, {"step": 2, "split": "train", "loss": 0.25}]
OF = {"folder": "/photographs", "split": "train"}
READERS = {
    "config.toml": lambda run: run.config,
    "run.json": lambda run: run.record,
    "metrics.jsonl": lambda run: run.read_metrics(),
    "skipped.txt": lambda run: read_names(run.skipped_file),
    "listings/train": lambda run: Listing.read(run.listing_file("train"), **OF),
}
TERABYTE = 2**40


@pytest.fixture(autouse=True)
def no_waiting():
    """A test that hangs ends as one that failed."""

    def stop(*arguments):
        raise AssertionError("It waits for something.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.create(CONFIG, {"status": "running"})
    for record in RECORDS:
        run.append_metrics(record)
    run.skipped_file.write_bytes(b"a.png\tit is cut\n")
    run.listing_file("train").parent.mkdir()
    run.listing_file("train").write_bytes(Listing.of(["a.png", "b/..c.png"]).to_bytes(**OF))
    return run


def test_good_run_is_read(run):
    values = {name: read(run) for name, read in READERS.items()}
    assert values["config.toml"] == CONFIG and values["run.json"]["status"] == "running" and values["metrics.jsonl"] == RECORDS
    assert values["skipped.txt"] == {"a.png"} and [*values["listings/train"]] == ["a.png", "b/..c.png"]


def make_a_terabyte(path):
    path.touch()
    os.truncate(path, TERABYTE)


PLACES = {
    "a pipe": (os.mkfifo, "it is not a regular file"),
    "a folder": (os.mkdir, "it is not a regular file"),
    "a link": (lambda path: path.symlink_to("/etc/hostname"), "it is a symbolic link"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "it is a symbolic link"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "it is a symbolic link"),
    "a terabyte": (make_a_terabyte, "it is larger than"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_of_a_run_is_not_read(run, name, place):
    path = run.folder / name
    path.unlink()
    put, reason = PLACES[place]
    put(path)
    if name == "listings/train":
        assert READERS[name](run) is None  # the folder is walked through instead
        return
    with pytest.raises((RunError, DataError), match=f"{name} cannot be read: {reason}"):
        READERS[name](run)


DEEP = b"[" * 100_000


@pytest.mark.parametrize("content", [b"\xff\xfe", DEEP, b"9" * 5000, b'{"step": 1, "step": 2}', b"[]", b"3", b"\0"], ids=repr)
def test_line_of_metrics_that_is_none_is_passed_over(run, content):
    lines = run.metrics_file.read_bytes().splitlines()
    run.metrics_file.write_bytes(b"\n".join([lines[0], content, lines[1], b""]))
    assert run.read_metrics() == RECORDS
    run.drop_metrics_after(1)
    assert run.read_metrics() == RECORDS[:1]


@pytest.mark.parametrize("step", ["null", '"1"', "1.0", "[]", "true", "-1", str(2**63)])
def test_record_without_a_step_is_none(run, step):
    run.metrics_file.write_text(f'{{"step": {step}, "split": "train"}}\n')
    assert run.read_metrics() == []


def test_run_without_a_record_has_curves(run):
    """Its first line may be the one that was cut."""
    run.metrics_file.write_bytes(b'{"step": 1, "sp')
    loss_curves(run.read_metrics(), run.loss_plot)
    assert run.loss_plot.stat().st_size


CHANGES = [{"loss": "low"}, {"loss": 10**4000}, {"loss": None}, {"split": 3}, {"usage": [1.0]}]


@pytest.mark.parametrize("change", CHANGES, ids=["text", "long", "none", "split", "list"])
def test_record_of_other_values_does_not_stop_the_curves(run, change):
    for record in ({**RECORDS[0], **change}, {"step": 3}):
        run.append_metrics(record)
    loss_curves(run.read_metrics(), run.loss_plot)
    assert run.loss_plot.stat().st_size


@pytest.mark.parametrize(
    "content", [DEEP, b"9" * 5000, b'{"a": 1, "a": 2}', "ü".encode("latin-1")], ids=["deep", "long", "2", "l1"]
)
def test_record_that_is_no_json_is_refused(run, content):
    run.record_file.write_bytes(content)
    with pytest.raises(RunError, match="run.json cannot be read: "):
        run.record  # noqa: B018


def test_names_of_bad_files_in_another_encoding_are_none_of_ours(run):
    run.skipped_file.write_bytes(b"\xff.png\treason\na.png\treason\n")
    assert "a.png" in read_names(run.skipped_file) and len(read_names(run.skipped_file)) == 2


@pytest.mark.parametrize(
    "name", ["../a.png", "/a.png", "b/../../a.png", "..", "b/..", "", "a.png\0../b.png", "dev/zero", "a.png\0b"]
)
def test_listing_names_images_in_its_folder_alone(run, name):
    run.listing_file("train").write_bytes(Listing.of(["a.png", name]).to_bytes(**OF))
    assert Listing.read(run.listing_file("train"), **OF) is None


def test_listing_that_is_deep_is_none(run):
    run.listing_file("train").write_bytes(DEEP + b"\na.png\0")
    assert Listing.read(run.listing_file("train"), **OF) is None


@pytest.mark.parametrize("data", ["[]", "3", '{"train": 3}', '{"train": {}}', '{"train": null, "validation": []}'])
def test_record_of_images_that_is_none_is_no_traceback(run, data):
    from kvq.data import open_source

    run.record_file.write_text(f'{{"data": {data}}}')
    images = open_source("fashion_mnist_mini", "test")
    with pytest.raises(RunError, match="have changed since it began: .* --changed-data"):
        check_unchanged(run, CONFIG, images, images)


# Writing.


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "skipped.txt", "loss.png", "samples/train_00000001.png", "model"])
def test_run_with_a_link_is_not_written(run, tmp_path, name):
    """Opening the lock used to empty the file that it led to."""
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    (run.folder / name).unlink(missing_ok=True)
    (run.folder / name).symlink_to(precious)
    with pytest.raises(RunError, match=f"{name} is a link or a pipe, and kvq writes through none"), run.locked():
        pass
    with pytest.raises(RunError, match="is a link or a pipe"):
        run.create(CONFIG, {}, overwrite=True)
    assert precious.read_text() == "years of work"


def test_run_with_a_pipe_is_not_written(run):
    run.skipped_file.unlink()
    os.mkfifo(run.skipped_file)
    with pytest.raises(RunError, match="skipped.txt is a link or a pipe"), run.locked():
        pass


# Configurations.


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 10_000,
        "a = " + "{b=" * 5_000,
        "a = " + "9" * 5000,
        "[train]\nsteps = 0x" + "f" * 10_000,
        "[train]\nlog_every = 0x" + "f" * 10_000,
        "a = " + str(2**63),
        "a = 1979-13-41",
        'a = "\\ud800"',
        "\0",
        "a = 1\na = 2",
    ],
    ids=["deep", "deep tables", "long", "hexadecimal", "hexadecimal that fits", "65 bits", "date", "surrogate", "zero", "twice"],
)
def test_text_that_is_no_toml_is_refused(text):
    with pytest.raises(ConfigError, match="^mine is not TOML: ") as caught:
        parse_config(text, "mine")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", [".".join(["a"] * 3_000), "train." + ".".join(["a"] * 3_000), "a" * 14_000])
def test_keys_without_end_are_told_shortly(key):
    with pytest.raises(ConfigError, match="^mine (does not fit|is not TOML)") as caught:
        parse_config(f"{key} = 1\n{CONFIG.to_toml()}", "mine")
    assert len(str(caught.value)) < 1000


def test_mistakes_without_end_are_counted():
    with pytest.raises(ConfigError, match="and 980 more") as caught:
        parse_config("".join(f"a{n} = 1\n" for n in range(1000)) + CONFIG.to_toml(), "mine")
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize("value", ["9" * 5000, "0x" + "f" * 5000, "[" * 100_000])
def test_override_without_end_is_refused(value):
    with pytest.raises(ConfigError) as caught:
        load_config("fashion_mnist_mini", [f"train.steps={value}"])
    assert len(str(caught.value)) < 1000


def test_configuration_of_a_terabyte_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    make_a_terabyte(path)
    with pytest.raises(ConfigError, match="is larger than"):
        load_config(path)


def test_keys_that_take_the_square_of_their_length_are_not_begun():
    with pytest.raises(ConfigError, match="mine is larger than"):
        parse_config(".".join(["a"] * 500_000) + " = 1", "mine")


def test_configuration_is_not_cut(tmp_path):
    (tmp_path / "mine.toml").write_text(f"# {'ü' * 10_000}\n{CONFIG.to_toml()}", "utf-8")
    with pytest.raises(ConfigError, match="is larger than"):
        load_config(tmp_path / "mine.toml")


def test_name_of_a_configuration_that_is_too_long_is_refused():
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        load_config("x" * 5000)


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "link"])
def test_configuration_of_a_run_is_neither_a_pipe_nor_a_link(run, put):
    run.config_file.unlink()
    put(run.config_file)
    with pytest.raises(ConfigError, match="config.toml cannot be read: it is"):
        load_config(run.folder)


@pytest.mark.parametrize("put", ["link", "pipe"])
def test_own_configuration_may_be_a_link_or_a_pipe(tmp_path, put):
    """`kvq train <(make_config)`."""
    path, text = tmp_path / "mine.toml", CONFIG.to_toml()
    if put == "link":
        (tmp_path / "other.toml").write_text(text)
        path.symlink_to("other.toml")
        assert load_config(path) == CONFIG
        return
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=[text])
    writer.start()
    assert load_config(path) == CONFIG
    writer.join()
