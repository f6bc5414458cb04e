import numpy as np
import pytest

from vgpt_jax.data.transforms import ImageTransform, resize_short_side
from vgpt_jax.data.views import CacheViews
from vgpt_jax.errors import UserError

PICTURE = {"image": np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8), "label": 2}


def transform(**options):
    return ImageTransform(**{"image_size": 4, "resize_size": 6, "value_range": (0.0, 255.0)} | options)


def test_none_and_flip_are_the_centre_crop():
    centre = PICTURE["image"][1:5, 2:6]
    none, flip = CacheViews("none", transform()), CacheViews("flip", transform())
    assert (none.num, flip.num) == (1, 2)
    np.testing.assert_array_equal(none(PICTURE, 0), [centre])
    np.testing.assert_array_equal(flip(PICTURE, 5), [centre, centre[:, ::-1]])
    assert flip(PICTURE, 0).dtype == np.float32
    np.testing.assert_array_equal(none(PICTURE, 0)[0], transform().evaluate(PICTURE)["image"])


def test_ten_crops_are_the_centre_and_the_corners_and_all_of_them_flipped():
    image = PICTURE["image"]
    crops = np.stack([image[1:5, 2:6], image[:4, :4], image[:4, 5:], image[2:, :4], image[2:, 5:]])
    ten = CacheViews("ten_crop", transform())
    assert ten.num == 10
    np.testing.assert_array_equal(ten(PICTURE, 0), np.concatenate([crops, crops[:, :, ::-1]]))


def test_crops_are_of_the_resized_picture():
    large = {"image": np.random.default_rng(1).integers(0, 256, (20, 24, 3), np.uint8), "label": 0}
    resized = resize_short_side(large["image"], 6)
    np.testing.assert_array_equal(CacheViews("ten_crop", transform())(large, 0)[4], resized[2:, -4:])


def test_nothing_is_flipped_where_training_does_not_flip():
    flip, ten = (CacheViews(name, transform(flip=False)) for name in ("flip", "ten_crop"))
    assert (flip.num, ten.num) == (1, 5)
    assert len(flip(PICTURE, 0)) == 1
    np.testing.assert_array_equal(ten(PICTURE, 0), CacheViews("ten_crop", transform())(PICTURE, 0)[:5])


def test_random_views_are_draws_of_training_that_stay_the_same():
    random = transform(crop="random")
    views = CacheViews("random", random, num_random=6, seed=3)
    assert views.num == 6
    np.testing.assert_array_equal(views(PICTURE, 7), views(PICTURE, 7))
    rng = np.random.default_rng([3, 7])
    np.testing.assert_array_equal(views(PICTURE, 7), [random.train(PICTURE, rng)["image"] for _ in range(6)])
    assert not np.array_equal(views(PICTURE, 7), views(PICTURE, 8))
    assert not np.array_equal(views(PICTURE, 7), CacheViews("random", random, num_random=6, seed=4)(PICTURE, 7))


def test_settings_differ_where_the_views_do_and_the_crop_of_training_counts_for_random_ones_alone():
    def settings(name, **options):
        return CacheViews(name, transform(**options)).settings

    for name in ("none", "flip", "ten_crop"):
        assert settings(name) == settings(name, crop="random")
    assert settings("random") != settings("random", crop="random")
    different = [settings("flip"), settings("none"), settings("flip", resize_size=7), settings("flip", flip=False)]
    assert len({repr(s) for s in different}) == 4


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("twelve_crop", {}, "data.cache_views is 'twelve_crop'.*flip, none, random, ten_crop"),
        ("ten_crop", {"resize_size": 0}, "data.resize_size leaves no room"),
    ],
)
def test_views_that_cannot_be_are_refused(name, options, said):
    with pytest.raises(UserError, match=said):
        CacheViews(name, transform(**options))


def test_no_random_views_are_refused():
    with pytest.raises(UserError, match="data.cache_random_views is 0"):
        CacheViews("random", transform(), num_random=0)
