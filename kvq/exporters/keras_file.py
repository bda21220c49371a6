"""Export as a `.keras` file, Keras' own format. It loads where kvq is installed, after `from kvq import VQVAE, build`."""

from pathlib import Path

import keras
import numpy as np

from kvq.exporters.parts import Exporter, Loaded, Part, described


def _write(part: Part, path: Path) -> None:
    # A functional model around the part carries the names of input and output.
    inputs = keras.Input(part.free_shape[1:], dtype=part.sample.dtype.name, name=part.input_name)
    outputs = keras.layers.Identity(name=part.output_name, dtype="uint8" if part.output_name == "reconstruction" else "int32")(
        part.model(inputs)
    )
    keras.Model({part.input_name: inputs}, {part.output_name: outputs}, name=part.model.name + "_file").save(path)


def _load(path: Path) -> Loaded:
    model = keras.saving.load_model(path)
    ((input_name, given),), ((output_name, result),) = model.input.items(), model.output.items()
    return Loaded(
        lambda array: np.asarray(model.predict_on_batch({input_name: array})[output_name]),
        [described(input_name, given.dtype, given.shape)],
        [described(output_name, result.dtype, result.shape)],
        {"keras": keras.__version__},
    )


EXPORTER = Exporter(
    extension="keras",
    backends=(),
    write=_write,
    load=_load,
    example=(
        "from kvq import VQVAE, build  # takes a backend that is installed; the classes in the file\nimport keras",
        "model = keras.saving.load_model(file)\n"
        "(name,) = model.input\n"
        "(output,) = model.predict_on_batch({name: array}).values()",
    ),
)
