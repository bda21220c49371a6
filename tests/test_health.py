"""What `kvq doctor RUN` promises: it names what ails a codebook with a setting to change, and is silent on a healthy one."""

import json

import keras
import numpy as np
import pytest
from kvq_cli.main import app
from typer.testing import CliRunner

from kvq import load_config
from kvq.artifact import save
from kvq.build import build_model
from kvq.config import RunConfig
from kvq.errors import DataError
from kvq.findings import _existing
from kvq.health import _divergence, diagnose
from kvq.progress import Progress

SIDE, CODES = 8, 32
VECTOR = {"kind": "vector", "codebook_size": CODES}
RECIPE = ["model.latent_dim=4", f"data.crop={SIDE}", "data.pad=0"]


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Smooth images, whose latents differ from place to place, in two splits of one kind."""
    rng = np.random.default_rng(0)
    return write_images(tmp_path_factory.mktemp("data") / "arrays.npz", patterns(rng, 200), patterns(rng, 200))


def patterns(rng, count):
    return np.kron(rng.integers(0, 256, (count, 4, 4)), np.ones((2, 2))).astype("uint8")


def write_images(file, train, test):
    np.savez(file, x_train=train, x_test=test)
    return file


@pytest.fixture(scope="module")
def make_model(arrays):
    """A function that saves a model whose codes lie on its latents, after `spoil` had its way."""

    def make(folder, spoil=lambda model: None, quantizer=VECTOR):
        values = load_config("fashion_mnist_mini", RECIPE).model_dump()
        config = RunConfig.model_validate({**values, "quantizer": quantizer})
        keras.utils.set_random_seed(0)
        model = build_model(config.model, config.quantizer, config.loss, 1)
        with np.load(arrays) as file:
            images = file["x_train"][..., None]
        model.quantizer.initialise(np.asarray(model.encoder.predict_on_batch(images / 127.5 - 1)))
        spoil(model)
        save(model, config, 1, "fashion_mnist_mini", "train", 1, folder)
        return folder

    return make


def names(result):
    return {finding["name"] for finding in result["findings"]}


@pytest.mark.parametrize(
    "quantizer",
    [
        VECTOR,
        {"kind": "residual", "levels": 2, "base": VECTOR},
        {"kind": "shared_residual", "levels": 2, "base": VECTOR},
        {"kind": "ema_cosine_vector", "codebook_size": CODES},
    ],
    ids=lambda section: section["kind"],
)
def test_a_healthy_codebook_gives_no_finding(quantizer, make_model, arrays, tmp_path):
    result = diagnose(make_model(tmp_path / "model", quantizer=quantizer), arrays)
    assert not result["findings"]
    assert len(result["measured"]["usage"]) == quantizer.get("levels", 1)


def codebook(change):
    def spoil(model):
        weight = getattr(model.quantizer, "members", [model.quantizer])[0].codebook
        weight.assign(change(np.array(keras.ops.convert_to_numpy(weight))))

    return spoil


def far_but(kept):
    """All codes but `kept` are where no latent is."""

    def change(values):
        values[kept:] = 1e3
        return values

    return codebook(change)


def constant_encoder(model):
    for weight in model.encoder.weights:
        weight.assign(np.zeros(weight.shape))


def silent_second_level(model):
    model.quantizer.members[1].codebook.assign(np.concatenate([np.zeros((1, 4)), np.full((CODES - 1, 4), 1e3)]))


RESIDUAL = {"kind": "residual", "levels": 2, "base": VECTOR}
SHARED = {"kind": "shared_residual", "levels": 2, "base": VECTOR}
SICK = {
    "collapsed": (far_but(5), VECTOR, {"dead codes", "codes far away"}, "codebook.replace_dead_every"),
    "one code": (far_but(1), VECTOR, {"one code", "codes far away", "coarse codes"}, "codebook.initialise"),
    "all zero": (codebook(np.zeros_like), VECTOR, {"one code", "codes at the origin", "coarse codes"}, "codebook.initialise"),
    "exploded": (codebook(lambda values: values * 1e4), VECTOR, {"codes far away", "coarse codes"}, "train.learning_rate"),
    "shrunk": (codebook(lambda values: values * 1e-3), VECTOR, {"codes at the origin", "coarse codes"}, "quantizer.decay"),
    "constant latents": (constant_encoder, VECTOR, {"constant latents", "one code"}, "train.clip_norm"),
    "collapsed and shared": (far_but(5), SHARED, {"dead codes"}, "quantizer.base.codebook_size"),
    "unused level": (silent_second_level, RESIDUAL, {"unused level"}, "quantizer.levels"),
}


@pytest.mark.parametrize("sick", SICK)
def test_what_ails_a_codebook_is_named_with_a_setting(sick, make_model, arrays, tmp_path):
    spoil, quantizer, expected, key = SICK[sick]
    result = diagnose(make_model(tmp_path / "model", spoil, quantizer), arrays)
    assert names(result) >= expected
    assert key in {key for finding in result["findings"] for key in finding["keys"]}
    json.dumps(result["findings"])


INSIDE = {"kind": "product", "groups": 2, "base": {"kind": "gumbel", "codebook_size": CODES}}
# Whose codes are not placed: they are computed, moved by a matrix all together, or stand for logits.
NOT_PLACED = {
    "computed": {"kind": "finite_scalar", "levels": [5, 5, 5, 5]},
    "projected": {"kind": "sim_vector", "codebook_size": CODES},
    "inside": INSIDE,
}


@pytest.mark.parametrize("sick", [*SICK, *NOT_PLACED])
def test_every_setting_that_is_named_exists(sick, make_model, arrays, tmp_path):
    spoil, quantizer = (constant_encoder, NOT_PLACED[sick]) if sick in NOT_PLACED else SICK[sick][:2]
    folder = make_model(tmp_path / "model", spoil, quantizer)
    saved = json.loads((folder / "config.json").read_text())
    config = {**load_config("fashion_mnist_mini").model_dump(), "quantizer": saved["quantizer"]}
    findings = diagnose(folder, arrays)["findings"]
    keys = {key for finding in findings for key in finding["keys"]}
    for key in keys:
        value = config
        for name in key.split("."):
            assert name in value, key
            value = value[name]
    assert any(key.startswith("codebook.") for key in keys) == (sick not in NOT_PLACED)
    assert sick not in NOT_PLACED or not any("Start codes" in finding["remedy"] for finding in findings)


def test_settings_of_the_quantizer_inside_are_named_as_its():
    section = RunConfig.model_validate({**load_config("fashion_mnist_mini").model_dump(), "quantizer": RESIDUAL}).quantizer
    keys = ("quantizer.levels", "quantizer.codebook_size", "quantizer.groups", "codebook.initialise", "train.steps")
    found = _existing(keys, section, replaceable=True)
    assert found == ("quantizer.levels", "quantizer.base.codebook_size", "codebook.initialise", "train.steps")


def test_a_split_that_is_not_there_is_found_out_before_anything_is_computed(make_model, arrays, tmp_path):
    class Never(Progress):
        def start(self, total_steps, first_step):
            raise AssertionError

    with np.load(arrays) as file:
        np.savez(tmp_path / "a.npz", x_train=file["x_train"])
    with pytest.raises(DataError, match="offers the splits train. Received: split=test"):
        diagnose(make_model(tmp_path / "model"), tmp_path / "a.npz", progress=Never())


def test_a_few_codes_that_carry_all_are_seen(make_model, tmp_path):
    rng = np.random.default_rng(0)
    rare, common = patterns(rng, 40), np.repeat(patterns(rng, 1), 2000, axis=0)
    file = write_images(tmp_path / "a.npz", np.concatenate([rare, common]), np.concatenate([rare, common]))
    folder = make_model(tmp_path / "model", quantizer={"kind": "vector", "codebook_size": 128})
    assert "few codes carry all" in names(diagnose(folder, file, images=5000))


def test_validation_images_of_another_kind_are_seen(make_model, tmp_path):
    rng = np.random.default_rng(0)
    file = write_images(tmp_path / "a.npz", patterns(rng, 200), np.full((200, SIDE, SIDE), 255, np.uint8))
    assert "other codes on validation" in names(diagnose(make_model(tmp_path / "model"), file))


def test_small_samples_of_one_source_do_not_count_as_a_shift():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(200))
    same = [_divergence(rng.multinomial(2000, p), rng.multinomial(500, p)) for _ in range(20)]
    assert max(same) < 0.05  # half of what is told
    assert _divergence(np.array([9, 0]), np.array([0, 9])) > 0.9


@pytest.mark.parametrize("option", [["--data", "fashion_mnist_mini"], ["--images", "3"], ["--backend", "torch"]])
def test_what_the_installation_has_no_use_for_is_wrong_usage(option):
    result = CliRunner().invoke(app, ["doctor", *option])
    assert result.exit_code == 2 and "go with RUN_OR_MODEL" in result.stderr


def test_the_command_ends_with_status_1_where_there_is_something(make_model, arrays, tmp_path):
    healthy, sick = make_model(tmp_path / "healthy"), make_model(tmp_path / "sick", far_but(1))
    shown = CliRunner().invoke(app, ["doctor", str(healthy), "--data", str(arrays)])
    assert shown.exit_code == 0 and "The codebook is healthy." in shown.stdout
    shown = CliRunner().invoke(app, ["doctor", str(sick), "--data", str(arrays)])
    assert shown.exit_code == 1 and "one code: " in shown.stdout and "settings: codebook.initialise" in shown.stdout
    shown = CliRunner().invoke(app, ["doctor", str(sick), "--data", str(arrays), "--json"])
    assert shown.exit_code == 1 and json.loads(shown.stdout)["measured"]["dead"] == [CODES - 1]
