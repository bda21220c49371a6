"""Pads, crops and flips of uint8 images: pure NumPy functions of the images and of numbers drawn beforehand.

A transform is called with `images` uint8 (n, height, width, channels) and `uniform` float64 (n, draws) in [0, 1), and returns
uint8 (n, height, width, channels). Row i of `uniform` belongs to image i alone, so a batch gives what its images give one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from kvq.errors import DataError

Images = NDArray[np.uint8]
Uniform = NDArray[np.float64]


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
class RandomCrop:
    """A square of side `size`, every position equally likely; both numbers of an image choose its row and its column.

    Raises:
        ValueError: If `size` is below 1.
        DataError: At the call, if an image is smaller than `size`.
    """

    size: int
    draws: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(self, images: Images, uniform: Uniform) -> Images:
        # A number below 1 times n stays below n in float64 for every n that an image side can be, so the floor is a position.
        top, left = np.floor(uniform * (_room(images, self.size) + 1)).astype(np.intp).T
        windows = np.lib.stride_tricks.sliding_window_view(images, (self.size, self.size), axis=(1, 2))
        chosen = windows[np.arange(len(images)), top, left]
        return np.ascontiguousarray(np.moveaxis(chosen, 1, -1))


@dataclass(frozen=True)
class CentreCrop:
    """The square of side `size` in the middle; where the middle falls between two pixels, the upper and left one.

    Raises:
        ValueError: If `size` is below 1.
        DataError: At the call, if an image is smaller than `size`.
    """

    size: int
    draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(self, images: Images, uniform: Uniform) -> Images:
        top, left = _room(images, self.size) // 2
        return images[:, top : top + self.size, left : left + self.size]


@dataclass(frozen=True)
class RandomFlip:
    """Left and right exchanged, with probability 1/2."""

    draws: ClassVar[int] = 1

    def __call__(self, images: Images, uniform: Uniform) -> Images:
        return np.where(uniform[:, :, None, None] < 0.5, images[:, :, ::-1], images)


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


def training_transforms(pad: int, crop: int, flip: bool) -> tuple[Transform, ...]:
    """A black frame, a random square, and a random flip where asked for. MNIST's recipe is pad=4, crop=28 without a flip.

    Args:
        pad: Width of the frame in pixels, 0 for none.
        crop: Side of the square in pixels, at least 1.
        flip: Whether left and right may be exchanged (not for digits or letters).
    """
    transforms: list[Transform] = [Pad(pad)] if pad else []
    transforms.append(RandomCrop(crop))
    if flip:
        transforms.append(RandomFlip())
    return tuple(transforms)


def evaluation_transforms(pad: int, crop: int) -> tuple[Transform, ...]:
    """The square in the middle, nothing random.

    The frame shows only on images smaller than `crop`: on larger ones the middle square lies inside the image.

    Args:
        pad: Width of the frame in pixels, as in training.
        crop: Side of the square in pixels, at least 1.
    """
    return (Pad(pad), CentreCrop(crop)) if pad else (CentreCrop(crop),)


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


def _splitmix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of SplitMix64 on uint64 of any shape; arithmetic is modulo 2**64."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"`size` must be at least 1. Received: size={size}.")


def _room(images: Images, size: int) -> NDArray[np.intp]:
    """How far a square of side `size` can move down and to the right, (2,)."""
    room = np.array(images.shape[1:3]) - size
    if room.min() < 0:
        height, width = images.shape[1:3]
        raise DataError(
            f"An image must be at least as large as the crop. Received: {height} x {width} pixels (height x width, "
            f"with any padding), crop={size}. Choose a smaller `data.crop` or leave such images out."
        )
    return room
