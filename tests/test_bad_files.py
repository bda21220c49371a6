"""What broken, hostile and odd files do: to the decoder, to batches, and to a run. The files lie in tests/data/bad_images."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvq.bad_files import BadFiles
from kvq.build import build_model
from kvq.config import load_config
from kvq.data import (
    FolderSource,
    evaluation_batches,
    evaluation_transforms,
    iterate,
    open_source,
    training_batches,
    training_transforms,
)
from kvq.data.decoding import decode, decode_image
from kvq.data.listing import list_images
from kvq.data.skipped import read_names, to_lines, written
from kvq.data.transforms import Chain, hashed, uniform_numbers
from kvq.errors import BadImageError, DataError
from kvq.evaluation import measure
from kvq.run import Run
from kvq.run_images import open_images
from kvq.training import train

BAD = Path(__file__).parent / "data" / "bad_images"
EXPECTED = {row["filename"]: row for row in csv.DictReader((BAD / "expected.csv").read_text("utf-8").splitlines())}
DRAWN = [
    name for name, row in EXPECTED.items() if row["should_decode"] == "yes" and name not in ("one_pixel.png", "wide_4000x3.png")
]
# Pixels of the drawn picture (row, column) and the channel that is largest there.
RED, GREEN, BLUE = (30, 30), (30, 125), (100, 25)


def pattern(number, size=(20, 16)):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Forty small images of which numbers 3, 4 and 17 are bad."""
    path = tmp_path / "photos"
    path.mkdir()
    for number in range(40):
        pattern(number).save(path / f"{number:02d}.png")
    (path / "03.png").write_bytes(b"")
    (path / "04.png").write_text("no picture")
    (path / "17.png").write_bytes((path / "17.png").read_bytes()[:200])
    return path


@pytest.fixture(scope="module")
def model():
    """A small model for 16x16 colour images."""
    config = small_config("fashion_mnist_mini")
    return build_model(config.model, config.quantizer, config.loss, channels=3, precision="float32")


def source_of(path):
    return FolderSource(path, list_images(path))


# The decoder


def test_every_file_is_expected_and_there():
    assert len(EXPECTED) == 29 and {path.name for path in BAD.iterdir()} == {*EXPECTED, "expected.csv"}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_file_decodes_or_is_refused_as_expected(name):
    row = EXPECTED[name]
    if row["should_decode"] == "no":
        with pytest.raises(BadImageError, match=f"^{name} cannot be decoded: .*Remove or replace it.$") as caught:
            decode_image(BAD / name, name)
        assert caught.value.name == name and caught.value.reason
        return
    pixels = decode_image(BAD / name)
    size = (int(row["height"]), int(row["width"]))
    assert pixels.shape == (*(size[::-1] if "exif" in name else size), 3) and pixels.dtype == np.uint8


@pytest.mark.parametrize("name", DRAWN)
def test_the_picture_is_upright_and_its_colours_are_right(name):
    pixels = decode_image(BAD / name).astype(int)
    grey = name in ("gray.jpg", "gray16.png", "bilevel.png")
    for place, channel in ((RED, 0), (GREEN, 1), (BLUE, 2)):
        values = pixels[place]
        if grey:
            assert len(set(values.tolist())) == 1
        else:
            assert values.argmax() == channel and values[channel] > values.sum() / 2, (place, values)


def test_the_pixels_are_those_of_pillow():
    """Of every file that Pillow reads as plain RGB: a faster decoder must not be another one."""
    for name in DRAWN:
        with Image.open(BAD / name) as image:
            if image.mode == "RGB" and "exif" not in name:
                np.testing.assert_array_equal(decode_image(BAD / name), np.asarray(image), err_msg=name)


def test_sixteen_bits_span_the_whole_range():
    pixels = decode_image(BAD / "gray16.png")
    assert (pixels.min(), pixels.max()) == (round(16091 / 257), round(64514 / 257))
    assert decode_image(BAD / "one_pixel.png").tolist() == [[[200, 100, 50]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpeg", "png"])
def test_every_orientation_is_turned_upright(orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16, 0] = upright[16:, :16, 1] = upright[:16, 16:, 2] = 255
    # What a camera held that way stores: the inverse of what the viewer does.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    file = io.BytesIO()
    options = {"quality": 100, "subsampling": 0} if suffix == "jpeg" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(file, suffix, exif=exif, **options)
    decoded = decode(file.getvalue(), "x").astype(int)
    assert decoded.shape == upright.shape and abs(decoded - upright).max() < 8


def test_a_file_that_is_gone_is_a_bad_file(tmp_path):
    with pytest.raises(BadImageError, match="gone.jpg cannot be decoded: No such file"):
        decode_image(tmp_path / "gone.jpg")


# Batches


def test_training_replaces_bad_files_by_what_follows_from_seed_epoch_index_and_attempt(folder):
    source, recipe = source_of(folder), training_transforms(0, 16, True)
    dataset = training_batches(source, recipe, 8, seed=5)
    skipped, chain = [], Chain(recipe)
    for number in range(10):  # two epochs
        batch = dataset[number]
        assert len(batch["images"]) == 8
        skipped += batch["skipped"]
        uniform = uniform_numbers(5, 8 * number + np.arange(8), chain.draws)
        for name, image, numbers in zip(batch["names"], batch["images"], uniform, strict=True):
            whole = decode_image(folder / name)
            np.testing.assert_array_equal(image, chain(whole[None], numbers[None])[0])
    assert {name for name, _ in skipped} == {"03.png", "04.png", "17.png"} and len(skipped) >= 6
    # The substitutes, worked out here; the second epoch has its own.
    for epoch in (0, 1):
        places = range(40 * epoch, 40 * (epoch + 1))
        position = next(p for p in places if _wanted(source, p) == 3)
        attempts = (hashed(5, epoch, 3, attempt) % 40 for attempt in range(1, 100))
        assert dataset[position // 8]["names"][position % 8] == f"{next(i for i in attempts if i not in (3, 4, 17)):02d}.png"


def _wanted(source, position):
    from kvq.data.loader import _Shuffled

    return int(_Shuffled(len(source), 5)(np.array([position]))[0])


def test_mending_a_file_changes_nothing_but_its_own_places(folder):
    before = training_batches(source_of(folder), training_transforms(0, 16, True), 8, seed=5)
    batches = [before[k] for k in range(10)]
    pattern(3).save(folder / "03.png")
    after = training_batches(source_of(folder), training_transforms(0, 16, True), 8, seed=5)
    changed = 0
    for k, batch in enumerate(batches):
        for old, new, name in zip(batch["images"], after[k]["images"], after[k]["names"], strict=True):
            if not (old == new).all():
                changed += 1
                assert name == "03.png"
    assert changed >= 2


@pytest.mark.parametrize("threads", [0, 1, 8])
def test_the_order_does_not_depend_on_threads(folder, threads):
    dataset = training_batches(source_of(folder), training_transforms(0, 16, True), 8, seed=5)
    for k, batch in zip(range(3, 12), iterate(dataset, start=3, threads=threads), strict=False):
        np.testing.assert_array_equal(batch["images"], dataset[k]["images"])
        assert batch["names"] == dataset[k]["names"] and batch["skipped"] == dataset[k]["skipped"]


def test_hosts_take_turns_through_grains_own_slices(folder):
    dataset = training_batches(source_of(folder), training_transforms(0, 16, True), 8, seed=5)
    for host in range(2):
        for k, batch in zip(range(3), iterate(dataset[host::2], threads=0), strict=False):
            assert batch["names"] == dataset[2 * k + host]["names"]


def test_evaluation_leaves_bad_files_out_and_says_so(folder):
    batches = list(evaluation_batches(source_of(folder), evaluation_transforms(0, 16), 2))
    assert [len(batch["images"]) for batch in batches[:3]] == [2, 1, 1]
    skipped = [name for batch in batches for name, _ in batch["skipped"]]
    assert skipped == ["03.png", "04.png", "17.png"] and sum(len(batch["names"]) for batch in batches) == 37


def test_measuring_counts_what_was_left_out(folder, model):
    pattern(5).save(folder / "02.png")
    (folder / "02.png").write_bytes(b"")  # a whole batch of bad files
    batches = evaluation_batches(source_of(folder), evaluation_transforms(0, 16), 2)
    measured = measure(model, iterate(batches))
    assert (measured["images"], measured["skipped"]) == (36, 4)
    with pytest.raises(DataError, match="No image is left to measure: 2 could not be used"):
        measure(model, [batches[1]])


def test_a_vanished_and_a_small_file_are_bad_files_too(folder):
    (folder / "10.png").unlink(missing_ok=True)
    source = FolderSource(folder, [f"{number:02d}.png" for number in range(40)])
    pattern(0, size=(15, 90)).save(folder / "11.png")
    pattern(0, size=(1, 90)).save(folder / "12.png")
    skip = evaluation_batches(source, evaluation_transforms(0, 16, small="skip"), 64)[0]
    enlarge = evaluation_batches(source, evaluation_transforms(0, 16), 64)[0]
    reasons = dict(skip["skipped"])
    assert set(reasons) == {"03.png", "04.png", "10.png", "11.png", "12.png", "17.png"}
    assert "15 x 90" in reasons["11.png"] and "No such file" in reasons["10.png"]
    assert {name for name, _ in enlarge["skipped"]} == {"03.png", "04.png", "10.png", "12.png", "17.png"}


def test_a_folder_without_good_files_ends_instead_of_searching_for_ever(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"")
    dataset = training_batches(source_of(tmp_path), training_transforms(0, 16, False), 2, seed=0)
    with pytest.raises(DataError, match="too few images.*: 101 drawn in a row cannot. The last: .*the file is empty"):
        dataset[0]


# Runs


def small_config(folder, *changes):
    sizes = ["model.latent_dim=8", "quantizer.codebook_size=8", "data.pad=0", "data.crop=16", "train.batch_size=8"]
    return load_config("fashion_mnist_mini", [*sizes, f'data.source="{folder}"', "train.log_every=2", *changes])


def test_a_run_goes_on_and_names_each_bad_file_once(folder, tmp_path):
    run = tmp_path / "run"
    train(small_config(folder, "train.steps=8", "data.max_bad_fraction=1"), out=run)
    lines = [line.split("\t") for line in (run / "skipped.txt").read_text("utf-8").splitlines()]
    assert {name for name, _ in lines} == {"03.png", "04.png", "17.png"} and len(lines) == 3
    assert dict(lines)["03.png"] == "the file is empty"
    train(small_config(folder, "train.steps=12", "data.max_bad_fraction=1"), out=run, resume=True)
    assert len((run / "skipped.txt").read_text("utf-8").splitlines()) == 3


def test_a_resumed_run_goes_on_with_the_files_it_began_with(folder, tmp_path):
    run = tmp_path / "run"
    train(small_config(folder, "train.steps=2", "data.max_bad_fraction=1"), out=run)
    assert (run / "listings" / "train").exists() and (run / "listings" / "validation").exists()
    pattern(99).save(folder / "00_new.png")

    resumed, fresh = (open_images(small_config(folder), known)[0] for known in (Run(run), None))
    assert (
        (len(resumed), len(fresh)) == (38, 38) and "00_new.png" not in list(resumed.names) and "00_new.png" in list(fresh.names)
    )


def test_too_many_bad_files_end_a_run_with_the_way_out_and_nothing_is_lost(tmp_path):
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for number in range(210):
        pattern(number).save(photos / f"{number:03d}.png")
        if number % 40 == 1:
            (photos / f"{number:03d}.png").write_bytes(b"")
    expected = r"^2 of the 199 training files cannot be used so far, more than data.max_bad_fraction = 0.01.*skipped.txt"
    with pytest.raises(DataError, match=expected + ".*--set data.max_bad_fraction=0.1. Then --resume goes on"):
        train(small_config(photos, "train.steps=60"), out=run)
    record = Run(run).record
    assert record["status"] == "failed" and (run / "skipped.txt").exists() and (run / "model").exists()
    stopped = max(metric["step"] for metric in Run(run).read_metrics())
    assert 0 < stopped < 30 and (run / "checkpoints" / f"step_{stopped:08d}").exists()
    train(small_config(photos, f"train.steps={stopped + 2}", "data.max_bad_fraction=0.1"), out=run, resume=True)
    assert Run(run).record["status"] == "finished"


def test_as_many_bad_files_as_may_be_stop_no_run_whatever_their_order(tmp_path):
    """Ten of 1000 are 1%: also where all of them come first, or come again in the next epoch."""
    bad = BadFiles(Run(tmp_path), count=1000, max_fraction=0.01)
    broken = [(f"{number}", "broken") for number in range(11)]
    batch = {"images": np.zeros((60, 1, 1, 3)), "labels": [], "names": [], "skipped": broken[:10]}
    watched = bad.watch(iter([batch, batch, {**batch, "skipped": broken[10:]}]))
    for _ in range(2):
        next(watched)
        bad.check()
        assert not bad.too_many
    next(watched)
    with pytest.raises(DataError, match="^11 of the 1000"):
        bad.check()
    assert len((tmp_path / "skipped.txt").read_text("utf-8").splitlines()) == 11


def test_what_the_loader_raises_during_training_comes_through_as_it_is(folder, tmp_path, monkeypatch):
    """TensorFlow wraps what a generator raises in an error of its own; the user is told what happened all the same."""
    for number in (3, 4):
        pattern(number).save(folder / f"{number:02d}.png")
    # Keras looks at the first batches itself: the one bad file must come later than that.
    source, recipe = open_source(str(folder), "train"), training_transforms(0, 16, True)

    def first_bad(seed):
        dataset = training_batches(source, recipe, 8, seed)
        return next(number for number in range(6) if dataset[number]["skipped"])

    seed = next(seed for seed in range(100) if first_bad(seed) == 4)
    monkeypatch.setattr("kvq.data.loader.SUBSTITUTES", 0)
    untouched = ("data.max_bad_fraction=1", 'codebook.initialise="none"', "codebook.replace_dead_every=0", f"train.seed={seed}")
    with pytest.raises(DataError, match="^photos .train. has too few images that can be used: 1 drawn in a row cannot."):
        train(small_config(folder, "train.steps=12", *untouched), out=tmp_path / "run")
    assert Run(tmp_path / "run").record["status"] == "failed"


def test_a_folder_of_images_that_are_all_too_small_is_refused(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(30):
        pattern(number, size=(2, 2)).save(photos / f"{number:02d}.png")
    with pytest.raises(DataError, match="No image of photos .train. can be used. The first: 01.png: 2 x 2 pixels"):
        train(small_config(photos, "train.steps=3", "data.max_bad_fraction=1", 'data.small="skip"'), out=tmp_path / "run")


def test_names_with_line_ends_take_one_line(tmp_path):
    names = ["a\nb.png", "tab\t.png", "back\\slash", "\udcff.png"]
    (tmp_path / "skipped.txt").write_bytes(to_lines((name, "broken") for name in names))
    assert read_names(tmp_path / "skipped.txt") == {written(name) for name in names}
    assert len((tmp_path / "skipped.txt").read_text("utf-8").splitlines()) == 4
    assert read_names(tmp_path / "none") == set()


def test_files_that_vanish_during_a_run_are_bad_files(folder, tmp_path):
    dataset = training_batches(source_of(folder), training_transforms(0, 16, True), 8, seed=5)
    batches = iterate(dataset, threads=2)
    next(batches)
    (folder / "30.png").unlink()
    seen = [name for _, batch in zip(range(20), batches, strict=False) for name, _ in batch["skipped"]]
    assert "30.png" in seen
