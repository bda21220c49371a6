"""Export to ONNX, by the converter that each backend has, and ONNX Runtime to run it."""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kvq.exporters.parts import Exporter, Part

# Beside these every backend needs onnx, to name inputs and outputs alike, and onnxruntime, to run what came out.
_CONVERTERS = {"tensorflow": ("tf2onnx",), "jax": ("jax2onnx",), "torch": ()}


def _packages(backend: str) -> tuple[str, ...]:
    return (*_CONVERTERS[backend], "onnx", "onnxruntime")


def _write(part: Part, path: Path) -> None:
    import onnx

    signature = [keras.InputSpec(shape=part.shape, dtype=part.dtype, name=part.input_name)]
    # The converters talk; whether one succeeded is decided by running its file.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet_logging():
        warnings.simplefilter("ignore")
        part.model.export(str(path), format="onnx", input_signature=signature, verbose=False)
    model = onnx.load(str(path))
    _copy_shared_initializers(model.graph)
    _rename(model.graph, model.graph.input[0].name, part.input_name)
    _rename(model.graph, model.graph.output[0].name, part.output_name)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


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


def _run(path: Path, array: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: array})[0]


@contextlib.contextmanager
def _quiet_logging() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


EXPORTER = Exporter("onnx", _packages, _write, _run)
