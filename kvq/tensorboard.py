"""TensorBoard summaries of a run, by tensorboardX, which needs no backend."""

from typing import Any

import numpy as np
from PIL import Image

from kvq.errors import BackendError
from kvq.progress import Progress
from kvq.run import Run


class TensorBoard(Progress):
    """Writes records and pictures as TensorBoard summaries."""

    def __init__(self, run: Run):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise BackendError('TensorBoard summaries need the extra: pip install "kvq[tensorboard]".') from None
        self.writer = SummaryWriter(str(run.tensorboard))

    def log(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, float):
                self.writer.add_scalar(f"{record['split']}/{name}", value, record["step"])
        self.writer.flush()

    def picture(self, name: str, step: int, picture: Image.Image) -> None:
        self.writer.add_image(f"samples/{name}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
