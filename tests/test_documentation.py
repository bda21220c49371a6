"""What the documentation shows is run as it stands: each page from top to bottom, in a folder of its own.

Every fenced block is found. Python runs, TOML must be a configuration, and a line of Bash runs, or `LEFT` says why it does not.
"""

import importlib.util
import re
import shlex
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import tomli_w
import typer
from kvq_cli.main import app
from PIL import Image
from typer.testing import CliRunner

from kvq import artifact
from kvq.build import build_model
from kvq.config import RunConfig, load_config, parse_config
from kvq.data.token_set import TokenSet
from kvq.quantizer_config import describe_quantizers

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {page.name: page for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]}

# Lines of Bash that are not run here, whole or the start, and why. Options of kvq are still compared with the command's.
LEFT = {
    "pip install": "needs a network",
    "npm pack": "needs a network",
    "nox": "runs these tests",
    "sbatch": "needs Slurm",
    "RAY_ADDRESS=auto": "needs a Ray cluster; tests/test_ray.py",
    "python -m http.server": "serves until it is stopped",
    "cd exported/onnx": "for the next line",
    "python example.py": "tests/test_exporters.py runs it",
    "python docs/draw_replication.py": "draws another figure of this page; its runs take hours",
    "kvq export runs/fashion_mnist_mini --format onnx": "takes long; the tutorial exports the same",
    "kvq export runs/fashion_mnist_mini --format web": "needs onnxruntime-web; tests/test_export_web.py",
    "kvq train RUN --resume --backend torch": "may not be installed; tests/test_resume.py",
}
if not any(map(importlib.util.find_spec, ("torch", "tensorflow"))):
    LEFT["kvq export runs/pictures"] = "jax2onnx cannot write this quantizer, see docs/export.md"

# What is put in the place of something that takes long or is not at hand.
INSTEAD = {
    "--steps 500": "--steps 2",  # tutorial.md
    "--steps 600": "--steps 3",
    "--steps 200000": "--steps 3",  # long_runs.md
    "--steps 1600 --set train.log_every=25": "--set train.log_every=1",  # replication.md
    "steps = 300\nbatch_size = 32": "steps = 2\nbatch_size = 8",  # pictures.toml of tutorial.md
    "train cifar10": "train fashion_mnist_mini",
    "train mscoco --data PHOTOGRAPHS --validation": "train mscoco --set data.crop=32 --data PHOTOGRAPHS --validation",
    "doctor runs/fashion_mnist_mini": "doctor fashion_mnist_mini",  # trained for two steps it is not healthy; the shipped one is
}
# What is added where a run begins.
SHORT = ["--set", "train.steps=2", "--set", "train.batch_size=8", "--set", "data.validation_images=8"]

# Where a backend compiles, each run of these does so anew; on PyTorch they take a few seconds.
COMPILING = {"README.md", "data.md", "long_runs.md", "tutorial.md"}
SLOW = {"replication.md", *(COMPILING if keras.backend.backend() != "torch" else [])}


def fences(page: Path) -> list[tuple[str, str, str]]:
    """Language, content and the paragraph before it, of each fenced block."""
    text = page.read_text("utf-8")
    found = re.findall(r"(?:((?:(?!```)[^\n]+\n)+)\n)?^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert 2 * len(found) == len(re.findall(r"^\s*```", text, re.MULTILINE)), f"{page.name}: a fence that does not close."
    return [(language, content, before) for before, language, content in found]


def commands(block: str) -> list[str]:
    """The commands of a block of Bash, without comments."""
    lines = [re.sub(r"\s+# .*", "", line) for line in block.splitlines()]
    return [command for line in lines for command in line.split(" && ")]


def photographs(folder: Path) -> None:
    folder.mkdir()
    for i in range(40):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 60, 3), np.uint8)).save(folder / f"{i:02}.jpg")


def model(folder: Path) -> None:
    config = load_config("fashion_mnist_mini", ["model.latent_dim=4", "data.crop=8"])
    artifact.save(build_model(config.model, config.quantizer, config.loss, 3), config, 3, "noise", "train", 0, folder)


def run(folder: Path) -> None:
    succeed("kvq train fashion_mnist_mini --out", str(folder), *SHORT)


GIVEN: dict[str, dict[str, Callable[[Path], None]]] = {
    "README.md": {"PHOTOGRAPHS": photographs, "OTHER_PHOTOGRAPHS": photographs},
    "data.md": {"PHOTOGRAPHS": photographs, "OTHER_PHOTOGRAPHS": photographs},
    "replication.md": {"PHOTOGRAPHS": photographs},
    "long_runs.md": {"RUN_A": run, "RUN_B": run},
    "tokens.md": {"RUN": model, "DATA": photographs},
}


def learns(names: dict, printed: str) -> None:
    model, rng = names["model"], np.random.default_rng(0)
    inputs = (rng.normal(size=(256, 3)) @ rng.normal(size=(3, 12))).astype("float32")
    losses = model.fit(inputs, inputs, epochs=40, batch_size=32, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    # More than the error alone: the commitment was added.
    error = np.mean(np.square(np.asarray(model.predict(inputs, verbose=0)) - inputs))
    assert float(model.evaluate(inputs, inputs, verbose=0)) > error * 1.001


def shapes_are_as_said(names: dict, printed: str) -> None:
    assert names["indices"].shape == (2, 7, 7) and names["restored"].shape == (2, 28, 28, 1)


def prints_two_rows_of_tokens(names: dict, printed: str) -> None:
    assert printed.count("[") == 3


def predicts_every_code(names: dict, printed: str) -> None:
    assert names["model"].output_shape[-1] == 64


# What an example must have done beyond ending without an error, by page and place among its Python blocks.
AFTERWARDS = {
    ("README.md", 0): shapes_are_as_said,
    ("quantizers.md", 0): learns,
    ("tokens.md", 0): prints_two_rows_of_tokens,
    ("tokens.md", 1): predicts_every_code,
}


def succeed(line: str, *more: str) -> None:
    result = CliRunner().invoke(app, [*shlex.split(line)[1:], *more])
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


def cases() -> list:
    """The pages that show anything that runs."""
    runs = [name for name, page in PAGES.items() if {language for language, _, _ in fences(page)} & {"python", "toml", "bash"}]
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in runs]


@pytest.mark.parametrize("page", cases())
def test_a_page_does_what_it_says(page: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, make in GIVEN.get(page, {}).items():
        make(tmp_path / name)
    examples = 0
    for language, content, before in fences(PAGES[page]):
        original = content
        for long, short in INSTEAD.items():
            content = content.replace(long, short)
        if language == "python":
            names: dict = {}
            capsys.readouterr()
            exec(compile(content, f"{page}, Python block {examples}", "exec"), names)
            AFTERWARDS.get((page, examples), lambda *_: None)(names, capsys.readouterr().out)
            examples += 1
        elif language == "toml":
            # What a configuration must have and the example leaves out is that of a shipped one.
            values = tomllib.loads(load_config("fashion_mnist_mini").to_toml()) | tomllib.loads(original)
            parse_config(tomli_w.dumps(values), page)
            if saved := re.search(r"Save this one as `([\w.]+)`", before):
                Path(saved[1]).write_text(content, "utf-8")
        elif language == "bash":
            for line in commands(content):
                if line.startswith(tuple(LEFT)):
                    continue
                assert line.startswith("kvq "), f"{page}: `{line}` is neither run nor in LEFT."
                begins = line.startswith("kvq train") and "--dry-run" not in line and not line.endswith(".toml")
                succeed(line, *(SHORT if begins and not re.search(r"--resume( |$)", line) and "--steps" not in line else []))


def test_blocks_are_of_languages_that_are_looked_at() -> None:
    languages = {(page, language) for page, path in PAGES.items() for language, _, _ in fences(path)}
    # "{...}" is for the site; "text" is output, or commands whose options are compared below.
    unknown = {(page, name) for page, name in languages if name not in {"python", "toml", "bash", "text"} and name[:1] != "{"}
    assert not unknown


def test_what_is_left_out_or_replaced_is_there() -> None:
    shown = [content for page in PAGES.values() for language, content, _ in fences(page) if language in {"bash", "toml"}]
    lines = [line for content in shown for line in commands(content)]
    assert not [start for start in LEFT if not any(line.startswith(start) for line in lines)]
    assert not [text for text in INSTEAD if not any(text in content for content in shown)]
    assert {page for page, _ in AFTERWARDS} | set(GIVEN) | SLOW <= set(PAGES)


def test_the_keys_of_a_token_set_are_explained() -> None:
    text = (DOCS / "tokens.md").read_text("utf-8")
    for name in TokenSet.model_fields:
        assert f"`{name}`" in text


def test_every_key_of_a_configuration_is_explained_with_its_default() -> None:
    expected = {"quantizer.kind": "-"}
    for section, field in RunConfig.model_fields.items():
        members = typing.get_args(field.annotation) or [field.annotation]
        for name, key in [pair for member in members for pair in getattr(member, "model_fields", {}).items()]:
            if section != "quantizer" and name != "kind":
                default = None if key.is_required() else key.default
                words = "off" if default is None else tomli_w.dumps({"": default}).removeprefix('"" = ').strip()
                expected[f"{section}.{name}"] = "-" if key.is_required() else words
    shown = re.findall(r"^\| `([\w.]+)` \| (.+?) \| .{5,}\|$", (DOCS / "configuration.md").read_text("utf-8"), re.MULTILINE)
    assert dict(shown) == expected and [key for key, _ in shown] == [*dict(shown)]


def test_every_quantizer_is_explained() -> None:
    text = (DOCS / "quantizers.md").read_text("utf-8")
    for described in describe_quantizers():
        assert f"`{described['kind']}`" in text


def test_links_lead_somewhere() -> None:
    for file in PAGES.values():
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text("utf-8")):
            assert target.startswith("https://") or (file.parent / target).exists(), f"{file.name}: {target}"


def test_shown_commands_exist_with_the_options_that_are_shown() -> None:
    root = typer.main.get_command(app)
    shown = 0
    for file in PAGES.values():
        for block in re.findall(r"```(?:bash|text)\n(.*?)```", file.read_text("utf-8"), re.DOTALL):
            for line in re.findall(r"(?:^|&& |--wrap '|^\w+=\w+ )(kvq [a-z].*)$", block, re.MULTILINE):
                command, words = root, re.sub(r"  +\S.*| #.*", "", line).replace("[", " ").replace("]", " ").split()[1:]
                while hasattr(command, "commands"):
                    command = command.commands[words.pop(0)]
                options = {option for parameter in command.params for option in parameter.opts}
                unknown = {word for word in words if re.fullmatch(r"--[a-z-]+", word)} - options - {"--help"}
                assert not unknown, f"{file.name}: {line}"
                shown += 1
    assert shown > 20
