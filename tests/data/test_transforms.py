import numpy as np
import pytest

from vgpt_jax.data.transforms import ImageTransform, crop, random_window, resize_short_side, to_uint8, to_value_range
from vgpt_jax.errors import UserError


def numbered(height, width):
    """A picture of which every pixel is different."""
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


@pytest.mark.parametrize(
    ("value_range", "expected"), [((0.0, 1.0), [0, 0.2, 1]), ((-1.0, 1.0), [-1, -0.6, 1]), ((0.5, 3.0), [0.5, 1, 3])]
)
def test_value_range_by_hand(value_range, expected):
    scaled = to_value_range(np.array([[[0, 51, 255]]], np.uint8), value_range)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, [[expected]], atol=1e-6)


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-2.5, 0.1)])
def test_to_uint8_inverts_the_value_range(value_range):
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    back = to_uint8(to_value_range(image, value_range), value_range)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, image)


def test_to_uint8_rounds_and_clips():
    values = np.array([-2.0, -1.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1, 1.0, 7.0], np.float32)
    np.testing.assert_array_equal(to_uint8(values, (-1.0, 1.0)), [0, 0, 100, 101, 255, 255])


def test_resize_leaves_the_right_size_alone():
    image = numbered(6, 9)
    np.testing.assert_array_equal(resize_short_side(image, 6), image)


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((10, 20), 5, (5, 10)), ((20, 10), 5, (10, 5)), ((4, 6), 8, (8, 12)), ((7, 10), 3, (3, 4)), ((3, 99), 1, (1, 33))],
)
def test_resize_keeps_the_shape_of_the_picture(shape, size, expected):
    assert resize_short_side(np.zeros((*shape, 3), np.uint8), size).shape == (*expected, 3)


def test_resize_keeps_flat_colours_exact():
    image = np.broadcast_to(np.array([7, 100, 250], np.uint8), (9, 13, 3))
    for size in (4, 17):
        resized = resize_short_side(image, size)
        np.testing.assert_array_equal(resized, np.broadcast_to(np.array([7, 100, 250]), resized.shape))


def test_halved_ramp_is_the_mean_of_neighbours():
    ramp = np.broadcast_to(np.arange(0, 240, 10, dtype=np.uint8)[None, :, None], (24, 24, 3))
    halved = resize_short_side(ramp, 12)[:, :, 0]
    # Pixel i covers 2i and 2i + 1: 20 i + 5. The border is left out, where the filter does not fit.
    np.testing.assert_array_equal(halved[:, 2:-2], np.broadcast_to(20 * np.arange(2, 10) + 5, (12, 8)))


def test_centre_crop_by_hand():
    image = numbered(5, 8)
    np.testing.assert_array_equal(crop(image, 2, None), image[1:3, 3:5])
    np.testing.assert_array_equal(crop(image, 5, None), image[:, 1:6])


def test_random_crop_reaches_every_position_and_no_other():
    image = numbered(4, 5)
    windows = {image[top : top + 3, left : left + 3].tobytes() for top in range(2) for left in range(3)}
    rng = np.random.default_rng(0)
    assert {crop(image, 3, rng).tobytes() for _ in range(200)} == windows


def test_random_crop_of_the_whole_picture():
    np.testing.assert_array_equal(crop(numbered(4, 4), 4, np.random.default_rng(0)), numbered(4, 4))


def test_evaluation_is_the_scaled_centre_crop():
    transform = ImageTransform(image_size=2, resize_size=4, crop="random", flip=True, value_range=(-1.0, 1.0))
    image = numbered(4, 6)
    expected = image[1:3, 2:4].astype(np.float32) / 127.5 - 1
    for _ in range(3):
        example = transform.evaluate({"image": image, "label": 3})
        assert example["image"].dtype == np.float32
        np.testing.assert_allclose(example["image"], expected, atol=1e-6)
        assert example["label"] == 3
        assert example["label"].dtype == np.int32


def test_training_flips_half_of_the_pictures():
    transform = ImageTransform(image_size=4, flip=True, value_range=(0.0, 255.0))
    image = numbered(4, 4)
    rng = np.random.default_rng(0)
    drawn = [transform.train({"image": image, "label": 1}, rng) for _ in range(200)]
    flipped = [np.array_equal(example["image"], image[:, ::-1]) for example in drawn]
    kept = [np.array_equal(example["image"], image) for example in drawn]
    assert all(f != k for f, k in zip(flipped, kept, strict=True))
    assert 70 < sum(flipped) < 130
    assert {int(example["label"]) for example in drawn} == {1}


def test_training_without_flip_and_random_crop_is_evaluation():
    transform = ImageTransform(image_size=3, resize_size=5, flip=False)
    example = {"image": numbered(5, 7), "label": 0}
    expected = transform.evaluate(example)["image"]
    for seed in range(10):
        np.testing.assert_array_equal(transform.train(example, np.random.default_rng(seed))["image"], expected)


def test_training_depends_on_the_generator_alone():
    transform = ImageTransform(image_size=3, resize_size=6, crop="random")
    example = {"image": numbered(6, 7), "label": 0}
    first, again = (transform.train(example, np.random.default_rng(5))["image"] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len({transform.train(example, np.random.default_rng(s))["image"].tobytes() for s in range(30)}) > 15


def test_random_windows_have_the_shares_and_shapes_asked_for():
    rng = np.random.default_rng(0)
    height, width, scale, ratio = 300, 400, (0.2, 0.6), (0.5, 2.0)
    windows = np.array([random_window(height, width, rng, scale, ratio) for _ in range(2000)])
    top, left, h, w = windows.T
    assert top.min() >= 0 and left.min() >= 0 and (top + h).max() <= height and (left + w).max() <= width
    share, shape = h * w / (height * width), w / h
    assert share.min() > 0.2 - 0.01 and share.max() < 0.6 + 0.01
    assert shape.min() > 0.5 - 0.01 and shape.max() < 2 + 0.02
    # Where the window fits whatever its shape (a share of a third at most), both are uniform: by their quartiles.
    rng = np.random.default_rng(1)
    _, _, h, w = np.array([random_window(1000, 1000, rng, (0.1, 0.3), ratio) for _ in range(4000)]).T
    np.testing.assert_allclose(np.quantile(h * w / 1e6, [0.25, 0.5, 0.75]), [0.15, 0.2, 0.25], atol=0.006)
    np.testing.assert_allclose(np.quantile(np.log2(w / h), [0.25, 0.5, 0.75]), [-0.5, 0.0, 0.5], atol=0.06)


def test_random_windows_reach_all_corners():
    rng = np.random.default_rng(0)
    windows = {random_window(3, 3, rng, (4 / 9, 4 / 9), (1.0, 1.0)) for _ in range(100)}
    assert windows == {(top, left, 2, 2) for top in range(2) for left in range(2)}


@pytest.mark.parametrize(
    ("size", "expected"),
    [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((9, 12), (0, 0, 9, 12)), ((9, 1), (4, 0, 1, 1))],
)
def test_a_window_that_never_fits_is_taken_from_the_centre(size, expected):
    """All of the area with a ratio of at most 4 / 3: fits into the last one alone, as a whole."""
    ratio = (4 / 3, 4 / 3) if size == (9, 12) else (3 / 4, 4 / 3)
    assert random_window(*size, np.random.default_rng(0), (1.0, 1.0), ratio) == expected


def test_random_resized_of_the_whole_picture_is_the_picture_resized():
    picture = np.broadcast_to(np.arange(0, 240, 10, dtype=np.uint8)[None, :, None], (24, 24, 3))
    transform = ImageTransform(
        image_size=12,
        crop="random_resized",
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        flip=False,
        value_range=(0.0, 255.0),
    )
    drawn = transform.train({"image": picture, "label": 1}, np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(drawn, resize_short_side(picture, 12))


def test_random_resized_stretches_a_window_of_the_picture_as_it_comes():
    """Without a resize before: one pixel of 24 becomes the whole crop, and evaluation is the centre crop as ever."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (24, 24, 3), np.uint8)
    share = 1 / 24**2
    transform = ImageTransform(
        image_size=4, crop="random_resized", crop_scale=(share, share), crop_ratio=(1.0, 1.0), value_range=(0.0, 255.0)
    )
    colours = {tuple(c) for c in picture.reshape(-1, 3).tolist()}
    for _ in range(20):
        drawn = transform.train({"image": picture, "label": 0}, rng)["image"]
        assert drawn.shape == (4, 4, 3)
        assert {tuple(c) for c in drawn.reshape(-1, 3).astype(int).tolist()} <= colours
        assert np.ptp(drawn, axis=(0, 1)).max() == 0
    np.testing.assert_array_equal(
        transform.evaluate({"image": picture, "label": 0})["image"], resize_short_side(picture, 4)
    )


def test_short_side_becomes_the_image_size_where_no_resize_is_given():
    example = {"image": np.full((10, 30, 3), 255, np.uint8), "label": 0}
    np.testing.assert_array_equal(ImageTransform(image_size=5).evaluate(example)["image"], np.ones((5, 5, 3)))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"image_size": 0}, "data.image_size is 0"),
        ({"image_size": 8, "resize_size": 4}, "data.resize_size is 4.*image_size = 8"),
        ({"image_size": 8, "crop": "left"}, "'left'.*center, random, random_resized"),
        ({"image_size": 8, "crop_scale": (0.0, 1.0)}, "first number of data.crop_scale is 0"),
        ({"image_size": 8, "crop_scale": (0.9, 0.8)}, "second number of data.crop_scale is 0.8"),
        ({"image_size": 8, "crop_scale": (0.9, 1.1)}, "second number of data.crop_scale is 1.1"),
        ({"image_size": 8, "crop_scale": (1.0,)}, "data.crop_scale"),
        ({"image_size": 8, "crop_ratio": (-1.0, 1.0)}, "first number of data.crop_ratio is -1"),
        ({"image_size": 8, "value_range": (1.0, 0.0)}, "data.value_range"),
        ({"image_size": 8, "value_range": (0.0, 0.0)}, "data.value_range"),
        ({"image_size": 8, "value_range": (0.0,)}, "data.value_range"),
    ],
)
def test_arguments_out_of_range_are_refused(options, field):
    with pytest.raises(UserError, match=field):
        ImageTransform(**options)
