"""What `kvq codebook` and `kvq tokens migrate` promise: counts are those of the tokens, and a smaller model does the same."""

import json
import os

import keras
import numpy as np
import pytest
from kvq_cli.main import app
from PIL import Image
from typer.testing import CliRunner

from kvq import load_config
from kvq.artifact import check, save
from kvq.build import build_model
from kvq.code_atlas import CodeRow, code_atlas
from kvq.codebook_use import PATCHES, SHOWN, CodePlaces, codebook
from kvq.config import RunConfig
from kvq.data import FolderSource, TokenSource
from kvq.errors import ArtifactError, DataError, TokensError
from kvq.evaluation import Images
from kvq.index_map import NAME, IndexMap, read_index_map
from kvq.pruning import prune
from kvq.tokenizer import Tokenizer
from kvq.tokens.encoding import encode
from kvq.tokens.migration import migrate

SIDE = 8
RECIPE = ["model.latent_dim=4", f"data.crop={SIDE}", "data.pad=0"]
COMPUTED = {"finite_scalar", "symmetric_finite_scalar", "lookup_free", "binary_spherical"}


def make_model(folder, section, seed=0):
    values = load_config("fashion_mnist_mini", RECIPE).model_dump()
    config = RunConfig.model_validate({**values, "quantizer": section})
    keras.utils.set_random_seed(seed)
    model = build_model(config.model, config.quantizer, config.loss, 1)
    save(model, config, 1, "fashion_mnist_mini", "train", 1, folder)
    return folder


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """33 grey images; few, so that some codes stay unused."""
    file, rng = tmp_path_factory.mktemp("data") / "arrays.npz", np.random.default_rng(0)
    np.savez(file, x_train=rng.integers(0, 256, (33, SIDE, SIDE), np.uint8), y_train=np.arange(33) % 10)
    return file


@pytest.fixture(scope="module")
def images(arrays):
    with np.load(arrays) as file:
        return file["x_train"][..., None]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "vector", {"kind": "vector", "codebook_size": 300})


@pytest.fixture(scope="module")
def small(model, arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    prune(model, folder, arrays)
    return folder


# Counting


def test_counts_are_those_of_the_tokens(model, arrays, images):
    result = codebook(model, arrays, batch_size=7)
    counts = np.bincount(Tokenizer.load(model).encode(images).ravel(), minlength=300)
    p = counts[counts > 0] / counts.sum()
    assert (result["images"], result["used"], result["dead"]) == (33, (counts > 0).sum(), (counts == 0).sum())
    assert result["perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert result["usage"] == pytest.approx((counts > 0).mean())
    used = np.sort(counts[counts > 0])
    assert [code["count"] for code in result["most_used"]] == used[::-1][:SHOWN].tolist()
    assert [code["count"] for code in result["least_used"]] == used[:SHOWN].tolist()
    assert all(counts[code["code"]] == code["count"] for code in [*result["most_used"], *result["least_used"]])


def test_places_hold_their_code_and_are_of_different_images():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 6, (40, 3, 3, 2))
    use = CodePlaces(6, 2)
    for start in range(0, 40, 15):
        use.add(tokens[start : start + 15], start)
    for level in range(2):
        np.testing.assert_array_equal(use.counts[level], np.bincount(tokens[..., level].ravel(), minlength=6))
        for code in range(6):
            places = use.places(level, code)
            assert len(places) == PATCHES == len(set(places[:, 0].tolist()))
            assert all(tokens[number, position // 3, position % 3, level] == code for number, position in places)


def first_patch(page):
    """Top and left of the first one, by the outline of its middle cell."""
    return np.argwhere((page == (255, 0, 0)).all(-1)).min(0) - (72 // 3 - 1)


@pytest.mark.parametrize("section", [{"kind": "vector", "codebook_size": 300}, {"kind": "finite_scalar", "levels": [3, 3, 3, 3]}])
def test_the_atlas_shows_patches_of_the_images(section, arrays, images, tmp_path):
    folder = make_model(tmp_path / "model", section)
    result = codebook(folder, arrays, atlas=tmp_path / "new" / "atlas.png")
    page = np.asarray(Image.open(tmp_path / "new" / "atlas.png"))
    step = Tokenizer.load(folder).downsampling
    (first, *_) = result["most_used"]
    number, row, column = np.argwhere(Tokenizer.load(folder).encode(images) == first["code"])[0]
    patch = np.pad(images[number, :, :, 0], step, constant_values=128)[row * step :, column * step :][: 3 * step, : 3 * step]
    tile = patch.repeat(72 // (3 * step), 0).repeat(72 // (3 * step), 1)
    # The outline of the middle cell lies inside, so that the ring around is the image's.
    top, left = first_patch(page)
    shown = page[top : top + 72, left : left + 72, 0]
    np.testing.assert_array_equal(shown[:20], tile[:20])
    np.testing.assert_array_equal(shown[:, :20], tile[:, :20])


def test_labels_of_the_atlas_are_whole():
    cell = (np.full((SIDE, SIDE, 1), 255, np.uint8), 0)
    gaps = []
    for label in ("1: 1 times", "3.419303: 12,345,678 times"):
        page = np.asarray(code_atlas({"most used": [CodeRow(label, [cell], None)]}, 4))
        _, left = first_patch(page)
        gaps.append(left - np.argwhere((page[40:, :left] < 128).any((0, 2))).max())
    assert min(gaps) > 4 and abs(gaps[0] - gaps[1]) <= 2


def test_images_of_a_batch_are_read_together_and_do_not_keep_it(images, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[:, :, 0]).convert("RGB").save(photos / f"{number:02}.png")
    (photos / "05.png").write_bytes(b"no image")
    values = load_config("fashion_mnist_mini", RECIPE)
    save(build_model(values.model, values.quantizer, values.loss, 3), values, 3, "photos", "train", 1, tmp_path / "model")
    collection = Images(tmp_path / "model", check(tmp_path / "model"), photos, "all", None, batch_size=10)
    counted, batches = [], [batch["images"] for batch in collection]
    read = FolderSource.__getitem__
    monkeypatch.setattr(FolderSource, "__getitem__", lambda source, index: counted.append(index) or read(source, index))
    chosen = collection.chosen([21, 3, 8, 3, 29])
    assert sorted(counted) == [*range(10), *range(20, 30)]
    for number, image in chosen.items():
        np.testing.assert_array_equal(image, batches[number // 10][number % 10])
        assert image.base is None
    # After the file that is left out, the others move up.
    np.testing.assert_array_equal(chosen[8][..., :1], images[9])


def test_a_picture_of_another_ending_is_refused_before_anything_is_counted(tmp_path):
    with pytest.raises(DataError, match="The picture of codes is a PNG. Received: .*a.txt. Give an --atlas that ends in .png"):
        codebook("no/model", atlas=tmp_path / "a.txt")


def test_a_picture_that_cannot_be_written_is_an_error(model, arrays, tmp_path):
    with pytest.raises(DataError, match="cannot be written"):
        codebook(model, arrays, atlas=arrays / "atlas.png")
    assert not list(tmp_path.iterdir())


# Pruning


def test_the_pruned_model_does_the_same_on_its_images(quantizer_kind, quantizer_section, arrays, images, tmp_path):
    section = quantizer_section(quantizer_kind, 4)
    if quantizer_kind in COMPUTED:
        folder = make_model(tmp_path / "model", section)
        with pytest.raises(ArtifactError, match="no codebook to prune"):
            prune(folder, tmp_path / "small", arrays)
        assert not (tmp_path / "small").exists()
        return
    resized = json.loads(json.dumps(section).replace('"codebook_size": 9', '"codebook_size": 60'))
    assert resized != section
    folder = make_model(tmp_path / "model", resized)
    result = prune(folder, tmp_path / "small", arrays)
    before, after = Tokenizer.load(folder), Tokenizer.load(tmp_path / "small")
    index_map = read_index_map(tmp_path / "small")
    old, new = before.encode(images), after.encode(images)
    assert after.vocabulary_size == result["codebook_size"] < before.vocabulary_size == result["previous_size"]
    # One to one on the codes used, in the same order; no code is left that no level uses.
    np.testing.assert_array_equal(index_map.renumbered(old), new)
    levels = old.reshape(-1, before.depth or 1)
    for kept, column in zip(index_map.kept, levels.T, strict=True):
        assert set(column.tolist()) <= set(kept)
    sizes = {len(set(column.tolist())) for column in levels.T} | {len(set(levels.ravel().tolist()))}
    assert after.vocabulary_size in sizes
    # The same picture, bit by bit.
    np.testing.assert_array_equal(before.decode(old), after.decode(new))
    assert (result["changed_indices"], result["changed_pixels"]) == (0, 0)
    assert index_map.from_weights_sha256 == before.config.weights_sha256
    assert index_map.to_weights_sha256 == after.config.weights_sha256 == result["weights_sha256"]


def test_running_statistics_stay_with_their_codes(arrays, tmp_path):
    folder = make_model(tmp_path / "model", {"kind": "ema_vector", "codebook_size": 60})
    before = Tokenizer.load(folder)
    before.model.quantizer.counts.assign(np.arange(60.0))
    before.save(folder)
    prune(folder, tmp_path / "small", arrays)
    (kept,) = read_index_map(tmp_path / "small").kept
    counts = keras.ops.convert_to_numpy(Tokenizer.load(tmp_path / "small").model.quantizer.counts)
    np.testing.assert_array_equal(counts, np.array(kept, "float32"))


def test_two_codes_are_the_fewest(tmp_path):
    np.savez(tmp_path / "black.npz", x_train=np.zeros((5, SIDE, SIDE), np.uint8))
    folder = make_model(tmp_path / "model", {"kind": "vector", "codebook_size": 60}, seed=1)
    model = Tokenizer.load(folder)
    model.model.quantizer.codebook.assign(np.eye(60, 4) * 100)
    model.save(folder)
    assert len({*model.encode(np.zeros((1, SIDE, SIDE, 1), np.uint8)).ravel().tolist()}) == 1
    assert prune(folder, tmp_path / "small", tmp_path / "black.npz")["codebook_size"] == 2
    assert Tokenizer.load(tmp_path / "small").vocabulary_size == 2


def test_nothing_is_written_where_something_is(model, arrays, tmp_path):
    (tmp_path / "small").mkdir()
    with pytest.raises(ArtifactError, match="must be a new folder"):
        prune(model, tmp_path / "small", arrays)
    assert not list((tmp_path / "small").iterdir())


# Migration


@pytest.mark.parametrize("depth", [1, 3])
def test_migrated_tokens_are_those_of_the_pruned_model(depth, arrays, tmp_path):
    section = {"kind": "vector", "codebook_size": 300}
    folder = make_model(tmp_path / "model", section if depth == 1 else {"kind": "residual", "levels": depth, "base": section})
    prune(folder, tmp_path / "small", arrays)
    for name in ("model", "small"):
        encode(tmp_path / name, arrays, tmp_path / f"{name}_tokens", shard_size=20)
    result = migrate(tmp_path / "model_tokens", tmp_path / "small", tmp_path / "migrated")
    # 300 codes take two bytes each, what is left one.
    assert (result["images"], result["dtype"], TokenSource(tmp_path / "model_tokens").description.dtype) == (
        33,
        "uint8",
        "uint16",
    )
    expected = {path.name: path.read_bytes() for path in (tmp_path / "small_tokens").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "migrated").iterdir()} == expected
    TokenSource(tmp_path / "migrated", verify=True)


def test_names_and_labels_and_bad_images_come_along(arrays, images, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[:, :, 0]).convert("RGB").save(photos / f"it's {number:02}.png")
    (photos / "it's 05.png").write_bytes(b"no image")
    values = load_config("fashion_mnist_mini", RECIPE)
    model = build_model(values.model, values.quantizer, values.loss, 3)
    save(model, values, 3, "photos", "train", 1, tmp_path / "model")
    prune(tmp_path / "model", tmp_path / "small", photos, "all")
    encode(tmp_path / "model", photos, tmp_path / "tokens", "all", shard_size=10)
    migrate(tmp_path / "tokens", tmp_path / "small", tmp_path / "migrated")
    before, after = TokenSource(tmp_path / "tokens"), TokenSource(tmp_path / "migrated", verify=True)
    assert [before.name(i) for i in range(32)] == [after.name(i) for i in range(32)]
    assert (tmp_path / "migrated" / "skipped.txt").read_bytes() == (tmp_path / "tokens" / "skipped.txt").read_bytes()


def test_no_link_leads_out_of_a_token_set(model, small, arrays, tmp_path):
    encode(model, arrays, tmp_path / "tokens")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "tokens" / "skipped.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(TokensError, match=r"skipped\.txt cannot be read: it is a symbolic link"):
        migrate(tmp_path / "tokens", small, tmp_path / "migrated")
    assert not (tmp_path / "migrated").exists()


def test_tokens_of_dropped_codes_are_refused(model, small, tmp_path):
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "others.npz", x_train=rng.integers(0, 256, (99, SIDE, SIDE), np.uint8))
    encode(model, tmp_path / "others.npz", tmp_path / "tokens")
    with pytest.raises(TokensError, match=r"train/000\d\d has the index \d+, which was pruned"):
        migrate(tmp_path / "tokens", small, tmp_path / "migrated")
    assert not (tmp_path / "migrated").exists()


def test_what_does_not_belong_together_is_refused(model, small, arrays, tmp_path):
    encode(small, arrays, tmp_path / "tokens")
    with pytest.raises(TokensError, match="other weights than those that were pruned"):
        migrate(tmp_path / "tokens", small, tmp_path / "migrated")
    with pytest.raises(ArtifactError, match=f"has no {NAME}"):
        migrate(tmp_path / "tokens", model, tmp_path / "migrated")
    assert not (tmp_path / "migrated").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"kept": [[0, 0, 1]]},
        {"kept": [[1, 0]]},
        {"kept": [[0, 300]]},
        {"kept": [[-1, 3]]},
        {"kept": [[1]]},
        {"kept": [[0, 1], [0, 1, 2]]},
        {"kept": []},
        {"kept": [["0", "1"]]},
        {"vocabulary": 2**40},
        {"format_version": 2},
        {"more": 1},
    ],
)
def test_a_broken_map_is_one_clear_error(change, small, tmp_path):
    values = {**json.loads((small / NAME).read_text()), **change}
    (tmp_path / NAME).write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="is not what this kvq reads"):
        read_index_map(tmp_path)


def test_a_map_that_is_no_json_or_a_link_is_one_clear_error(small, tmp_path):
    (tmp_path / NAME).write_text("[" * 100_000)
    with pytest.raises(ArtifactError):
        read_index_map(tmp_path)
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).symlink_to(small / NAME)
    with pytest.raises(ArtifactError):
        read_index_map(tmp_path)


def test_renumbered():
    index_map = IndexMap(from_weights_sha256="0" * 64, to_weights_sha256="1" * 64, vocabulary=5, kept=[[0, 3], [2, 4]])
    np.testing.assert_array_equal(index_map.renumbered(np.array([[0, 2], [3, 4], [1, 4]])), [[0, 0], [1, 1], [-1, 1]])


# The commands


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands(model, arrays, tmp_path):
    shown = run("codebook", model, "--data", arrays)
    assert shown.exit_code == 0 and "of 300 codes are used by 33 images" in shown.stdout and ".png" not in shown.stdout
    pruned = run("codebook", model, "--data", arrays, "--prune", "--out", tmp_path / "small", "--json")
    assert pruned.exit_code == 0 and json.loads(pruned.stdout)["changed_indices"] == 0
    encode(model, arrays, tmp_path / "tokens")
    moved = run("tokens", "migrate", tmp_path / "tokens", tmp_path / "small", "--out", tmp_path / "migrated")
    assert moved.exit_code == 0 and "33 images" in moved.stdout


@pytest.mark.parametrize("writable", [True, False])
def test_a_run_that_cannot_be_written_is_counted_all_the_same(writable, arrays, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    make_model(folder / "model", {"kind": "vector", "codebook_size": 60})
    (folder / "run.json").write_text("{}")
    (folder / "config.toml").write_text(load_config("fashion_mnist_mini", [f'data.source="{arrays}"']).to_toml())
    access = os.access  # whose word root does not need
    monkeypatch.setattr(os, "access", lambda path, mode: writable if mode == os.W_OK else access(path, mode))
    # The picture in a run is that of all its images.
    assert run("codebook", folder, "--images", 5).exit_code == 0 and not (folder / "codebook.png").exists()
    result = run("codebook", folder)
    assert result.exit_code == 0 and "of 60 codes are used" in result.stdout
    assert (folder / "codebook.png").exists() == (str(folder / "codebook.png") in result.stdout) == writable
    assert ("codebook.png is not drawn" in result.stderr) != writable


@pytest.mark.parametrize("options", [["--prune"], ["--out", "x"], ["--prune", "--out", "x", "--atlas", "y.png"]])
def test_options_that_do_not_go_together(options, model):
    result = run("codebook", model, *options)
    assert result.exit_code == 2 and "--prune" in result.stderr
