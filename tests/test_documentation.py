"""Code and configurations that the documentation shows, run as they stand."""

import re
import tomllib
from pathlib import Path

import numpy as np
import typer
from kvq_cli.main import app

from kvq import encode
from kvq.artifact import save
from kvq.build import build_model
from kvq.config import load_config, parse_config
from kvq.data.token_set import TokenSet
from kvq.quantizer_config import describe_quantizers

DOCS = Path(__file__).parents[1] / "docs"


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / file).read_text("utf-8"), re.DOTALL)


def test_the_example_of_a_model_of_ones_own_learns() -> None:
    (example,) = blocks("quantizers.md", "python")
    names: dict = {}
    exec(compile(example, "docs/quantizers.md", "exec"), names)
    model, rng = names["model"], np.random.default_rng(0)
    inputs = (rng.normal(size=(256, 3)) @ rng.normal(size=(3, 12))).astype("float32")
    losses = model.fit(inputs, inputs, epochs=40, batch_size=32, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    # More than the error alone: the commitment was added.
    error = np.mean(np.square(np.asarray(model.predict(inputs, verbose=0)) - inputs))
    assert float(model.evaluate(inputs, inputs, verbose=0)) > error * 1.001


def test_the_example_of_a_grain_pipeline_runs() -> None:
    (example,) = blocks("data.md", "python")
    exec(compile(example, "docs/data.md", "exec"), {})


def test_the_examples_of_reading_and_training_on_tokens_run(tmp_path, monkeypatch, capsys) -> None:
    config = load_config("fashion_mnist_mini", ["model.latent_dim=4", "data.crop=8"])
    save(build_model(config.model, config.quantizer, config.loss, 1), config, 1, "noise", "train", 0, tmp_path / "model")
    np.savez(tmp_path / "noise.npz", x_train=np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8))
    encode(tmp_path / "model", tmp_path / "noise.npz", tmp_path / "tokens")
    monkeypatch.chdir(tmp_path)
    reading, training = blocks("tokens.md", "python")
    exec(compile(reading, "docs/tokens.md", "exec"), {})
    assert capsys.readouterr().out.count("[") == 3  # two rows of two tokens
    names: dict = {}
    exec(compile(training, "docs/tokens.md", "exec"), names)
    assert names["model"].output_shape[-1] == 64


def test_the_keys_of_a_token_set_are_explained() -> None:
    text = (DOCS / "tokens.md").read_text("utf-8")
    for name in TokenSet.model_fields:
        assert f"`{name}`" in text


def test_the_shown_section_is_one_that_a_configuration_takes() -> None:
    (section,) = blocks("quantizers.md", "toml")
    values = tomllib.loads(load_config("fashion_mnist_mini").to_toml()) | tomllib.loads(section)
    import tomli_w

    assert parse_config(tomli_w.dumps(values), "docs/quantizers.md").quantizer.codebook_size == 256


def test_every_quantizer_is_explained() -> None:
    text = (DOCS / "quantizers.md").read_text("utf-8")
    for described in describe_quantizers():
        assert f"`{described['kind']}`" in text


def test_links_lead_somewhere() -> None:
    for file in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text("utf-8")):
            assert target.startswith("https://") or (file.parent / target).exists(), f"{file.name}: {target}"


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch) -> None:
    text = (DOCS.parent / "README.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), names)
    assert names["indices"].shape == (2, 7, 7) and names["restored"].shape == (2, 28, 28, 1)


def test_shown_commands_exist_with_the_options_that_are_shown() -> None:
    root = typer.main.get_command(app)
    shown = 0
    for file in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for block in re.findall(r"```(?:bash|text)\n(.*?)```", file.read_text("utf-8"), re.DOTALL):
            for line in re.findall(r"(?:^|&& |--wrap ')(kvq [a-z].*)$", block, re.MULTILINE):
                command, words = root, re.sub(r"  +\S.*| #.*", "", line).replace("[", " ").replace("]", " ").split()[1:]
                while hasattr(command, "commands"):
                    command = command.commands[words.pop(0)]
                options = {option for parameter in command.params for option in parameter.opts}
                unknown = {word for word in words if re.fullmatch(r"--[a-z-]+", word)} - options - {"--help"}
                assert not unknown, f"{file.name}: {line}"
                shown += 1
    assert shown > 20
