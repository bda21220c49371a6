"""Files that were changed at random: every reader takes them or refuses them with a KvqError, and none hangs.

Good files are damaged byte by byte (flipped, cut, spliced) and value by value (JSON and TOML with something else in a place).
In CI these are a few hundred inputs, the same each time; ten thousand, other ones each time, take a quarter of an hour:

    KVQ_FUZZ_INPUTS=10000 pytest tests/test_fuzz.py
"""

import contextlib
import copy
import hashlib
import json
import os
import shutil
import signal
import struct
from pathlib import Path

import keras
import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvq import artifact, load_config
from kvq.build import build_model
from kvq.checkpoint import has_checkpoint, newest_checkpoint, restore_checkpoint, save_checkpoint
from kvq.config import RunConfig, parse_config
from kvq.data import open_source
from kvq.data.listing import Listing
from kvq.data.skipped import read_names
from kvq.errors import KvqError
from kvq.plots import loss_curves
from kvq.run import Run
from kvq.run_images import check_unchanged
from kvq.validation import check

WANTED = os.environ.get("KVQ_FUZZ_INPUTS")
INPUTS = int(WANTED or 200)
SECONDS = 60  # after which an input counts as one that hangs
GOOD = Path(__file__).parent / "golden" / "plain"
CONFIG = load_config("fashion_mnist_mini", ["model.latent_dim=4", "quantizer.codebook_size=5", "train.steps=4"])
OF = {"folder": "/photographs", "split": "train"}


def inputs(share):
    """Settings of a test that takes a share of all inputs."""
    return settings(
        max_examples=max(1, round(INPUTS * share)),
        derandomize=WANTED is None,
        database=None,
        deadline=None,
        suppress_health_check=[*HealthCheck],
    )


@contextlib.contextmanager
def harmless():
    """Inside, nothing but a KvqError may be raised, within `SECONDS`."""

    def stop(*arguments):
        raise AssertionError("It hangs.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with contextlib.suppress(KvqError):
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Damage to bytes.

PIECES = [
    b"",
    b"\0",
    b"\xff",
    b"\n",
    b"{",
    b"[" * 2000,
    b'"',
    b"}",
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 4400,
    b"\xed\xa0\x80",
]


@st.composite
def damaged_bytes(draw, content):
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["flip", "cut", "remove", "splice", "insert"])):
            case "flip" if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at:]
            case "remove":
                del content[at : at + draw(st.integers(1, 64))]
            case "splice":
                start = draw(st.integers(0, len(content)))
                content[at:at] = content[start : start + draw(st.integers(1, 200))]
            case "insert":
                content[at:at] = draw(st.sampled_from(PIECES) | st.binary(max_size=16))
    return bytes(content)


# Damage to values.

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 4, 64, 2**20, 2**22, 2**31, 2**63, 2**64, 10**4000, 0.0, -0.5, 1.0, 1e-300, 1e300]),
    st.floats(),
    st.integers(),
    st.sampled_from(
        ["", "vqvae", "plain", "paper", "projected", "residual", "F32", "float32", "../x", "/dev/zero", "\0", "\ud800"]
    ),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=8
)


def paths(values, path=()):
    """Of everything inside of a value."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*path, key))


@st.composite
def damaged_values(draw, values, new=VALUES):
    values = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        known = [*paths(values)]
        if not known:
            break
        *outer, last = draw(st.sampled_from(known))
        inner = values
        for key in outer:
            inner = inner[key]
        match draw(st.sampled_from(["replace", "remove", "rename", "move", "nest"])):
            case "replace":
                inner[last] = draw(new)
            case "remove":
                del inner[last]
            case "rename" if isinstance(inner, dict):
                inner[draw(st.text(max_size=8) | st.sampled_from([str(path[-1]) for path in known]))] = inner.pop(last)
            case "move":
                source = values
                for key in draw(st.sampled_from(known)):
                    source = source[key]
                inner[last] = copy.deepcopy(source)
            case "nest":
                for _ in range(draw(st.sampled_from([1, 2, 300]))):
                    inner[last] = draw(st.sampled_from([[inner[last]], {"base": inner[last]}])) if _ < 2 else [inner[last]]
    return values


def read_parts(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def to_tensors(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# Configurations.

TEXT = CONFIG.to_toml()
SECTIONS = CONFIG.model_dump(exclude_none=True)
# Other kinds, so that their checks are reached, too.
QUANTIZERS = st.sampled_from(
    [
        {"kind": "finite_scalar", "levels": [5, 5, 5, 5]},
        {"kind": "lookup_free", "bits": 4},
        {"kind": "gumbel", "codebook_size": 9},
        {"kind": "vector", "codebook_size": 9, "regularisers": [{"kind": "orthogonality"}, {"kind": "entropy"}]},
        *(
            {"kind": kind, size: 2, "base": {"kind": "ema_vector", "codebook_size": 9}}
            for kind, size in [
                ("residual", "levels"),
                ("shared_residual", "levels"),
                ("product", "groups"),
                ("projected", "code_dim"),
            ]
        ),
    ]
)


@inputs(0.1)
@given(damaged_bytes(TEXT.encode()))
def test_text_of_a_configuration(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(content)
    with harmless():
        assert load_config(path).to_toml()


def as_toml(values):
    # TOML has no null, and tomli_w refuses it.
    try:
        return tomli_w.dumps(values)
    except (TypeError, ValueError, RecursionError):
        return None


@inputs(0.15)
@given(st.data())
def test_values_of_a_configuration(data):
    quantizer = data.draw(st.just(SECTIONS["quantizer"]) | QUANTIZERS)
    values = data.draw(damaged_values({**SECTIONS, "quantizer": quantizer}))
    with harmless():
        check(RunConfig, values, "mine").to_toml()
    if text := as_toml(values):
        with harmless():
            # What was taken is written out, read back, and the same.
            config = parse_config(text, "mine")
            assert parse_config(config.to_toml(), "mine") == config


@inputs(0.05)
@given(
    st.sampled_from([*paths(SECTIONS)]),
    st.text(max_size=12) | VALUES.map(repr) | st.sampled_from(["0x" + "f" * 5000, "[" * 2000]),
)
def test_overrides(path, value):
    with harmless():
        load_config("fashion_mnist_mini", [f"{'.'.join(map(str, path))}={value}"]).to_toml()


# Model folders.


def try_model(folder):
    with harmless():
        artifact.check(artifact.model_folder(folder))
        # Whatever was checked can be loaded, or is refused.
        artifact.load(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return shutil.copytree(GOOD, tmp_path_factory.mktemp("fuzz") / "model")


@inputs(0.1)
@given(damaged_bytes((GOOD / "config.json").read_bytes()))
def test_text_of_a_model_config(model, content):
    shutil.copy(GOOD / "model.safetensors", model)
    (model / "config.json").write_bytes(content)
    try_model(model)


@inputs(0.1)
@given(st.data(), st.booleans())
def test_bytes_of_model_weights(model, data, with_checksum):
    content = (GOOD / "model.safetensors").read_bytes()
    # Most of the file are weights, of which every bit may be anything: what is damaged is the rest.
    head = data.draw(damaged_bytes(content[:4000]))
    content = head + (content[4000:] if data.draw(st.booleans()) else data.draw(damaged_bytes(content[4000:])))
    config = json.loads((GOOD / "config.json").read_text())
    if with_checksum:
        config["weights_sha256"] = hashlib.sha256(content).hexdigest()
    (model / "model.safetensors").write_bytes(content)
    (model / "config.json").write_text(json.dumps(config))
    try_model(model)


@inputs(0.2)
@given(st.data())
def test_values_of_a_model(model, data):
    """With a checksum that holds, so that all the checks before it are what stops it."""
    config = json.loads((GOOD / "config.json").read_text())
    header, tensors = read_parts(GOOD / "model.safetensors")
    which = data.draw(st.sampled_from(["config", "header", "both"]))
    if which != "header":
        small = {key: value for key, value in config.items() if key != "tensors"}
        config = {**config, **data.draw(damaged_values(small))}
    if which != "config":
        header = data.draw(damaged_values(header, new=st.lists(st.integers(0, 100), max_size=4) | VALUES))
    content = to_tensors(header, tensors)
    (model / "model.safetensors").write_bytes(content)
    if "weights_sha256" in config and data.draw(st.booleans()) or which == "header":
        config["weights_sha256"] = hashlib.sha256(content).hexdigest()
    (model / "config.json").write_text(json.dumps(config))
    try_model(model)


# Run folders.

METRICS = [{"step": step, "split": "train", "loss": 0.5 / step, "perplexity": 3.5, "usage": 0.5} for step in (1, 2, 3)]


def small_model():
    model = build_model(CONFIG.model, CONFIG.quantizer, CONFIG.loss, channels=1)
    model.compile(optimizer=keras.optimizers.Adam(0.01))
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture(scope="module")
def trained():
    return small_model()


@pytest.fixture(scope="module")
def run(tmp_path_factory, trained):
    """A run with all the files that are read again, and two checkpoints."""
    run = Run(tmp_path_factory.mktemp("fuzz") / "run")
    images = {"images": 2000, "sha256": "0" * 64}
    run.create(CONFIG, {"status": "running", "seed": 0, "data": {"train": images, "validation": images}})
    for record in METRICS:
        run.append_metrics(record)
    run.skipped_file.write_bytes(b"a.png\tit is cut\n")
    run.listing_file("train").parent.mkdir()
    run.listing_file("train").write_bytes(Listing.of(["a.png", "b/c.png"]).to_bytes(**OF))
    for step in (3, 4):
        save_checkpoint(run, trained, step, 2, CONFIG.model_dump(), 20.0, lambda folder, step: None)
    return run


@pytest.fixture(scope="module")
def images():
    return open_source("fashion_mnist_mini", "test")


def read_run(run, images):
    """All that a resumed run reads before it trains, but its checkpoints."""
    with harmless():
        assert run.config
    with harmless():
        check_unchanged(run, CONFIG, images, images)
    with harmless():
        run.update_record(status="running")
    with harmless():
        [*(Listing.read(run.listing_file("train"), **OF) or [])]
    with harmless():
        read_names(run.skipped_file)
    with harmless():
        run.drop_metrics_after(2)


FILES = ["config.toml", "run.json", "metrics.jsonl", "skipped.txt", "listings/train"]


@contextlib.contextmanager
def rewritten(run, **contents):
    """A run of whose files some have another content; afterwards all have theirs."""
    before = {name: (run.folder / name).read_bytes() for name in FILES}
    try:
        for name, content in contents.items():
            (run.folder / name).write_bytes(content)
        yield
    finally:
        for name, content in before.items():
            (run.folder / name).write_bytes(content)


@inputs(0.1)
@given(st.data(), st.sampled_from(FILES))
def test_files_of_a_run(run, images, data, name):
    content = data.draw(damaged_bytes((run.folder / name).read_bytes()))
    with rewritten(run, **{name: content}):
        read_run(run, images)


@inputs(0.1)
@given(st.data())
def test_values_of_a_run(run, images, data):
    record = data.draw(damaged_values(run.record))
    lines = data.draw(damaged_values(run.read_metrics()))
    metrics = "".join(json.dumps(line) + "\n" for line in lines)
    with rewritten(run, **{"run.json": json.dumps(record).encode(), "metrics.jsonl": metrics.encode()}):
        read_run(run, images)


# Few, since each draws a picture.
@inputs(0.01)
@given(damaged_values(METRICS))
def test_curves(run, records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    with rewritten(run, **{"metrics.jsonl": lines.encode()}), harmless():
        loss_curves(run.read_metrics(), run.loss_plot)


@inputs(0.09)
@given(st.data())
def test_checkpoints(run, trained, data):
    newest = run.checkpoints / "step_00000004"
    state, described = newest / "state.safetensors", newest / "state.json"
    before = state.read_bytes(), described.read_bytes()
    try:
        match data.draw(st.sampled_from(["state", "state.json", "header", "description"])):
            case "state":
                state.write_bytes(data.draw(damaged_bytes(before[0][:4000])) + before[0][4000:])
            case "state.json":
                described.write_bytes(data.draw(damaged_bytes(before[1])))
            case "header":
                header, tensors = read_parts(state)
                content = to_tensors(data.draw(damaged_values(header, new=st.lists(st.integers(0, 100)) | VALUES)), tensors)
                state.write_bytes(content)
                described.write_text(json.dumps({**json.loads(before[1]), "sha256": hashlib.sha256(content).hexdigest()}))
            case "description":
                described.write_text(json.dumps(data.draw(damaged_values(json.loads(before[1])))))
        with harmless():
            assert has_checkpoint(run)
            newest_checkpoint(run)
            assert restore_checkpoint(run, trained, lambda text: None).step in (3, 4)
    finally:
        state.write_bytes(before[0])
        described.write_bytes(before[1])
