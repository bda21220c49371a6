"""Whoever watches a long computation: a display, a log, or nobody."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


# What a record of metrics.jsonl holds beside the terms of the loss.
NOT_TERMS = {"step", "split", "loss", "psnr", "ssim", "usage", "perplexity", "images_per_second", "input_wait"}


class Progress:
    """Told what happens as it happens. Every method does nothing here; a watcher overrides what it cares about."""

    def start(self, total_steps: int, first_step: int) -> None:
        """Steps `first_step` + 1 to `total_steps` will come."""

    def step(self, step: int) -> None:
        """So many steps are done."""

    def log(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""

    def picture(self, name: str, step: int, picture: "Image.Image") -> None:
        """A grid of originals above reconstructions, of the images called `name`."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def stop(self) -> None:
        """Nothing more will come."""
