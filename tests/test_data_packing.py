"""Shards and inspection: what `kvq data pack` writes trains like the folder, and `kvq data inspect` says what is there."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from kvq.data import inspect, iterate, open_source, pack, training_batches, training_transforms
from kvq.data.packing import PLAN
from kvq.data.shards import read_index
from kvq.errors import DataError

SHARD = {"file": "x", "records": 1, "bytes": 1, "sha256": "0" * 64}
BAD = Path(__file__).parent / "data" / "bad_images"


def picture(number, size=(40, 30)):
    """Smooth, so that JPEG keeps it."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return Image.fromarray(np.stack([rows * 5, columns * 6, rows + columns + number], -1).astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for number in range(25):
        path = folder / ("a" if number % 2 else "b") / f"it's {number:02d}.{'jpg' if number % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path, quality=95)
    return folder


def test_shards_train_like_the_folder(photos, tmp_path):
    told = []
    result = pack(photos, tmp_path / "packed", shard_size=4, on_progress=lambda *done: told.append(done))
    assert (result["images"], result["skipped"], result["shards"]) == (25, 0, 7)
    assert told[-1] == (25, 25) and told == sorted(told)
    for split in ("train", "test", "all"):
        folder, packed = (open_source(str(path), split) for path in (photos, tmp_path / "packed"))
        assert len(folder) == len(packed)
        for one, other in zip(folder, packed, strict=True):
            assert one["name"] == other["name"] and one["label"] == other["label"]
            np.testing.assert_array_equal(one["image"], other["image"])
    recipe = training_transforms(0, 16, True)
    batches = [training_batches(open_source(str(path)), recipe, 4, 3)[7] for path in (photos, tmp_path / "packed")]
    np.testing.assert_array_equal(batches[0]["images"], batches[1]["images"])


def test_folders_of_splits_keep_their_splits(photos, tmp_path):
    (photos / "a").rename(photos / "train2017")
    (photos / "b").rename(photos / "val2017")
    pack(photos, tmp_path / "packed", shard_size=100)
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [
        "index.json",
        "test-00000.array_record",
        "train-00000.array_record",
    ]
    sources = [open_source(str(tmp_path / "packed"), split) for split in ("train", "test")]
    assert [len(source) for source in sources] == [12, 13] and sources[0].splits == ("train", "test")
    with pytest.raises(DataError, match="offers the splits train, test. Received: split=all"):
        open_source(str(tmp_path / "packed"), "all")


def test_resized_images_have_the_size_and_the_colours(photos, tmp_path):
    picture(3, size=(14, 30)).save(photos / "small.png")
    pack(photos, tmp_path / "packed", size=20)
    packed = open_source(str(tmp_path / "packed"), "all")
    folder = open_source(str(photos), "all")
    for one, other in zip(folder, packed, strict=True):
        expected = Image.fromarray(one["image"])
        if min(expected.size) > 20:
            expected = expected.resize((20, 27), Image.Resampling.BICUBIC)
        difference = np.abs(other["image"].astype(float) - np.asarray(expected))
        assert other["image"].shape == np.asarray(expected).shape and difference.mean() < 4, one["name"]
    assert read_index(tmp_path / "packed").size == 20


def test_bad_files_are_left_out_and_named(tmp_path):
    result = pack(BAD, tmp_path / "packed")
    lines = (tmp_path / "packed" / "skipped.txt").read_text("utf-8").splitlines()
    assert (result["images"], result["skipped"]) == (18, 10) and len(lines) == 10  # no_extension is not listed
    assert lines[0].split("\t")[0] == "bad_crc_idat.png"
    assert read_index(tmp_path / "packed").skipped == 10


def test_a_stopped_call_goes_on_and_ends_as_if_it_had_not_been(photos, tmp_path):
    """Stopped in the middle of the third shard; the shards before it are not written again."""

    class Stopped(Exception):
        pass

    def stop(done, total):
        if done == 10:
            raise Stopped

    with pytest.raises(Stopped):
        pack(photos, tmp_path / "packed", shard_size=4, on_progress=stop)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "packed").glob("*.array_record")}
    assert set(kept) == {"all-00000.array_record", "all-00001.array_record"}
    with pytest.raises(DataError, match="was begun with another shard_size"):
        pack(photos, tmp_path / "packed", shard_size=5)
    pack(photos, tmp_path / "packed", shard_size=4)
    pack(photos, tmp_path / "whole", shard_size=4)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "packed" / path.name).read_bytes()
    assert len(list((tmp_path / "whole").iterdir())) == len([*(tmp_path / "packed").glob("[!.]*")])
    assert all((tmp_path / "packed" / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert not (tmp_path / "packed" / PLAN).exists()


@pytest.mark.parametrize("method", ["write", "close"])
def test_a_full_disk_is_one_clear_error_and_packing_goes_on_later(photos, tmp_path, monkeypatch, method):
    class Full:
        """The writer of array_record on a disk that has no room for the second shard."""

        def __init__(self, path, options):
            self.writer, self.full = ArrayRecordWriter(path, options), "00001" in path

        def write(self, record):
            self._call("write", record)

        def close(self):
            self._call("close")

        def _call(self, name, *arguments):
            getattr(self.writer, name)(*arguments)
            if self.full and name == method:
                raise RuntimeError("write() failed: No space left on device; writing x; at byte 12288; Failed to close")

    with monkeypatch.context() as patched:
        patched.setattr(array_record_module, "ArrayRecordWriter", Full)
        with pytest.raises(DataError, match="packed cannot be written: .*No space left on device. What is packed"):
            pack(photos, tmp_path / "packed", shard_size=10)
    left = {path.name for path in (tmp_path / "packed").iterdir()}
    assert left == {"all-00000.array_record", "all-00000.array_record.json", PLAN}
    assert pack(photos, tmp_path / "packed", shard_size=10)["images"] == 25


def test_packing_refuses_what_it_would_spoil_or_cannot_take(photos, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="must be a new folder"):
        pack(photos, tmp_path / "full")
    pack(photos, tmp_path / "done")
    with pytest.raises(DataError, match="done is packed already: it holds index.json and its shards. Remove it, or give another"):
        pack(photos, tmp_path / "done")
    with pytest.raises(DataError, match="must be a folder of image files"):
        pack("fashion_mnist_mini", tmp_path / "packed")
    with pytest.raises(ValueError, match="`shard_size` must be at least 1"):
        pack(photos, tmp_path / "packed", shard_size=0)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="No image of .* can be decoded. The first: a.png: the file is empty"):
        pack(tmp_path / "broken", tmp_path / "packed")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        pack(photos, tmp_path / "file" / "packed")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "index.json").write_text("{"), "index.json cannot be read"),
        (lambda folder: _edit(folder, format_version=2), "index.json cannot be read"),
        (
            lambda folder: _edit(folder, splits={"all": [{"file": "../x", "records": 1, "bytes": 1, "sha256": "0" * 64}]}),
            "cannot be read",
        ),
        (lambda folder: (folder / "all-00001.array_record").unlink(), "all-00001.array_record is not the file of"),
        (lambda folder: os.truncate(folder / "all-00001.array_record", 100), "is not the file of"),
    ],
)
def test_shards_that_are_not_whole_are_refused(photos, tmp_path, harm, words):
    pack(photos, tmp_path / "packed", shard_size=10)
    harm(tmp_path / "packed")
    with pytest.raises(DataError, match=words):
        open_source(str(tmp_path / "packed"))


def _edit(folder, **changes):
    index = json.loads((folder / "index.json").read_text("utf-8"))
    (folder / "index.json").write_text(json.dumps({**index, **changes}))


def test_inspection_finds_shards_that_changed(photos, tmp_path):
    pack(photos, tmp_path / "packed")
    assert inspect(tmp_path / "packed")["images"] == 25
    path = next((tmp_path / "packed").glob("*.array_record"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not what its checksum says"):
        inspect(tmp_path / "packed")


def test_inspection_counts_measures_and_draws(photos, tmp_path):
    shutil.copy(BAD / "truncated.jpg", photos / "truncated.jpg")
    told = []
    result = inspect(photos, tmp_path / "sheet.png", on_progress=lambda *done: told.append(done))
    assert (result["kind"], result["splits"], result["images"], result["channels"]) == ("images", {"all": 26}, 25, 3)
    assert result["formats"] == {"jpeg": 16, "png": 9}
    assert result["height"] == {"smallest": 40, "median": 40, "largest": 40} and result["width"]["median"] == 30
    assert [bad["name"] for bad in result["bad"]] == ["truncated.jpg"] and told[-1] == (26, 26)
    pixels = np.concatenate([source["image"].reshape(-1, 3) for source in _good(open_source(str(photos), "all"))]) / 127.5 - 1
    np.testing.assert_allclose(result["mean"], pixels.mean(0), atol=1e-6)
    np.testing.assert_allclose(result["variance"], pixels.var(0), atol=1e-6)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (10 * 100 + 4, 3 * 100 + 4)


def _good(source):
    for index in range(len(source)):
        try:
            yield source[index]
        except DataError:
            pass


def test_inspection_takes_arrays_as_well():
    result = inspect("fashion_mnist_mini")
    assert (result["kind"], result["splits"], result["channels"]) == ("idx", {"train": 2000, "test": 500}, 1)
    assert result["bad"] == [] and result["sheet"] is None and result["formats"] == {"array": 2500}


def test_threads_read_shards_in_any_order(photos, tmp_path):
    pack(photos, tmp_path / "packed", shard_size=3)
    dataset = training_batches(open_source(str(tmp_path / "packed")), training_transforms(0, 16, True), 4, 3)
    for number, batch in zip(range(30), iterate(dataset, threads=4), strict=False):
        assert batch["names"] == dataset[number]["names"]
