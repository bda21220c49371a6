"""Configurations: the shipped ones, what is refused and in which words, and that a default says the same in both its places."""

import inspect
import subprocess
import sys
import tomllib
import typing

import pydantic
import pytest

from kvq.build import build_quantizer
from kvq.config import ModelConfig, QuantizerConfig, RunConfig, check, list_configs, load_config, parse_config
from kvq.errors import ConfigError
from kvq.model import MODELS
from kvq.networks import DECODERS, ENCODERS
from kvq.quantizers import QUANTIZERS

SMALL = """
[train]
steps = 10
batch_size = 2
learning_rate = 1e-3

[model]
network = "paper"
latent_dim = 8

[quantizer]
kind = "vector"
codebook_size = 16

[data]
source = "fashion_mnist_mini"
crop = 28
"""


def members(union):
    """The sections that a tagged union of them can be."""
    return typing.get_args(typing.get_args(union)[0])


def tag(section, field):
    (value,) = typing.get_args(section.model_fields[field].annotation)
    return value


def mistakes(text, *overrides):
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "small.toml", overrides)
    return str(caught.value)


def section_of(values, name, **changes):
    return {**values, name: {**values[name], **changes}}


# What is shipped.


@pytest.mark.parametrize("name", sorted(list_configs()))
def test_shipped_configuration_loads_and_says_what_it_is(name):
    config = load_config(name)
    assert isinstance(config, RunConfig)
    header = list_configs()[name]
    assert header[0].isupper() and header.endswith(".") and len(header.split()) >= 5, header


def test_the_configurations_of_the_experiments_are_there():
    expected = {"cifar10", "fashion_mnist", "fashion_mnist_mini", "mnist", "mscoco", "mscoco_paper", "mscoco_resnet"}
    assert expected <= set(list_configs())


def test_digits_are_never_mirrored():
    assert load_config("mnist").data.flip is False
    assert load_config("fashion_mnist").data.flip is True


@pytest.mark.parametrize("name", sorted(list_configs()))
def test_configuration_survives_its_toml(name, tmp_path):
    config = load_config(name)
    (tmp_path / "config.toml").write_text(config.to_toml(), "utf-8")
    assert load_config(tmp_path / "config.toml") == config
    # A run folder means its config.toml.
    assert load_config(tmp_path) == config
    assert load_config(str(tmp_path)) == config


def test_toml_spells_out_every_default_but_what_is_absent():
    written = tomllib.loads(parse_config(SMALL, "small").to_toml())
    assert written["codebook"]["initialise"] == "kmeans" and written["train"]["seed"] == 0
    assert "validation" not in written["data"]
    odd = 'C:\\images "of" mine\u00e9\n'
    config = parse_config(SMALL, "small").model_copy(deep=True)
    config = RunConfig.model_validate(section_of(config.model_dump(), "data", validation=odd))
    assert parse_config(config.to_toml(), "again") == config


# Defaults live in one place, or say the same in two.


@pytest.mark.parametrize("section", members(QuantizerConfig), ids=lambda section: tag(section, "kind"))
def test_quantizer_section_equals_the_constructor(section):
    parameters = inspect.signature(QUANTIZERS[tag(section, "kind")]).parameters
    # What is inside of a quantizer has a section of its own, and the numbers of its members are in the one outside.
    inside = {"kwargs", "members", "base", "groups"} | ({"levels"} if tag(section, "kind").endswith("residual") else set())
    assert fields(section, without={"kind", *inside}) == arguments(parameters, without=inside)


@pytest.mark.parametrize("networks", [ENCODERS, DECODERS], ids=["encoders", "decoders"])
@pytest.mark.parametrize("section", members(ModelConfig), ids=lambda section: tag(section, "network"))
def test_network_section_equals_the_function(section, networks):
    parameters = inspect.signature(networks[tag(section, "network")]).parameters
    # The images say how many channels there are.
    assert fields(section, without={"kind", "network"}) == arguments(parameters, without={"channels"})


def fields(section, without):
    return {
        name: "required" if field.is_required() else field.default
        for name, field in section.model_fields.items()
        if name not in without
    }


def arguments(parameters, without):
    return {
        name: "required" if parameter.default is inspect.Parameter.empty else parameter.default
        for name, parameter in parameters.items()
        if name not in without
    }


def test_every_member_has_its_section():
    assert {tag(section, "kind") for section in members(QuantizerConfig)} == set(QUANTIZERS)
    assert {tag(section, "network") for section in members(ModelConfig)} == set(ENCODERS) == set(DECODERS)
    assert {tag(section, "kind") for section in members(ModelConfig)} == set(MODELS)


EXTREMES = {
    "codebook": [{"codebook_size": 2}, {"codebook_size": 4, "decay": 0.0, "commitment_weight": 0.0}],
    "gumbel": [{"codebook_size": 2, "kl_weight": 0.0, "temperature": 1e-3, "final_temperature": 1e-3, "annealing": 1.0}],
    "finite_scalar": [{"levels": [3]}, {"levels": [1447, 1447]}],
    "symmetric_finite_scalar": [{"levels": [2]}, {"levels": [2] * 22}],
    "lookup_free": [{"bits": 1, "entropy_weight": 0.0, "group_bits": 1}, {"bits": 22, "group_bits": 12}],
    "binary_spherical": [{"bits": 1}, {"bits": 22}],
    **{kind: [{"levels": 1, "base": {"kind": "vector", "codebook_size": 2}}] for kind in ("residual", "shared_residual")},
    "product": [{"groups": 1, "base": {"kind": "lookup_free", "bits": 1}}],
    "projected": [{"code_dim": 1, "base": {"kind": "product", "groups": 1, "base": {"kind": "vector", "codebook_size": 2}}}],
}


def test_bounds_let_nothing_in_that_the_constructor_refuses():
    for section in members(QuantizerConfig):
        kind = tag(section, "kind")
        for extreme in EXTREMES[kind] if kind in EXTREMES else EXTREMES["codebook"]:
            build_quantizer(section(kind=kind, **extreme), "quantizer")


def test_configuration_is_frozen():
    config = parse_config(SMALL, "small")
    with pytest.raises(pydantic.ValidationError):
        config.train.steps = 3
    with pytest.raises(pydantic.ValidationError):
        config.train = None


def test_configuration_imports_no_keras():
    program = (
        "import sys; from kvq import load_config; load_config('cifar10')\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & {'keras', 'grain', 'jax', 'tensorflow', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# What is refused.


def test_all_mistakes_are_told_at_once_with_the_nearest_names():
    text = (
        SMALL.replace("steps = 10", 'stepz = 10\nseed = "seven"')
        .replace('kind = "vector"', 'kind = "vectr"')
        .replace("batch_size = 2", "batch_size = 0")
        .replace("latent_dim = 8", "latent_dim = 8\nhiden = 12")
        .replace("crop = 28", "crop = 28\nqwxzy = 1")
    )
    message = mistakes(text + "\n[trian]\nx = 1\n")
    lines = message.splitlines()
    assert lines[0] == "small.toml does not fit:" and len(lines) == 9
    for expected in (
        "train.stepz: there is no such key. Did you mean train.steps?",
        "train.steps: is missing.",
        "train.seed: input should be a valid integer. Received: 'seven'.",
        "train.batch_size: input should be greater than or equal to 1. Received: 0.",
        f"quantizer.kind: must be one of {', '.join(QUANTIZERS)}. Received: 'vectr' (did you mean 'vector'?).",
        "model.hiden: there is no such key. Did you mean model.hidden?",
        "trian: there is no such key. Did you mean train?",
    ):
        assert f"  {expected}" in lines, message
    (far,) = [line for line in lines if "qwxzy" in line]
    assert far.startswith("  data.qwxzy: there is no such key. Known: crop, flip, ")


@pytest.mark.parametrize(
    "override, expected",
    [
        ("train.steps=3.5", "train.steps: input should be a valid integer. Received: 3.5."),
        ("train.steps=true", "train.steps: input should be a valid integer. Received: True."),
        ("train.steps=0", "train.steps: input should be greater than or equal to 1. Received: 0."),
        ("train.learning_rate=nan", "train.learning_rate: input should be a finite number. Received: nan."),
        ("train.learning_rate=inf", "train.learning_rate: input should be a finite number. Received: inf."),
        ("train.schedule=linear", "train.schedule: input should be 'constant' or 'cosine'. Received: 'linear'."),
        ("data.flip=1", "data.flip: input should be a valid boolean. Received: 1."),
        ("data.source=3", "data.source: input should be a valid string. Received: 3."),
        ("data.source=''", "data.source: string should have at least 1 character. Received: ''."),
        ("quantizer.decay=1.0", "quantizer.decay: input should be less than 1. Received: 1.0."),
        ("quantizer.codebook_size=1", "quantizer.codebook_size: input should be greater than or equal to 2. Received: 1."),
        ("model.latent_dim=3", "model.latent_dim: input should be greater than or equal to 4. Received: 3."),
        (
            "model.network=plane",
            f"model.network: must be one of {', '.join(ENCODERS)}. Received: 'plane' (did you mean 'plain'?).",
        ),
        ("data.crop=30", "data.crop must be a multiple of 4, the downsampling of model.network = 'paper'. Received: 30."),
    ],
)
def test_value_out_of_type_or_range_is_named_with_what_came(override, expected):
    assert mistakes(SMALL, override).splitlines() == ["small.toml does not fit:", f"  {expected}"]


def test_arguments_of_another_network_are_unknown_keys():
    text = SMALL.replace('network = "paper"', 'network = "plain"\nhidden = 8')
    assert mistakes(text).splitlines()[1].startswith("  model.hidden: there is no such key.")


def test_missing_sections_and_tags_are_named():
    message = mistakes(
        SMALL.replace('kind = "vector"\n', "").replace("[data]", "[loss]").replace("source", "#").replace("crop", "#")
    )
    assert "  quantizer.kind: is missing." in message.splitlines()
    assert "  data: is missing." in message.splitlines()


def test_a_value_in_the_place_of_a_section_is_named():
    message = mistakes("train = 3\nmodel = 4\n")
    assert "train: input should be" in message and "Received: 3." in message
    assert "model: input should be" in message and "Received: 4." in message


def test_text_that_is_not_toml_is_named(tmp_path):
    assert mistakes("train = [").startswith("small.toml is not TOML: ")
    file = tmp_path / "binary.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="binary.toml cannot be read: "):
        load_config(file)


def test_unknown_configuration_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config("fashion_mist")
    message = str(caught.value)
    assert "no configuration 'fashion_mist' (did you mean 'fashion_mnist'?)" in message and "cifar10" in message
    with pytest.raises(ConfigError, match="no configuration"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="is a folder without config.toml. .*kvq train CONFIG --data "):
        load_config(tmp_path)


def test_another_kind_with_the_keys_of_this_one_says_how_to_give_its_own():
    for overrides, way_out in {
        ("quantizer.kind=finite_scalar",): """--set 'quantizer={kind="...", ...}'""",
        ("model.hidden=8", "model.network=plain"): """--set 'model={network="...", ...}'""",
    }.items():
        assert mistakes(SMALL, *overrides).endswith(f"give the section whole, as {way_out}.")


# Overrides.


def test_overrides_are_toml_or_words():
    config = parse_config(
        SMALL,
        "small",
        [
            "train.steps=3",
            " train.learning_rate = 2 ",
            "train.schedule= cosine ",
            'data.source="a b"',
            "data.validation=/images/of mine",
            "data.flip=true",
            "checkpoint.keep=5",
            "train.steps=4",
            "data.pad=0x4",
        ],
    )
    assert config.train.steps == 4 and config.checkpoint.keep == 5 and config.data.pad == 4
    assert config.train.learning_rate == 2.0 and config.train.schedule == "cosine"
    assert (config.data.source, config.data.validation, config.data.flip) == ("a b", "/images/of mine", True)


def test_overrides_change_the_kind_of_a_section():
    config = parse_config(SMALL, "small", ["quantizer.kind=ema_vector", "model.network=resnet"])
    assert (config.quantizer.kind, config.model.network) == ("ema_vector", "resnet")


@pytest.mark.parametrize("override", ["steps=3", "train.steps", "=3", "train.=3", "", "train steps 3"])
def test_override_that_assigns_nothing_is_refused(override):
    message = mistakes(SMALL, override)
    assert message == f"An override must read section.key=value. Received: {override!r}."


def test_override_into_a_value_is_refused():
    assert mistakes(SMALL, "train.steps.x=3").startswith("train.steps is not a section.")


def test_override_with_a_misspelt_key_names_the_nearest():
    assert "train.stepps: there is no such key. Did you mean train.steps?" in mistakes(SMALL, "train.stepps=3")
    assert "trai: there is no such key. Did you mean train?" in mistakes(SMALL, "trai.steps=3")


BASE = {"kind": "vector", "codebook_size": 4}


@pytest.mark.parametrize(
    "quantizer, message",
    [
        ({"kind": "lookup_free", "bits": 6}, "model.latent_dim must be 6, one channel for each of .*bits.* Received: 8."),
        ({"kind": "finite_scalar", "levels": [8, 2]}, "quantizer.levels.1: .*greater than or equal to 3. Received: 2."),
        ({"kind": "finite_scalar", "levels": [4096, 4096]}, "product of quantizer.levels must be at most 4194304"),
        ({"kind": "product", "groups": 3, "base": BASE}, "a multiple of 3, quantizer.groups"),
        (
            {"kind": "residual", "levels": 2, "base": {**BASE, "kind": "vectr"}},
            "base.kind: must be one of .*did you mean 'vector'",
        ),
        ({"kind": "residual", "levels": 2, "base": {"kind": "residual"}}, "base.kind: must be one of "),
        ({"kind": "residual", "levels": 2, "base": {**BASE, "kind": "gumbel"}}, "learns by losses or averages .*product"),
        (
            {"kind": "shared_residual", "levels": 2, "base": {**BASE, "estimator": "rotation"}},
            "base.estimator .*'rotation'",
        ),
        ({"kind": "projected", "code_dim": 3, "base": {"kind": "lookup_free", "bits": 4}}, "quantizer.code_dim must be 4"),
        ({"kind": "gumbel", "codebook_size": 4, "temperature": 0.01}, "quantizer.final_temperature must be at most"),
        ({**BASE, "regularisers": [{"kind": "entrpy"}]}, "must be one of entropy, orthogonality"),
        ({**BASE, "bits": 3}, "quantizer.bits: there is no such key."),
    ],
)
def test_wrong_combinations_are_refused_when_the_configuration_is_read(quantizer, message):
    values = parse_config(SMALL, "small").model_dump(exclude_none=True)
    with pytest.raises(ConfigError, match=message):
        check(RunConfig, {**values, "quantizer": quantizer}, "small")


def test_a_section_can_be_replaced_whole():
    config = parse_config(SMALL, "small", ['quantizer={kind="finite_scalar", levels=[3, 3, 3, 3, 3, 3, 3, 3]}'])
    assert config.quantizer.codebook_size == 3**8 and parse_config(config.to_toml(), "again") == config
    with pytest.raises(ConfigError, match="must read section.key=value"):
        parse_config(SMALL, "small", ["quantizer=vector"])
