"""Export to ONNX, by the converter that each backend has, and ONNX Runtime to run it."""

from pathlib import Path
from typing import Any

import keras
import numpy as np

from kvq.exporters.parts import Exporter, Loaded, Part, described

# Beside these every backend needs onnx, to name inputs and outputs alike, and onnxruntime, to run what came out.
_CONVERTERS = {"tensorflow": ("tf2onnx",), "jax": ("jax2onnx",), "torch": ()}
_FIXED_SIZE = frozenset({"jax"})


def converters(backend: str) -> tuple[str, ...]:
    """Packages that writing needs."""
    return (*_CONVERTERS[backend], "onnx")


def write(part: Part, path: Path) -> None:
    """Writes a part as one file, with the names of its input and output."""
    import onnx

    backend = keras.backend.backend()
    if backend == "torch":
        _write_from_torch(part, path)
    else:
        shape = part.fixed_shape if backend in _FIXED_SIZE else part.free_shape
        signature = [keras.InputSpec(shape=shape, dtype=part.sample.dtype.name, name=part.input_name)]
        part.model.export(str(path), format="onnx", input_signature=signature, verbose=False)
    model = onnx.load(str(path))
    _copy_shared_initializers(model.graph)
    _rename(model.graph, model.graph.input[0].name, part.input_name)
    _rename(model.graph, model.graph.output[0].name, part.output_name)
    for value in (model.graph.input[0], model.graph.output[0]):
        for axis, name in enumerate(("batch",) if backend in _FIXED_SIZE else ("batch", "height", "width")):
            # Those of a grid are others than those of an image.
            value.type.tensor_type.shape.dim[axis].dim_param = f"grid_{name}" if axis and value.name == "indices" else name
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _write_from_torch(part: Part, path: Path) -> None:
    import torch

    # Not by Keras: it traces images of one pixel, whose padding is another than that of an even side.
    torch.onnx.export(
        part.model.eval(),
        (keras.ops.convert_to_tensor(part.sample),),
        str(path),
        dynamo=False,
        input_names=[part.input_name],
        output_names=[part.output_name],
        dynamic_axes={name: {0: "batch", 1: "height", 2: "width"} for name in (part.input_name, part.output_name)},
    )


def _copy_shared_initializers(graph: Any) -> None:
    """Gives each use of a weight its own copy: PyTorch's converter makes equal weights one, behind an Identity that ONNX Runtime
    loses."""
    weights = {initializer.name: initializer for initializer in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Identity" and node.input[0] in weights]:
        copy = type(weights[node.input[0]])()
        copy.CopyFrom(weights[node.input[0]])
        copy.name = node.output[0]
        graph.initializer.append(copy)
        graph.node.remove(node)


def _rename(graph: Any, old: str, new: str) -> None:
    """Gives a tensor of an ONNX graph another name; every backend's converter invents its own."""
    if old == new:
        return
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.name == old:
            value.name = new
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _load(path: Path) -> Loaded:
    import onnx
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model = onnx.load(str(path))

    def run(array: np.ndarray) -> np.ndarray:
        return session.run(None, {session.get_inputs()[0].name: array})[0]

    return Loaded(
        run,
        [described(value.name, value.type, value.shape) for value in session.get_inputs()],
        [described(value.name, value.type, value.shape) for value in session.get_outputs()],
        {"opset": max(opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx"))},
    )


EXPORTER = Exporter(
    extension="onnx",
    # PyTorch's needs no package beside these, and converts every quantizer.
    backends=("torch", "tensorflow", "jax"),
    packages=lambda backend: (*converters(backend), "onnxruntime"),
    write=write,
    load=_load,
    example=(
        "import onnxruntime",
        "session = onnxruntime.InferenceSession(file)\n(output,) = session.run(None, {session.get_inputs()[0].name: array})",
    ),
    fixed_size=_FIXED_SIZE,
)
