"""Export to OpenVINO: an .xml with the graph and a .bin with the weights. Converted from ONNX, whose names it keeps."""

import tempfile
from pathlib import Path

import numpy as np

from kvq.exporters import onnx
from kvq.exporters.parts import Exporter, Loaded, Part, described


def _write(part: Part, path: Path) -> None:
    import openvino

    # OpenVINO's own converter of PyTorch's graphs knows no aten::subtract.
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "part.onnx"
        onnx.write(part, written)
        model = openvino.convert_model(str(written))
        # Another tensor may be known by the same name; its first one stands.
        model.inputs[0].tensor.set_names({part.input_name})
        model.outputs[0].tensor.set_names({part.output_name})
        openvino.save_model(model, str(path), compress_to_fp16=False)


def _load(path: Path) -> Loaded:
    import openvino

    # Its default on a CPU that can is bfloat16, which finds other codes.
    model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(array: np.ndarray) -> np.ndarray:
        return np.array(model([array])[0])

    inputs, outputs = (
        [described(port.any_name, port.element_type.to_dtype().name, _sizes(port.partial_shape)) for port in ports]
        for ports in (model.inputs, model.outputs)
    )
    return Loaded(run, inputs, outputs, {"openvino": openvino.get_version(), "precision": "f32"})


def _sizes(shape: "object") -> list[int]:
    return [size.get_length() if size.is_static else -1 for size in shape]  # type: ignore[attr-defined]


EXPORTER = Exporter(
    extension="xml",
    backends=onnx.EXPORTER.backends,
    packages=lambda backend: (*onnx.converters(backend), "openvino"),
    write=_write,
    load=_load,
    example=(
        "import openvino",
        "# The default precision of many CPUs is bfloat16, which finds other codes.\n"
        'model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})\n'
        "output = np.array(model([array])[0])",
    ),
    fixed_size=onnx.EXPORTER.fixed_size,
)
