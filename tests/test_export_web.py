"""What `kvq export --format web` promises: a folder that is whole or says why not, and a page that computes what Python computes.

The page itself is tried in Chromium where it, its driver, selenium and the runtime are there: `$KVQ_WEB_RUNTIME` names the
archive of onnxruntime-web, else kvq's cache is looked at. Nothing here touches the network.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from kvq import artifact, download
from kvq.build import build_model
from kvq.config import RunConfig, load_config
from kvq.data import open_source
from kvq.errors import BackendError, ExportError, KvqError
from kvq.exporters import EXPORTERS, export, web, writers
from kvq.exporters.check import near_ties
from kvq.exporters.samples import of_another_size
from kvq.exporters.web import runtime
from kvq.tokenizer import Tokenizer

BACKEND = keras.backend.backend()
RESIDUAL = {"kind": "residual", "levels": 2, "base": {"kind": "ema_vector", "codebook_size": 9}}
FILES = {
    *("index.html", "page.js", "ask.js", "outline.js", "picture.js", "tokens.js", "worker.js", "style.css", "model.json"),
    *("onnxruntime.js", "onnxruntime.wasm", "onnxruntime_LICENSE.txt"),
    *("encoder.onnx", "decoder.onnx", "report.json", "example.py"),
}


def save_model(folder, channels=1, quantizer=None, crop=28):
    """A model that nobody trained, whose codes lie among its latents all the same."""
    settings = ["model.latent_dim=4", "quantizer.codebook_size=16", f"data.crop={crop}"]
    values = load_config("fashion_mnist_mini", settings).model_dump()
    config = RunConfig.model_validate({**values, **({"quantizer": quantizer} if quantizer else {})})
    model = build_model(config.model, config.quantizer, config.loss, channels)
    rng = np.random.default_rng(0)
    model.quantizer.initialise(np.asarray(model.encoder.predict_on_batch(rng.uniform(-1, 1, (8, crop, crop, channels)))), seed=0)
    artifact.save(model, config, channels, "fashion_mnist_mini", "train", 0, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    try:
        writers.choose_backend("web", EXPORTERS["web"], BACKEND)
    except BackendError as error:
        pytest.skip(str(error))
    return save_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(autouse=True)
def cache(request, tmp_path, monkeypatch):
    """An empty one, and no network."""
    if "chromium" not in request.fixturenames:
        monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
        monkeypatch.setattr(runtime, "URL", "http://127.0.0.1:9/onnxruntime-web.tgz")
    return tmp_path / "keras" / "datasets" / "kvq"


def stand_in(monkeypatch, path, members=tuple(runtime.MEMBERS)):
    """An archive that counts as the runtime, with a member that would leave the folder."""
    with tarfile.open(path, "w:gz") as tar:
        for name in (*members, "../outside.js", "package/dist/other.js"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    content = path.read_bytes()
    monkeypatch.setattr(runtime, "INTEGRITY", "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode())
    monkeypatch.setattr(runtime, "SIZE", len(content))
    return path


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def served(folder):
    """The address of a plain static file server, and the paths that were asked of it."""
    asked = []

    class Handler(Quiet):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_the_folder_holds_everything_and_its_report_says_what(model, tmp_path, monkeypatch):
    archive = stand_in(monkeypatch, tmp_path / "given.tgz")
    out = tmp_path / "out"
    report = export(model, "web", out, backend=BACKEND, runtime=archive)
    assert {path.name for path in out.iterdir()} == FILES
    assert not (tmp_path / "outside.js").exists()
    assert report == json.loads((out / "report.json").read_text("utf-8"))
    assert (report["page"], report["runtime"]) == (str(out / "index.html"), "onnxruntime-web 1.30.0")
    assert {*report["parts"]} == {"encoder", "decoder"}
    assert report["parts"]["encoder"]["different_indices"] <= report["parts"]["encoder"]["near_ties"]
    assert report["parts"]["decoder"]["largest_difference"] <= 1
    assert report["files"] == {name: (out / name).stat().st_size for name in report["files"]}
    assert {*report["files"]} == FILES - {"encoder.onnx", "decoder.onnx", "report.json", "example.py"}
    assert (out / "onnxruntime.wasm").read_text() == "package/dist/ort-wasm-simd-threaded.wasm"
    described = json.loads((out / "model.json").read_text("utf-8"))
    expected = {"channels": 1, "crop": 28, "downsampling": 4, "vocabulary": 16, "depth": 0, "quantizer": "vector"}
    assert {key: described[key] for key in expected} == expected
    assert described["free_size"] == (BACKEND != "jax")
    assert described["bytes"] == {name: (out / name).stat().st_size for name in described["bytes"]}
    assert {*described["bytes"]} == {"encoder.onnx", "decoder.onnx", "onnxruntime.wasm"}
    assert [len(level) for level in described["colours"]] == [16]


def test_the_page_names_no_other_host():
    page = Path(web.__file__).parent / "page"
    assert {path.name for path in page.iterdir()} == {*web.PAGE}
    for path in page.iterdir():
        addresses = re.findall(r"https?://[^\s\"'<>]+", path.read_text("utf-8"))
        assert all("localhost" in address or "www.w3.org" in address for address in addresses) or path.suffix == ".txt"


@pytest.mark.parametrize("content", [None, b"", b"another file", bytes(2000)])
def test_another_file_than_the_runtime_is_refused_before_anything_is_written(model, tmp_path, monkeypatch, content):
    stand_in(monkeypatch, tmp_path / "right.tgz")
    given = tmp_path / "given.tgz"
    if content is not None:
        given.write_bytes(content)
    message = "given.tgz cannot be read: No such file" if content is None else "is not onnxruntime-web 1.30.0: its sha512"
    with pytest.raises(KvqError, match=message) as error:
        export(model, "web", tmp_path / "out", backend=BACKEND, runtime=given)
    assert error.value.exit_code == 2 and len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_without_a_network_one_sentence_says_what_to_do(model, tmp_path, cache):
    with pytest.raises(ExportError, match=r"onnxruntime-web.tgz could not be fetched \(.*refused.*\).*--runtime") as error:
        export(model, "web", tmp_path / "out", backend=BACKEND)
    assert error.value.exit_code == 1 and len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists() and not cache.exists()


def test_the_runtime_is_fetched_once(model, tmp_path, monkeypatch, cache):
    archive, said = stand_in(monkeypatch, tmp_path / "onnxruntime-web.tgz"), []
    with served(tmp_path) as (address, asked):
        monkeypatch.setattr(runtime, "URL", f"{address}/{archive.name}")
        assert runtime.find(None, said.append) == cache / archive.name
        assert runtime.find(None, said.append) == cache / archive.name
        assert asked == [f"/{archive.name}"] and said == ["fetching onnxruntime-web 1.30.0, 0 MB, once"]
        # A copy that was damaged is no copy.
        (cache / archive.name).write_bytes(b"damaged")
        assert runtime.find(None, said.append).read_bytes() == archive.read_bytes()
    assert len(asked) == 2 and os.listdir(cache) == [archive.name]


@pytest.mark.parametrize("change", ["shorter", "longer", "other"])
def test_another_answer_than_the_runtime_is_not_kept(tmp_path, monkeypatch, cache, change):
    archive = stand_in(monkeypatch, tmp_path / "onnxruntime-web.tgz")
    content = archive.read_bytes()
    archive.write_bytes({"shorter": content[:-1], "longer": content + b"!", "other": b"?" + content[1:]}[change])
    with served(tmp_path) as (address, _):
        monkeypatch.setattr(runtime, "URL", f"{address}/{archive.name}")
        with pytest.raises(ExportError, match="could not be fetched .*(bytes came instead of|its sha512 is another)"):
            runtime.find(None, print)
    assert not cache.exists()


def test_an_answer_that_breaks_off_is_an_error_like_the_others(monkeypatch):
    class Short(Quiet):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5\r\nhal")

    with http.server.HTTPServer(("127.0.0.1", 0), Short) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(OSError, match="IncompleteRead"):
            download.fetch(f"http://127.0.0.1:{server.server_port}/", 5)
        thread.join()


def test_without_a_file_of_the_runtime_nothing_is_written(model, tmp_path, monkeypatch):
    archive = stand_in(monkeypatch, tmp_path / "given.tgz", [next(iter(runtime.MEMBERS))])
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ExportError, match="given.tgz holds no package/dist/ort-wasm-simd-threaded.wasm"):
        EXPORTERS["web"].bundle.write(out, Tokenizer.load(model), archive, True)
    assert not os.listdir(out)


def test_an_earlier_page_does_not_outlive_an_export_that_failed(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("of an earlier export")
    (out / "report.json").write_text('{"format": "web", "parts": {}}')
    monkeypatch.setitem(EXPORTERS, "web", dataclasses.replace(EXPORTERS["web"], write=lambda part, path: 1 / 0))
    with pytest.raises(ExportError, match="could not be written to web"):
        export(model, "web", out, backend=BACKEND, runtime=stand_in(monkeypatch, tmp_path / "given.tgz"))
    assert not (out / "index.html").exists()


def test_what_does_not_go_together_is_refused(model, tmp_path):
    with pytest.raises(KvqError, match="web is a whole of encoder and decoder: leave out --part. Received: encoder"):
        export(model, "web", tmp_path / "out", ["encoder"])
    with pytest.raises(KvqError, match="Only web takes a runtime along. Received: --runtime with onnx"):
        export(model, "onnx", tmp_path / "out", runtime=tmp_path / "given.tgz")
    with pytest.raises(KvqError, match="1 or 3 channels. Received: a model of 4"):
        export(save_model(tmp_path / "model", channels=4, crop=8), "web", tmp_path / "out", backend=BACKEND)
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_one_sentence(model, tmp_path):
    command = [sys.executable, "-m", "kvq_cli", "export", str(model), "--out", str(tmp_path / "out"), "--backend", BACKEND]
    # A proxy that is not there: no network, whatever this machine has.
    no_network = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    done = subprocess.run([*command, "--format", "web"], capture_output=True, text=True, env={**os.environ, **no_network})
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    address = "https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-1.30.0.tgz"
    assert last.startswith(f"error: {address} could not be fetched (")
    assert last.endswith("without a network, give a copy of that file by --runtime.")
    assert not (tmp_path / "out").exists()


def test_codes_that_are_alike_have_like_colours(tmp_path):
    tokenizer = Tokenizer.load(save_model(tmp_path / "model", crop=8))
    codes = np.random.default_rng(0).normal(size=(16, 4)).astype("float32") * [9, 3, 1, 1]
    codes[5] = codes[11] + 0.001
    tokenizer.model.quantizer.codebook.assign(codes)
    (colours,) = web.code_colours(tokenizer)
    assert len({*colours}) == 16 and all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
    places = np.array([[int(colour[start : start + 2], 16) for start in (1, 3, 5)] for colour in colours])
    distances = np.linalg.norm(places - places[5], axis=1)
    assert distances.argsort()[1] == 11
    # One axis is enough for a hue.
    assert len({*web._level_colours(codes[:, :1])}) == 16


def test_each_level_has_its_colours_and_large_vocabularies_none(tmp_path):
    assert [len(level) for level in web.code_colours(Tokenizer.load(save_model(tmp_path / "a", quantizer=RESIDUAL)))] == [9, 9]
    large = {"kind": "finite_scalar", "levels": [9, 9, 9, 9]}
    assert web.code_colours(Tokenizer.load(save_model(tmp_path / "b", quantizer=large))) is None


# From here on in a browser.


@pytest.fixture(scope="module")
def archive():
    cached = download.keras_cache() / "kvq" / runtime.URL.rpartition("/")[2]
    path = Path(os.environ.get("KVQ_WEB_RUNTIME") or cached)
    if not path.is_file():
        pytest.skip(f"No {path}. KVQ_WEB_RUNTIME names a copy of {runtime.URL}.")
    return path


@pytest.fixture(scope="module")
def site(model, archive):
    """Of a grey model with one index a position."""
    export(model, "web", model.parent / "site", backend=BACKEND, runtime=archive)
    return model.parent / "site"


class Page:
    """A page in Chromium, as somebody uses it."""

    def __init__(self, driver):
        self.driver = driver

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self):
        """Until it has done what it was told; what it says then."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 60).until(lambda _: self.run("return document.body.dataset.state") in ("ready", "error"))
        return self["status"].text

    def __getitem__(self, name):
        return self.driver.find_element("id", name)

    def open(self, path):
        self["file"].send_keys(str(path))
        return self.wait()

    def array(self, name, dtype):
        return np.array(self.run(f"return [...kvq.{name}]"), dtype)

    def click(self, row, column, rows, columns):
        from selenium.webdriver.common.action_chains import ActionChains

        size = self["grid"].size
        # Offsets are from the middle.
        place = [round(size["width"] * ((column + 0.5) / columns - 0.5)), round(size["height"] * ((row + 0.5) / rows - 0.5))]
        ActionChains(self.driver).move_to_element_with_offset(self["grid"], *place).click().perform()

    def type(self, code):
        self.run("arguments[0].select()", self["code"])
        self["code"].send_keys(f"{code}\n")
        return self.wait()


@contextlib.contextmanager
def visit(folder, chromium, profile):
    """The folder's page in a browser of its own, which must neither complain nor ask anybody else for anything."""
    with served(folder) as (address, asked):
        with chromium(profile) as (driver, requests):
            driver.get(address + "/")
            page = Page(driver)
            assert page.wait() == "Ready. Give it an image."
            yield page
            assert driver.get_log("browser") == []
    ours = {request["url"] for request in requests if request.get("initiator") == address}
    # Of the page, and of its worker.
    assert {f"{address}/page.js", f"{address}/onnxruntime.wasm", f"{address}/encoder.onnx"} <= ours
    assert {url for url in ours if not url.startswith((address + "/", "data:", "blob:"))} == set()
    assert {path.rpartition("/")[2] for path in asked} <= FILES | {""}


def same(page, tokenizer, shape):
    """Holds the page's indices (as an array of `shape`) and its picture against the tokenizer's, for the images it shows."""
    channels, step = tokenizer.config.images.channels, tokenizer.downsampling
    images = page.array("images", "uint8").reshape(1, shape[0] * step, shape[1] * step, channels)
    indices = page.array("indices", "int32").reshape(1, *shape, *([tokenizer.depth] if tokenizer.depth else []))
    ties = near_ties(tokenizer, images)
    assert ties.mean() < 0.1 and len(np.unique(indices)) > 2
    assert (indices == tokenizer.encode(images))[~ties].all()
    same_picture(page, tokenizer, indices)
    return images, indices


def same_picture(page, tokenizer, indices):
    expected = tokenizer.decode(indices)
    assert np.abs(page.array("reconstruction", int).reshape(expected.shape) - expected).max() <= 1
    return expected


def photographs(channels, side):
    images = open_source("fashion_mnist_mini", "test").fetch(np.array([7, 20, 33]))["images"][:, :side, :side]
    return images if channels == 1 else np.concatenate([images, np.roll(images, 3, 1), 255 - images], axis=-1)


def write_image(path, image):
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)
    return path


def test_the_page_computes_what_python_computes(model, site, chromium, tmp_path):
    holds_against_python(site, model, chromium, tmp_path)


@pytest.mark.skipif(
    BACKEND == "jax", reason="jax2onnx takes minutes; the page is the same from every backend, and is tried from two"
)
def test_in_colour_and_for_several_indices_a_position_too(model, archive, chromium, tmp_path):
    of_colour = save_model(tmp_path / "model", 3, RESIDUAL, 16)
    export(of_colour, "web", tmp_path / "site", backend=BACKEND, runtime=archive)
    holds_against_python(tmp_path / "site", of_colour, chromium, tmp_path)


def holds_against_python(site, model, chromium, tmp_path):
    tokenizer = Tokenizer.load(model)
    channels, side = tokenizer.config.images.channels, tokenizer.config.images.crop
    cells = side // 4
    with visit(site, chromium, tmp_path / "profile") as page:
        for number, image in enumerate(photographs(channels, side)):
            said = page.open(write_image(tmp_path / f"{number}.png", image))
            assert f"{cells * cells * (tokenizer.depth or 1)} tokens" in said
            shown, indices = same(page, tokenizer, (cells, cells))
            # A grid of the size that the model takes reaches it unchanged, colour or grey.
            np.testing.assert_array_equal(shown[0], image)
        # Click a token, type a code: one index is another, and the picture that of the new indices.
        page.click(1, 2, cells, cells)
        expected, before = indices.copy(), tokenizer.decode(indices)
        where = (0, 1, 2, 0) if tokenizer.depth else (0, 1, 2)
        assert page["place"].text == f"Row 2, column 3: code {indices[where]}"
        expected[where] = (indices[where] + 5) % tokenizer.vocabulary_size
        assert "1 token changed" in page.type(expected[where])
        np.testing.assert_array_equal(page.array("indices", "int32"), expected.reshape(-1))
        assert (same_picture(page, tokenizer, expected) != before).any()
        # The palette and, where there is one, another level.
        if tokenizer.depth:
            page.run("document.querySelector('[name=level][value=\"1\"]').click()")
            where = (0, 1, 2, 1)
        page.run("document.querySelector('#palette [data-code=\"3\"]').click()")
        page.wait()
        expected[where] = 3
        np.testing.assert_array_equal(page.array("indices", "int32"), expected.reshape(-1))
        same_picture(page, tokenizer, expected)
        page["reset"].click()
        page.wait()
        np.testing.assert_array_equal(page.array("indices", "int32"), indices.reshape(-1))
        # A larger one that is not square: cut to the model's size, or as it is.
        if page["sizes"].is_displayed():
            larger = of_another_size(image[None], 4)[0]
            page.run("document.querySelector('[name=size][value=own]').click()")
            page.wait()
            page.open(write_image(tmp_path / "larger.png", larger))
            shown, _ = same(page, tokenizer, (cells + 1, cells + 2))
            np.testing.assert_array_equal(shown[0], larger)
            page.run("document.querySelector('[name=size][value=model]').click()")
            page.wait()
            same(page, tokenizer, (cells, cells))


def test_the_page_can_be_used_without_a_mouse_and_says_what_is_wrong(site, chromium, tmp_path):
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "notes.png").write_text("no image")
    with visit(site, chromium, tmp_path / "profile") as page:
        assert page.open(tmp_path / "notes.png") == "notes.png is not an image this browser can read."
        # Dropped, not chosen.
        image = base64.b64encode(write_image(tmp_path / "image.png", photographs(1, 28)[0]).read_bytes()).decode()
        page.run(
            """const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], "image.png", { type: "image/png" }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));""",
            image,
        )
        assert page.wait().startswith("49 tokens, 196 bits")
        assert page["sizes"].is_displayed() == (BACKEND != "jax")
        page["grid"].send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
        before = page.array("indices", "int32")
        assert page["place"].text == f"Row 2, column 2: code {before[8]}"
        page["grid"].send_keys(Keys.ENTER)
        assert page.run("return document.activeElement.id") == "code"
        for wrong in (16, -1, 1.5):
            assert page.type(wrong) == "A code is a whole number from 0 to 15."
            np.testing.assert_array_equal(page.array("indices", "int32"), before)
        page.type((before[8] + 1) % 16)
        assert page.array("indices", "int32")[8] == (before[8] + 1) % 16
        page["grid"].send_keys(Keys.CONTROL, "z")
        page.wait()
        np.testing.assert_array_equal(page.array("indices", "int32"), before)
