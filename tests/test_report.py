"""What `kvq report` promises: one page that says what a run folder says, whatever that is, and asks nobody for anything.

In Chromium, where it, its driver and selenium are there, the page is used.
"""

import base64
import hashlib
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvq import load_config, report
from kvq.errors import RunError
from kvq.plots import image_grid
from kvq.run import Run
from kvq.run_report.images import LARGE, MOST_STEPS
from kvq.run_report.reading import flat, thinned

GOLDEN = Path(__file__).parent / "golden" / "resume" / "run"
EVIL = "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 2'><!--"
RECORD = {
    **{"status": "finished", "kvq": "0.1.0", "backend": "torch", "devices": ["cpu"], "seed": 0, "steps": 300},
    **{"command": "kvq train fashion_mnist_mini", "started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T00:02:05+00:00"},
}
EVALUATION = {"images": 500, "psnr": 20.5, "losses": {"reconstruction": 0.04}, "weights_sha256": "a" * 64}


def png(image):
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def make_run(folder, steps=(100, 200, 300), side=8, overrides=(), **record):
    """A run folder as training leaves it, without the training."""
    run = Run(folder)
    run.create(load_config("fashion_mnist_mini", list(overrides)), {**RECORD, **record})
    for step in (1, *steps):
        terms = {"reconstruction": 20 / (step + 20), "codebook": 2 / (step + 20), "commitment": 0.5 / (step + 20)}
        values = {"step": step, "loss": sum(terms.values()), **terms, "psnr": 10 + step / 30, "usage": 0.5, "perplexity": 20.0}
        run.append_metrics({**values, "split": "train", "images_per_second": 900.0, "input_wait": 0.01})
        if step > 1:
            run.append_metrics({**values, "split": "validation", "ssim": 0.7, "images_per_second": 1000.0})
            for number, split in enumerate(("train", "validation")):
                images = np.full((4, side, side, 1), 40 * number, np.uint8)
                grid = image_grid(images, images + np.uint8(step % 200))
                (run.samples / f"{split}_{step:08d}.png").write_bytes(png(grid))
    return run


def data_of(page):
    """What the page holds."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"))[1])


def picture(address):
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


# The page as a file.


def test_the_page_says_what_the_folder_says(tmp_path):
    run = make_run(tmp_path / "mine", overrides=["train.steps=300"])
    run.codebook_plot.write_bytes(png(Image.new("RGB", (4, 4))))
    run.write_evaluation(EVALUATION)
    run.skipped_file.write_text("".join(f"{number}.png\tit is cut\n" for number in range(30)))
    run.log("3 of 64 codes were dead and replaced")
    result = report(run.folder)
    assert result == {"out": str(run.report), "bytes": run.report.stat().st_size}
    data = data_of(run.report)
    (shown,) = data["runs"]
    assert (shown["name"], shown["status"], shown["notes"], shown["remarks"]) == ("mine", "finished", [], [])
    assert shown["record"]["command"] == RECORD["command"] and shown["record"]["devices"] == '["cpu"]'
    assert shown["series"]["validation"]["psnr"] == [[step, float(f"{10 + step / 30:.6g}")] for step in (100, 200, 300)]
    assert [step for step, _ in shown["series"]["train"]["loss"]] == [1, 100, 200, 300]
    for split, number in (("train", 0), ("validation", 1)):
        assert [sample["step"] for sample in shown["samples"][split]] == [100, 200, 300]
        file = run.samples / f"{split}_00000200.png"
        np.testing.assert_array_equal(np.asarray(picture(shown["samples"][split][1]["address"])), np.asarray(Image.open(file)))
        assert np.asarray(Image.open(file))[10, 10] == 40 * number
    assert picture(shown["atlas"]).size == (4, 4)
    assert shown["evaluation"] == {"values": flat(EVALUATION), "outdated": False}
    assert shown["evaluation"]["values"]["losses.reconstruction"] == 0.04
    assert (shown["skipped"]["count"], shown["skipped"]["first"][0]) == (30, ["0.png", "it is cut"])
    assert shown["log"]["text"].endswith("3 of 64 codes were dead and replaced\n")
    config = shown["config"]
    assert config["nearest"] == "fashion_mnist_mini"
    assert {key for key in config["values"] if config["values"][key] != config["shipped"].get(key)} == {"train.steps"}


def test_the_page_allows_its_own_script_and_style_and_no_request(tmp_path):
    run = make_run(tmp_path / "run")
    report(run.folder)
    text = run.report.read_text("utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert {*rules} == {"default-src", "script-src", "style-src", "img-src", "base-uri"}
    assert (rules["default-src"], rules["img-src"], rules["base-uri"]) == ("'none'", "data:", "'none'")
    for tag, rule in (("<script>", "script-src"), ("<style>", "style-src")):
        inside = text.partition(tag)[2].partition(tag.replace("<", "</"))[0]
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
    addresses = {*re.findall(r"https?://[\w./]+", text)}
    assert addresses == {"http://www.w3.org/2000/svg"}


class Elements(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.title = [("",)], ""

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, *(name for name, _ in attributes)))

    def handle_data(self, data):
        if self.found[-1][0] == "title" and not self.title:
            self.title = data


def make_evil_run(folder):
    record = {"status": EVIL, "command": EVIL, "devices": [EVIL], EVIL: {EVIL: EVIL}, "error": EVIL, "seed": 10**400}
    run = make_run(folder / EVIL.replace("/", "|"), **record)
    run.config_file.write_text(f"# {EVIL}\n[train]\nsteps = '{EVIL.replace(chr(39), '')}'\n")
    run.append_metrics({"step": 300, "split": "train", EVIL: 0.5, "loss": 10**400, "psnr": EVIL, "usage": None})
    run.append_metrics({"step": 300, "split": [EVIL], "loss": 0.5})
    run.skipped_file.write_text(f"{EVIL}\t{EVIL}\n")
    run.log(EVIL)
    run.evaluation_file.write_text(json.dumps({EVIL: EVIL, "psnr": [EVIL]}))
    (run.samples / f"train_00000400.png{EVIL.replace('/', '|')}").write_bytes(b"")
    return run


def test_what_files_say_becomes_no_markup(tmp_path):
    run, good = make_evil_run(tmp_path), make_run(tmp_path / "good")
    report(run.folder)
    report(good.folder)
    evil, plain = Elements(), Elements()
    evil.feed(run.report.read_text("utf-8"))
    plain.feed(good.report.read_text("utf-8"))
    assert evil.found == plain.found
    assert EVIL.replace("/", "|") in evil.title
    (shown,) = data_of(run.report)["runs"]
    assert shown["record"]["seed"] == str(10**400)
    assert shown["record"][f"{EVIL}.{EVIL}"] == EVIL and EVIL in shown["config"]["text"] and EVIL in shown["series"]["train"]


PLACES = [
    "metrics.jsonl",
    "config.toml",
    "evaluation.json",
    "skipped.txt",
    "log.txt",
    "codebook.png",
    "samples/train_00000100.png",
]


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("put", ["link", "pipe", "rubbish"])
def test_what_cannot_be_read_is_noted_and_the_rest_is_shown(tmp_path, name, put):
    run, secret = make_run(tmp_path / "run"), tmp_path / "secret"
    secret.write_bytes(png(Image.new("L", (3, 3))) if name.endswith("png") else b'{"secret": "secret"}')
    path = run.folder / name
    path.unlink(missing_ok=True)
    if put == "link":
        path.symlink_to(secret)
    elif put == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"\xff\x00<" * 100)
    report(run.folder)
    (shown,) = data_of(run.report)["runs"]
    reason = {"link": "it is a symbolic link", "pipe": "it is not a regular file", "rubbish": ""}[put]
    if put != "rubbish" or name not in ("metrics.jsonl", "skipped.txt", "log.txt"):
        assert [note for note in shown["notes"] if name in note and reason in note], shown["notes"]
    assert "secret" not in json.dumps(shown) and shown["atlas"] is None
    assert all(picture(sample["address"]).size != (3, 3) for sample in shown["samples"]["train"])
    assert len(shown["samples"]["validation"]) == 3 and shown["record"]["backend"] == "torch"


def test_no_link_leads_out_of_the_run(tmp_path):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    for name in ("samples", "model"):
        shutil.rmtree(run.folder / name, ignore_errors=True)
        (run.folder / name).symlink_to(other.folder / "samples")
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    run.report.symlink_to(precious)
    report(run.folder)
    (shown,) = data_of(run.report)["runs"]
    assert shown["samples"] == {"train": [], "validation": []}
    assert shown["notes"] == ["The folder samples cannot be read: it is a link or no folder."]
    assert precious.read_text() == "years of work" and not run.report.is_symlink()


@pytest.mark.parametrize("size", [(1, 1), (60_000, 60_000)])
def test_a_picture_is_one_and_not_too_large(tmp_path, size):
    run = make_run(tmp_path / "run")
    path = run.samples / "train_00000100.png"
    content = bytearray(path.read_bytes())
    content[16:24] = b"".join(side.to_bytes(4, "big") for side in size)
    path.write_bytes(content)
    report(run.folder)
    (shown,) = data_of(run.report)["runs"]
    assert [sample["step"] for sample in shown["samples"]["train"]] == [200, 300]
    assert len(shown["notes"]) == 1 and shown["notes"][0].startswith("samples/train_00000100.png cannot be shown: ")


def test_many_and_large_pictures_fit_a_page(tmp_path):
    run = make_run(tmp_path / "run", steps=range(10, 2000, 10))
    noise = np.random.default_rng(0).integers(0, 256, (600, 2400, 3), np.uint8)
    for split in ("train", "validation"):
        (run.samples / f"{split}_00000010.png").write_bytes(png(Image.fromarray(noise)))
    assert (run.samples / "train_00000010.png").stat().st_size > LARGE
    report(run.folder)
    (shown,) = data_of(run.report)["runs"]
    steps = [sample["step"] for sample in shown["samples"]["train"]]
    assert len(steps) == MOST_STEPS and (steps[0], steps[-1]) == (10, 1990) and {*np.diff(steps)} <= {100, 110}
    assert picture(shown["samples"]["train"][0]["address"]).size == (2000, 500)
    assert picture(shown["samples"]["train"][0]["address"]).format == "JPEG"
    assert [remark.partition(" ")[0] for remark in shown["remarks"]] == [str(MOST_STEPS), str(MOST_STEPS), "2"]
    assert run.report.stat().st_size < 6e6


def test_a_long_curve_keeps_its_ends_and_its_peaks():
    values = np.random.default_rng(0).normal(size=50_000)
    values[31_234] = 99
    points = [[step, float(value)] for step, value in enumerate(values)]
    kept = thinned(points)
    assert len(kept) <= 1002 and kept[0] == points[0] and kept[-1] == points[-1]
    assert [31_234, 99.0] in kept and min(value for _, value in kept) == values.min()
    assert kept == sorted(kept) and thinned(points[:1000]) == points[:1000]


def test_a_page_of_a_long_run_is_quick(tmp_path):
    run = make_run(tmp_path / "run")
    line = json.dumps({"step": 1, "split": "train", "loss": 0.5, "reconstruction": 0.1, "psnr": 20.5, "usage": 1.0})
    with run.metrics_file.open("a") as file:
        file.writelines(line.replace('"step": 1', f'"step": {step}') + "\n" for step in range(301, 20_000))
    started = time.process_time()
    report(run.folder)
    assert time.process_time() - started < 2  # of the CPU: other work is no matter
    assert run.report.stat().st_size < 500_000


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_a_run_that_did_not_finish_has_a_page(tmp_path, status):
    run = make_run(tmp_path / "run", status=status, error="TrainingError: the loss is not finite")
    report(run.folder)
    assert data_of(run.report)["runs"][0]["status"] == status


def test_a_real_run_of_few_files_has_a_page(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "run")
    report(tmp_path / "run")
    (shown,) = data_of(tmp_path / "run" / "report.html")["runs"]
    assert shown["series"] == {"train": {}, "validation": {}} and shown["samples"] == {"train": [], "validation": []}
    assert shown["evaluation"] is shown["atlas"] is shown["skipped"] is shown["log"] is None and shown["notes"] == []
    assert shown["record"]["backend"] == "jax" and shown["config"]["nearest"] == "fashion_mnist_mini"


def resumed(step, at, **rest):
    return {"step": step, "at": f"2026-01-01T{at}+00:00", **rest}


@pytest.mark.parametrize(
    "record, expected",
    [
        ({}, (125, False)),
        ({"ended": None}, (None, False)),
        ({"resumed": [resumed(100, "00:01:55", stopped="2026-01-01T00:01:00+00:00")]}, (60 + 10, False)),
        # Of a run that an older kvq resumed, or that was killed, it is not known how long it paused.
        ({"resumed": [resumed(100, "00:01:55")]}, (125, True)),
        ({"resumed": [resumed(100, "00:01:55", stopped=None)]}, (125, True)),
        # It goes on, and an older kvq left the end before: not the end of what runs now.
        ({"resumed": [resumed(100, "00:03:00")]}, (None, True)),
        ({"started": 7}, (None, False)),
        ({"started": "yesterday", "resumed": [resumed(100, "00:01:55")]}, (None, True)),
        ({"started": "2026-01-01T00:00:00", "resumed": 7}, (None, False)),
    ],
)
def test_the_time_is_that_of_training_without_the_pauses(tmp_path, record, expected):
    run = make_run(tmp_path / "run", **record)
    report(run.folder)
    (shown,) = data_of(run.report)["runs"]
    assert shown["seconds"] == expected[0] and (expected[0] is None or shown["with_pauses"] == expected[1])


def test_commands_come_the_newest_first_and_each_once(tmp_path):
    again = {"command": "kvq train mine --resume", "stopped": None}
    entries = [resumed(60, "00:01:00"), resumed(100, "00:01:10", **again), resumed(200, "00:01:20", **again), "rubbish"]
    run = make_run(tmp_path / "run", resumed=[*entries, resumed([], "00:01:30", command=["rubbish"])])
    report(run.folder)
    assert data_of(run.report)["runs"][0]["commands"] == [
        {"step": None, "command": None},
        {"step": 100, "command": "kvq train mine --resume"},
        {"step": 60, "command": None},
        {"step": 0, "command": "kvq train fashion_mnist_mini"},
    ]


def test_an_evaluation_of_other_weights_is_called_outdated(tmp_path):
    run = make_run(tmp_path / "run")
    run.write_evaluation(EVALUATION)
    run.model.mkdir()
    for weights, outdated in (("a" * 64, False), ("b" * 64, True)):
        (run.model / "config.json").write_text(json.dumps({"weights_sha256": weights}))
        report(run.folder)
        assert data_of(run.report)["runs"][0]["evaluation"]["outdated"] == outdated


def test_runs_are_compared(tmp_path):
    first, second = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", overrides=["train.seed=1"])
    assert report([first.folder, second.folder])["out"] == str(first.comparison)
    shown = data_of(first.comparison)["runs"]
    assert [run["name"] for run in shown] == [str(first.folder), str(second.folder)]
    assert [run["config"]["values"]["train.seed"] for run in shown] == [0, 1]
    assert not first.report.exists() and not second.report.exists()
    with pytest.raises(RunError, match="A report is of 1 to 8 runs. Received: 9"):
        report([first.folder] * 9)


# The command.


def kvq(*arguments):
    return subprocess.run([sys.executable, "-m", "kvq_cli", "report", *map(str, arguments)], capture_output=True, text=True)


def test_the_command_prints_the_file_and_imports_nothing_heavy(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "page.html"
    done = kvq(run.folder, "--out", out, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"out": str(out), "bytes": out.stat().st_size} and not run.report.exists()
    code = """
import sys
from kvq_cli.main import app
try:
    app(["report", sys.argv[1]])
except SystemExit as end:
    print(end.code, *({"keras", "grain", "jax", "tensorflow", "torch", "matplotlib"} & {*sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", code, str(run.folder)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{run.report}\n0\n", "")


def test_folders_of_the_page_are_made(tmp_path):
    page = tmp_path / "new" / "folder" / "page.html"
    assert report(make_run(tmp_path / "run").folder, page)["out"] == str(page) and page.exists()


def test_what_is_no_run_is_one_sentence(tmp_path):
    run = make_run(tmp_path / "run")
    newer = make_run(tmp_path / "newer")
    newer.update_record(format_version=2)
    cases = [
        ([tmp_path / "none"], "none. Give a run folder, as `kvq train` writes it."),
        ([run.folder, tmp_path], "run.json cannot be read"),
        ([newer.folder], "is a run of format 2"),
        ([run.folder, "--out", run.config_file / "page.html"], "page.html cannot be written: File exists."),
    ]
    for arguments, message in cases:
        done = kvq(*arguments)
        assert (done.returncode, done.stdout) == (2, "") and message in done.stderr
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not list(tmp_path.rglob("*.html"))


# In a browser.


@pytest.fixture
def visit(chromium, tmp_path):
    """A function of a page and a width that opens the page, and gives the driver. No page may complain or ask for anything."""
    with chromium(tmp_path / "profile") as (driver, requests):

        def check():
            assert driver.get_log("browser") == []
            assert driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []

        def opened(page, width=1200):
            check()
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            driver.get(Path(page["out"]).as_uri())
            return driver

        yield opened
        check()
    assert [request["url"] for request in requests] == []


def text_of(driver, selector):
    return driver.find_element("css selector", selector).text


def shown_picture(driver):
    """The middle pixel of the first picture, as the browser draws it."""
    return driver.execute_script(
        """const image = document.querySelector(".picture img");
        const context = document.createElement("canvas").getContext("2d");
        context.drawImage(image, 0, 0);
        return [...context.getImageData(10, image.naturalHeight - 10, 1, 1).data].slice(0, 3);"""
    )


def width_of(driver):
    driver.execute_script("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    return driver.execute_script("return document.documentElement.scrollWidth")


def test_the_page_is_read_with_the_keyboard(tmp_path, visit):
    from selenium.webdriver.common.keys import Keys

    run = make_run(tmp_path / "mine", overrides=["train.steps=300"])
    run.write_evaluation(EVALUATION)
    driver = visit(report(run.folder))
    assert text_of(driver, "h1") == "mine finished"
    assert text_of(driver, ".tiles").split("\n")[:4] == ["300", "steps", "20", "PSNR, dB"]
    assert "torch · cpu · seed 0 · 2 min 5 s · kvq train fashion_mnist_mini" in text_of(driver, "header")
    # The slider moves the picture, and so does the choice of the images.
    slider = driver.find_element("id", "step")
    for key, step, split, value in [
        ("", 300, "validation", 40 + 100),
        (Keys.ARROW_LEFT, 200, "validation", 40),
        (Keys.ARROW_LEFT, 100, "validation", 40 + 100),
        (Keys.ARROW_RIGHT, 200, "validation", 40),
    ]:
        slider.send_keys(key)
        assert text_of(driver, "output") == f"step {step}" == slider.get_attribute("aria-valuetext")
        assert f"{split} images of mine, step {step}" in driver.find_element("css selector", ".picture img").get_attribute("alt")
        assert shown_picture(driver) == [value] * 3
    driver.find_element("css selector", "[name=split][value=train]").send_keys(Keys.SPACE)
    slider.send_keys(Keys.HOME)
    assert text_of(driver, "output") == "step 100" and shown_picture(driver) == [100] * 3
    # A curve tells its values at a step.
    plot = driver.find_element("css selector", ".plot")
    plot.send_keys(Keys.HOME)
    assert text_of(driver, ".legend tbody").split("\n")[0].split() == ["loss", "1.071", "0.1875"]
    assert plot.get_attribute("aria-valuetext").startswith("step 1: loss train 1.071, loss validation 0.1875 at step 100, ")
    plot.send_keys(Keys.ARROW_RIGHT)
    assert text_of(driver, ".legend tbody").split("\n")[0].split() == ["loss", "0.1875", "0.1875"]
    assert text_of(driver, ".legend thead").startswith("step 100")
    assert len(driver.find_elements("css selector", "svg polyline")) > 10
    # Everything is somewhere; what is missing comes with its command.
    text = text_of(driver, "main")
    assert "losses.reconstruction 0.04" in text and f"kvq codebook {run.folder}" in text and "train.steps 300 2500" in text
    assert "No file had to be left out." in text


def test_a_resumed_run_shows_its_commands_and_how_long_it_was_trained(tmp_path, visit):
    again = resumed(100, "00:01:55", command="kvq train mine --resume --steps 300", stopped="2026-01-01T00:01:00+00:00")
    run, other = make_run(tmp_path / "run", resumed=[again]), make_run(tmp_path / "other", resumed=[resumed(100, "00:01:55")])
    lines = ["from step 100: kvq train mine --resume --steps 300", "from the start: kvq train fashion_mnist_mini"]
    assert text_of(visit(report(run.folder)), "header").split("\n")[2:] == ["torch · cpu · seed 0 · 1 min 10 s", *lines]
    driver = visit(report([run.folder, other.folder]))
    assert text_of(driver, "header").split("\n")[2:] == [
        *(f"run: {line}" for line in lines),
        "other: from step 100: a command that run.json does not name",
        "other: from the start: kvq train fashion_mnist_mini",
    ]
    assert "time 1 min 10 s 2 min 5 s from the first start to the end" in text_of(driver, "main")


def test_the_page_fits_a_phone(tmp_path, visit):
    run = make_run(tmp_path / ("long" * 20), steps=range(10, 500, 10), side=64, overrides=[f"data.source={'/deep' * 40}"])
    run.codebook_plot.write_bytes(png(Image.new("RGB", (1600, 200))))
    run.log("word" * 100)
    run.skipped_file.write_text(f"{'name' * 50}.png\t{'reason' * 50}\n")
    other = make_run(tmp_path / "other", overrides=["train.seed=1"])
    for runs in (run.folder, [run.folder, other.folder]):
        driver = visit(report(runs), 375)
        assert width_of(driver) <= 375
        driver.find_element("css selector", ".controls input[type=checkbox]").click()  # actual size
        assert width_of(driver) <= 375
        sizes = driver.execute_script(
            "return [...document.querySelectorAll('p, td, th, text')].map((e) => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(sizes) >= 12


def test_what_hardly_changes_looks_like_it(tmp_path, visit):
    def height(title):
        """Of the only curve with a rise, of the 220 pixels of its chart."""
        return driver.execute_script(
            """const [chart] = [...document.querySelectorAll(".chart")].filter((e) => e.innerText.startsWith(arguments[0]));
            const line = [...chart.querySelectorAll("polyline")].find((each) => each.getAttribute("points"));
            return line.getBBox().height;""",
            title,
        )

    for change in (0.002, 0.02):
        run = make_run(tmp_path / str(change), steps=())
        records = [(100, 20, 0.7, -5), (200, 20 + change, 0.7 + change, -5 + change)]
        run.metrics_file.unlink()
        for step, psnr, ssim, term in records:
            run.append_metrics({"step": step, "split": "validation", "psnr": psnr, "ssim": ssim, "entropy": term})
        driver = visit(report(run.folder))
        # Of 184 pixels: an axis reaches over 0.05 and 0.5 dB at least, else over a twentieth of the values; and a bit more.
        assert height("SSIM") == pytest.approx(change * 184 / 0.055, abs=0.2)
        assert height("PSNR") == pytest.approx(change * 184 / 0.55, abs=0.2)
        assert height("Loss") == pytest.approx(change * 184 / 0.275, rel=0.03, abs=0.2)


def test_a_badge_and_a_swatch_stay_with_their_words_on_a_phone(tmp_path, visit):
    few, several = (
        [make_run(tmp_path / name, status="interrupted").folder for name in names] for names in (["a" * 24, "b" * 50], "cdef")
    )
    for runs in (few[0], several, few):
        driver = visit(report(runs), 400)
        badges = driver.find_elements("css selector", ".status")
        assert badges and all(badge.size["height"] < 1.8 * 14 for badge in badges)
        assert width_of(driver) <= 400
    for name in driver.find_elements("css selector", ".legend tbody th"):
        swatch = name.find_element("css selector", ".swatch")
        beside = driver.execute_script(
            """const words = document.createRange();
            words.selectNodeContents(arguments[0].lastChild);
            const [line] = words.getClientRects();
            const box = arguments[1].getBoundingClientRect();
            return box.right < line.left && box.top > line.top && box.bottom < line.bottom;""",
            *(name, swatch),
        )
        assert beside


def test_runs_are_shown_side_by_side(tmp_path, visit):
    first = make_run(tmp_path / "first")
    second = make_run(tmp_path / "second", steps=(90, 280), status="running", overrides=["train.seed=1"])
    driver = visit(report([first.folder, second.folder]))
    text = text_of(driver, "main")
    assert "train.seed 0 1" in text and "second: Was running when this was written: step 280 of 2,500" in text
    assert "status finished running" in text and "PSNR, dB 20 19.33" in text
    assert len(driver.find_elements("css selector", ".picture img")) == 2
    driver.execute_script(
        "document.getElementById('step').value = 2; document.getElementById('step').dispatchEvent(new Event('input'))"
    )
    assert text_of(driver, "output") == "step 200"
    captions = [each.text for each in driver.find_elements("css selector", ".picture figcaption")]
    assert captions == ["first", "second: step 280"]


def test_figures_that_are_of_other_things_are_called_so(tmp_path, visit):
    def data(digest):
        return {"data": {"validation": {"images": 500, "sha256": digest}}}

    first, same = (make_run(tmp_path / name, overrides=[f"train.seed={len(name)}"], **data("a")) for name in ("first", "same"))
    older = make_run(tmp_path / "older")  # does not say on which images it was validated
    driver = visit(report([first.folder, same.folder, older.folder]))
    assert "Not comparable" not in text_of(driver, "main")
    weights = ["loss.reconstruction=2.0", "quantizer.commitment_weight=0.5"]
    other = make_run(tmp_path / "other", overrides=["data.crop=24", *weights], **data("b"))
    other.append_metrics({"step": 300, "split": "validation", "entropy": 0.5})
    driver = visit(report([first.folder, same.folder, other.folder]))
    assert text_of(driver, "[aria-labelledby=final-figures] .alert") == (
        "Not comparable: all figures (other validation images, other data.crop) and the loss (other terms, other "
        "quantizer.commitment_weight, other loss.reconstruction)."
    )
    lost = make_run(tmp_path / "lost", **data("a"))
    records = [record for record in lost.read_metrics() if record["split"] == "train"]
    lost.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    driver = visit(report([first.folder, lost.folder]))
    assert text_of(driver, "[aria-labelledby=final-figures] .alert") == "Not comparable: all figures (another split)."
    # Of 500 images, 2,000 are as many as 1,000.
    more, fewer = (make_run(tmp_path / str(n), overrides=[f"data.validation_images={n}"], **data("a")) for n in (1000, 100))
    assert "Not comparable" not in text_of(visit(report([first.folder, more.folder])), "main")
    text = text_of(visit(report([first.folder, fewer.folder])), "main")
    assert "Not comparable: all figures (fewer validation images)." in text


def test_a_hostile_run_is_text_and_an_empty_one_says_what_is_missing(tmp_path, visit):
    driver = visit(report(make_evil_run(tmp_path).folder), 375)
    assert width_of(driver) <= 375
    assert driver.execute_script("return window.owned ?? null") is None
    assert driver.execute_script("return document.scripts.length") == 2 and not driver.find_elements("css selector", "[onerror]")
    assert text_of(driver, "h1 .status") == EVIL and EVIL in text_of(driver, "pre")
    shutil.copytree(GOLDEN, tmp_path / "golden")
    driver = visit(report(tmp_path / "golden"))
    text = text_of(driver, "main")
    for missing in (
        "There are no metrics yet",
        "There are no pictures in samples yet",
        "no picture of the codes",
        "no evaluation.json",
    ):
        assert missing in text
    odd = make_run(tmp_path / "odd", status=7, devices=7, command=7, backend=None, started={}, seed={})
    assert text_of(visit(report(odd.folder)), "header").split("\n")[-1] == "7 · seed {}"
    failed = make_run(tmp_path / "failed", status="failed", error="TrainingError: the loss is not finite")
    assert (
        text_of(visit(report(failed.folder)), ".alert") == "Failed after step 300 of 2,500: TrainingError: the loss is not finite"
    )
