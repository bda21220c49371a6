"""How well tokenizers keep colours: of photographs never trained on, and of images of one colour.

    python benchmarks/colours.py --data PHOTOGRAPHS runs/mscoco runs/mscoco_resnet runs/mscoco_paper

For each, as a line of a Markdown table: PSNR of the luma and of the two chroma channels (BT.601, as in JPEG; mean of the images'
values) of the held-out photographs, centre-cropped to 128; and the mean distance, in grey levels per channel, between images of
one colour and what comes back, over the 27 colours whose channels are 0, 128 or 255.
"""

import argparse
import itertools

import numpy as np
from PIL import Image

import kvq
from kvq.data import evaluation_batches, evaluation_transforms, iterate, open_source
from kvq.metrics import psnr

CROP = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tokenizers", nargs="+", help="runs or models")
    parser.add_argument("--data", required=True, help="photographs, as `kvq evaluate` takes them")
    arguments = parser.parse_args()
    images = _held_out(arguments.data)
    flat = np.stack([np.full((CROP, CROP, 3), colour, np.uint8) for colour in itertools.product((0, 128, 255), repeat=3)])
    print(f"| tokenizer | luma, dB | chroma, dB | one colour: distance in grey levels |\n|{'---|' * 4}")
    for name in arguments.tokenizers:
        tokenizer = kvq.Tokenizer.load(name)
        before, after = _ycbcr(images), _ycbcr(_there_and_back(tokenizer, images))
        luma, chroma = (psnr(before[..., part], after[..., part]).mean() for part in (slice(1), slice(1, None)))
        distance = np.abs(flat.astype(float) - _there_and_back(tokenizer, flat)).mean()
        print(f"| {name} | {luma:.2f} | {chroma:.2f} | {distance:.1f} |", flush=True)


def _held_out(data: str) -> np.ndarray:
    batches = evaluation_batches(open_source(data, "test"), evaluation_transforms(0, CROP), 1)
    return np.concatenate([batch["images"] for batch in iterate(batches)])


def _there_and_back(tokenizer: kvq.Tokenizer, images: np.ndarray) -> np.ndarray:
    return tokenizer.decode(tokenizer.encode(images))


def _ycbcr(images: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(image).convert("YCbCr")) for image in images])


if __name__ == "__main__":
    main()
