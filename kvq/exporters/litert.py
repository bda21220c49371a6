"""Export to LiteRT (a .tflite file, for phones and small machines), by TensorFlow's converter."""

import tempfile
from pathlib import Path

import numpy as np

from kvq.exporters import saved_model
from kvq.exporters.parts import Exporter, Loaded, Part, described


def _write(part: Part, path: Path) -> None:
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        saved_model.write(part, Path(folder))
        # Built-in operations only: others would need a runtime with TensorFlow inside.
        path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder).convert())


def _load(path: Path) -> Loaded:
    import importlib.metadata

    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    signature = interpreter.get_signature_runner()
    ((input_name, given),) = signature.get_input_details().items()
    ((output_name, result),) = signature.get_output_details().items()

    def run(array: np.ndarray) -> np.ndarray:
        return signature(**{input_name: array})[output_name]

    return Loaded(
        run,
        [described(input_name, np.dtype(given["dtype"]).name, given["shape_signature"].tolist())],
        [described(output_name, np.dtype(result["dtype"]).name, result["shape_signature"].tolist())],
        {"ai-edge-litert": importlib.metadata.version("ai-edge-litert")},
    )


EXPORTER = Exporter(
    extension="tflite",
    backends=("tensorflow",),
    packages=lambda backend: ("ai_edge_litert",),
    write=_write,
    load=_load,
    example=(
        "from ai_edge_litert.interpreter import Interpreter",
        "run = Interpreter(file).get_signature_runner()\n"
        "(name,) = run.get_input_details()\n"
        "(output,) = run(**{name: array}).values()",
    ),
)
