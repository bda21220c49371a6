"""Export as a `.keras` file, Keras' own format. It loads where kvq is installed, after `import kvq.model`."""

from pathlib import Path

import keras
import numpy as np

from kvq.exporters.parts import Exporter, Part


def _write(part: Part, path: Path) -> None:
    # A functional model around the part carries the names of input and output.
    inputs = keras.Input(part.shape[1:], dtype=part.dtype, name=part.input_name)
    outputs = keras.layers.Identity(name=part.output_name, dtype="uint8" if part.output_name == "reconstruction" else "int32")(
        part.model(inputs)
    )
    keras.Model({part.input_name: inputs}, {part.output_name: outputs}, name=part.model.name + "_file").save(path)


def _run(path: Path, array: np.ndarray) -> np.ndarray:
    model = keras.saving.load_model(path)
    (input_name,), (output_name,) = model.input, model.output
    return np.asarray(model.predict_on_batch({input_name: array})[output_name])


EXPORTER = Exporter("keras", lambda backend: (), _write, _run)
