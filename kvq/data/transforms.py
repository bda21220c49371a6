"""Pads, crops, flips and changes of size of uint8 images: pure functions of the images and of numbers drawn beforehand.

A transform is called with `images` uint8 (n, height, width, channels) and `uniform` float64 (n, draws) in [0, 1), and returns
uint8 (n, height, width, channels). Row i of `uniform` belongs to image i alone, so a batch gives what its images give one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kvq.errors import DataError

Images = NDArray[np.uint8]
Uniform = NDArray[np.float64]
MAX_ENLARGEMENT = 8  # times; what would have to grow more is refused


class Transform(Protocol):
    """What the loader asks of a transform: how many numbers it needs per image, and the call itself."""

    @property
    def draws(self) -> int: ...

    def __call__(self, images: Images, uniform: Uniform) -> Images: ...


@dataclass(frozen=True)
class Pad:
    """A black frame of `margin` pixels on all four sides.

    Raises:
        ValueError: If `margin` is negative.
    """

    margin: int
    draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise ValueError(f"`margin` must be at least 0. Received: margin={self.margin}.")

    def __call__(self, images: Images, uniform: Uniform) -> Images:
        sides = (self.margin, self.margin)
        return np.pad(images, ((0, 0), sides, sides, (0, 0)))


@dataclass(frozen=True)
class ResizeShorterSide:
    """The whole image scaled so that its shorter side has `size` pixels; both sides round to the nearest pixel, at least 1.

    Bicubic, and antialiased where it shrinks: each new pixel is a mean over all it covers, as Pillow's filters do.

    Raises:
        ValueError: If `size` is below 1.
        DataError: At the call, if that enlarges more than 8 times.
    """

    size: int
    draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(self, images: Images, uniform: Uniform) -> Images:
        shorter = min(images.shape[1:3])
        if shorter == self.size:
            return images
        _check_enlargement(images, self.size)
        height, width = (max(1, round(side * self.size / shorter)) for side in images.shape[1:3])
        return _resized(images, height, width)


@dataclass(frozen=True)
class RequireSize:
    """The images unchanged. Raises DataError at the call if one side is smaller than `size`."""

    size: int
    draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(self, images: Images, uniform: Uniform) -> Images:
        height, width = images.shape[1:3]
        if min(height, width) < self.size:
            raise DataError(f"{height} x {width} pixels (height x width) are smaller than the crop of {self.size}")
        return images


@dataclass(frozen=True)
class RandomCrop:
    """A square of side `size`, every position equally likely; both numbers of an image choose its row and its column.

    Of an image whose shorter side is smaller, the square has that side, and is enlarged to `size` afterwards (bicubic).

    Raises:
        ValueError: If `size` is below 1.
        DataError: At the call, if an image would have to grow more than 8 times.
    """

    size: int
    draws: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(self, images: Images, uniform: Uniform) -> Images:
        side = _window(images, self.size)
        room = np.array(images.shape[1:3]) - side
        # A number below 1 times n stays below n in float64 for every n that an image side can be, so the floor is a position.
        places = np.floor(uniform * (room + 1)).astype(np.intp).tolist()
        chosen = np.empty((len(images), side, side, images.shape[3]), np.uint8)
        for number, (top, left) in enumerate(places):
            chosen[number] = images[number, top : top + side, left : left + side]
        return _resized(chosen, self.size, self.size)


@dataclass(frozen=True)
class CentreCrop:
    """The square of side `size` in the middle; where the middle falls between two pixels, the upper and left one.

    Of an image whose shorter side is smaller, the square has that side, and is enlarged to `size` afterwards (bicubic).

    Raises:
        ValueError: If `size` is below 1.
        DataError: At the call, if an image would have to grow more than 8 times.
    """

    size: int
    draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(self, images: Images, uniform: Uniform) -> Images:
        side = _window(images, self.size)
        top, left = (np.array(images.shape[1:3]) - side) // 2
        return _resized(images[:, top : top + side, left : left + side], self.size, self.size)


@dataclass(frozen=True)
class RandomFlip:
    """Left and right exchanged, with probability 1/2."""

    draws: ClassVar[int] = 1

    def __call__(self, images: Images, uniform: Uniform) -> Images:
        flipped, mirrored = images.copy(), np.arange(images.shape[2])[::-1]
        for number in np.flatnonzero(uniform[:, 0] < 0.5).tolist():
            np.take(images[number], mirrored, axis=1, out=flipped[number], mode="clip")  # "raise" would copy twice
        return flipped


@dataclass(frozen=True)
class Chain:
    """Transforms one after the other, itself a transform: each takes its own columns of `uniform`, in order."""

    transforms: tuple[Transform, ...]

    @property
    def draws(self) -> int:
        return sum(transform.draws for transform in self.transforms)

    def __call__(self, images: Images, uniform: Uniform) -> Images:
        column = 0
        for transform in self.transforms:
            images = transform(images, uniform[:, column : column + transform.draws])
            column += transform.draws
        return images


def training_transforms(
    pad: int, crop: int, flip: bool, resize: int | None = None, small: str = "enlarge"
) -> tuple[Transform, ...]:
    """A change of size, a black frame, a random square, and a random flip, each where asked for.

    MNIST's recipe is pad=4, crop=28 without a flip.

    Args:
        pad: Width of the frame in pixels, 0 for none.
        crop: Side of the square in pixels, at least 1.
        flip: Whether left and right may be exchanged (not for digits or letters).
        resize: Shorter side of the image before all else, in pixels; None leaves it as it is.
        small: What happens to an image smaller than `crop`: "enlarge" it, or "skip" it by a DataError.
    """
    transforms: list[Transform] = [*_before_crop(pad, crop, resize, small), RandomCrop(crop)]
    if flip:
        transforms.append(RandomFlip())
    return tuple(transforms)


def evaluation_transforms(pad: int, crop: int, resize: int | None = None, small: str = "enlarge") -> tuple[Transform, ...]:
    """The square in the middle, nothing random. Arguments as for `training_transforms`.

    The frame shows only on images smaller than `crop`: on larger ones the middle square lies inside the image.
    """
    return (*_before_crop(pad, crop, resize, small), CentreCrop(crop))


def _before_crop(pad: int, crop: int, resize: int | None, small: str) -> list[Transform]:
    before: list[Transform] = [ResizeShorterSide(resize)] if resize else []
    if pad:
        before.append(Pad(pad))
    return [*before, RequireSize(crop)] if small == "skip" else before


def uniform_numbers(seed: int, positions: Sequence[int] | NDArray[np.integer], count: int) -> Uniform:
    """Random numbers that depend on nothing but (seed, position, draw): no state, so any position can be had at any time.

    Args:
        seed: Any integer of up to 64 bits.
        positions: Integers (n,), at least 0.
        count: Numbers per position.

    Returns:
        Float64 (n, count) in [0, 1), multiples of 2**-53.

    Source: SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), applied once to the seed,
    once to the position and once to the draw.
    """
    # One-element arrays, since NumPy warns of the wanted overflow where it multiplies scalars.
    state = _splitmix(np.array([seed % 2**64], np.uint64))
    state = _splitmix(state ^ np.asarray(positions).astype(np.uint64))
    state = _splitmix(state[:, None] ^ np.arange(count, dtype=np.uint64)[None, :])
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hashed(*numbers: int) -> int:
    """A number in [0, 2**64) that depends on all `numbers` and their order, as if drawn at random. SplitMix64, chained."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = _splitmix(state ^ np.uint64(number % 2**64))
    return int(state[0])


def _splitmix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of SplitMix64 on uint64 of any shape; arithmetic is modulo 2**64."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"`size` must be at least 1. Received: size={size}.")


def _window(images: Images, size: int) -> int:
    """Side of the square to cut out: `size`, or the images' shorter side where that is smaller, which is then enlarged."""
    _check_enlargement(images, size)
    return min(size, *images.shape[1:3])


def _check_enlargement(images: Images, size: int) -> None:
    height, width = images.shape[1:3]
    if size > MAX_ENLARGEMENT * min(height, width):
        raise DataError(
            f"{height} x {width} pixels (height x width) would have to grow over {MAX_ENLARGEMENT} times for a side of {size}"
        )


def _resized(images: Images, height: int, width: int) -> Images:
    """Images (n, h, w, c) as (n, height, width, c): bicubic, antialiased where they shrink; each channel by itself."""
    if images.shape[1:3] == (height, width):
        return images
    count, _, _, channels = images.shape
    resized = np.empty((count, height, width, channels), np.uint8)
    for image, out in zip(images, resized, strict=True):
        if channels == 3:
            out[...] = _resized_plane(image, height, width)
            continue
        for channel in range(channels):
            out[:, :, channel] = _resized_plane(image[:, :, channel], height, width)
    return resized


def _resized_plane(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """(h, w) or (h, w, 3)."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BICUBIC))
