"""Export as PyTorch's ExportedProgram (a .pt2 file), which PyTorch runs without Keras."""

import io
from pathlib import Path

import keras
import numpy as np

from kvq.exporters.parts import Exporter, Loaded, Part, described


def _write(part: Part, path: Path) -> None:
    import torch
    from torch.export import Dim

    free = {0: Dim("batch"), 1: part.step * Dim("height"), 2: part.step * Dim("width")}
    sample = keras.ops.convert_to_tensor(part.sample)
    # Keras' models are called as `forward(*args)`: hence a tuple in the tuple.
    program = torch.export.export(part.model.eval(), (sample,), dynamic_shapes=((free,),), strict=False)
    # Not into the file: on a full disk PyTorch's own writer aborts the process.
    content = io.BytesIO()
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def _load(path: Path) -> Loaded:
    import torch

    program = torch.export.load(str(path))
    model = program.module()

    def run(array: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(np.ascontiguousarray(array))).numpy()

    values = {node.name: node.meta["val"] for node in program.graph.nodes if hasattr(node.meta.get("val"), "shape")}
    inputs, outputs = (
        [described(name, str(values[name].dtype).removeprefix("torch."), values[name].shape) for name in names]
        for names in (program.graph_signature.user_inputs, program.graph_signature.user_outputs)
    )
    return Loaded(run, inputs, outputs, {"torch": torch.__version__})


EXPORTER = Exporter(
    extension="pt2",
    backends=("torch",),
    write=_write,
    load=_load,
    example=(
        "import torch",
        "model = torch.export.load(file).module()\n"
        "with torch.inference_mode():\n"
        "    output = model(torch.from_numpy(array)).numpy()",
    ),
)
