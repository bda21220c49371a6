"""The configuration of a run: TOML in, a checked and frozen `RunConfig` out. Nothing past this file reads TOML.

A field's bounds live here; its default too, except that a quantizer's or a network's equals the default of the class, so
that both say the same (tests/test_config.py).
"""

import os
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import tomli_w
from pydantic import Field

from kvq.errors import ConfigError
from kvq.quantizer_config import QuantizerConfig as QuantizerConfig
from kvq.quantizer_sections import Section as Section
from kvq.untrusted import open_regular
from kvq.validation import check, nearest

# Bytes of a configuration. The shipped ones have a tenth. tomllib takes the square of a dotted key's parts: here, a second.
_LIMIT = 2**14


class TrainConfig(Section):
    """How long, how fast and how often; a step is an optimizer step.

    `clip_norm` bounds the norm of all gradients together. With `average_decay`, what is validated, drawn and saved as the model
    are running averages of the weights, that much of which is kept per step. A step whose loss or gradient is not finite is not
    taken: it ends the run or, with `on_nonfinite = "skip"`, is left out, `most_skipped` times. `log_batches` writes the SHA-256
    of every batch into metrics.jsonl.
    """

    steps: int = Field(ge=1, le=10**9)
    batch_size: int = Field(ge=1, le=2**20)
    learning_rate: float = Field(gt=0, le=10)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0, le=10**9)
    clip_norm: float | None = Field(None, gt=0)
    average_decay: float | None = Field(None, ge=0, lt=1)
    on_nonfinite: Literal["stop", "skip"] = "stop"
    most_skipped: int = Field(10, ge=1)
    seed: int = Field(0, ge=0, lt=2**31)
    precision: Literal["float32", "mixed_bfloat16"] = "float32"
    log_every: int = Field(100, ge=1)
    sample_every: int = Field(1000, ge=1)
    validate_every: int = Field(1000, ge=1)
    log_batches: bool = False


class _Model(Section):
    kind: Literal["vqvae"] = "vqvae"
    latent_dim: int = Field(ge=4, le=4096)

    downsampling: ClassVar[int] = 4


class PlainModel(_Model):
    network: Literal["plain"]


class ResNetModel(_Model):
    network: Literal["resnet"]


class PaperModel(_Model):
    network: Literal["paper"]
    hidden: int = Field(128, ge=2, le=4096)
    residual_blocks: int = Field(2, ge=0, le=64)
    residual_hidden: int = Field(32, ge=1, le=4096)


class CodebookConfig(Section):
    """What is done to the codebook between steps.

    Codes start where `initialise` puts them on the first latents: kmeans, latents (a random choice), or none, which leaves them
    as they were drawn. A code is dead where it is used less than `dead_below` times as often as the mean code. Dead codes are
    replaced every `replace_dead_every` steps (0: never), in the first `replace_until` of the steps. A `frozen` quantizer does not
    move once its codes are placed.
    """

    initialise: Literal["kmeans", "latents", "none"] = "kmeans"
    replace_dead_every: int = Field(100, ge=0)
    dead_below: float = Field(0.03, ge=0, lt=1)
    replace_until: float = Field(0.5, ge=0, le=1)
    frozen: bool = False


class LossConfig(Section):
    """Weights of the model's own loss terms. Those of the quantizer are its arguments."""

    reconstruction: float = Field(1.0, gt=0, le=1e6)


class DataConfig(Section):
    """Which images, and what is done to them before the model. Sizes in pixels.

    Training: the shorter side scaled to `resize` if that is given, black margins of `pad`, a random crop of `crop` x `crop`, and,
    where `flip`, left and right exchanged half the time. Evaluation: a centre crop instead. `validation` is a source of its own;
    without it, the test split of `source`. Files smaller than the crop are enlarged, at most 8 times, or, with `small = "skip"`,
    treated like broken ones: replaced in training. More than `max_bad_fraction` of these stop a run.
    """

    source: str = Field(min_length=1)
    crop: int = Field(ge=4, le=8192)
    pad: int = Field(0, ge=0, le=1024)
    flip: bool = False
    resize: int | None = Field(None, ge=4, le=8192)
    small: Literal["enlarge", "skip"] = "enlarge"
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    validation: str | None = Field(None, min_length=1)
    validation_images: int = Field(2000, ge=1)

    def place(self, split: str) -> str:
        """Where images of a split come from."""
        return self.validation or self.source if split == "test" else self.source


class CheckpointConfig(Section):
    """When the whole training state is saved, and how many of the newest are kept beside the best."""

    every_steps: int = Field(1000, ge=1)
    every_minutes: float = Field(10.0, gt=0)
    keep: int = Field(2, ge=1)


ModelConfig = Annotated[PlainModel | ResNetModel | PaperModel, Field(discriminator="network")]


class RunConfig(Section):
    """Everything that, together with the data, reproduces a run."""

    train: TrainConfig
    model: ModelConfig
    quantizer: QuantizerConfig
    data: DataConfig
    codebook: CodebookConfig = CodebookConfig()
    loss: LossConfig = LossConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @pydantic.model_validator(mode="after")
    def _quantizer_fits(self) -> "RunConfig":
        mistake = self.quantizer.mistake(self.model.latent_dim)
        if mistake:
            raise ValueError(f"model.latent_dim {mistake}. Received: {self.model.latent_dim}.")
        return self

    @pydantic.model_validator(mode="after")
    def _crop_fits(self) -> "RunConfig":
        if self.data.crop % self.model.downsampling:
            raise ValueError(
                f"data.crop must be a multiple of {self.model.downsampling}, the downsampling of model.network = "
                f"{self.model.network!r}. Received: {self.data.crop}."
            )
        return self

    def to_toml(self) -> str:
        """The configuration with every default written out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def list_configs() -> dict[str, str]:
    """The shipped configurations: name to the first line of the file's header."""
    files = sorted(resources.files("kvq_configs").iterdir(), key=lambda file: file.name)
    return {
        file.name.removesuffix(".toml"): file.read_text("utf-8").partition("\n")[0].removeprefix("#").strip()
        for file in files
        if file.name.endswith(".toml")
    }


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A checked configuration.

    Args:
        name_or_path: Name of a shipped configuration, a TOML file, or a run folder (its `config.toml`).
        overrides: Assignments such as `train.steps=3`; the value is TOML, or a word that stands for itself.

    Raises:
        ConfigError: If there is no such configuration, it does not parse, or values are not allowed: all of them at once.
    """
    text, origin = _read(name_or_path)
    return parse_config(text, origin, overrides)


def parse_config(text: str, origin: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a TOML text; `origin` names it in errors."""
    if len(text) > _LIMIT:
        raise _too_large(origin)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin} is not TOML: {str(error)[:200]}.") from None
    if not _fits_toml(values):
        raise ConfigError(f"{origin} is not TOML: an integer in it has more than 64 bits.")
    for override in overrides:
        _assign(values, override)
    try:
        return check(RunConfig, values, origin)
    except ConfigError as error:
        for section, key in (("model", "network"), ("quantizer", "kind")):
            changed = any(override.partition("=")[0].strip() == f"{section}.{key}" for override in overrides)
            if changed and any(misfit.startswith(f"{section}.") for misfit in error.misfits):
                way_out = f"Another {key} has other keys: give the section whole, as --set '{section}={{{key}=\"...\", ...}}'."
                raise ConfigError(f"{error}\n{way_out}", error.misfits) from None
        raise


def _read(name_or_path: str | Path) -> tuple[str, str]:
    names = list_configs()
    if str(name_or_path) in names:
        return resources.files("kvq_configs").joinpath(f"{name_or_path}.toml").read_text("utf-8"), f"Config {name_or_path}"
    path, folder = Path(name_or_path), os.path.isdir(name_or_path)
    path = path / "config.toml" if folder else path
    try:
        # Of one's own file, a link or a pipe (`kvq train <(...)`) is as good as any.
        with open_regular(path) if folder else path.open("rb") as file:
            content = file.read(_LIMIT + 1)
        if len(content) > _LIMIT:
            raise _too_large(path)
        return content.decode("utf-8"), str(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {(isinstance(error, OSError) and error.strerror) or error}.") from None
    if folder:
        raise ConfigError(
            f"{path.parent} is a folder without config.toml. To train on images in it: kvq train CONFIG --data {path.parent}"
        )
    raise ConfigError(
        f"There is no configuration {str(name_or_path)!r}{nearest(str(name_or_path), names)}. "
        f"It must be one of {', '.join(names)}, a TOML file, or a run folder with its config.toml."
    )


def _too_large(origin: str | Path) -> ConfigError:
    return ConfigError(f"{origin} is larger than {_LIMIT} bytes, which no configuration needs.")


def _assign(values: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    *sections, name = (part.strip() for part in key.split("."))
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value.strip()
    # A whole section is a table: quantizer={kind="gumbel", codebook_size=64}.
    if not equals or not name or not (sections or isinstance(parsed, dict)):
        raise ConfigError(f"An override must read section.key=value. Received: {override!r}.")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{'.'.join(sections)} is not a section. Received: {override!r}.")
    if not _fits_toml(parsed):
        raise ConfigError(f"{key.strip()}: an integer of more than 64 bits is too large.")
    values[name] = parsed


def _fits_toml(values: Any) -> bool:
    """Whether integers have 64 bits at most. tomllib reads longer ones, too, of which Python cannot even print the longest."""
    waiting: list[Any] = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            return False
    return True
