"""Export as TensorFlow's SavedModel, a folder that TensorFlow and its servers run without Keras."""

from pathlib import Path

import keras
import numpy as np

from kvq.exporters.parts import Exporter, Loaded, Part, described


def write(part: Part, path: Path) -> None:
    """Writes a part with one signature, `serving_default`, and the names of its input and output."""
    import tensorflow as tf

    archive = keras.export.ExportArchive()
    archive.track(part.model)
    signature = tf.TensorSpec(part.free_shape, part.sample.dtype, name=part.input_name)
    archive.add_endpoint("serve", lambda array: {part.output_name: part.model(array)}, input_signature=[signature])
    archive.write_out(str(path), verbose=False)


def _load(path: Path) -> Loaded:
    import tensorflow as tf

    model = tf.saved_model.load(str(path))
    signature = model.signatures["serving_default"]
    ((input_name, given),) = signature.structured_input_signature[1].items()
    ((output_name, result),) = signature.structured_outputs.items()

    def run(array: np.ndarray) -> np.ndarray:
        # By way of the model, which has to outlive its signature.
        return model.signatures["serving_default"](**{input_name: tf.constant(array)})[output_name].numpy()

    return Loaded(
        run,
        [described(input_name, given.dtype.name, given.shape)],
        [described(output_name, result.dtype.name, result.shape)],
        {"tensorflow": tf.__version__, "signature": "serving_default"},
    )


EXPORTER = Exporter(
    extension="saved_model",
    backends=("tensorflow",),
    write=write,
    load=_load,
    example=(
        "import tensorflow as tf",
        "model = tf.saved_model.load(file)\n(output,) = model.serve(tf.constant(array)).values()\noutput = output.numpy()",
    ),
)
