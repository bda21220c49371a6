"""Model folders from strangers: each ends in one clear error of `artifact.check`, before Keras is imported, and soon.

Every folder is a good one that was damaged in one way, with checksums that hold, so that what refuses it is the check of that
very damage. One process goes through all of them, as a user's would through one.
"""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kvq_cli.main import app
from typer.testing import CliRunner

from kvq import backends
from kvq.artifact import check, model_folder
from kvq.errors import KvqError
from kvq.evaluation import evaluate

GOOD = Path(__file__).parent / "golden" / "plain"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
BOOK, KERNEL = "quantizer.codebook", "encoder.stage0.down.conv.kernel"
SECONDS, MEBIBYTES = 2.0, 500


# Ways to damage a folder.


def read_parts(folder):
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    return config, json.loads(content[8 : 8 + length]), content[8 + length :]


def write_parts(folder, config, header, data):
    """Puts the parts together again, with a checksum that holds: what is left to find is the change itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + data
    (folder / WEIGHTS).write_bytes(content)
    (folder / CONFIG).write_text(json.dumps({**config, "weights_sha256": hashlib.sha256(content).hexdigest()}), "utf-8")


def parts(change):
    """Damage by a function of config, header and data that changes the first two, or gives new ones."""

    def damage(folder):
        config, header, data = read_parts(folder)
        write_parts(folder, *(change(config, header, data) or (config, header, data)))

    return damage


def place(values, path):
    for key in path:
        values = values[key]
    return values


def says(path, value):
    """config.json says something else; `value` may be a function of what it said."""
    *outer, last = path.split("/")
    outer, last = [int(key) if key.isdigit() else key for key in outer], int(last) if last.isdigit() else last

    def change(config, header, data):
        inner = place(config, outer)
        inner[last] = value(inner[last]) if callable(value) else value

    return parts(change)


def declares(name, key, value):
    """The header of the weights says something else of a tensor."""

    def change(config, header, data):
        header[name][key] = value(header[name][key]) if callable(value) else value

    return parts(change)


def content(name, make):
    """A file has other bytes; `make` may be a function of what it had."""

    def damage(folder):
        (folder / name).write_bytes(make((folder / name).read_bytes()) if callable(make) else make)

    return damage


def text_of_config(make):
    """The text of config.json changed, its meaning otherwise kept."""
    return content(CONFIG, lambda old: make(old.decode()).encode())


def header_text(make):
    """The header's bytes, as `make` gives them from its JSON text."""
    return parts(lambda config, header, data: (config, make(json.dumps(header)), data))


def instead(name, put):
    """Something else in the place of a file, which itself goes on existing beside the folder."""

    def damage(folder):
        moved = (folder / name).rename(folder.parent / f"outside.{name}")
        put(folder / name, moved)

    return damage


def link_the_folder_outside(folder):
    """A run whose model is elsewhere."""
    (folder.parent / "run").mkdir()
    (folder.parent / "run" / "run.json").write_text("{}")
    (folder.parent / "run" / "model").symlink_to(folder, target_is_directory=True)
    return folder.parent / "run"


def replace_by_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("x")


def nested(depth, opening="[", closing="]"):
    return opening * depth + closing * depth


def number(value):
    """A float put in the place of the last weight."""
    return parts(lambda config, header, data: (config, header, data[:-4] + struct.pack("<f", value)))


def without(name, of_config=True, of_header=True):
    def change(config, header, data):
        for names in [config["tensors"]] * of_config + [header] * of_header:
            del names[name]

    return parts(change)


def renamed(old, new):
    def change(config, header, data):
        for names in (config["tensors"], header):
            names[new] = names.pop(old)

    return parts(change)


def one_more(name):
    def change(config, header, data):
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        return config, header, data + bytes(4)

    return parts(change)


def overlap(config, header, data):
    norm = "encoder.stage0.down.norm"
    header[f"{norm}.gamma"]["data_offsets"] = header[f"{norm}.beta"]["data_offsets"]


def hole(config, header, data):
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    header[last]["data_offsets"] = [offset + 4 for offset in header[last]["data_offsets"]]
    return config, header, data + bytes(4)


def shifted_border(config, header, data):
    first, second = sorted(header, key=lambda name: header[name]["data_offsets"])[:2]
    header[first]["data_offsets"][1] += 4
    header[second]["data_offsets"][0] += 4


def flag_for_one(shape):
    return [True if side == 1 else side for side in shape]


def another_network(config, header, data):
    config["model"] = {"kind": "vqvae", "network": "resnet", "latent_dim": 16}


def enormous_network(config, header, data):
    """80 GB by 200 bytes."""
    sizes = {"hidden": 4096, "residual_blocks": 64, "residual_hidden": 4096}
    config["model"] = {"kind": "vqvae", "network": "paper", "latent_dim": 16, **sizes}


def enormous_codebook(config, header, data):
    config["quantizer"]["codebook_size"] = config["grids"][0]["vocabulary"] = 2**20


def terabytes_in_agreement(folder):
    """Config, header and the file's size all say the same: codebooks of 16 GB at 64 levels, in a file that is one hole."""
    config, header, data = read_parts(folder)
    config["model"]["latent_dim"] = dim = 4096
    config["quantizer"] = {"kind": "residual", "levels": 64, "base": {"kind": "vector", "codebook_size": 2**20}}
    config["grids"][0] |= {"vocabulary": 2**20, "depth": 64}
    for spec in config["tensors"].values():
        # From 16 channels, and their halves and quarters, to 256 times as many.
        spec["shape"] = [
            side if index < len(spec["shape"]) - 2 or side == 1 else side * dim // 16 for index, side in enumerate(spec["shape"])
        ]
    del config["tensors"][BOOK]
    config["tensors"] |= {f"quantizer.level{n}.codebook": {"shape": [2**20, dim], "dtype": "float32"} for n in range(64)}
    header, end = {}, 0
    for name, spec in config["tensors"].items():
        size = 4 * int(np.prod(spec["shape"], dtype=object))
        header[name] = {"dtype": "F32", "shape": spec["shape"], "data_offsets": [end, end + size]}
        end += size
    write_parts(folder, config, header, b"")
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + end)


def many_mistakes(config, header, data):
    """As many as fit: each of them is looked for among the known names, and told."""
    config |= {f"{n:x}": 0 for n in range(90_000)}


def declared(length):
    return content(WEIGHTS, lambda old: struct.pack("<Q", length) + old[8:])


def cut(kept):
    return content(WEIGHTS, lambda old: old[:kept])


def after_header(extra):
    return parts(lambda config, header, data: (config, header, data + extra))


# Every case: what is done to the folder (it may give another path to check), and what the message must say.
CASES = {
    # The folder.
    "folder is absent": (shutil.rmtree, "not a kvq model.*No such file"),
    "folder is a file": (replace_by_a_file, "not a kvq model.*Not a dir"),
    "folder has a name too long": (lambda folder: folder / ("x" * 300), "not a kvq model.*name too long"),
    "folder is a link out of a run": (link_the_folder_outside, "model is a symbolic link, and kvq follows none"),
    # What lies in the place of a file.
    **{
        f"{name} is {what}": (instead(name, put), f"its {name} cannot be read: {reason}")
        for name in (CONFIG, WEIGHTS)
        for what, put, reason in [
            ("missing", lambda path, moved: None, "No such file"),
            ("a link out of the folder", lambda path, moved: path.symlink_to(moved), "it is a symbolic link"),
            ("a relative link out of the folder", lambda path, moved: path.symlink_to(f"../{moved.name}"), "it is a symbolic"),
            ("a link to nothing", lambda path, moved: path.symlink_to("nothing"), "it is a symbolic link"),
            ("a link to itself", lambda path, moved: path.symlink_to(path.name), "it is a symbolic link"),
            ("a folder", lambda path, moved: path.mkdir(), "it is not a regular file"),
            ("a pipe", lambda path, moved: os.mkfifo(path), "it is not a regular file"),
            ("a link to a device", lambda path, moved: path.symlink_to("/dev/zero"), "it is a symbolic link"),
        ]
    },
    # config.json: its text.
    "config is empty": (content(CONFIG, b""), "config.json is not JSON"),
    "config is cut": (text_of_config(lambda text: text[:-20]), "config.json is not JSON"),
    "config is not UTF-8": (content(CONFIG, lambda old: old.replace(b"vqvae", b"vqv\xffe")), "is not JSON: .utf-8"),
    "config is UTF-16": (content(CONFIG, lambda old: old.decode().encode("utf-16")), "is not JSON: .utf-8"),
    "config is UTF-32": (content(CONFIG, lambda old: old.decode().encode("utf-32-le")), "is not JSON"),
    "config is huge": (text_of_config(lambda text: text + " " * 2**20), "config.json cannot be read: it is larger than"),
    "config is a terabyte of nothing": (lambda folder: os.truncate(folder / CONFIG, 2**40), "it is larger than"),
    "config is deep": (content(CONFIG, nested(100_000).encode()), "is not JSON: it is nested too deeply"),
    "config is deep in objects": (content(CONFIG, ('{"a":' * 90_000 + "1" + "}" * 90_000).encode()), "nested too deeply"),
    **{
        # Python's own limit lies near 1,000 frames: just short of it, text is read, and writing it out again must not fail.
        f"config has a version {depth} deep": (
            text_of_config(lambda text, depth=depth: text.replace('"format_version": 1', f'"format_version": {nested(depth)}')),
            "format_version|nested too deeply",
        )
        for depth in (900, 960, 990)
    },
    "config is a list": (content(CONFIG, b"[1, 2]"), "has no format_version"),
    "config is a number": (content(CONFIG, b"3"), "has no format_version"),
    "config is of another program": (content(CONFIG, b"{}"), "has no format_version"),
    "config has a key twice": (
        text_of_config(lambda text: text.replace('"kind": "vqvae"', '"kind": "vqvae", "kind": "vqvae"', 1)),
        "is not JSON: it has a key twice",
    ),
    "config has a number of 5,000 digits": (
        text_of_config(lambda text: text.replace('"steps": 300', '"steps": ' + "9" * 5000)),
        "config.json is not JSON: Exceeds the limit",
    ),
    "config has a number of 4,000 digits": (
        text_of_config(lambda text: text.replace('"steps": 300', '"steps": ' + "9" * 4000)),
        "trained.steps: ",
    ),
    **{
        f"config has the number {word}": (
            text_of_config(lambda text, word=word: text.replace('"reconstruction": 1.0', f'"reconstruction": {word}')),
            "loss.reconstruction: ",
        )
        for word in ("NaN", "Infinity", "-Infinity", "1e999", "-1", "true", '"1"', "null")
    },
    "config has 90,000 mistakes": (parts(many_mistakes), "there is no such key.*and 899.. more"),
    "config has a key of 900,000 letters": (says("x" * 900_000, 1), "there is no such key|x{400} [.]{3}"),
    # config.json: what it says.
    "config is of a newer kvq": (says("format_version", 2), "written by a newer kvq, in format_version 2.*Upgrade kvq"),
    "config is of an older kvq": (says("format_version", 0), "format_version 0; this kvq .* reads 1"),
    "config has a version of text": (says("format_version", "1"), "format_version '1'"),
    "config has a version of 900,000 letters": (says("format_version", "x" * 900_000), "format_version 'x{10,20}[.]{3}x"),
    "config has a version of floating point": (says("format_version", 1.0), "format_version 1.0"),
    "config has a version that is true": (says("format_version", True), "format_version True"),
    "config has another kind of model": (says("kind", "vqgan"), "kind: "),
    "config names a class of Python": (says("kind", "os.system"), "kind: "),
    "config has one key more": (says("extra", 1), "extra: there is no such key"),
    "config has one key more in a section": (says("model/__class__", "os.system"), "model.__class__: there is no such key"),
    "config lacks keys": (parts(lambda config, header, data: config.pop("loss") and None), "loss: is missing"),
    "network is unknown": (says("model/network", "transformer"), "model.network: must be one of plain, resnet, paper"),
    "network is a path": (says("model/network", "../../evil"), "model.network: must be one of"),
    "network is a list": (says("model/network", ["plain"]), "model.network: must be one of"),
    "network is 900,000 letters": (says("model/network", "x" * 900_000), "model.network: must be one of"),
    "latent dimension is enormous": (says("model/latent_dim", 10**9), "model.latent_dim: "),
    "latent dimension is text": (says("model/latent_dim", "16"), "model.latent_dim: "),
    "quantizer is unknown": (says("quantizer/kind", "fsq"), "quantizer.kind: must be one of vector, ema_vector, "),
    "codebook is enormous": (says("quantizer/codebook_size", 2**40), "quantizer.codebook_size: "),
    "quantizer does not fit": (says("quantizer", {"kind": "lookup_free", "bits": 8}), "model.latent_dim must be 8"),
    "quantizer is deep": (
        says("quantizer", {"kind": "projected", "code_dim": 4, "base": {"kind": "projected", "code_dim": 4, "base": {}}}),
        "base.kind: must be one of",
    ),
    "no channels": (says("images/channels", 0), "images.channels: "),
    "crop is not an integer": (says("images/crop", 28.5), "images.crop: "),
    "crop is no multiple": (says("images/crop", 30), "images.crop must be a multiple of 4"),
    "no grid": (says("grids", []), "grids: "),
    "grid has a negative vocabulary": (says("grids/0/vocabulary", -1), "grids.0.vocabulary: "),
    "grid has another vocabulary": (says("grids/0/vocabulary", 1000), "other grids than its model has"),
    "grid has another depth": (says("grids/0/depth", 2), "other grids than its model has"),
    "grid has another shape": (says("grids/0/shape", [14, 14]), "other grids than its model has"),
    "version of kvq is 10,000 letters": (says("kvq_version", "x" * 10_000), "kvq_version: "),
    "checksum is a path": (
        text_of_config(lambda text: re.sub('"weights_sha256": "[^"]*"', '"weights_sha256": "../../etc/passwd"', text)),
        "weights_sha256: ",
    ),
    "checksum is another": (
        text_of_config(lambda text: re.sub('"weights_sha256": "[^"]*"', f'"weights_sha256": "{"0" * 64}"', text)),
        "is not the file that config.json describes: its sha256 is",
    ),
    "training is nothing": (says("trained", None), "trained: "),
    "tensors are none": (says("tensors", {}), "tensors: "),
    "tensor has another dtype in config": (says(f"tensors/{BOOK}/dtype", "float64"), "dtype: "),
    "tensor is enormous": (says(f"tensors/{BOOK}/shape", [2**31, 2**31]), "shape.0: "),
    "tensor is empty": (says(f"tensors/{BOOK}/shape", [64, 0]), "shape.1: "),
    "tensor has nine sides": (says(f"tensors/{BOOK}/shape", [1] * 9), "shape: "),
    # A model that its tensors are not, which would be built first.
    "network is another": (parts(another_network), "holds other tensors than its model has"),
    "network is enormous": (
        parts(enormous_network),
        "holds other tensors than its model has: encoder.down0.conv.kernel is missing",
    ),
    "images have more channels": (says("images/channels", 64), f"other tensors than its model has: {KERNEL} is .3, 3, 1, 4."),
    "codebook is larger than its tensor": (parts(enormous_codebook), f"{BOOK} is .64, 16. in the file and .1048576, 16."),
    "terabytes, in agreement": (terabytes_in_agreement, "declares 11[0-9]{11} bytes of weights; at most"),
    "kernel is renamed": (renamed(KERNEL, "encoder.other"), f"other tensors than its model has: {KERNEL} is missing"),
    "codebook is renamed to a path": (renamed(BOOK, "../../quantizer.codebook"), f"its model has: {BOOK} is missing"),
    # model.safetensors: its header.
    **{
        f"header declares {length} bytes": (declared(length), "not a safetensors file, or was cut: it declares")
        for length in (0, 1, 2**20 + 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
    },
    **{f"weights are cut to {kept} bytes": (cut(kept), "was cut") for kept in (0, 7, 8, 9, 200, -4, -1)},
    "weights are a terabyte": (lambda folder: os.truncate(folder / WEIGHTS, 2**40), "It was cut or added to"),
    "header is cut": (header_text(lambda text: text[:-20].encode()), "header that is not JSON"),
    "header is a list": (header_text(lambda text: b"[]"), "header that is not a JSON object"),
    "header is not UTF-8": (header_text(lambda text: text.encode().replace(b"F32", b"F\xff2", 1)), "header that is not JSON"),
    "header is UTF-16": (header_text(lambda text: text.encode("utf-16")), "header that is not JSON"),
    "header is deep": (header_text(lambda text: nested(500_000).encode()), "not JSON: it is nested too deeply"),
    "header is huge": (header_text(lambda text: text.encode() + b" " * 2**20), "not a safetensors file, or was cut"),
    "header is a bomb of lists": (header_text(lambda text: ("[" + "[]," * 340_000 + "0]").encode()), "not a JSON object"),
    "header is a bomb of objects": (header_text(lambda text: ("[" + "{}," * 340_000 + "0]").encode()), "not a JSON object"),
    "header is a bomb of names": (
        header_text(lambda text: ("{" + ",".join(f'"{n:x}":0' for n in range(90_000)) + "}").encode()),
        "do not name the same tensors",
    ),
    "header has a name twice": (header_text(lambda text: text.replace("{", f'{{"{BOOK}": 1, ', 1).encode()), "key twice"),
    "header has a dtype of 1,000,000 letters": (declares(BOOK, "dtype", "x" * 1_000_000), f"{BOOK} is 'x{{10,20}}[.]{{3}}x"),
    **{
        f"header has a shape {depth} deep": (
            header_text(lambda text, depth=depth: text.replace('"shape": [64, 16]', f'"shape": {nested(depth)}').encode()),
            f"{BOOK} is 'F32' |nested too deeply",
        )
        for depth in (900, 960, 990)
    },
    "header has another dtype": (declares(BOOK, "dtype", "I32"), f"{BOOK} is 'I32' .*config.json says 'F32'"),
    "header has half the dtype": (declares(BOOK, "dtype", "F16"), f"{BOOK} is 'F16' .*config.json says 'F32'"),
    "header has a dtype that is no text": (declares(BOOK, "dtype", {}), f"{BOOK} is {{}} "),
    "header has another shape": (declares(BOOK, "shape", [16, 64]), f"{BOOK} is 'F32' .16, 64.; config.json says 'F32' .64, 16."),
    "header has a shape of 100,000 sides": (
        declares(BOOK, "shape", [1] * 100_000),
        f"{BOOK} is 'F32' .1, 1, 1, 1, 1, 1, [.]{{3}}",
    ),
    "header has a shape of floats": (declares(BOOK, "shape", [64.0, 16.0]), f"{BOOK} is 'F32' .64.0, 16.0."),
    "header has a shape of flags": (declares(KERNEL, "shape", flag_for_one), f"{KERNEL} is 'F32' .3, 3, True, 4."),
    "header has no shape": (
        parts(lambda config, header, data: header[BOOK].pop("shape") and None),
        f"{BOOK} must have dtype, sh",
    ),
    "header has one key more": (declares(BOOK, "path", "/etc/passwd"), f"{BOOK} must have"),
    "header has an entry that is a number": (parts(lambda config, header, data: header.update({BOOK: 3})), f"{BOOK} must have"),
    "header has metadata in a list": (
        header_text(lambda text: text.replace("{", '{"__metadata__": [1], ', 1).encode()),
        "metadata",
    ),
    "header has metadata of numbers": (
        header_text(lambda text: text.replace("{", '{"__metadata__": {"a": 1}, ', 1).encode()),
        "metadata",
    ),
    # model.safetensors: its tensors.
    "tensor is missing in the file": (without(BOOK, of_config=False), f"do not name the same tensors.* {BOOK}"),
    "tensor is missing in both": (without(BOOK), f"other tensors than its model has: {BOOK} is missing"),
    "tensor too many": (one_more("quantizer.bomb"), "do not name the same tensors.* quantizer.bomb"),
    "tensor with a path": (one_more("../../evil"), "do not name the same tensors.* ../../evil"),
    "tensors overlap": (parts(overlap), "do not lie where"),
    "tensors leave a hole": (parts(hole), "do not lie where"),
    "tensors have another border": (parts(shifted_border), "do not lie where"),
    "offsets lie outside of the file": (declares(BOOK, "data_offsets", [2**62, 2**62 + 4096]), "do not lie where"),
    "offsets are of 4,000 digits": (declares(BOOK, "data_offsets", [10**3999, 10**3999 + 4096]), "do not lie where"),
    "offsets are negative": (declares(BOOK, "data_offsets", [-4096, 0]), "do not lie where"),
    "offsets go backwards": (declares(BOOK, "data_offsets", lambda old: old[::-1]), "do not lie where"),
    "offsets are floats": (declares(BOOK, "data_offsets", lambda old: [float(each) for each in old]), f"{BOOK} must have"),
    "offsets are three": (declares(BOOK, "data_offsets", lambda old: [*old, old[1]]), f"{BOOK} must have"),
    "bytes follow the data": (after_header(bytes(4)), "bytes of data; its tensors need"),
    "another file follows the data": (after_header(b"PK\3\4" + bytes(1000)), "bytes of data; its tensors need"),
    "weight is not a number": (number(float("nan")), "has weights that are NaN or infinite"),
    "weight is infinite": (number(float("inf")), "has weights that are NaN or infinite"),
    "weight is infinitely small": (number(float("-inf")), "has weights that are NaN or infinite"),
    "weight has another bit": (content(WEIGHTS, lambda old: old[:-1] + bytes([old[-1] ^ 1])), "its sha256 is"),
}

# Runs without Keras, under a limit of memory that no case may reach: past it, Python raises a MemoryError.
PROGRAM = f"""
import contextlib, json, resource, signal, sys, time
from pathlib import Path
from kvq.artifact import check, model_folder
from kvq.errors import KvqError

def peak():
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
    except OSError:  # not Linux: of all cases so far, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_DATA, ({MEBIBYTES} * 2**20, resource.RLIM_INFINITY))
for line in sys.stdin:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    signal.alarm(60)  # a process that waits is ended, and the case that it waits in has no answer
    # Of the processor: a clock on the wall would measure how busy the machine is.
    started = time.process_time()
    try:
        check(model_folder(json.loads(line)) if "/run" in line else Path(json.loads(line)))
        said = ["nothing", "nothing"]
    except KvqError as error:
        said = [type(error).__name__, str(error)]
    except Exception as error:
        said = ["not a KvqError", repr(error)[:500]]
    seconds = time.process_time() - started
    signal.alarm(0)
    heavy = sorted({{"keras", "grain", "jax", "tensorflow", "torch"}} & {{*sys.modules}})
    print(json.dumps([*said, seconds, peak(), heavy]), flush=True)
"""


def damaged(name, folder):
    """The path to check for a case, made in an empty folder."""
    model = shutil.copytree(GOOD, folder / "model")
    return CASES[name][0](model) or model


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Case to class and text of the error, seconds, peak in MiB, and the heavy modules that were imported by then."""
    places = {name: damaged(name, tmp_path_factory.mktemp("case")) for name in CASES}
    lines = "".join(json.dumps(str(path)) + "\n" for path in places.values())
    # Each thread of a library for linear algebra counts as 64 MB, though it is not used.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=lines, capture_output=True, text=True, env=environment)
    answered = [json.loads(line) for line in done.stdout.splitlines()]
    assert answered, done.stderr
    return dict(zip(CASES, answered, strict=False))


@pytest.mark.parametrize("name", CASES)
def test_hostile_folder_ends_in_one_clear_error_soon_and_in_little_memory(answers, name):
    assert name in answers, "The process did not get over it."
    kind, message, seconds, peak, heavy = answers[name]
    print(f"{seconds:.3f} s, {peak:.0f} MiB: {message[:200]}")  # `pytest -rP` shows it
    assert kind == "ArtifactError", message
    assert re.search(CASES[name][1], message, re.DOTALL), message
    assert len(message) < 12_000 and "Traceback" not in message
    assert not heavy
    assert seconds < SECONDS and peak < MEBIBYTES, f"{seconds:.2f} s, {peak:.0f} MiB"


def test_the_folder_that_was_damaged_is_good(tmp_path):
    """Else any error would do. Also where it is written anew, as most cases are."""
    folder = shutil.copytree(GOOD, tmp_path / "model")
    write_parts(folder, *read_parts(folder))
    assert check(folder) and model_folder(folder) == folder


COMMANDS = {
    "evaluate": lambda model, out: ["evaluate", model],
    "evaluate --json": lambda model, out: ["evaluate", model, "--json"],
    "export": lambda model, out: ["export", model, "--format", "onnx", "--out", out],
    "reconstruct": lambda model, out: ["reconstruct", model, "image.png", "--out", out],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [*CASES][::15])
def test_command_says_one_sentence_and_writes_nothing(tmp_path, monkeypatch, command, name):
    monkeypatch.setattr(backends, "choose", lambda *arguments, **keywords: None)
    model = damaged(name, tmp_path)
    result = CliRunner().invoke(app, [*map(str, COMMANDS[command](model, tmp_path / "out"))])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.startswith("error: ") and result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1 and not (tmp_path / "out").exists()


def test_message_cannot_command_the_terminal(tmp_path):
    folder = shutil.copytree(GOOD, tmp_path / "model")
    one_more("quantizer.\x1b]0;owned\x07\u202e")(folder)
    result = CliRunner().invoke(app, ["evaluate", str(folder)])
    assert result.exit_code == 2 and "quantizer.\\x1b]0;owned\\x07\\u202e" in result.stderr
    assert not {"\x1b", "\x07", "\u202e"} & {*result.stderr}


@pytest.mark.parametrize("name", ["../secret", "/etc", "secret", "\ud800", "~"])
def test_model_does_not_choose_the_images_it_is_measured_on(tmp_path, monkeypatch, name):
    """Else a stranger's model reads a folder of its choice. Known names are no paths; a run names what its owner trained on."""
    (tmp_path / "secret").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(GOOD, tmp_path / "model")
    says("data/name", name)(folder)
    with pytest.raises(KvqError, match="--data|data.name: "):
        evaluate(folder)
