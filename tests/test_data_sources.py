"""What image collections promise: what is recognised, where it is looked for, what is refused and in which words."""

import gzip
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from kvq.data import places
from kvq.data.contract import VectorSource
from kvq.data.decoding import decode_image
from kvq.data.files import read_idx
from kvq.data.listing import Listing, list_images
from kvq.data.places import locate
from kvq.data.sources import ArraySource, FolderSource, check_images, listing_of, open_source
from kvq.errors import BadImageError, DataError

IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def some_images(count=5, shape=(4, 3)):
    return np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)


def idx_bytes(array, declared=None):
    shape = declared or array.shape
    return b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes()


def write_idx_set(folder, gz=True, train=5, test=2):
    folder.mkdir(parents=True, exist_ok=True)
    for (images, labels), count in zip(IDX.values(), (train, test), strict=True):
        for name, array in ((images, some_images(count)), (labels, np.arange(count, dtype=np.uint8))):
            path = folder / (f"{name}.gz" if gz else name)
            path.write_bytes(gzip.compress(idx_bytes(array), mtime=0) if gz else idx_bytes(array))
    return folder


def write_npz(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **(arrays or {"x_train": some_images(5), "x_test": some_images(2)}))
    return path


def write_image(path, size=(8, 6), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No data set of this machine is found, and nothing is downloaded."""
    monkeypatch.delenv("KVQ_DATA", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras home"))
    monkeypatch.setattr(places, "SYSTEM", tmp_path / "system")

    def offline(name):
        raise DataError(f"Could not download {name}: no network.")

    monkeypatch.setattr("kvq.download.download", offline)


# Arrays


def test_array_source_gives_single_images_with_a_channel_axis():
    images = some_images()
    source = ArraySource(images, np.arange(5, dtype=np.uint8)[:, None], name="tiny", split="train", splits=("train", "test"))
    assert (len(source), source.channels, source.name, source.split, source.splits) == (5, 1, "tiny", "train", ("train", "test"))
    assert source[3]["image"].shape == (4, 3, 1) and source[3]["image"].dtype == np.uint8
    np.testing.assert_array_equal(source[3]["image"][..., 0], images[3])
    assert (source[3]["label"], type(source[3]["label"])) == (3, int)


def test_array_source_fetches_what_it_gives_one_by_one():
    source = ArraySource(some_images(shape=(4, 3, 3)), np.arange(5))
    batch = source.fetch([4, 0, 0])
    for place, index in enumerate([4, 0, 0]):
        element = source[index]
        np.testing.assert_array_equal(batch["images"][place], element["image"])
        assert (batch["labels"][place], batch["names"][place]) == (element["label"], element["name"])
    assert len(set(source.fetch(range(5))["names"])) == 5


def test_images_without_labels_have_label_minus_one():
    source = ArraySource(some_images())
    assert source[0]["label"] == -1 and source.fetch([1, 2])["labels"].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (some_images().astype(np.float32), None, "uint8.*Received: float32"),
        (some_images(shape=(3,)), None, r"Received: uint8 \(5, 3\)"),
        (some_images(shape=(3, 32, 32)), None, r"1 to 4 channels.*\(5, 3, 32, 32\)"),
        (np.zeros((0, 4, 3), np.uint8), None, r"no side empty.*\(0, 4, 3\)"),
        (some_images(), np.arange(4), r"5 images.*Received: int64 \(4,\)"),
        (some_images(), np.arange(5.0), r"integer labels.*float64 \(5,\)"),
    ],
)
def test_arrays_of_another_kind_are_refused(images, labels, words):
    with pytest.raises(DataError, match=words):
        ArraySource(images, labels)


def test_images_of_one_size_must_hold_the_crop_with_its_padding():
    source = ArraySource(some_images(shape=(28, 28)), name="digits")
    check_images(source, crop=28)
    check_images(source, crop=36, pad=4)
    check_images(source, crop=64, resize=64)
    with pytest.raises(DataError, match=r"digits \(all\) is smaller.*28 x 28 pixels.*4 of padding, crop=37"):
        check_images(source, crop=37, pad=4)


# IDX files and .npz


@pytest.mark.parametrize("gz", [True, False])
def test_idx_files_are_read_gzipped_or_not(tmp_path, gz):
    folder = write_idx_set(tmp_path / "digits", gz)
    for split, count in (("train", 5), ("test", 2)):
        source = open_source(str(folder), split)
        assert (source.name, source.split, source.splits) == ("digits", split, ("train", "test"))
        np.testing.assert_array_equal(source.fetch(range(count))["images"][..., 0], some_images(count))
        assert source.fetch(range(count))["labels"].tolist() == list(range(count))


def test_an_unpacked_file_may_keep_its_gz_name(tmp_path):
    (tmp_path / "images.gz").write_bytes(idx_bytes(some_images()))
    np.testing.assert_array_equal(read_idx(tmp_path / "images.gz", ranks=(3,)), some_images())


WHOLE = idx_bytes(some_images())
ZIPPED = gzip.compress(WHOLE, mtime=0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "begins with 00000803. Received: no bytes"),
        (b"\x00\x00\x0d\x03" + WHOLE[4:], "begins with 00000803. Received: 00000d03"),
        (idx_bytes(some_images(shape=())), "begins with 00000803. Received: 00000801"),
        (b"<html>404</html>", "begins with 00000803. Received: 3c68746d"),
        (WHOLE[:9], "ends inside its header"),
        (WHOLE[:-7], "must hold 60 values.*Received: 53"),
        (WHOLE + b"\0", "must hold 60 values.*Received: more"),
        (idx_bytes(some_images(), declared=(2**31, 2**31, 2**31)), "must hold 9903520314283042199192993792 values.*Received: 60"),
        (ZIPPED[: len(ZIPPED) // 2], "cannot be read: Compressed file ended before the end-of-stream marker"),
        (ZIPPED[:-6] + b"\0\0" + ZIPPED[-4:], "cannot be read: CRC check failed"),
        (ZIPPED + b"junk", "cannot be read: Not a gzipped file"),
        (gzip.compress(WHOLE + b"\0", mtime=0), "must hold 60 values.*Received: more"),
    ],
)
def test_a_broken_idx_file_is_named_with_what_is_wrong(tmp_path, content, words):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{path} .*{words}"):
        read_idx(path, ranks=(3,))


def test_labels_that_do_not_belong_to_the_images_are_refused(tmp_path):
    folder = write_idx_set(tmp_path)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(idx_bytes(np.arange(4, dtype=np.uint8)))
    with pytest.raises(DataError, match="train-images.*5 images need as many integer labels.*uint8"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("as_file", [True, False])
def test_one_npz_is_a_collection_alone_or_in_its_folder(tmp_path, as_file):
    arrays = {"x_train": some_images(5), "y_train": np.arange(5)[:, None], "x_test": some_images(2)}
    path = write_npz(tmp_path / "patterns" / "patterns.npz", **arrays, class_names=np.array(["a", "b"]))
    train, test = (open_source(str(path if as_file else path.parent), split) for split in ("train", "test"))
    assert (train.name, train.splits, train[4]["label"], test[1]["label"]) == ("patterns", ("train", "test"), 4, -1)
    np.testing.assert_array_equal(test[1]["image"][..., 0], arrays["x_test"][1])


def test_an_npz_without_test_images_offers_train_alone(tmp_path):
    path = write_npz(tmp_path / "a.npz", x_train=some_images())
    assert open_source(str(path)).splits == ("train",)
    with pytest.raises(DataError, match="a offers the splits train. Received: split=test"):
        open_source(str(path), "test")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x_train": some_images().astype(np.int64)}, "uint8.*Received: int64"),
        ({"x_train": some_images(), "y_train": np.arange(3)}, "5 images need as many integer labels"),
        ({"images": some_images()}, "must hold x_train or x_test. Received: images"),
        ({"x_train": np.array([{}, {}])}, "cannot be read: Object arrays cannot be loaded"),
    ],
)
def test_a_wrong_npz_is_named_with_what_is_wrong(tmp_path, arrays, words):
    path = write_npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=f"^{path}:? .*{words}"):
        open_source(str(path))


def test_a_cut_or_corrupt_npz_is_refused(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(DataError, match=f"{path} must be an .npz.*a part of one"):
        open_source(str(path))
    at = whole.index(some_images(5).tobytes())
    path.write_bytes(whole[:at] + b"\0\0\0\0" + whole[at + 4 :])
    with pytest.raises(DataError, match=f"{path} cannot be read: Bad CRC-32"):
        open_source(str(path))


def test_an_npz_that_declares_more_than_memory_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 1000000, 28), }"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(DataError, match=f"{path} cannot be read"):
        open_source(str(path))


# Folders of images


def test_a_folder_is_searched_deeply_in_the_order_of_its_paths(tmp_path):
    for name in ("b.png", "a/z.JPEG", "a/a.tif", "a/deep/x.webp", "B.bmp", "it's ünï 画像.gif"):
        write_image(tmp_path / name)
    for name in (".hidden.png", ".cache/a.png", "__MACOSX/a.png", "a/._z.png", "notes.txt", "a/no_suffix"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert list(list_images(tmp_path)) == ["B.bmp", "a/a.tif", "a/deep/x.webp", "a/z.JPEG", "b.png", "it's ünï 画像.gif"]
    source = open_source(str(tmp_path), "all")
    assert (len(source), source.channels, source.splits, source.name) == (6, 3, ("all",), tmp_path.name)
    assert not isinstance(source, VectorSource)
    for index in range(6):
        element = source[index]
        assert element["image"].shape == (6, 8, 3) and element["image"].dtype == np.uint8 and element["label"] == -1
    assert source[2]["name"] == "a/deep/x.webp"


@pytest.mark.parametrize("held_out", ["val", "validation", "test", "val2017"])
def test_folders_called_after_splits_are_the_splits(tmp_path, held_out):
    train = "train2017" if held_out == "val2017" else "train"
    for name in (f"{train}/cat/1.png", f"{train}/2.png", f"{held_out}/3.png", "elsewhere/4.png"):
        write_image(tmp_path / name)
    train_source, test_source = (open_source(str(tmp_path), split) for split in ("train", "test"))
    assert train_source.splits == test_source.splits == ("train", "test")
    assert [element["name"] for element in train_source] == [f"{train}/2.png", f"{train}/cat/1.png"]
    assert [element["name"] for element in test_source] == [f"{held_out}/3.png"]
    with pytest.raises(DataError, match="offers the splits train, test. Received: split=all"):
        open_source(str(tmp_path), "all")


def test_a_flat_folder_holds_out_every_twentieth_image(tmp_path):
    for number in range(41):
        write_image(tmp_path / f"{number:02d}.png", size=(1, 1))
    names = {split: [e["name"] for e in open_source(str(tmp_path), split)] for split in ("train", "test", "all")}
    assert names["test"] == ["00.png", "20.png", "40.png"]
    assert len(names["train"]) == 38 and sorted(names["train"] + names["test"]) == names["all"]
    with pytest.raises(DataError, match="train, test, all. Received: split=validation"):
        open_source(str(tmp_path), "validation")


@pytest.mark.parametrize("count", [1, 2])
def test_even_the_smallest_folder_has_images_in_both_splits(tmp_path, count):
    for number in range(count):
        write_image(tmp_path / f"{number}.png")
    assert [len(open_source(str(tmp_path), split)) for split in ("train", "test")] == [1, 1]


def test_an_empty_list_of_files_is_refused(tmp_path):
    with pytest.raises(DataError, match="No images in .*Looked for .jpg"):
        FolderSource(tmp_path, [])


def test_a_folder_needs_one_image_that_decodes(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no picture")
    source = FolderSource(tmp_path, list_images(tmp_path))
    with pytest.raises(DataError, match=f"No image of {tmp_path.name} .all. can be decoded, all 2 were tried. The first: a.png"):
        check_images(source, crop=1)
    write_image(tmp_path / "b.png")
    check_images(source, crop=1)


# Lists of files


def test_a_list_is_a_sequence_in_the_order_of_bytes_and_survives_its_file(tmp_path):
    names = ["a/b.png", "B.png", "it's ünï 画像.gif", "new\nline.png", "a.png"]
    for name in names:
        write_image(tmp_path / name)
    (tmp_path / os.fsdecode(b"not utf-8 \xff.png")).write_bytes(b"")
    listing = list_images(tmp_path)
    assert list(listing) == sorted([*names, os.fsdecode(b"not utf-8 \xff.png")], key=os.fsencode)
    assert (listing[-1], listing[1:3]) == (list(listing)[-1], list(listing)[1:3])
    with pytest.raises(IndexError):
        listing[6]
    assert list(listing.where(np.arange(6) % 2 == 0)) == list(listing)[::2]
    assert pickle.loads(pickle.dumps(listing)) == listing
    (tmp_path / "list").write_bytes(listing.to_bytes(folder="here", split="train"))
    assert Listing.read(tmp_path / "list", folder="here", split="train") == listing
    assert Listing.read(tmp_path / "list", split="train") == listing
    assert Listing.read(tmp_path / "list", folder="there", split="train") is None
    assert Listing.read(tmp_path / "missing", folder="here", split="train") is None
    (tmp_path / "list").write_bytes(listing.to_bytes(folder="here", split="train")[:-3])
    assert Listing.read(tmp_path / "list", folder="here", split="train") is None, "a part of a list"


def test_a_kept_list_is_taken_instead_of_a_walk(tmp_path):
    for number in range(3):
        write_image(tmp_path / "photos" / f"{number}.png")
    source = open_source(str(tmp_path / "photos"), "all")
    (tmp_path / "list").write_bytes(listing_of(source))
    write_image(tmp_path / "photos" / "3.png")
    assert list(open_source(str(tmp_path / "photos"), "all", listing=tmp_path / "list").names) == ["0.png", "1.png", "2.png"]
    assert len(open_source(str(tmp_path / "photos"), "all", listing=tmp_path / "none")) == 4
    assert listing_of(ArraySource(some_images())) is None


def test_a_pipe_is_a_bad_file_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadImageError, match="it is not a regular file"):
        decode_image(tmp_path / "a.png")


def test_links_to_folders_are_not_followed(tmp_path):
    write_image(tmp_path / "photos/a.png")
    (tmp_path / "photos/again.png").symlink_to(tmp_path / "photos", target_is_directory=True)
    (tmp_path / "photos/b.png").symlink_to(tmp_path / "photos/a.png")
    assert list(list_images(tmp_path / "photos")) == ["a.png", "b.png"]


# Decoding


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 128, 129, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png").tolist() == [[[v] * 3 for v in (0, 0, 1, 128, 255)]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.array([[0, 70000]], dtype)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="8 or 16 bits? are allowed|8 or 16 are allowed"):
        decode_image(tmp_path / "a.tif")


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "a.png", size=(2, 5), exif=exif)
    write_image(tmp_path / "b.png", size=(2, 5))
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png"), np.rot90(decode_image(tmp_path / "b.png"), -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_three_channels(tmp_path, mode):
    path = write_image(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), mode=mode)
    assert decode_image(path).shape == (6, 8, 3)


def test_transparency_is_dropped_not_mixed_in(tmp_path):
    pixels = np.array([[[200, 100, 50, 0], [10, 20, 30, 128]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png").tolist() == [[[200, 100, 50], [10, 20, 30]]]
    palette = Image.new("P", (1, 1))
    palette.putpalette([200, 100, 50])
    palette.save(tmp_path / "b.png", transparency=b"\x07")
    assert decode_image(tmp_path / "b.png").tolist() == [[[200, 100, 50]]]


def test_a_truncated_image_is_an_error_with_its_name(tmp_path):
    for name in ("a.jpg", "a.png"):
        path = write_image(tmp_path / name, size=(64, 64))
        path.write_bytes(path.read_bytes()[:-1500])
        with pytest.raises(DataError, match=f"^{path} cannot be decoded: .*([Tt]runcated|Premature end)"):
            decode_image(path)


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [47, 23])
def test_more_pixels_than_pil_allows_are_an_error(tmp_path, monkeypatch, limit):
    """PIL itself only warns up to twice its limit."""
    path = write_image(tmp_path / "a.png", size=(8, 6))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48)
    assert decode_image(path).shape == (6, 8, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=f"^{path} cannot be decoded: .*(at most|exceeds limit of)"):
        if limit > 23:
            with pytest.warns(Image.DecompressionBombWarning):
                decode_image(path)
        else:
            decode_image(path)


# Where things are looked for


def test_the_shipped_images_are_found_and_whole():
    train, test = (open_source("fashion_mnist_mini", split) for split in ("train", "test"))
    assert (len(train), len(test), train.name, train.channels) == (2000, 500, "fashion_mnist_mini", 1)
    assert train[0]["image"].shape == (28, 28, 1)
    assert np.bincount(train.fetch(range(2000))["labels"]).tolist() == [200] * 10
    assert np.bincount(test.fetch(range(500))["labels"]).tolist() == [50] * 10


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", "KVQ_DATA/mnist"),
        ("mnist", "keras home/datasets/mnist.npz"),
        ("mnist", "keras home/datasets/kvq/mnist.npz"),
        ("fashion_mnist", "keras home/datasets/fashion-mnist"),
        ("fashion_mnist", "system/fashion-mnist"),
        ("cifar10", "KVQ_DATA/cifar10"),
    ],
)
def test_known_names_are_found_in_their_places(tmp_path, monkeypatch, name, place):
    monkeypatch.setenv("KVQ_DATA", str(tmp_path / "KVQ_DATA"))
    path = write_npz(tmp_path / place) if place.endswith(".npz") else write_idx_set(tmp_path / place)
    assert places.find(name) == locate(name) == path
    assert open_source(name).name == name


def test_the_users_own_folder_comes_before_the_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("KVQ_DATA", str(tmp_path / "KVQ_DATA"))
    write_npz(tmp_path / "keras home/datasets/mnist.npz")
    own = write_idx_set(tmp_path / "KVQ_DATA" / "mnist")
    assert locate("mnist") == own


def test_an_incomplete_folder_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("KVQ_DATA", str(tmp_path / "KVQ_DATA"))
    partial = write_idx_set(tmp_path / "KVQ_DATA" / "mnist")
    (partial / "t10k-images-idx3-ubyte.gz").unlink()
    whole = write_npz(tmp_path / "keras home/datasets/mnist.npz")
    assert locate("mnist") == whole


def test_finding_downloads_nothing(monkeypatch):
    monkeypatch.setattr("kvq.download.download", lambda name: pytest.fail("tried to download"))
    found = [name for name in places.KNOWN if places.find(name)]
    assert found == ["fashion_mnist_mini"]


def test_the_last_resort_is_the_download(monkeypatch, tmp_path):
    asked = []
    path = write_npz(tmp_path / "fetched.npz")
    monkeypatch.setattr("kvq.download.download", lambda name: asked.append(name) or path)
    assert open_source("cifar10").name == "cifar10"
    assert asked == ["cifar10"]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_a_set_that_is_nowhere_tells_every_place_and_how_to_get_it(tmp_path, monkeypatch, name):
    monkeypatch.setenv("KVQ_DATA", str(tmp_path / "KVQ_DATA"))
    with pytest.raises(DataError) as caught:
        open_source(name)
    message = str(caught.value)
    dashed = name.replace("_", "-")
    for place in (f"KVQ_DATA/{name}", f"keras home/datasets/kvq/{name}.npz", f"system/{dashed}"):
        assert str(tmp_path / place) in message
    assert "no network" in message and f"$KVQ_DATA/{name}" in message
    assert ("dataset-fashion-mnist" in message) == (name == "fashion_mnist")


def test_data_overrides_where_a_known_set_is_looked_for(tmp_path):
    mine = write_idx_set(tmp_path / "mine")
    inside = write_idx_set(tmp_path / "collection" / "mnist")
    write_image(tmp_path / "collection" / "a.png")
    assert locate("mnist", mine) == mine
    assert locate("mnist", tmp_path / "collection") == inside
    assert locate("photos/that/are/not/here", mine) == mine
    write_idx_set(mine / "mnist")
    assert locate("mnist", mine) == mine, "what the user names comes before what lies in it"
    assert open_source("mnist", data=mine).name == "mine"
    assert open_source("mnist", data=str(tmp_path / "collection")).name == "mnist"


def test_data_may_name_another_known_set_or_a_folder_of_images(tmp_path):
    assert open_source("mnist", data="fashion_mnist_mini").name == "fashion_mnist_mini"
    write_image(tmp_path / "a.png")
    assert isinstance(open_source("mnist", data=tmp_path), FolderSource)


def test_data_without_images_never_falls_back_to_another_place(tmp_path, monkeypatch):
    write_npz(tmp_path / "keras home/datasets/mnist.npz")
    monkeypatch.setattr("kvq.download.download", lambda name: pytest.fail("tried to download"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"No images in .*empty. Looked for train.*npz.*index.json.*\.jpg.*`kvq doctor` lists"):
        open_source("mnist", data=tmp_path / "empty")
    with pytest.raises(DataError, match="No file or folder .*missing"):
        open_source("mnist", data=tmp_path / "missing")


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(DataError, match="No file or folder fashion_mnst. Did you mean `fashion_mnist`?"):
        open_source("fashion_mnst")
    with pytest.raises(DataError, match="No file or folder /nonexistent/photos. Known names: fashion_mnist_mini"):
        open_source("/nonexistent/photos")


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    path = write_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=f"must be an .npz. Received: {path}. Name the folder"):
        open_source(str(path))


def test_of_several_kinds_idx_comes_first_then_npz_then_images(tmp_path):
    write_image(tmp_path / "a.png")
    assert places.recognise(tmp_path) == "images"
    write_npz(tmp_path / "features.npz", embeddings=np.zeros(3))
    assert places.recognise(tmp_path) == "images", "an .npz of something else hides the images"
    write_npz(tmp_path / "features.npz")
    assert places.recognise(tmp_path) == "npz"
    write_idx_set(tmp_path)
    assert places.recognise(tmp_path) == "idx"


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_idx_set(tmp_path / "digits")
    assert len(open_source("~/digits")) == len(open_source("mnist", data="~/digits")) == 5


def test_opening_a_collection_imports_neither_keras_nor_grain():
    """Grain's workers import this package; a backend in each of them would cost seconds and memory."""
    program = (
        "import sys; from kvq.data import open_source, training_transforms; open_source('fashion_mnist_mini')\n"
        "heavy = {'keras', 'tensorflow', 'torch', 'jax', 'grain'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from kvq.data import training_batches\n"
        "heavy -= {'jax', 'grain'}\n"  # Grain itself imports jax
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
