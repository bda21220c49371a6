"""The images that an exported part is compared on."""

from pathlib import Path

import numpy as np
from PIL import Image

from kvq.artifact import ArtifactConfig
from kvq.data import evaluation_batches, evaluation_transforms, iterate, open_source
from kvq.errors import KvqError
from kvq.evaluation import own_images

COMPARED = 64
SHIPPED = "fashion_mnist_mini"


def sample_images(path: str | Path, config: ArtifactConfig) -> tuple[np.ndarray, str]:
    """uint8 images (at most 64, h, w, c) as the model takes them, and where they come from.

    They are test images of the model's own data set where it is at hand, else of the one that kvq ships, scaled.
    """
    wanted = config.images
    try:
        source = own_images(path, config.data.name, "test")
        transforms = evaluation_transforms(wanted.pad, wanted.crop, wanted.resize)
        images = next(iterate(evaluation_batches(source, transforms, COMPARED), threads=0))["images"]
        if images.shape[-1] == wanted.channels and len(images):
            return images, f"{len(images)} images of {source.name}"
    except KvqError:
        pass
    source = open_source(SHIPPED, "test")
    shipped = [Image.fromarray(source[index]["image"][..., 0]) for index in range(COMPARED)]
    scaled = np.stack([np.asarray(image.resize((wanted.crop, wanted.crop))) for image in shipped])
    images = np.repeat(scaled[..., None], wanted.channels, axis=-1)
    return images, f"{COMPARED} images of {SHIPPED}, as {wanted.crop}x{wanted.crop}x{wanted.channels}"


def of_another_size(images: np.ndarray, step: int) -> np.ndarray:
    """The same images with reflected margins: not square any more, height and width still multiples of `step`."""
    return np.pad(images, ((0, 0), (0, step), (0, 2 * step), (0, 0)), "reflect")
