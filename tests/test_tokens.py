"""What `kvq encode` and `kvq decode` promise: the same bytes however the work was cut, and a set that says what it is."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from kvq_cli.main import app
from PIL import Image
from typer.testing import CliRunner

import kvq
from kvq import load_config
from kvq.artifact import check, save
from kvq.build import build_model
from kvq.data import TokenSource, evaluation_batches, evaluation_transforms, open_source
from kvq.errors import ArtifactError, DataError, TokensError
from kvq.evaluation import evaluate
from kvq.progress import Progress
from kvq.tokenizer import Tokenizer
from kvq.tokens.decoding import decode, png_names
from kvq.tokens.encoding import encode
from kvq.tokens.engines import Job
from kvq.tokens.ray_engine import _place

CODES, SIDE = 12, 8
RECIPE = ["model.latent_dim=4", f"quantizer.codebook_size={CODES}", f"data.crop={SIDE}", "data.pad=2"]

CUT = {"split": "all", "batch_size": 4, "shard_size": 10}


class Stopped(Exception):
    pass


class StopAfter(Progress):
    def __init__(self, images):
        self.images = images

    def step(self, step):
        if step >= self.images:
            raise Stopped


def make_model(folder, overrides=(), channels=3, seed=0):
    config = load_config("fashion_mnist_mini", [*RECIPE, *overrides])
    keras.utils.set_random_seed(seed)
    model = build_model(config.model, config.quantizer, config.loss, channels)
    # Codes where the latents are, so that images come out as several.
    noise = np.random.default_rng(seed).uniform(-1, 1, (16, SIDE, SIDE, channels)).astype("float32")
    model.quantizer.initialise(np.asarray(model.encoder.predict_on_batch(noise)))
    save(model, config, channels, "fashion_mnist_mini", "train", 1, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "colour")


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "grey", channels=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """45 images in two folders; three of their names are of broken files."""
    folder, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for number in range(45):
        path = folder / ("a" if number % 2 else "it's b") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9 + number % 3, 12, 3), np.uint8)).save(path)
        if number in (7, 20, 21):
            path.write_bytes(path.read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """70 grey images with labels, the split `test` of a collection."""
    file, rng = tmp_path_factory.mktemp("data") / "arrays.npz", np.random.default_rng(0)
    np.savez(file, x_test=rng.integers(0, 256, (70, 12, 10), np.uint8), y_test=np.arange(70) % 10)
    return file


@pytest.fixture(scope="module")
def whole(model, photos, tmp_path_factory):
    """What no cut changes."""
    out = tmp_path_factory.mktemp("sets") / "whole"
    encode(model, photos, out, **CUT)
    return contents(out)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def expected_tokens(model, source):
    tokenizer = Tokenizer.load(model)
    images = evaluation_batches(source, evaluation_transforms(2, SIDE), len(source))[0]
    return tokenizer.encode(images["images"], 10), images


# What is written


def test_tokens_are_those_of_the_tokenizer_and_can_be_read_with_numpy_alone(grey, arrays, tmp_path):
    result = encode(grey, arrays, tmp_path / "set", split="test", batch_size=10, shard_size=30)
    expected, images = expected_tokens(grey, open_source(str(arrays), "test"))
    described = json.loads((tmp_path / "set" / "tokens.json").read_text())
    read = [np.load(tmp_path / "set" / shard["tokens"]["file"], mmap_mode="r") for shard in described["shards"]]
    assert [shard.shape for shard in read] == [(30, 2, 2), (30, 2, 2), (10, 2, 2)]
    assert {shard.dtype for shard in read} == {np.dtype("uint8")}
    np.testing.assert_array_equal(np.concatenate(read), expected)
    assert len(np.unique(expected)) > 3
    labels = np.concatenate([np.load(tmp_path / "set" / shard["labels"]["file"]) for shard in described["shards"]])
    np.testing.assert_array_equal(labels, images["labels"])
    assert (result["images"], result["encoded"], result["shards"], result["skipped"]) == (70, 70, 3, 0)
    assert result["complete"] and result["images_per_second"] > 0 and result["shape"] == [2, 2]
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "set").glob("*.npy"))


def test_the_set_says_everything_about_itself(grey, arrays, tmp_path):
    encode(grey, arrays, tmp_path / "set", split="test", shard_size=500)
    described = json.loads((tmp_path / "set" / "tokens.json").read_text())
    artifact = json.loads((grey / "config.json").read_text())
    (shard,) = described.pop("shards")
    source = described.pop("source")
    assert described == {
        "format": "kvq tokens",
        "format_version": 1,
        "kvq_version": kvq.__version__,
        "weights_sha256": artifact["weights_sha256"],
        "backend": keras.backend.backend(),
        "quantizer": artifact["quantizer"],
        "vocabulary": CODES,
        "grid": [2, 2],
        "depth": None,
        "dtype": "uint8",
        "preprocessing": {"channels": 1, "resize": None, "pad": 2, "crop": SIDE, "small": "enlarge"},
        "batch_size": 64,
        "shard_size": 500,
        "images": 70,
        "skipped": 0,
    }
    assert {**source, "sha256": 0} == {"name": "arrays", "split": "test", "images": 70, "sha256": 0}
    assert (shard["first"], shard["images"], shard["names"]) == (0, 70, None)
    assert {path.name for path in (tmp_path / "set").iterdir()} == {"tokens.json", "tokens-00000.npy", "labels-00000.npy"}


@pytest.mark.parametrize(
    ("quantizer", "dim", "shape", "dtype"),
    [
        ('{kind="vector", codebook_size=256}', 4, (2, 2), "uint8"),
        ('{kind="vector", codebook_size=257}', 4, (2, 2), "uint16"),
        ('{kind="finite_scalar", levels=[16, 16, 16, 16]}', 4, (2, 2), "uint16"),
        ('{kind="finite_scalar", levels=[17, 16, 16, 16]}', 4, (2, 2), "uint32"),
        ('{kind="residual", levels=3, base={kind="vector", codebook_size=9}}', 4, (2, 2, 3), "uint8"),
    ],
)
def test_integers_are_the_narrowest_that_hold_the_vocabulary(arrays, tmp_path, quantizer, dim, shape, dtype):
    model = make_model(tmp_path / "model", [f"quantizer={quantizer}", f"model.latent_dim={dim}"], channels=1)
    result = encode(model, arrays, tmp_path / "set", split="test", batch_size=10)
    assert (tuple(result["shape"]), result["dtype"]) == (shape, dtype)
    assert np.load(tmp_path / "set" / "tokens-00000.npy").dtype == dtype
    source = TokenSource(tmp_path / "set", verify=True)
    expected, _ = expected_tokens(model, open_source(str(arrays), "test"))
    np.testing.assert_array_equal([source[i]["tokens"] for i in range(len(source))], expected)
    assert decode(model, tmp_path / "set", tmp_path / "png")["images"] == 70


# Bad files, names


def test_bad_files_are_left_out_counted_and_named(model, photos, tmp_path):
    result = encode(model, photos, tmp_path / "set", **CUT)
    assert (result["images"], result["skipped"], result["shards"]) == (42, 3, 5)
    lines = (tmp_path / "set" / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["a/07.png", "a/21.png", "it's b/20.png"]
    expected, images = expected_tokens(model, open_source(str(photos), "all"))
    source = TokenSource(tmp_path / "set", verify=True)
    assert [source[i]["name"] for i in range(len(source))] == images["names"]
    np.testing.assert_array_equal([source[i]["tokens"] for i in range(len(source))], expected)
    assert {source[i]["label"] for i in range(len(source))} == {-1} and not list((tmp_path / "set").glob("labels*"))
    read = (tmp_path / "set" / "names-00001.txt").read_bytes().decode().split("\0")[:-1]
    assert read == images["names"][9:18]


def test_images_that_training_left_out_as_too_small_are_left_out_of_sets_and_measurements(tmp_path):
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for number, side in enumerate((SIDE, SIDE - 1, SIDE + 3, 4)):
        Image.fromarray(rng.integers(0, 256, (side, SIDE, 3), np.uint8)).save(photos / f"{number}.png")
    for small, images in (("skip", 2), ("enlarge", 4)):
        model = make_model(tmp_path / f"model_{small}", ["data.pad=0", f'data.small="{small}"'])
        measured = evaluate(model, photos, split="all")
        assert (measured["images"], measured["skipped"]) == (images, 4 - images)
        assert encode(model, photos, tmp_path / small, **CUT)["images"] == images


def test_the_model_sees_only_full_batches_whatever_is_bad(model, photos, tmp_path, monkeypatch):
    """So a shape is compiled once, and rounding, which may differ with the size of a batch, is that of the others."""
    sizes, encode_images = set(), Tokenizer.encode

    def watched(tokenizer, images, batch_size):
        sizes.add((len(images), batch_size))
        return encode_images(tokenizer, images, batch_size)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    # Three bad files lie in three batches, and the last batch of a shard has two images.
    encode(model, photos, tmp_path / "set", **CUT)
    assert sizes == {(CUT["batch_size"],) * 2}


def test_a_shard_of_nothing_but_bad_files_leaves_a_gap(model, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    # After these come 21, which is broken, and 23.
    for path in sorted((tmp_path / "photos" / "a").iterdir())[5:10]:
        path.write_bytes(b"")
    result = encode(model, tmp_path / "photos", tmp_path / "set", split="all", batch_size=4, shard_size=5)
    assert not (tmp_path / "set" / "tokens-00001.npy").exists() and result["complete"]
    source = TokenSource(tmp_path / "set", verify=True)
    assert len(source) == result["images"] and source[4]["name"] == "a/23.png"


def test_all_bad_is_an_error(model, photos, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a\.png"):
        encode(model, tmp_path / "photos", tmp_path / "set", split="all")
    assert not (tmp_path / "set").exists()


def test_data_that_do_not_fit_the_model_are_refused_before_anything_is_written(model, tmp_path):
    with pytest.raises(DataError, match="takes images of 3 channels. Received: 1 in fashion_mnist_mini. Give other data.$"):
        encode(model, "fashion_mnist_mini", tmp_path / "set")
    with pytest.raises(ArtifactError, match="There is no"):
        encode(tmp_path / "nothing", "fashion_mnist_mini", tmp_path / "set")
    with pytest.raises(ValueError, match=r"Received: \(2, 2\)"):
        encode(model, "fashion_mnist_mini", tmp_path / "set", shard=(2, 2))
    assert not list(tmp_path.iterdir())


# However the work is cut


def test_stopped_and_gone_on_it_gives_the_same_bytes(model, photos, whole, tmp_path):
    with pytest.raises(Stopped):
        encode(model, photos, tmp_path / "cut", **CUT, progress=StopAfter(27))
    assert not (tmp_path / "cut" / "tokens.json").exists()
    before = (tmp_path / "cut" / "tokens-00001.npy").stat().st_mtime_ns
    with pytest.raises(TokensError, match="not complete yet.*Run the same `kvq encode` again"):
        TokenSource(tmp_path / "cut")
    # Cut again, as a power failure might: what is not whole is encoded anew.
    (tmp_path / "cut" / "names-00000.txt").write_bytes(b"a")
    result = encode(model, photos, tmp_path / "cut", **CUT)
    assert (tmp_path / "cut" / "tokens-00001.npy").stat().st_mtime_ns == before
    assert (result["encoded"], result["images"]) == (33, 42) and result["complete"]
    assert contents(tmp_path / "cut") == whole
    assert encode(model, photos, tmp_path / "cut", **CUT)["encoded"] == 0


KILLED = """
import os, signal, sys
from kvq import encode
from kvq.progress import Progress

class Kill(Progress):
    def step(self, step):
        if step >= 27:
            os.kill(os.getpid(), signal.SIGKILL)

model, data, out = sys.argv[1:]
encode(model, data, out, split="all", batch_size=4, shard_size=10, progress=Kill())
"""


def test_a_killed_process_leaves_what_another_goes_on_with(model, photos, whole, tmp_path):
    process = subprocess.run([sys.executable, "-c", KILLED, str(model), str(photos), str(tmp_path / "cut")])
    assert process.returncode == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "cut").glob("tokens*")} == {"tokens-00000.npy", "tokens-00001.npy"}
    # As it is left by a process that was killed while it wrote.
    (tmp_path / "cut" / ".tokens-00002.npy.a1b2c3d4").write_bytes(b"half")
    result = encode(model, photos, tmp_path / "cut", **CUT)
    assert result["encoded"] == 24
    assert contents(tmp_path / "cut") == whole


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_parts_in_any_order_give_the_same_bytes(model, photos, whole, tmp_path, order):
    results = [encode(model, photos, tmp_path / "parts", **CUT, shard=(part, 3)) for part in order]
    assert [result["complete"] for result in results] == [False, False, True]
    assert sum(result["encoded"] for result in results) == 42
    assert contents(tmp_path / "parts") == whole


def test_more_parts_than_shards_leave_some_with_nothing_to_do(model, photos, tmp_path):
    results = [encode(model, photos, tmp_path / "set", split="all", shard_size=30, shard=(part, 3)) for part in (2, 0, 1)]
    assert [(result["encoded"], result["complete"]) for result in results] == [(0, False), (28, False), (14, True)]


def test_what_has_changed_is_refused(model, photos, tmp_path):
    other = make_model(tmp_path / "other", seed=1)
    fewer = tmp_path / "fewer"
    shutil.copytree(photos, fewer)
    (fewer / "a" / "01.png").unlink()
    for complete in (False, True):
        out = tmp_path / f"set-{complete}"
        if complete:
            encode(model, photos, out, **CUT)
        else:
            with pytest.raises(Stopped):
                encode(model, photos, out, **CUT, progress=StopAfter(15))
        before = contents(out)
        for changed, words in [
            ((other, photos, CUT), "holds a set of another model. Remove it"),
            ((model, fewer, CUT), "was made otherwise: name: fewer instead of photos, images: 44 instead of 45, sha256: "),
            (
                (model, photos, {**CUT, "split": "train"}),
                "was made otherwise: split: train instead of all, images: .* of 45, sha256",
            ),
            ((model, photos, {**CUT, "batch_size": 5}), "was made otherwise: batch_size: 5 instead of 4. Give"),
            ((model, photos, {**CUT, "shard_size": 11}), "was made otherwise: shard_size: 11 instead of 10. Give"),
        ]:
            with pytest.raises(TokensError, match=words):
                encode(changed[0], changed[1], out, **changed[2])
        assert contents(out) == before


def test_more_shards_than_a_set_can_list_are_refused_before_anything_is_written(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("kvq.tokens.encoding.MOST_SHARDS", 4)
    with pytest.raises(TokensError, match=r"at most 4 shards. Received: 5, of 10 images each. Give a --shard-size of 12 or more"):
        encode(model, photos, tmp_path / "set", **CUT)
    assert not (tmp_path / "set").exists()
    assert encode(model, photos, tmp_path / "set", **{**CUT, "shard_size": 12})["complete"]


def test_a_folder_of_something_else_is_refused(model, photos, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(TokensError, match="must be a new folder"):
        encode(model, photos, tmp_path, split="all")
    assert contents(tmp_path) == {"thesis.tex": b"mine"}
    with pytest.raises(TokensError, match="cannot be written"):
        encode(model, photos, tmp_path / "thesis.tex" / "set", split="all")


def test_progress_is_told_in_images(model, photos, tmp_path):
    class Watcher(Progress):
        def __init__(self):
            self.said = []

        def start(self, total_steps, first_step):
            self.said.append((total_steps, first_step))

        def step(self, step):
            self.said.append(step)

        def log(self, record):
            assert record.pop("images_per_second") > 0
            self.said.append(record)

    watcher = Watcher()
    encode(model, photos, tmp_path / "set", split="all", batch_size=10, shard_size=20, progress=watcher, shard=(1, 2))
    assert watcher.said == [(20, 0), 10, 20, {"step": 20, "split": "all"}]


# And back


def test_decoded_images_are_those_of_the_tokenizer_under_the_names_of_their_sources(model, photos, tmp_path):
    encode(model, photos, tmp_path / "set", split="all", shard_size=10)
    result = decode(model, tmp_path / "set", tmp_path / "png", batch_size=5)
    assert result["images"] == 42 and result["same_weights"]
    tokens, images = expected_tokens(model, open_source(str(photos), "all"))
    for name, image in zip(images["names"], Tokenizer.load(model).decode(tokens), strict=True):
        with Image.open(tmp_path / "png" / name) as written:
            # Convolutions of other batch sizes may round differently.
            assert np.abs(np.asarray(written).astype(int) - image).max() <= 1
    assert sum(path.is_file() for path in (tmp_path / "png").rglob("*")) == 42


def test_images_are_decoded_into_a_folder_of_their_own(model, photos, tmp_path):
    encode(model, photos, tmp_path / "set", split="all")
    originals = shutil.copytree(photos, tmp_path / "photos")
    before = {path: path.read_bytes() for path in originals.rglob("*") if path.is_file()}
    with pytest.raises(TokensError, match="holds files, .* Give another --out, a new folder"):
        decode(model, tmp_path / "set", originals)
    assert {path: path.read_bytes() for path in originals.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="`batch_size` must be at least 1. Received: -1"):
        decode(model, tmp_path / "set", tmp_path / "png", batch_size=-1)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_decoding_that_was_stopped_says_what_is_there_and_goes_on(model, photos, tmp_path, monkeypatch, error):
    encode(model, photos, tmp_path / "set", split="all")
    decode(model, tmp_path / "set", tmp_path / "whole", batch_size=8)
    save, saved, out = Image.Image.save, [], tmp_path / "png"

    def files(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def stop(image, path):
        if len(saved) == 23:  # the last of a batch
            path.write_bytes(b"the beginning of a PNG")
            raise error
        saved.append(path)
        save(image, path)

    class Watcher(Progress):
        def start(self, total, first):
            self.first = first

        def note(self, text):
            self.text = text

    watcher = Watcher()
    with monkeypatch.context() as patched, pytest.raises((KeyboardInterrupt, TokensError)) as raised:
        patched.setattr(Image.Image, "save", stop)
        decode(model, tmp_path / "set", out, batch_size=8, progress=watcher)
    assert watcher.text == f"23 of 42 images are in {out}: the same command goes on from them."
    if isinstance(error, OSError):
        assert str(raised.value) == f"{out} cannot be written: No space left on device. Make room, or give another --out."
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(TokensError, match="png was begun with other tokens or another model. Remove it, or give another --out"):
        decode(other, tmp_path / "set", out, force=True)
    decode(model, tmp_path / "set", out, batch_size=8, progress=watcher)
    assert watcher.first == 16 and files(out) == files(tmp_path / "whole")
    with pytest.raises(TokensError, match="holds files"):
        decode(model, tmp_path / "set", out)


def test_a_bad_file_whose_name_is_not_utf_8_is_named_all_the_same(model, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / os.fsdecode(b"bad\xe9.png")).write_bytes(b"no image")
    assert encode(model, folder, tmp_path / "set", split="all")["skipped"] == 4
    assert "bad\\\\xe9.png" in (tmp_path / "set" / "skipped.txt").read_text()


def test_arrays_are_decoded_under_their_numbers_in_grey(grey, arrays, tmp_path):
    encode(grey, arrays, tmp_path / "set", split="test")
    decode(grey, tmp_path / "set", tmp_path / "png")
    with Image.open(tmp_path / "png" / "test" / "00069.png") as written:
        assert written.mode == "L" and written.size == (SIDE, SIDE)


def test_names_that_would_fall_together_are_kept_apart():
    assert png_names(["a/b.jpg", "a/c.jpg", "d"]) == ["a/b.png", "a/c.png", "d.png"]
    assert png_names(["a/b.jpg", "a/b.png", "b.jpg"]) == ["a/b.jpg.png", "a/b.png.png", "b.png"]
    with pytest.raises(TokensError, match="Received: 2 that would be written as b.jpg.png"):
        png_names(["b.jpg", "b.png", "b.jpg.webp"])


def test_tokens_of_other_weights_are_decoded_only_by_force(model, photos, tmp_path):
    encode(model, photos, tmp_path / "set", split="all")
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(TokensError, match="other weights than the model's.*--force"):
        decode(other, tmp_path / "set", tmp_path / "png")
    assert not (tmp_path / "png").exists()
    result = decode(other, tmp_path / "set", tmp_path / "png", force=True)
    assert result["images"] == 42 and not result["same_weights"]
    for number, overrides in enumerate(["quantizer.codebook_size=11"], 2):
        smaller = make_model(tmp_path / str(number), [overrides])
        with pytest.raises(TokensError, match="below 11. Received: tokens of shape .*below 12"):
            decode(smaller, tmp_path / "set", tmp_path / "none", force=True)
    assert not (tmp_path / "none").exists()


# The command line


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands_do_what_the_functions_do(model, photos, tmp_path):
    result = run(
        "encode", model, photos, "--split", "all", "--shard-size", 20, "--shard", "1/2", "--out", tmp_path / "set", "--json"
    )
    assert result.exit_code == 0, result.stderr
    part = json.loads(result.stdout)
    assert (part["images"], part["complete"]) == (19, False)
    assert "image 20/20  all  images/s" in result.stderr
    result = run("encode", model, photos, "--split", "all", "--shard-size", 20, "--shard", "0/2", "--out", tmp_path / "set")
    assert result.exit_code == 0 and "3 images could not be used" in result.stdout
    assert re.match(r"42 images in 3 shards, [1-9]\d*\.\d kB, in ", result.stdout)
    result = run("decode", model, tmp_path / "set", "--out", tmp_path / "png", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["images"] == 42
    other = make_model(tmp_path / "other", seed=1)
    result = run("decode", other, tmp_path / "set", "--out", tmp_path / "none")
    assert result.exit_code == 2 and result.stdout == "" and "error: " in result.stderr and "other weights" in result.stderr
    assert run("decode", other, tmp_path / "set", "--out", tmp_path / "forced", "--force").exit_code == 0


@pytest.mark.parametrize("shard", ["2/2", "1", "-1/2", "a/b", "0/0", "1/2/3"])
def test_parts_that_there_are_not_are_wrong_usage(model, photos, tmp_path, shard):
    result = run("encode", model, photos, "--out", tmp_path / "set", f"--shard={shard}")
    assert result.exit_code == 2 and "--shard takes I/N" in result.stderr and not (tmp_path / "set").exists()


@pytest.mark.slow  # two processes that import Keras and compile, at the same time; the quick test of this uses threads
def test_two_processes_share_a_folder(model, photos, whole, tmp_path):
    arguments = [
        "encode",
        str(model),
        str(photos),
        "--split",
        "all",
        "--shard-size",
        "10",
        "--batch-size",
        "4",
        "--out",
        str(tmp_path / "parts"),
        "--json",
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "kvq_cli", *arguments, "--shard", f"{part}/2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for part in range(2)
    ]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    results = [json.loads(out) for out, _ in said]
    assert sum(result["encoded"] for result in results) == 42 and any(result["complete"] for result in results)
    assert contents(tmp_path / "parts") == whole


def test_workers_elsewhere_find_the_model_that_comes_with_kvq(tmp_path):
    plan = SimpleNamespace(source=SimpleNamespace(split="test"))
    model, data, *_ = _place(Job(Path("fashion_mnist_mini"), "fashion_mnist_mini", None, tmp_path, plan))
    assert model.is_absolute() and check(model).data.name == data == "fashion_mnist_mini"
