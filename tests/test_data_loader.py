"""What batches promise: batch k follows from the seed, k, the batch size and the files, and from nothing else."""

import itertools
import os
import pickle
import subprocess
import sys

import grain
import numpy as np
import pytest
from PIL import Image

from kvq.data import ArraySource, FolderSource, as_grain, evaluation_batches, evaluation_transforms, iterate, training_batches
from kvq.data.contract import VectorSource
from kvq.data.listing import list_images
from kvq.data.transforms import Chain, RandomCrop, RandomFlip, training_transforms, uniform_numbers
from kvq.errors import DataError

COUNT, BATCH = 40, 7  # the batch does not divide the epoch
RECIPE = training_transforms(pad=2, crop=10, flip=True)


class OneByOne:
    """A source that has no `fetch`, as files have none, and counts what is read of it."""

    def __init__(self, source):
        self.source, self.reads = source, 0
        self.name, self.split, self.splits, self.channels = source.name, source.split, source.splits, source.channels

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.reads += 1
        return self.source[index]


@pytest.fixture
def arrays():
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 12, 12, 3), np.uint8)
    return ArraySource(images, np.arange(COUNT), name="noise")


@pytest.fixture
def folder(tmp_path):
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 14, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    return FolderSource(tmp_path, list_images(tmp_path))


def assert_same(one, other):
    np.testing.assert_array_equal(one["images"], other["images"])
    np.testing.assert_array_equal(one["labels"], other["labels"])
    assert list(one["names"]) == list(other["names"])


def labels_of(dataset, count):
    """The first `count` labels of the stream, which the fixture makes the images' numbers."""
    batches = (dataset[k]["labels"] for k in range(-(-count // BATCH)))
    return np.concatenate(list(batches))[:count]


@pytest.mark.parametrize("kind", ["arrays", "folder"])
def test_a_batch_has_images_labels_and_names(kind, request):
    source = request.getfixturevalue(kind)
    batch = training_batches(source, RECIPE, BATCH, seed=1)[3]
    assert set(batch) == {"images", "labels", "names", "skipped"} and batch["skipped"] == []
    assert (batch["images"].shape, batch["images"].dtype) == ((BATCH, 10, 10, 3), np.uint8)
    assert (batch["labels"].shape, batch["labels"].dtype, len(batch["names"])) == ((BATCH,), np.int64, BATCH)


@pytest.mark.parametrize("kind", ["arrays", "folder"])
@pytest.mark.parametrize("threads", [0, 1, 4, None])
@pytest.mark.parametrize("start", [0, 9])
def test_batch_k_depends_neither_on_threads_nor_on_where_one_starts(kind, threads, start, request):
    dataset = training_batches(request.getfixturevalue(kind), RECIPE, BATCH, seed=1)
    for number, batch in zip(range(start, start + 8), iterate(dataset, start, threads), strict=False):
        assert_same(batch, dataset[number])


def test_batches_are_the_same_in_another_pipeline_and_after_pickling(arrays):
    dataset = training_batches(arrays, RECIPE, BATCH, seed=1)
    assert_same(dataset[5], training_batches(arrays, RECIPE, BATCH, seed=1)[5])
    for source in (arrays, OneByOne(arrays)):
        pipeline = pickle.loads(pickle.dumps(training_batches(source, RECIPE, BATCH, seed=1)))
        assert_same(pipeline[5], dataset[5])


def test_starting_late_reads_nothing_of_what_lies_before(arrays):
    source = OneByOne(arrays)
    next(iterate(training_batches(source, RECIPE, BATCH, seed=1), start=100_000, threads=0))
    assert source.reads == BATCH


def test_whole_batches_and_single_elements_give_the_same_bits(arrays):
    """Two ways through the loader, chosen by what the source offers."""
    assert isinstance(arrays, VectorSource) and not isinstance(OneByOne(arrays), VectorSource)
    whole = training_batches(arrays, RECIPE, BATCH, seed=3)
    singly = training_batches(OneByOne(arrays), RECIPE, BATCH, seed=3)
    for number in (0, 1, 5, 6, 1000):
        assert_same(whole[number], singly[number])
    recipe = evaluation_transforms(pad=0, crop=9)
    for one, other in zip(evaluation_batches(arrays, recipe, 16), evaluation_batches(OneByOne(arrays), recipe, 16), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("wrap", [lambda source: source, OneByOne])
def test_crops_and_flips_follow_from_seed_and_place_in_the_stream(arrays, wrap):
    batch = training_batches(wrap(arrays), RECIPE, BATCH, seed=3)[8]
    places = 8 * BATCH + np.arange(BATCH)
    chain = Chain(RECIPE)
    expected = chain(arrays.fetch(batch["labels"])["images"], uniform_numbers(3, places, chain.draws))
    np.testing.assert_array_equal(batch["images"], expected)


def test_every_epoch_has_every_image_once_in_an_order_of_its_own(arrays):
    epochs = labels_of(training_batches(arrays, RECIPE, BATCH, seed=1), 5 * COUNT).reshape(5, COUNT)
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    orders = [tuple(epoch) for epoch in epochs] + [tuple(range(COUNT))]
    assert len(set(orders)) == 6
    matches = [np.mean(a == b) for a, b in itertools.combinations(epochs, 2)]
    assert np.mean(matches) < 0.1, "orders of different epochs resemble each other"


def test_another_seed_gives_another_order_and_other_crops(arrays):
    one, other = (training_batches(arrays, RECIPE, BATCH, seed) for seed in (1, 2))
    assert not np.array_equal(labels_of(one, COUNT), labels_of(other, COUNT))
    second_of_one = labels_of(one, 2 * COUNT)[COUNT:]
    assert not np.array_equal(second_of_one, labels_of(other, COUNT)), "seed 2 must not repeat seed 1 an epoch later"


def test_an_image_is_cropped_differently_in_each_epoch(arrays):
    source = ArraySource(arrays.fetch([0])["images"], name="one")
    dataset = training_batches(source, training_transforms(pad=4, crop=10, flip=False), 1, seed=0)
    assert len({dataset[epoch]["images"].tobytes() for epoch in range(20)}) > 10


def test_a_training_batch_may_be_the_whole_source_but_not_more(arrays):
    assert sorted(training_batches(arrays, RECIPE, COUNT, seed=0)[7]["labels"]) == list(range(COUNT))
    with pytest.raises(DataError, match="a batch size of 41 and 40 images in noise"):
        training_batches(arrays, RECIPE, COUNT + 1, seed=0)


@pytest.mark.parametrize("threads", [0, 4])
@pytest.mark.parametrize("kind", ["arrays", "folder"])
def test_evaluation_keeps_the_order_and_the_ragged_last_batch(kind, threads, request):
    source = request.getfixturevalue(kind)
    dataset = evaluation_batches(source, evaluation_transforms(pad=0, crop=10), 16)
    batches = list(iterate(dataset, threads=threads))
    assert len(dataset) == 3 and [len(batch["images"]) for batch in batches] == [16, 16, 8]
    names = [name for batch in batches for name in batch["names"]]
    assert names == [source[index]["name"] for index in range(COUNT)]
    np.testing.assert_array_equal(batches[2]["images"][7], Chain(evaluation_transforms(0, 10))(
        source[39]["image"][None], np.zeros((1, 0)))[0])  # fmt: skip
    assert [len(batch["images"]) for batch in iterate(dataset, start=2, threads=threads)] == [8]
    assert list(iterate(dataset, start=3, threads=threads)) == []


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1]), (16, [16]), (20, [16, 4]), (1000, [16, 16, 8]), (None, [16, 16, 8])])
def test_evaluation_can_stop_after_so_many_images(arrays, limit, sizes):
    dataset = evaluation_batches(arrays, evaluation_transforms(pad=0, crop=10), 16, limit)
    assert [len(batch["images"]) for batch in dataset] == sizes
    assert dataset[0]["labels"][0] == 0


def test_an_evaluation_batch_may_exceed_the_source(arrays):
    assert len(evaluation_batches(arrays, evaluation_transforms(0, 10), 4 * COUNT)[0]["images"]) == COUNT


def test_only_decoding_is_given_threads(arrays, folder, monkeypatch):
    """Handing over a batch between threads costs more than to cut it out of an array."""
    asked = []
    options = grain.ReadOptions

    def record(**kwargs):
        asked.append(kwargs["num_threads"])
        return options(**kwargs)

    monkeypatch.setattr("kvq.data.loader.grain.ReadOptions", record)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    next(iterate(training_batches(arrays, RECIPE, BATCH, seed=0)))
    next(iterate(training_batches(folder, RECIPE, BATCH, seed=0)))
    next(iterate(evaluation_batches(folder, evaluation_transforms(0, 10), BATCH).map(lambda batch: batch["images"])))
    assert asked == [0, 6, 6]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda source: training_batches(source, RECIPE, 0, seed=0), "`batch_size` must be at least 1. Received: batch_size=0"),
        (lambda source: training_batches(source, RECIPE, 4, seed=-1), r"`seed` must be in \[0, 2\*\*32\). Received: seed=-1"),
        (lambda source: training_batches(source, RECIPE, 4, seed=2**32), "Received: seed=4294967296"),
        (lambda source: evaluation_batches(source, RECIPE, 4), "only transforms without random numbers.*RandomCrop"),
        (lambda source: evaluation_batches(source, (), 4, limit=0), "`limit` must be at least 1"),
        (lambda source: iterate(evaluation_batches(source, (), 4), start=-1), "Received: start=-1"),
    ],
)
def test_numbers_out_of_their_range_are_refused(arrays, make, words):
    with pytest.raises(ValueError, match=words):
        make(arrays)


@pytest.mark.slow  # starting processes takes seconds
@pytest.mark.parametrize("workers", [2, 8])
def test_worker_processes_give_the_same_batches_and_import_no_backend(tmp_path, workers):
    """In a process of its own: Grain's workers start anew from the main module."""
    for number in range(COUNT):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 14, 3), np.uint8)).save(
            tmp_path / f"{number:02d}.png"
        )
    (tmp_path / "05.png").write_bytes(b"")
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import sys
import grain
from absl import flags
from kvq.data import open_source, training_batches, training_transforms

class Backends(grain.transforms.Map):
    def map(self, batch):
        return {{**batch, "backends": sorted({{"tensorflow", "torch", "keras"}} & set(sys.modules))}}

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    dataset = training_batches(open_source({str(tmp_path)!r}, "all"), training_transforms(0, 10, True), 7, 1)
    options = grain.multiprocessing.MultiprocessingOptions(num_workers={workers})
    batches = iter(dataset.map(Backends()).to_iter_dataset().mp_prefetch(options))
    for number in range(12):
        batch, expected = next(batches), dataset[number]
        assert (batch["images"] == expected["images"]).all() and batch["names"] == expected["names"]
        assert batch["skipped"] == expected["skipped"] and batch["backends"] == [], batch["backends"]
"""
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, str(program)], check=True, env=environment, timeout=300)


def test_a_transform_works_in_grain_pipelines_of_ones_own(arrays):
    """With Grain's own generator; the rest of the element stays."""
    elements = grain.MapDataset.source([arrays[i] for i in range(4)]).seed(3).random_map(as_grain(RandomCrop(10)))
    assert [element["label"] for element in elements] == [0, 1, 2, 3]
    for element in elements:
        windows = np.lib.stride_tricks.sliding_window_view(arrays[element["label"]]["image"], (10, 10, 3))
        assert (windows == element["image"]).all(axis=(-3, -2, -1)).any()
    flipped = grain.MapDataset.source([arrays[i] for i in range(40)]).seed(3).random_map(as_grain(RandomFlip()))
    turned = [not np.array_equal(element["image"], arrays[element["label"]]["image"]) for element in flipped]
    assert 8 < sum(turned) < 32
