"""What every kind of collection promises the loader, whatever lies on the disk: `kvq.data.contract`."""

import pickle
import struct
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from kvq.data import evaluation_batches, evaluation_transforms, inspect, open_source, pack, places
from kvq.data.contract import VectorSource
from kvq.data.sources import fingerprint
from kvq.data.transforms import Chain

SPLITS = ("train", "test")


def some_images(count):
    return np.random.default_rng(count).integers(0, 256, (count, 8, 6, 3), np.uint8)


def idx_set(folder, count):
    for files, images in zip(places.IDX_FILES.values(), (some_images(count), some_images(count - 1)), strict=True):
        for name, array in zip(files, (images[..., 0], np.arange(len(images), dtype=np.uint8)), strict=True):
            header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / name).write_bytes(header + array.tobytes())
    return folder


def npz_file(folder, count):
    arrays = {"x_train": some_images(count), "y_train": np.arange(count), "x_test": some_images(count - 1)}
    np.savez(folder / "set.npz", **arrays)
    return folder / "set.npz"


def image_files(folder, count):
    for split, images in zip(SPLITS, (some_images(count), some_images(count - 1)), strict=True):
        (folder / split).mkdir()
        for number, pixels in enumerate(images):
            Image.fromarray(pixels).save(folder / split / f"{number}.png")
    return folder


def packed(folder, count):
    (folder / "files").mkdir()
    pack(image_files(folder / "files", count), folder / "packed", shard_size=2)
    return folder / "packed"


# What writes a collection of each kind into a folder, and says where it is: images of one size, at least 4x4, several to train on
# and several to test on, the more the larger `count`.
COLLECTIONS = {"idx": idx_set, "npz": npz_file, "shards": packed, "images": image_files}
COUNT = 5


@pytest.fixture(params=COLLECTIONS)
def kind(request):
    return request.param


@pytest.fixture
def place(kind, tmp_path):
    return COLLECTIONS[kind](tmp_path, COUNT)


@pytest.fixture(params=SPLITS)
def source(place, request):
    opened = open_source(str(place), request.param)
    assert opened.split == request.param
    return opened


def assert_same(one, other):
    np.testing.assert_array_equal(one["image"], other["image"])
    assert (one["label"], one["name"]) == (other["label"], other["name"])


def assert_batch(batch, elements):
    assert {*batch} == {"images", "labels", "names", "skipped"} and batch["skipped"] == []
    assert (batch["images"].dtype, batch["labels"].dtype) == (np.uint8, np.int64)
    np.testing.assert_array_equal(batch["images"], [element["image"] for element in elements])
    assert batch["labels"].tolist() == [element["label"] for element in elements]
    assert batch["names"] == [element["name"] for element in elements]


def test_every_kind_has_a_row():
    assert COLLECTIONS.keys() == {*get_args(places.Kind)}


def test_it_is_recognised_and_says_what_it_is(kind, place, source):
    assert places.recognise(place) == kind and places.splits_of(place, kind) == source.splits
    assert len(source) > 1 and source.name
    inspected, images = inspect(place), sum(len(open_source(str(place), split)) for split in source.splits)
    assert (inspected["kind"], inspected["images"], inspected["channels"]) == (kind, images, source.channels)


def test_an_element_is_an_image_with_its_label_and_a_name_of_its_own(source):
    for element in source:
        assert {*element} == {"image", "label", "name"}
        assert element["image"].dtype == np.uint8 and element["image"].ndim == 3
        assert element["image"].shape[2] == source.channels
        assert type(element["label"]) is int and type(element["name"]) is str
    assert len({element["name"] for element in source}) == len(source)


def test_an_index_finds_the_same_image_every_time_and_in_every_process(place, source):
    again, elsewhere = open_source(str(place), source.split), pickle.loads(pickle.dumps(source))
    for index in reversed(range(len(source))):
        for other in (source, again, elsewhere):
            assert_same(source[index], other[index])
    # The loader's indices are NumPy's.
    assert_same(source[np.int64(1)], source[1])


def test_an_index_outside_is_refused(source):
    assert len(list(source)) == len(source)
    with pytest.raises(IndexError):
        source[len(source)]


def test_fetch_gives_what_single_elements_are(source):
    if isinstance(source, VectorSource):
        for indices in (range(len(source)), np.array([1, 0, 1])):
            assert_batch(source.fetch(indices), [source[index] for index in indices])
        with pytest.raises(IndexError):
            source.fetch([0, len(source)])


def test_the_loader_makes_batches_of_it(source):
    recipe = evaluation_transforms(pad=0, crop=4)
    batch = evaluation_batches(source, recipe, len(source))[0]
    crop = Chain(tuple(recipe))
    assert_batch(batch, [{**element, "image": crop(element["image"][None], np.empty((1, 0)))[0]} for element in source])


def test_its_identity_is_the_same_until_images_change(kind, place, source, tmp_path):
    assert fingerprint(source) == fingerprint(open_source(str(place), source.split))
    (tmp_path / "more").mkdir()
    more = open_source(str(COLLECTIONS[kind](tmp_path / "more", COUNT + 1)), source.split)
    assert fingerprint(source)["sha256"] != fingerprint(more)["sha256"]
