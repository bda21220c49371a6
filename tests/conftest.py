"""One small configuration for each kind of quantizer, for all tests that go through every kind."""

import pytest

SINGLE = {
    **{kind: {"codebook_size": 9} for kind in ("vector", "ema_vector", "cosine_vector", "ema_cosine_vector", "sim_vector")},
    **{kind: {"codebook_size": 9} for kind in ("index_backprop", "gumbel")},
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
