"""The runtime of the page: one version of onnxruntime-web from the npm registry, known by its hash before it is opened."""

import base64
import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from kvq.atomic import write_bytes
from kvq.download import fetch, keras_cache
from kvq.errors import ExportError, KvqError

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
URL = f"https://registry.npmjs.org/{PACKAGE}/-/{PACKAGE}-{VERSION}.tgz"
# As `npm view onnxruntime-web@1.30.0 dist.integrity` gives it, and the size of what it is of.
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
SIZE = 33_106_585  # bytes
# The build for the CPU alone, under names whose types every server knows: some do not take .mjs for JavaScript.
MEMBERS = {
    "package/dist/ort.wasm.bundle.min.mjs": "onnxruntime.js",
    "package/dist/ort-wasm-simd-threaded.wasm": "onnxruntime.wasm",
}


def find(given: Path | None, say: Callable[[str], None]) -> Path:
    """The package's archive: the file that was given, else the one in kvq's folder of Keras' cache, fetched if it is not there.

    Raises:
        KvqError: If the given file is missing or another one.
        ExportError: If it cannot be fetched.
    """
    if given is not None:
        try:
            content = _read(given)
        except OSError as error:
            raise KvqError(f"{given} cannot be read: {error.strerror}. --runtime takes {URL}.") from None
        if not _is_it(content):
            raise KvqError(f"{given} is not {PACKAGE} {VERSION}: its sha512 is another. --runtime takes {URL}.")
        return given
    cached = keras_cache() / "kvq" / URL.rpartition("/")[2]
    if cached.is_file() and _is_it(_read(cached)):
        return cached
    say(f"fetching {PACKAGE} {VERSION}, {SIZE / 1e6:.0f} MB, once")
    try:
        content = fetch(URL, SIZE)
        if not _is_it(content):
            raise OSError("its sha512 is another")
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(cached, content)
    except OSError as error:
        raise ExportError(
            f"{URL} could not be fetched ({error}): without a network, give a copy of that file by --runtime."
        ) from None
    return cached


def unpack(archive: Path) -> dict[str, bytes]:
    """The files of the runtime, by the names they get beside the page. Nothing else of the archive is looked at.

    Raises:
        ExportError: If the archive has changed since it was found, or a file is not in it.
    """
    content = _read(archive)
    if not _is_it(content):
        raise ExportError(f"{archive} has changed meanwhile: its sha512 is another than that of {PACKAGE} {VERSION}.")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
        files = {}
        for member in tar:
            file = tar.extractfile(member) if member.name in MEMBERS and member.isfile() else None
            if file:
                files[MEMBERS[member.name]] = file.read()
    if missing := [name for name, target in MEMBERS.items() if target not in files]:
        raise ExportError(f"{archive} holds no {' and no '.join(missing)}.")
    return files


def _read(path: Path) -> bytes:
    # A byte more than it has: whatever is larger is another file, and need not be read to its end.
    with path.open("rb") as file:
        return file.read(SIZE + 1)


def _is_it(content: bytes) -> bool:
    return "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode("ascii") == INTEGRITY
