"""The saved tokenizer: a folder of `config.json` and `model.safetensors`, the same on every backend.

`check` reads such a folder without Keras and believes nothing in it: every tensor's name, shape, dtype and place is held
against the configuration before anything of its size is allocated. No object graph is stored and none is executed, and no
link is followed.
"""

import hashlib
import json
import math
import os
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from kvq import __version__
from kvq.atomic import new_folder, write_bytes, write_text
from kvq.config import LossConfig, ModelConfig, QuantizerConfig, RunConfig, Section
from kvq.errors import ArtifactError, ConfigError
from kvq.network_shapes import kernels
from kvq.tensor_names import tensors as tensors
from kvq.untrusted import parse_json, read_bytes
from kvq.validation import check as check_section
from kvq.weights_file import check_weights

if TYPE_CHECKING:
    from kvq.model import VQVAE

FORMAT_VERSION: Literal[1] = 1
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
# Small tokenizers that come with the package. Made by: kvq train NAME --backend tensorflow; the run's model/ is what lies here.
SHIPPED = ("fashion_mnist_mini",)
_TRAINED = Path(__file__).parent / "trained"
_CONFIG_LIMIT = 2**20  # bytes
_WEIGHTS_LIMIT = 2**36  # bytes, more than fits any accelerator that trains it

Name = Annotated[str, Field(min_length=1, max_length=256)]
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Grid(Section):
    """One grid of indices: (rows, columns), the number of values an index takes, and how many indices a position has."""

    name: Name
    shape: list[Size] = Field(min_length=1, max_length=4)
    vocabulary: Size
    depth: Size


class Images(Section):
    """Images that the model was trained on: channels, shorter side they were scaled to, margin before the crop, side after it.

    And what became of those smaller than the crop; models of an older kvq do not say.
    """

    channels: Annotated[int, Field(ge=1, le=64)]
    resize: Annotated[int, Field(ge=4, le=8192)] | None = None
    pad: Annotated[int, Field(ge=0, le=1024)]
    crop: Annotated[int, Field(ge=4, le=8192)]
    small: Literal["enlarge", "skip"] = "enlarge"


class TrainedOn(Section):
    name: Name
    split: Name


class Trained(Section):
    steps: Annotated[int, Field(ge=0, le=10**9)]
    backend: Name


class TensorSpec(Section):
    shape: list[Annotated[int, Field(ge=1, le=2**31 - 1)]] = Field(max_length=8)
    dtype: Literal["float32"]


class ArtifactConfig(Section):
    """Everything that config.json says."""

    format_version: Literal[1]
    kind: Literal["vqvae"]
    kvq_version: Name
    model: ModelConfig
    quantizer: QuantizerConfig
    loss: LossConfig
    grids: list[Grid] = Field(min_length=1, max_length=16)
    images: Images
    data: TrainedOn
    trained: Trained
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    tensors: dict[Name, TensorSpec] = Field(min_length=1, max_length=10_000)


def save(model: "VQVAE", config: RunConfig, channels: int, source: str, split: str, steps: int, folder: Path) -> None:
    """Writes the tokenizer of a model, whole or not at all. The same weights give the same bytes.

    Args:
        model: Built from `config` for images of `channels` channels.
        source, split: Name and split of the images it was trained on.
        steps: How many it was trained for.
        folder: To write; an artifact that is there is replaced.
    """
    import keras

    weights, specs = _tensor_file(model)
    side = config.data.crop // config.model.downsampling
    described = ArtifactConfig(
        format_version=FORMAT_VERSION,
        kind=config.model.kind,
        kvq_version=__version__,
        model=config.model,
        quantizer=config.quantizer,
        loss=config.loss,
        grids=[_grid(config.quantizer, side)],
        images=Images(channels=channels, **config.data.model_dump(include={"resize", "pad", "crop", "small"})),
        data=TrainedOn(name=source, split=split),
        trained=Trained(steps=steps, backend=keras.backend.backend()),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        tensors=specs,
    )
    _write(described, weights, folder)


def save_loaded(model: "VQVAE", config: ArtifactConfig, folder: Path) -> ArtifactConfig:
    """Writes a model that was loaded, whole or not at all, with the weights that it has now. Unchanged, it gives the same bytes.

    Returns:
        What was written beside the weights.

    Raises:
        ArtifactError: If something else than a model is at `folder`.
    """
    # What is there is replaced as a whole, and must not be somebody's home.
    if folder.exists() and not (folder.is_dir() and {file.name for file in folder.iterdir()} <= {CONFIG_NAME, WEIGHTS_NAME}):
        raise ArtifactError(f"{folder} must be a new folder, or a model to replace. It holds something else.")
    weights, specs = _tensor_file(model)
    digest = hashlib.sha256(weights).hexdigest()
    described = config.model_copy(update={"weights_sha256": digest, "tensors": specs})
    _write(described, weights, folder)
    return described


def _tensor_file(model: "VQVAE") -> tuple[bytes, dict[str, TensorSpec]]:
    import keras
    from safetensors.numpy import save as to_bytes

    arrays = {name: np.asarray(keras.ops.convert_to_numpy(weight), order="C") for name, weight in tensors(model)}
    return to_bytes(arrays), {name: TensorSpec(shape=list(array.shape), dtype="float32") for name, array in arrays.items()}


def _write(described: ArtifactConfig, weights: bytes, folder: Path) -> None:
    with new_folder(folder) as temporary:
        write_text(temporary / CONFIG_NAME, json.dumps(described.model_dump(), indent=2) + "\n")
        write_bytes(temporary / WEIGHTS_NAME, weights)


def check(folder: Path) -> ArtifactConfig:
    """The configuration of a saved tokenizer whose files are whole and fit it.

    Raises:
        ArtifactError: If the folder is not kvq's, is of a newer kvq, or its tensors do not fit its configuration.
    """
    config = _read_config(folder / CONFIG_NAME)
    _check_consistent(folder, config)
    shapes = {name: spec.shape for name, spec in config.tensors.items()}
    try:
        check_weights(folder / WEIGHTS_NAME, shapes, config.weights_sha256)
    except (OSError, ValueError) as error:
        raise _not_a_model(folder, WEIGHTS_NAME, error) from None
    return config


def load(folder: Path) -> "tuple[VQVAE, ArtifactConfig]":
    """The model of a saved tokenizer, and its configuration.

    Raises:
        ArtifactError: As `check`; also if the tensors fit the list in config.json but not the model that it names.
    """
    config = check(folder)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from kvq.build import build_model

    model = build_model(config.model, config.quantizer, config.loss, config.images.channels)
    weights = dict(tensors(model))
    expected = {name: list(weight.shape) for name, weight in weights.items()}
    described = {name: spec.shape for name, spec in config.tensors.items()}
    for name in sorted(name for name in {*expected, *described} if expected.get(name) != described.get(name))[:1]:
        raise _other_tensor(folder, name, described, expected)
    try:
        arrays = load_file(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder / WEIGHTS_NAME} is not a safetensors file: {error}.") from None
    for name, array in arrays.items():
        weights[name].assign(array)
    return model, config


def model_folder(path: str | Path) -> Path:
    """The model folder that a path means: itself, the `model/` of a run or a checkpoint, or one of the `SHIPPED` names."""
    path = Path(path)
    # Not `path.exists()`, which raises an OSError where a name is too long.
    if not os.path.exists(path):
        if str(path) in SHIPPED:
            return _TRAINED / path
        raise ArtifactError(f"There is no {path}. Give a run folder, a model folder, or {', '.join(SHIPPED)}.")
    if not any(os.path.lexists(path / name) for name in ("run.json", "state.json")):
        return path
    if (path / "model").is_symlink():
        raise ArtifactError(f"{path / 'model'} is a symbolic link, and kvq follows none out of a run. Name the model itself.")
    if not (path / "model").exists():
        if os.path.lexists(path / "state.json"):
            raise ArtifactError(f"{path} is a checkpoint of an older kvq, which holds no model. Resume its run to get one.")
        checkpoints = sorted(path.glob("checkpoints/step_*/model"))
        newest = f" Its newest checkpoint has one: {checkpoints[-1].parent}" if checkpoints else ""
        raise ArtifactError(
            f"{path} has no model yet: it is written at the end of a run. `kvq train {path} --resume-or-start` goes on.{newest}"
        )
    return path / "model"


def run_folder(path: str | Path) -> Path:
    """The run folder that the model of a path would lie in, itself or as a checkpoint's."""
    folder = Path(os.path.abspath(model_folder(path))).parent
    return folder.parent.parent if os.path.lexists(folder / "state.json") else folder


def _other_tensor(folder: Path, name: str, described: dict[str, list[int]], expected: dict[str, list[int]]) -> ArtifactError:
    return ArtifactError(
        f"{folder} holds other tensors than its model has: {name} is {described.get(name, 'missing')} in the file "
        f"and {expected.get(name, 'missing')} in the model that {CONFIG_NAME} names."
    )


def _not_a_model(folder: Path, name: str, error: OSError | ValueError) -> ArtifactError:
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    wrong = f"is not a kvq model: its {name} cannot be read: {reason}"
    # Not `folder.is_dir()`, which raises an OSError where a name is too long.
    if os.path.isdir(folder) and not any(os.path.lexists(folder / file) for file in (CONFIG_NAME, WEIGHTS_NAME)):
        wrong = f"is neither a run nor a model: it has no {name}"
    return ArtifactError(
        f"{folder} {wrong}. A model is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}; a run has one in its folder model."
    )


def _read_config(path: Path) -> ArtifactConfig:
    try:
        content = read_bytes(path, _CONFIG_LIMIT)
    except (OSError, ValueError) as error:
        raise _not_a_model(path.parent, path.name, error) from None
    try:
        values = parse_json(content)
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}.") from None
    if not isinstance(values, dict) or "format_version" not in values:
        raise ArtifactError(f"{path.parent} is not a kvq model: {path.name} has no format_version.")
    version = values["format_version"]
    if type(version) is int and version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path.parent} was written by a newer kvq, in format_version {reprlib.repr(version)}; this kvq ({__version__}) "
            f"reads {FORMAT_VERSION}. Upgrade kvq."
        )
    if type(version) is not int or version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path.parent} has format_version {reprlib.repr(version)}; this kvq ({__version__}) reads {FORMAT_VERSION}."
        )
    try:
        return check_section(ArtifactConfig, values, str(path))
    except ConfigError as error:
        raise ArtifactError(str(error)) from None


def _check_consistent(folder: Path, config: ArtifactConfig) -> None:
    """Holds what the configuration says twice against itself."""
    if mistake := config.quantizer.mistake(config.model.latent_dim):
        raise ArtifactError(f"{CONFIG_NAME}: model.latent_dim {mistake}. Received: {config.model.latent_dim}.")
    step = config.model.downsampling
    if config.images.crop % step:
        raise ArtifactError(f"{CONFIG_NAME}: images.crop must be a multiple of {step}. Received: {config.images.crop}.")
    expected = [_grid(config.quantizer, config.images.crop // step)]
    if config.grids != expected:
        raise ArtifactError(f"{CONFIG_NAME} names other grids than its model has: {config.grids[0]} instead of {expected[0]}.")
    described = {name: spec.shape for name, spec in config.tensors.items()}
    # Before anything is built: a few bytes of configuration could ask for terabytes. What is left is small beside these.
    codebooks = config.quantizer.codebooks(config.model.latent_dim)
    large = {**kernels(config.model, config.images.channels), **{f"quantizer.{name}": codebooks[name] for name in codebooks}}
    for name, shape in large.items():
        if described.get(name) != shape:
            raise _other_tensor(folder, name, described, large)
    if (size := sum(4 * math.prod(shape) for shape in described.values())) > _WEIGHTS_LIMIT:
        raise ArtifactError(f"{CONFIG_NAME} declares {size} bytes of weights; at most {_WEIGHTS_LIMIT} are read.")


def _grid(quantizer: QuantizerConfig, side: int) -> Grid:
    return Grid(name="grid", shape=[side, side], vocabulary=quantizer.codebook_size, depth=quantizer.depth or 1)
