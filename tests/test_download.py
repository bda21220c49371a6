"""What the download promises: a whole file or none, and one kind of error. Nothing here touches the network."""

import os

import keras
import numpy as np
import pytest

from kvq.data.sources import open_source
from kvq.download import download, keras_cache
from kvq.errors import DataError

IMAGES, LABELS = np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4), np.arange(5, dtype=np.uint8)[:, None]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("KVQ_DATA", raising=False)
    monkeypatch.setattr("kvq.data.places.SYSTEM", tmp_path / "system")
    return tmp_path / "datasets" / "kvq"


def let_keras_give(monkeypatch, name, images=IMAGES, error=None):
    def load_data():
        print("Downloading data")
        if error:
            raise error
        return (images, LABELS), (images[:2], LABELS[:2])

    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", load_data)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_what_keras_gives_is_kept_and_opened_from_then_on(monkeypatch, cache, name, capsys):
    let_keras_give(monkeypatch, name)
    source = open_source(name, "train")
    assert (source.name, len(source), source[3]["label"]) == (name, 5, 3)
    np.testing.assert_array_equal(source[3]["image"][..., 0], IMAGES[3])
    assert os.listdir(cache) == [f"{name}.npz"]
    with np.load(cache / f"{name}.npz") as arrays:
        assert {key: array.shape[:1] for key, array in arrays.items() if array.ndim == 1} == {"y_train": (5,), "y_test": (2,)}
    let_keras_give(monkeypatch, name, error=AssertionError("downloaded twice"))
    assert len(open_source(name, "test")) == 2
    assert capsys.readouterr().out == "", "stdout belongs to the command's result"


def test_channels_come_last_whatever_keras_json_says(monkeypatch):
    let_keras_give(monkeypatch, "cifar10", images=np.zeros((5, 3, 32, 32), np.uint8))
    assert open_source("cifar10")[0]["image"].shape == (32, 32, 3)


@pytest.mark.parametrize("error", [Exception("URL fetch failure"), OSError("No space left"), ValueError("bad hash")])
def test_every_failure_is_a_data_error_and_leaves_no_file(monkeypatch, cache, error):
    let_keras_give(monkeypatch, "mnist", error=error)
    with pytest.raises(DataError, match=f"Could not download mnist: {error}"):
        download("mnist")
    assert not cache.exists()


def test_a_failure_while_writing_leaves_what_was_there(monkeypatch, cache):
    let_keras_give(monkeypatch, "mnist")
    path = download("mnist")
    before = path.read_bytes()

    def half(file, **arrays):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(DataError, match="Could not download mnist: No space left on device"):
        download("mnist")
    assert os.listdir(cache) == ["mnist.npz"] and path.read_bytes() == before


def test_the_file_gets_its_name_only_when_it_is_whole(monkeypatch, cache):
    def before_the_rename(part, target):
        with np.load(part) as arrays:
            assert set(arrays) == {"x_train", "y_train", "x_test", "y_test"}
        assert not os.path.exists(target)
        raise OSError("killed")

    let_keras_give(monkeypatch, "mnist")
    monkeypatch.setattr(os, "replace", before_the_rename)
    with pytest.raises(DataError, match="Could not download mnist: killed"):
        download("mnist")
    assert os.listdir(cache) == []


def test_locating_a_set_that_cannot_be_downloaded_tells_how_else_to_get_it(monkeypatch):
    let_keras_give(monkeypatch, "fashion_mnist", error=Exception("no network"))
    with pytest.raises(DataError, match="Looked for it in .*not download fashion_mnist: no network. Install .*dataset-fashion"):
        open_source("fashion_mnist")


def test_where_no_answer_came_the_reason_is_told_once_and_the_ways_out_after_it(monkeypatch):
    failure = "URL fetch failure on https://x.org/c.gz"
    let_keras_give(monkeypatch, "cifar10", error=Exception(f"{failure}: None -- [Errno -2] Name unknown"))
    told = r"Could not download cifar10: https://x.org/c.gz: \[Errno -2\] Name unknown. Name an .npz .* by --data, or put it into"
    with pytest.raises(DataError, match=told):
        open_source("cifar10")
    let_keras_give(monkeypatch, "cifar10", error=Exception(f"{failure}: 404 -- Not Found"))
    with pytest.raises(DataError, match="cifar10: https://x.org/c.gz: 404 -- Not Found. Name an"):
        open_source("cifar10")


def test_only_the_three_sets_can_be_downloaded():
    with pytest.raises(DataError, match="Only mnist, fashion_mnist, cifar10 can be downloaded.$"):
        download("imagenet")


def test_the_cache_is_where_keras_keeps_its_own(monkeypatch, tmp_path):
    assert keras_cache() == tmp_path / "datasets"
    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert keras_cache() == tmp_path / "home" / ".keras" / "datasets"
