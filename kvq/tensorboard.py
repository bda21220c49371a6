"""TensorBoard summaries of a run, by tensorboardX, which needs no backend."""

import functools
from typing import Any

import numpy as np
from PIL import Image

from kvq.errors import BackendError, installing
from kvq.progress import Progress
from kvq.run import Run


class TensorBoard(Progress):
    """Writes records and pictures as TensorBoard summaries.

    Raises:
        BackendError: If tensorboardX is not installed. Nothing is written before the first record.
    """

    def __init__(self, run: Run):
        try:
            import tensorboardX
        except ImportError:
            raise BackendError(f"TensorBoard summaries need two packages: {installing('tensorboard')}.") from None
        self._open = lambda: tensorboardX.SummaryWriter(str(run.tensorboard))

    @functools.cached_property
    def writer(self) -> Any:
        return self._open()

    def log(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, float):
                self.writer.add_scalar(f"{record['split']}/{name}", value, record["step"])
        self.writer.flush()

    def picture(self, name: str, step: int, picture: Image.Image) -> None:
        self.writer.add_image(f"samples/{name}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
