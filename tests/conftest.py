"""What several files of tests share: one small configuration for each kind of quantizer, and a browser."""

import contextlib
import importlib.util
import json
import shutil

import pytest

SINGLE = {
    **{kind: {"codebook_size": 9} for kind in ("vector", "ema_vector", "cosine_vector", "ema_cosine_vector", "sim_vector")},
    "gumbel": {"codebook_size": 9},
    # At the default, 0.01, its entropies multiply what rounding does to the latents by 100.
    "index_backprop": {"codebook_size": 9, "temperature": 1.0},
}


def section(kind: str, dim: int) -> dict:
    """A section `quantizer` that fits latents of `dim` channels, an even number."""
    base = {"kind": "ema_vector", "codebook_size": 9}
    others = {
        "finite_scalar": {"levels": [3] * dim},
        "symmetric_finite_scalar": {"levels": [2] * dim},
        "lookup_free": {"bits": dim},
        "binary_spherical": {"bits": dim},
        "residual": {"levels": 2, "base": base},
        "shared_residual": {"levels": 2, "base": base},
        "product": {"groups": 2, "base": base},
        "projected": {"code_dim": 3, "base": base},
    }
    return {"kind": kind, **{**SINGLE, **others}[kind]}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "quantizer_kind" in metafunc.fixturenames:
        from kvq.quantizers import QUANTIZERS

        metafunc.parametrize("quantizer_kind", sorted(QUANTIZERS))


@pytest.fixture(scope="session")
def quantizer_section():
    """`section` as a fixture."""
    return section


@pytest.fixture(scope="session")
def make_quantizer():
    """A function of kind and dimension that gives a quantizer that is not built yet."""
    import pydantic

    from kvq.build import build_quantizer
    from kvq.config import QuantizerConfig

    adapter = pydantic.TypeAdapter(QuantizerConfig)
    return lambda kind, dim, name="quantizer": build_quantizer(adapter.validate_python(section(kind, dim)), name)


@pytest.fixture(scope="session")
def chromium():
    """A function of a folder for the browser's files that opens one: a context of its driver, and a list.

    After the context the list has every request that a page began, as `url` and `initiator`, workers' too.
    """
    if not importlib.util.find_spec("selenium"):
        pytest.skip("selenium is not installed: pip install selenium.")
    programs = [shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")]
    if not all(programs):
        pytest.skip("Chromium or its driver is missing: Debian's packages are chromium and chromium-driver.")

    @contextlib.contextmanager
    def browser(profile):
        from selenium import webdriver

        options, log = webdriver.ChromeOptions(), profile.with_name("net_log.json")
        options.binary_location = programs[0]
        flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
        flags += ["disable-component-update", "disable-sync", "window-size=1300,1200"]
        flags += [f"user-data-dir={profile}", f"log-net-log={log}"]
        for flag in flags:
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver, requests = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1])), []
        try:
            yield driver, requests
        finally:
            driver.quit()
        events = json.loads(log.read_text("utf-8"))
        started = events["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
        asked = [event["params"] for event in events["events"] if event["type"] == started and "url" in event.get("params", {})]
        # What the browser itself asks for has no origin, or that of one of its own pages, such as a new tab's.
        own = ("not an origin", "chrome://", "chrome-untrusted://")
        requests += [request for request in asked if not request.get("initiator", own[0]).startswith(own)]

    return browser
