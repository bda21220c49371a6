"""Token data sets at the door: what a source gives, and that no file, however made, gets past it with more than an error."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvq.atomic import write_bytes
from kvq.data import TokenSource
from kvq.data.token_set import (
    _MANIFEST_LIMIT,
    DTYPES,
    MOST_SHARDS,
    Preprocessing,
    TokenPlan,
    TokenSet,
    TokenSetSource,
    TokenShard,
    smallest_dtype,
)
from kvq.errors import TokensError
from kvq.tokens.shards import _claim, begin, join, numbers, write_shard

CODES, GRID, IMAGES, SHARD = 200, (2, 3), 25, 10
WEIGHTS = "ab" * 32


def plan_of(vocabulary=CODES, images=IMAGES, shard_size=SHARD, grid=GRID, **changes):
    values = {
        "kvq_version": "0",
        "weights_sha256": WEIGHTS,
        "backend": "none",
        "quantizer": {"kind": "vector", "codebook_size": vocabulary},
        "vocabulary": vocabulary,
        "grid": grid,
        "depth": None,
        "dtype": smallest_dtype(vocabulary),
        "preprocessing": Preprocessing(channels=3, resize=None, pad=0, crop=8),
        "source": TokenSetSource(name="numbers", split="train", images=images, sha256="0" * 64),
        "batch_size": 1,
        "shard_size": shard_size,
    }
    return TokenPlan(**{**values, **changes})


def tokens_of(plan):
    rng = np.random.default_rng(0)
    return rng.integers(0, plan.vocabulary, (plan.source.images, *plan.shape)).astype(DTYPES[plan.dtype])


def labels_of(plan):
    return np.arange(plan.source.images) % 10


def write_one(out, plan, number, named=True, labelled=True):
    tokens = tokens_of(plan)
    part = slice(number * plan.shard_size, (number + 1) * plan.shard_size)
    count = len(tokens[part])
    names = [f"a/it's {number}\n{i}.jpg" for i in range(count)] if named else None
    labels = labels_of(plan)[part] if labelled else np.full(count, -1)
    return write_shard(out, plan, number, tokens[part], labels, names, [])


def write_set(out, plan=None, **options):
    plan = plan or plan_of()
    begin(out, plan)
    for number in numbers(plan):
        write_one(out, plan, number, **options)
    assert join(out, plan)
    return plan


@pytest.fixture
def folder(tmp_path):
    write_set(tmp_path / "set")
    return tmp_path / "set"


# What a source gives


def test_elements_are_what_was_written(folder):
    source, plan = TokenSource(folder), plan_of()
    assert (len(source), source.shape, source.vocabulary_size) == (IMAGES, GRID, CODES)
    assert source.description.weights_sha256 == WEIGHTS
    for index in range(IMAGES):
        element = source[index]
        assert element["tokens"].dtype == np.int32 and type(element["label"]) is int
        np.testing.assert_array_equal(element["tokens"], tokens_of(plan)[index])
        assert (element["label"], element["name"]) == (index % 10, f"a/it's {index // SHARD}\n{index % SHARD}.jpg")
        assert source.name(index) == element["name"]
    np.testing.assert_array_equal(source[-1]["tokens"], source[IMAGES - 1]["tokens"])
    np.testing.assert_array_equal(source[np.int64(3)]["tokens"], source[3]["tokens"])
    for index in (IMAGES, -IMAGES - 1):
        with pytest.raises(IndexError, match=f"No image {index} among {IMAGES}"):
            source[index]
    assert len(list(source)) == IMAGES


def test_numbered_images_without_labels(tmp_path):
    write_set(tmp_path / "set", named=False, labelled=False)
    source = TokenSource(tmp_path / "set", verify=True)
    assert (source[12]["name"], source[12]["label"]) == ("train/00012", -1)


def test_what_is_read_is_mapped_and_an_element_is_its_own(folder):
    source = TokenSource(folder)
    assert isinstance(source._map(0).tokens.base, np.memmap)
    element = source[0]
    assert type(element["tokens"]) is np.ndarray
    element["tokens"][:] = 0
    assert source[0]["tokens"].any()


def test_many_shards_leave_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr("kvq.data.token_source.MAPPED", 3)
    plan = write_set(tmp_path / "set", plan_of(images=12, shard_size=1))
    source = TokenSource(tmp_path / "set")
    for index in (*range(12), 0, 5):
        np.testing.assert_array_equal(source[index]["tokens"], tokens_of(plan)[index])
    assert source._map.cache_info().currsize == 3


def test_as_many_shards_as_there_may_be_can_be_listed():
    size, named = 2**31 - 1, {"bytes": 2**31 - 1, "sha256": "f" * 64}
    files = {part: {"file": f"{part}-{MOST_SHARDS - 1}.{end}", **named} for part, end in (("tokens", "npy"), ("names", "txt"))}
    shard = TokenShard(first=size, images=size, **files, labels={"file": f"labels-{MOST_SHARDS - 1}.npy", **named})
    described = TokenSet(**dict(plan_of()), images=size, skipped=size, shards=[shard] * MOST_SHARDS)
    assert len(described.model_dump_json(indent=1)) < _MANIFEST_LIMIT


def test_it_is_pickled_without_its_tokens(tmp_path):
    write_set(tmp_path / "set", plan_of(images=20_000, shard_size=20_000))
    source = TokenSource(tmp_path / "set")
    source[3]
    pickled = pickle.dumps(source)
    assert len(pickled) < 10_000
    np.testing.assert_array_equal(pickle.loads(pickled)[3]["tokens"], source[3]["tokens"])


def test_grain_takes_it_and_no_keras_is_imported(folder):
    code = """
import sys
import grain
from kvq.atomic import write_bytes
from kvq.data import TokenSource

source = TokenSource(sys.argv[1])
dataset = grain.MapDataset.source(source).shuffle(seed=0).map(lambda element: element["tokens"]).batch(5)
assert [batch.shape for batch in dataset] == [(5, 2, 3)] * 5
assert sorted(sum((batch.ravel().tolist() for batch in dataset), [])) == sorted(
    sum((source[i]["tokens"].ravel().tolist() for i in range(len(source))), [])
)
batches = list(dataset.to_iter_dataset(grain.ReadOptions(num_threads=4)))
assert len(batches) == 5
assert "keras" not in sys.modules
"""
    process = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_a_token_of_a_small_vocabulary_takes_a_byte(tmp_path):
    plan = write_set(tmp_path / "set", plan_of(256, images=30_000, shard_size=4096, grid=(3, 3)), named=False, labelled=False)
    size = sum(path.stat().st_size for path in (tmp_path / "set").iterdir())
    assert size <= 1.02 * plan.source.images * 9


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")]
)
def test_the_narrowest_integers(vocabulary, dtype):
    assert smallest_dtype(vocabulary) == dtype


def test_processes_that_begin_and_end_at_the_same_moment_do_not_get_in_each_others_way(tmp_path):
    plan = plan_of(images=40, shard_size=5)

    def work(part):
        if begin(tmp_path / "set", plan) is None:
            for number in numbers(plan)[part::8]:
                write_one(tmp_path / "set", plan, number)
        return join(tmp_path / "set", plan)

    with ThreadPoolExecutor(8) as pool:
        joined = list(pool.map(work, range(8)))
    assert any(joined)
    assert {path.name.split("-")[0] for path in (tmp_path / "set").iterdir()} == {"tokens", "names", "labels", "tokens.json"}
    source = TokenSource(tmp_path / "set", verify=True)
    np.testing.assert_array_equal([source[i]["tokens"] for i in range(40)], tokens_of(plan))


def test_a_plan_that_goes_while_it_is_looked_at_means_that_the_set_was_completed(tmp_path, monkeypatch):
    write_set(tmp_path / "set")

    def too_late(path, content):
        raise FileExistsError

    # As if another process had completed the set between two looks at it.
    monkeypatch.setattr("kvq.tokens.shards.write_new", too_late)
    _claim(tmp_path / "set", plan_of())


@pytest.mark.parametrize("name", ["tokens.json", ".shard-00001.json"])
def test_a_file_tidied_away_by_the_process_that_completed_the_set_is_no_error(tmp_path, monkeypatch, name):
    plan = plan_of()
    begin(tmp_path / "set", plan)
    for number in numbers(plan)[1:]:
        write_one(tmp_path / "set", plan, number)

    def another_is_quicker(path, content):
        if path.name != name:
            return write_bytes(path, content)
        monkeypatch.undo()
        write_one(tmp_path / "set", plan, 1)
        assert join(tmp_path / "set", plan)
        raise FileNotFoundError

    write_one(tmp_path / "set", plan, 0)
    monkeypatch.setattr("kvq.tokens.shards.write_bytes", another_is_quicker)
    write_one(tmp_path / "set", plan, 1)
    assert join(tmp_path / "set", plan).images == plan.source.images
    assert not [path for path in (tmp_path / "set").iterdir() if path.name.startswith(".")]


def test_a_folder_that_goes_while_a_set_is_written_is_an_error(tmp_path):
    plan = write_set(tmp_path / "set")
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(FileNotFoundError):
        write_one(tmp_path / "set", plan, 0)


# Hostile files


def describe(folder, change):
    """Changes what tokens.json says; `change` gets it as a dict."""
    described = json.loads((folder / "tokens.json").read_text())
    change(described)
    (folder / "tokens.json").write_text(json.dumps(described))


def replace(folder, part, content, honest=True):
    """Another file for the first shard; `honest` describes it with its size and checksum."""

    def change(described):
        file = described["shards"][0][part]
        (folder / file["file"]).write_bytes(content)
        if honest:
            file |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    describe(folder, change)


def npy(array=None, version=(1, 0), header=None):
    """An .npy of an array, or of no more than a header that says what you like."""
    import io

    file = io.BytesIO()
    if header is None:
        np.lib.format.write_array(file, array, version=version)
        return file.getvalue()
    length = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + header.encode("latin1")


TOKENS = tokens_of(plan_of())[:SHARD]
BOMB = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 1000000), }"
BREAK = {
    "cut": (lambda f: replace(f, "tokens", npy(TOKENS)[:-7], honest=False), "must have 188 bytes. Received: 181. It was cut"),
    "cut and described so": (lambda f: replace(f, "tokens", npy(TOKENS)[:-7]), "must have 188 bytes by its header"),
    "added to": (lambda f: replace(f, "tokens", npy(TOKENS) + b"x"), "must have 188 bytes by its header"),
    "empty": (lambda f: replace(f, "tokens", b""), "no proper .npy header"),
    "garbage": (lambda f: replace(f, "tokens", b"\x93NUMPY\x01\x00\xff"), "no proper .npy header"),
    "bomb of a shape": (lambda f: replace(f, "tokens", npy(header=BOMB)), r"must be of shape \(10, 2, 3\)"),
    "bomb of a header": (lambda f: replace(f, "tokens", npy(header="(" * 60_000)), "no proper .npy header"),
    "long header": (lambda f: replace(f, "tokens", npy(header=BOMB + " " * 2000)), "no proper .npy header"),
    "header of gigabytes": (
        lambda f: replace(f, "tokens", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 99),
        "another version of the format than 1.0",
    ),
    "pickle": (
        lambda f: replace(f, "tokens", npy(header="{'descr': '|O', 'fortran_order': False, 'shape': (10, 2, 3), }") + b"x" * 480),
        r"must be of shape \(10, 2, 3\).*Received: \(10, 2, 3\) object",
    ),
    "other type": (lambda f: replace(f, "tokens", npy(TOKENS.astype("int8"))), "must hold uint8, .* Received: int8"),
    "wider type": (lambda f: replace(f, "tokens", npy(TOKENS.astype("<u2"))), "must hold uint8, .* Received: uint16"),
    "other shape": (lambda f: replace(f, "tokens", npy(TOKENS[:9])), r"must be of shape \(10, 2, 3\)"),
    "other order": (lambda f: replace(f, "tokens", npy(np.asfortranarray(TOKENS))), "in Fortran's order"),
    "labels of floats": (lambda f: replace(f, "labels", npy(np.zeros(SHARD))), "must hold integers. Received: float64"),
    "labels of others": (lambda f: replace(f, "labels", npy(np.zeros(9, int))), r"must be of shape \(10,\)"),
    "missing shard": (lambda f: (f / "tokens-00001.npy").unlink(), "tokens-00001.npy is listed in tokens.json and is no file"),
    "shard out": (
        lambda f: describe(f, lambda d: d["shards"][0]["tokens"].update(file="../tokens-00000.npy")),
        "shards.0.tokens",
    ),
    "shard of the system": (
        lambda f: describe(f, lambda d: d["shards"][0]["names"].update(file="/etc/passwd")),
        "shards.0.names",
    ),
    "hidden shard": (lambda f: describe(f, lambda d: d["shards"][0]["names"].update(file="..")), "shards.0.names"),
    "huge names": (lambda f: replace(f, "names", b"a\0" * 30_000), "more bytes than 10 names can have"),
    "no names": (lambda f: (f / "names-00002.txt").unlink(), "names-00002.txt is listed in tokens.json and is no file"),
    "huge tokens.json": (
        lambda f: (f / "tokens.json").write_bytes((f / "tokens.json").read_bytes() + b" " * 2**24),
        "larger than 16777216 bytes",
    ),
    "not JSON": (lambda f: (f / "tokens.json").write_bytes(b"\xff\xfe{"), "is not what this kvq reads"),
    "deep JSON": (lambda f: (f / "tokens.json").write_bytes(b'{"quantizer":' * 100_000), "is not what this kvq reads"),
    "other JSON": (lambda f: (f / "tokens.json").write_text("[]"), "is not what this kvq reads"),
    "newer format": (lambda f: describe(f, lambda d: d.update(format_version=2)), "format_version: Input should be 1"),
    "further keys": (lambda f: describe(f, lambda d: d.update(more=1)), "more: Extra inputs are not permitted"),
    "no shards": (lambda f: describe(f, lambda d: d.update(shards=[])), "shards: "),
    "more images": (lambda f: describe(f, lambda d: d.update(images=26)), "says 26 images, its shards 25"),
    "wide for nothing": (lambda f: describe(f, lambda d: d.update(vocabulary=300)), "stored as uint16, not as uint8"),
    "huge grid": (lambda f: describe(f, lambda d: d.update(grid=[2**31 - 1] * 4)), "must be of shape"),
    "negative": (lambda f: describe(f, lambda d: d["shards"][0].update(images=-1)), "shards.0.images"),
}


@pytest.mark.parametrize("breakage", BREAK)
def test_a_broken_set_is_refused_when_it_is_opened(folder, breakage):
    change, message = BREAK[breakage]
    change(folder)
    with pytest.raises(TokensError, match=message) as error:
        TokenSource(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["tokens.json", "tokens-00000.npy", "names-00001.txt", "labels-00002.npy"])
def test_links_out_are_not_followed(folder, tmp_path, name):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(TokensError, match=f"no file {name}" if name == "tokens.json" else f"{name} is listed.* is no file"):
        TokenSource(folder)


def test_folders_are_no_files(folder):
    (folder / "labels-00000.npy").unlink()
    (folder / "labels-00000.npy").mkdir()
    with pytest.raises(TokensError, match="is no file"):
        TokenSource(folder)


def test_an_index_out_of_range_is_found_where_it_is_read(folder):
    tokens = TOKENS.copy()
    tokens[4, 1, 2] = CODES
    replace(folder, "tokens", npy(tokens))
    source = TokenSource(folder)
    assert source[3]["tokens"].shape == GRID
    with pytest.raises(TokensError, match=f"tokens-00000.npy must hold indices below {CODES}. Received: {CODES}"):
        source[4]
    with pytest.raises(TokensError, match=f"must hold indices below {CODES}"):
        TokenSource(folder, verify=True)


@pytest.mark.parametrize("part", ["tokens", "names", "labels"])
def test_a_changed_byte_is_found_on_request(folder, part):
    file = next(folder.glob(f"{part}-00001.*"))
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    TokenSource(folder)
    with pytest.raises(TokensError, match=f"{file.name} is not the file that tokens.json lists: its sha256 is"):
        TokenSource(folder, verify=True)


def test_a_file_that_changes_after_it_was_opened_is_not_mapped(folder):
    source = TokenSource(folder)
    file = folder / "tokens-00000.npy"
    file.write_bytes(file.read_bytes()[:150])
    with pytest.raises(TokensError, match="It was cut or added to"):
        source[0]


@pytest.mark.parametrize(
    "name",
    ["../../evil.png", "/etc/evil", "a//b", "..", "a/../../b", "./a", "", "a/"],
)
def test_names_that_lead_out_are_refused(folder, name):
    replace(folder, "names", b"".join(each + b"\0" for each in [name.encode(), *(b"%d" % i for i in range(9))]))
    with pytest.raises(TokensError, match="names-00000.txt must hold paths below a folder"):
        TokenSource(folder, verify=True)
    with pytest.raises(TokensError, match="must hold paths below a folder"):
        TokenSource(folder)[0]


@pytest.mark.parametrize("content", [b"a\0" * 9, b"a\0" * 11, b"a\0" * 10 + b"b", b""])
def test_as_many_names_as_images(folder, content):
    replace(folder, "names", content)
    with pytest.raises(TokensError, match="must hold 10 names"):
        TokenSource(folder, verify=True)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(TokensError, match="is not a token data set: it has no file tokens.json"):
        TokenSource(tmp_path)
    with pytest.raises(TokensError, match="There is no .*nothing. Give a folder that `kvq encode` wrote."):
        TokenSource(tmp_path / "nothing")


def test_a_broken_plan_is_refused(tmp_path):
    plan = plan_of()
    begin(tmp_path / "set", plan)
    (tmp_path / "set" / ".encoding.json").write_text("{}")
    with pytest.raises(TokensError, match=r"\.encoding\.json is broken"):
        begin(tmp_path / "set", plan)
