"""Export as StableHLO in the serialisation of `jax.export`, which JAX runs without Keras on CPU, GPU and TPU."""

from pathlib import Path

import numpy as np

from kvq.exporters.parts import Exporter, Loaded, Part, described

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def _write(part: Part, path: Path) -> None:
    import jax
    from jax import export

    height, width = (f"{part.step}*{name}" if part.step > 1 else name for name in ("height", "width"))
    shape = export.symbolic_shape(", ".join(["batch", height, width, *map(str, part.sample.shape[3:])]))
    # The weights become constants of the function.
    exported = export.export(jax.jit(lambda array: part.model(array)), platforms=_PLATFORMS)(
        jax.ShapeDtypeStruct(shape, part.sample.dtype)
    )
    path.write_bytes(exported.serialize())


def _load(path: Path) -> Loaded:
    import jax
    from jax import export

    exported = export.deserialize(bytearray(path.read_bytes()))
    # `call` alone would compile at each call.
    run = jax.jit(exported.call)
    inputs, outputs = (
        [described(name, value.dtype.name, [size if isinstance(size, int) else str(size) for size in value.shape])]
        for name, (value,) in (("argument", exported.in_avals), ("result", exported.out_avals))
    )
    facts = {"jax": jax.__version__, "platforms": list(exported.platforms)}
    return Loaded(lambda array: np.asarray(run(array)), inputs, outputs, facts)


EXPORTER = Exporter(
    extension="stablehlo",
    backends=("jax",),
    write=_write,
    load=_load,
    example=(
        "from jax import export",
        'with open(file, "rb") as stream:\n'
        "    program = export.deserialize(bytearray(stream.read()))\n"
        "output = np.array(program.call(array))",
    ),
)
