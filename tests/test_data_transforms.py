"""What crops, flips and their random numbers promise."""

import pickle

import numpy as np
import pytest
from PIL import Image

from kvq.data.transforms import (
    CentreCrop,
    Chain,
    Pad,
    RandomCrop,
    RandomFlip,
    RequireSize,
    ResizeShorterSide,
    _splitmix,
    evaluation_transforms,
    training_transforms,
    uniform_numbers,
)
from kvq.errors import DataError

CASES = {
    "pad": Pad(3),
    "random crop": RandomCrop(5),
    "centre crop": CentreCrop(6),
    "random flip": RandomFlip(),
    "enlarging random crop": RandomCrop(12),
    "enlarging centre crop": CentreCrop(13),
    "resize": ResizeShorterSide(7),
    "require size": RequireSize(9),
    "chain": Chain((Pad(2), RandomCrop(8), RandomFlip())),
}
ALMOST_ONE = 1 - 2.0**-53
# Of (seed 7; positions 12345 and 2**40 + 255; draws 0 and 1), times 2**53, worked out in plain Python integers.
GOLDEN = [[1960255265435173, 232887771525969], [2461896928525363, 4745979923546267]]


def some_images(count=6, height=9, width=11, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), np.uint8)


@pytest.mark.parametrize("transform", CASES.values(), ids=CASES)
def test_a_batch_gives_what_its_images_give_one_by_one(transform):
    images = some_images()
    before = images.copy()
    uniform = uniform_numbers(1, range(len(images)), transform.draws)
    whole = transform(images, uniform)
    singly = [transform(images[i : i + 1], uniform[i : i + 1])[0] for i in range(len(images))]
    np.testing.assert_array_equal(whole, np.stack(singly))
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(images, before, err_msg="the input was written to")


@pytest.mark.parametrize("transform", CASES.values(), ids=CASES)
def test_transforms_survive_pickling(transform):
    assert pickle.loads(pickle.dumps(transform)) == transform


def test_pad_is_a_black_frame():
    images = some_images()
    padded = Pad(2)(images, np.zeros((6, 0)))
    assert padded.shape == (6, 13, 15, 3)
    np.testing.assert_array_equal(padded[:, 2:-2, 2:-2], images)
    assert padded.astype(int).sum() == images.astype(int).sum()


def test_random_crop_takes_the_square_at_the_floor_of_the_scaled_numbers():
    images = some_images(3)
    uniform = np.array([[0.0, 0.0], [ALMOST_ONE, ALMOST_ONE], [0.5, 0.25]])
    crops = RandomCrop(5)(images, uniform)  # 5 rows and 7 columns to choose from
    np.testing.assert_array_equal(crops[0], images[0, :5, :5])
    np.testing.assert_array_equal(crops[1], images[1, 4:, 6:])
    np.testing.assert_array_equal(crops[2], images[2, 2:7, 1:6])


@pytest.mark.parametrize("side", [*range(1, 60), 4097, 65535])
def test_the_largest_random_number_is_still_a_position(side):
    images = np.zeros((1, side, 1, 1), np.uint8)
    assert RandomCrop(1)(images, np.array([[ALMOST_ONE, 0.0]])).shape == (1, 1, 1, 1)


def test_random_crop_finds_every_position_equally_often():
    places = np.arange(12, dtype=np.uint8).reshape(1, 3, 4, 1).repeat(12_000, axis=0)
    drawn = RandomCrop(1)(places, uniform_numbers(5, range(12_000), 2)).reshape(-1)
    counts = np.bincount(drawn, minlength=12)
    assert counts.min() > 1000 - 4 * 1000**0.5 and counts.max() < 1000 + 4 * 1000**0.5, counts


def test_a_crop_of_the_whole_image_is_the_image():
    images = some_images(height=9, width=9)
    np.testing.assert_array_equal(RandomCrop(9)(images, uniform_numbers(0, range(6), 2)), images)


def test_centre_crop_takes_the_upper_left_of_two_middles():
    images = some_images()
    np.testing.assert_array_equal(CentreCrop(6)(images, np.zeros((6, 0))), images[:, 1:7, 2:8])


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("crop", [RandomCrop(18), CentreCrop(18)])
def test_an_image_smaller_than_the_crop_is_cut_square_and_then_enlarged(crop, channels):
    """As Pillow's bicubic filter enlarges the square, channel by channel."""
    images = some_images(2, height=9, width=20, channels=channels)
    left = 11 if isinstance(crop, RandomCrop) else 5
    cropped = crop(images, np.full((2, crop.draws), ALMOST_ONE))
    assert cropped.shape == (2, 18, 18, channels) and cropped.dtype == np.uint8
    for image, result in zip(images[:, :, left : left + 9], cropped, strict=True):
        for channel in range(channels):
            expected = Image.fromarray(image[:, :, channel]).resize((18, 18), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(result[:, :, channel], np.asarray(expected))


@pytest.mark.parametrize("transform", [RandomCrop(73), CentreCrop(73), ResizeShorterSide(73)])
def test_nothing_grows_more_than_eight_times(transform):
    images = some_images(height=9, width=4000)
    with pytest.raises(DataError, match="9 x 4000 pixels.*over 8 times for a side of 73"):
        transform(images, np.zeros((6, transform.draws)))
    smaller = type(transform)(72)
    assert min(smaller(images[:1], np.zeros((1, transform.draws))).shape[1:3]) == 72


def test_a_required_size_refuses_what_is_smaller_and_changes_nothing():
    images = some_images()
    np.testing.assert_array_equal(RequireSize(9)(images, np.zeros((6, 0))), images)
    with pytest.raises(DataError, match="9 x 11 pixels.*smaller than the crop of 10"):
        RequireSize(10)(images, np.zeros((6, 0)))


@pytest.mark.parametrize(
    ("shape", "resized"), [((40, 60), (20, 30)), ((60, 41), (29, 20)), ((20, 33), (20, 33)), ((10, 15), (20, 30))]
)
def test_the_shorter_side_is_resized_and_the_shape_kept(shape, resized):
    images = some_images(2, *shape)
    assert ResizeShorterSide(20)(images, np.zeros((2, 0))).shape == (2, *resized, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_shrinking_is_antialiased(channels):
    """Stripes narrower than a new pixel become their mean; without antialiasing they would come out as black or white."""
    stripes = np.zeros((1, 64, 64, channels), np.uint8)
    stripes[:, :, ::2] = 255
    inner = ResizeShorterSide(16)(stripes, np.zeros((1, 0)))[0, :, 1:-1].astype(int)
    assert abs(inner - 127.5).max() < 3


def test_flip_exchanges_left_and_right_below_one_half():
    images = some_images(2)
    flipped = RandomFlip()(images, np.array([[0.49], [0.5]]))
    np.testing.assert_array_equal(flipped[0], images[0, :, ::-1])
    np.testing.assert_array_equal(flipped[1], images[1])


def test_a_chain_gives_each_transform_its_own_numbers():
    images, uniform = some_images(), uniform_numbers(2, range(6), 3)
    expected = RandomFlip()(RandomCrop(8)(Pad(2)(images, uniform[:, :0]), uniform[:, :2]), uniform[:, 2:])
    chain = CASES["chain"]
    assert chain.draws == 3
    np.testing.assert_array_equal(chain(images, uniform), expected)


def test_training_pads_crops_and_flips_only_where_asked():
    assert training_transforms(pad=4, crop=28, flip=True) == (Pad(4), RandomCrop(28), RandomFlip())
    assert training_transforms(pad=0, crop=128, flip=False) == (RandomCrop(128),)


def test_evaluation_of_a_whole_image_is_the_identity_and_has_no_random_numbers():
    chain = Chain(evaluation_transforms(pad=4, crop=28))
    images = some_images(height=28, width=28, channels=1)
    assert chain.draws == 0
    np.testing.assert_array_equal(chain(images, np.zeros((6, 0))), images)


@pytest.mark.parametrize("crop", [5, 6, 9])
@pytest.mark.parametrize("pad", [1, 4])
def test_padding_does_not_move_the_centre(crop, pad):
    images = some_images()
    plain, padded = (Chain(evaluation_transforms(p, crop))(images, np.zeros((6, 0))) for p in (0, pad))
    np.testing.assert_array_equal(padded, plain)


def test_evaluation_pads_images_that_are_smaller_than_the_crop():
    images = some_images(height=9, width=9)
    seen = Chain(evaluation_transforms(pad=2, crop=11))(images, np.zeros((6, 0)))
    np.testing.assert_array_equal(seen[:, 1:-1, 1:-1], images)


@pytest.mark.parametrize("make", [lambda: Pad(-1), lambda: RandomCrop(0), lambda: CentreCrop(0)])
def test_sizes_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match="must be at least .* Received"):
        make()


def test_the_mixing_is_splitmix64():
    """First outputs of the generator seeded with 1234567, as Rosetta Code lists them."""
    state = np.array([1234567, 1234567 + 0x9E3779B97F4A7C15], np.uint64)
    assert _splitmix(state).tolist() == [6457827717110365317, 3203168211198807973]


def test_numbers_depend_on_seed_position_and_draw_alone():
    whole = uniform_numbers(7, range(100), 4)
    np.testing.assert_array_equal(uniform_numbers(7, [63], 4)[0], whole[63])
    np.testing.assert_array_equal(uniform_numbers(7, range(100), 2), whole[:, :2])
    np.testing.assert_array_equal(uniform_numbers(7, np.arange(100)[::-1], 4), whole[::-1])
    assert uniform_numbers(7, range(100), 0).shape == (100, 0)


def test_numbers_never_change_between_versions():
    """A resumed run must see the crops that it would have seen: new values here break every unfinished run."""
    assert (uniform_numbers(7, [12345, 2**40 + 255], 2) * 2**53).astype(np.uint64).tolist() == GOLDEN


def test_numbers_are_uniform_and_independent():
    numbers = np.concatenate([uniform_numbers(seed, range(4000), 3) for seed in (0, 1, 2**32 - 1)], axis=1)
    assert 0 <= numbers.min() and numbers.max() < 1
    assert len(np.unique(numbers)) == numbers.size
    histogram = np.histogram(numbers, bins=20, range=(0, 1))[0] / numbers.size * 20
    assert abs(histogram - 1).max() < 0.1, histogram
    neighbours = np.concatenate([numbers[:-1], numbers[1:]], axis=1)  # draws, seeds, and the next position
    correlation = np.corrcoef(neighbours, rowvar=False) - np.eye(18)
    assert abs(correlation).max() < 0.07, abs(correlation).max()
