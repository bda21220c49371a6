"""The `example.py` that lies beside what was exported: it runs it with the format's runtime, NumPy and Pillow alone."""

from kvq.artifact import ArtifactConfig
from kvq.exporters.parts import Exporter

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_PROGRAM = '''\
"""python example.py encoder.{extension} image.png indices.npy, or: python example.py decoder.{extension} indices.npy image.png

The middle square of an image is scaled to {side}x{side}; arrays are taken as they are."""

import sys

import numpy as np
{imports}
from PIL import Image, ImageOps

_, file, given, result = sys.argv if len(sys.argv) == 4 else sys.exit(__doc__)
array = np.load(given) if given.endswith(".npy") else {open}
{run}
if result.endswith(".npy"):
    np.save(result, output)
else:
    Image.fromarray(output[0]{squeeze}).save(result)
'''


def example(exporter: Exporter, config: ArtifactConfig) -> str:
    """Its text. Images of channels that no file has come and go as .npy."""
    channels, side = config.images.channels, config.images.crop
    converted = f'Image.open(given).convert("{_MODES.get(channels, "RGB")}")'
    opened = f"np.array(ImageOps.fit({converted}, ({side}, {side})))[None]"
    imports, run = exporter.example
    return _PROGRAM.format(
        extension=exporter.extension,
        side=side,
        imports=imports,
        open=f"{opened}[..., None]" if channels == 1 else opened,
        run=run,
        squeeze="[..., 0]" if channels == 1 else "",
    )
