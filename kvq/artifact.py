"""The saved tokenizer: a folder of `config.json` and `model.safetensors`, the same on every backend.

`check` reads such a folder without Keras and believes nothing in it: every tensor's name, shape, dtype and place is held
against the configuration before anything of its size is allocated. No object graph is stored and none is executed.
"""

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from kvq import __version__
from kvq.atomic import new_folder, write_bytes, write_text
from kvq.config import LossConfig, ModelConfig, QuantizerConfig, RunConfig, Section
from kvq.config import check as check_section
from kvq.errors import ArtifactError, ConfigError
from kvq.tensor_names import tensors as tensors

if TYPE_CHECKING:
    from kvq.model import VQVAE

FORMAT_VERSION: Literal[1] = 1
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
_CONFIG_LIMIT = 2**20  # bytes
_HEADER_LIMIT = 2**22  # bytes

Name = Annotated[str, Field(min_length=1, max_length=256)]
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Grid(Section):
    """One grid of indices: (rows, columns), the number of values an index takes, and how many indices a position has."""

    name: Name
    shape: list[Size] = Field(min_length=1, max_length=4)
    vocabulary: Size
    depth: Size


class Images(Section):
    """Images that the model was trained on: channels, shorter side they were scaled to, margin before the crop, side after it."""

    channels: Annotated[int, Field(ge=1, le=64)]
    resize: Annotated[int, Field(ge=4, le=8192)] | None = None
    pad: Annotated[int, Field(ge=0, le=1024)]
    crop: Annotated[int, Field(ge=4, le=8192)]


class TrainedOn(Section):
    name: Name
    split: Name


class Trained(Section):
    steps: Annotated[int, Field(ge=0)]
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
        images=Images(channels=channels, resize=config.data.resize, pad=config.data.pad, crop=config.data.crop),
        data=TrainedOn(name=source, split=split),
        trained=Trained(steps=steps, backend=keras.backend.backend()),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        tensors=specs,
    )
    _write(described, weights, folder)


def save_loaded(model: "VQVAE", config: ArtifactConfig, folder: Path) -> None:
    """Writes a model that was loaded, whole or not at all, with the weights that it has now. Unchanged, it gives the same bytes.

    Raises:
        ArtifactError: If something else than a model is at `folder`.
    """
    # What is there is replaced as a whole, and must not be somebody's home.
    if folder.exists() and not (folder.is_dir() and {file.name for file in folder.iterdir()} <= {CONFIG_NAME, WEIGHTS_NAME}):
        raise ArtifactError(f"{folder} must be a new folder, or a model to replace. It holds something else.")
    weights, specs = _tensor_file(model)
    digest = hashlib.sha256(weights).hexdigest()
    _write(config.model_copy(update={"weights_sha256": digest, "tensors": specs}), weights, folder)


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
    weights = _regular_file(folder / WEIGHTS_NAME)
    _check_consistent(config)
    _check_tensors(weights, config)
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != config.weights_sha256:
        raise ArtifactError(f"{weights} is not the file that {CONFIG_NAME} describes: its sha256 is {digest}.")
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
    for name in _differences(expected, described)[:1]:
        raise ArtifactError(
            f"{folder} holds other tensors than its model has: {name} is {described.get(name, 'missing')} in the file "
            f"and {expected.get(name, 'missing')} in the model that {CONFIG_NAME} names."
        )
    try:
        arrays = load_file(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder / WEIGHTS_NAME} is not a safetensors file: {error}.") from None
    for name, array in arrays.items():
        weights[name].assign(array)
    return model, config


def model_folder(path: str | Path) -> Path:
    """The model folder that a path means: itself, or the `model/` of a run folder."""
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"There is no {path}. Give a run folder or a model folder.")
    if (path / "run.json").exists():
        if not (path / "model").exists():
            raise ArtifactError(f"{path} has no model yet: it is written at the end of a run.")
        return path / "model"
    return path


def _differences(expected: dict[str, list[int]], described: dict[str, list[int]]) -> list[str]:
    return sorted(name for name in {*expected, *described} if expected.get(name) != described.get(name))


def _regular_file(path: Path) -> Path:
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{path.parent} is not a kvq model: it has no file {path.name}. A model is a folder with both files.")
    return path


def _read_config(path: Path) -> ArtifactConfig:
    if _regular_file(path).stat().st_size > _CONFIG_LIMIT:
        raise ArtifactError(f"{path} is larger than {_CONFIG_LIMIT} bytes, which no kvq model needs.")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON: {error}.") from None
    if not isinstance(values, dict) or "format_version" not in values:
        raise ArtifactError(f"{path.parent} is not a kvq model: {path.name} has no format_version.")
    if values["format_version"] != FORMAT_VERSION:
        raise ArtifactError(
            f"{path.parent} has format_version {values['format_version']!r:.50}; this kvq ({__version__}) reads "
            f"{FORMAT_VERSION}. Upgrade kvq if the model is newer."
        )
    try:
        return check_section(ArtifactConfig, values, str(path))
    except ConfigError as error:
        raise ArtifactError(str(error)) from None


def _check_consistent(config: ArtifactConfig) -> None:
    """Holds what the configuration says twice against itself."""
    side = config.images.crop // config.model.downsampling
    expected = [_grid(config.quantizer, side)]
    if config.grids != expected:
        raise ArtifactError(f"{CONFIG_NAME} names other grids than its model has: {config.grids[0]} instead of {expected[0]}.")
    # Before anything is built: a few bytes of configuration could ask for a codebook of gigabytes.
    for name, shape in config.quantizer.codebooks(config.model.latent_dim).items():
        described = config.tensors.get(f"quantizer.{name}")
        if described is None or described.shape != shape:
            raise ArtifactError(
                f"{CONFIG_NAME} says that quantizer.{name} is {described and described.shape}; its model has {shape}."
            )
    if mistake := config.quantizer.mistake(config.model.latent_dim):
        raise ArtifactError(f"{CONFIG_NAME}: model.latent_dim {mistake}. Received: {config.model.latent_dim}.")


def _grid(quantizer: QuantizerConfig, side: int) -> Grid:
    return Grid(name="grid", shape=[side, side], vocabulary=quantizer.codebook_size, depth=quantizer.depth or 1)


def _check_tensors(path: Path, config: ArtifactConfig) -> None:
    """Holds the header of a safetensors file (8 bytes of length, JSON, data) against the configuration."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise ArtifactError(
                f"{path} is not a safetensors file, or was cut: it declares a header of {length} bytes in {size}."
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{path} has a header that is not JSON: {error}.") from None
    if not isinstance(header, dict):
        raise ArtifactError(f"{path} has a header that is not a JSON object.")
    header.pop("__metadata__", None)
    if {*header} != {*config.tensors}:
        names = sorted({*header} ^ {*config.tensors})
        raise ArtifactError(
            f"{path} and {CONFIG_NAME} do not name the same tensors. In one of them only: {', '.join(names)[:200]}."
        )
    end = 0
    for name, spec in sorted(config.tensors.items(), key=lambda item: _offsets(path, header, item[0])):
        entry, (begin, stop) = header[name], _offsets(path, header, name)
        if entry.get("dtype") != "F32" or entry.get("shape") != spec.shape:
            raise ArtifactError(
                f"{path}: {name} is {entry.get('dtype')} {entry.get('shape')!s:.80}; {CONFIG_NAME} says F32 {spec.shape}."
            )
        if begin != end or stop - begin != 4 * math.prod(spec.shape):
            raise ArtifactError(
                f"{path}: the data of {name} do not lie where {4 * math.prod(spec.shape)} bytes from {end} would."
            )
        end = stop
    if end != size - 8 - length:
        raise ArtifactError(f"{path} has {size - 8 - length} bytes of data; its tensors need {end}. It was cut or added to.")


def _offsets(path: Path, header: dict[str, Any], name: str) -> tuple[int, int]:
    entry = header[name]
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)):
        raise ArtifactError(f"{path}: {name} has no proper data_offsets.")
    return offsets[0], offsets[1]
