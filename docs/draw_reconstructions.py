"""Draws docs/reconstructions.png: test images of Fashion-MNIST above what the tokenizer that comes with kvq makes of them.

python docs/draw_reconstructions.py
"""

from pathlib import Path

import numpy as np

import kvq
from kvq.data import open_source
from kvq.plots import image_grid

IMAGES = 12

source = open_source("fashion_mnist_mini", "test")
images = np.stack([source[number]["image"] for number in range(IMAGES)])
tokenizer = kvq.Tokenizer.load("fashion_mnist_mini")
restored = tokenizer.decode(tokenizer.encode(images))
image_grid(images, restored, columns=IMAGES).save(Path(__file__).parent / "reconstructions.png", optimize=True)
