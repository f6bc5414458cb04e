import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quick_compile import jit
from vgpt_jax import UserError
from vgpt_jax.training.diff_augment import color, cutout, diff_augment, translation
from vgpt_jax.training.sharding import make_mesh, shard_batch

COLOR, TRANSLATION, CUTOUT = jit(color), jit(translation), jit(cutout)
AUGMENT = jit(diff_augment, static_argnums=(2, 3))
ALL = ("color", "translation", "cutout")
RANGE = (-1.0, 1.0)


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1.0, 1.0, shape).astype(np.float32)


def drawn(batch, count):
    return np.random.default_rng(1).uniform(size=(batch, count)).astype(np.float32)


# Each augmentation on given draws


def test_color_by_numpy():
    x, uniforms = pictures(3, 6, 5, 3), drawn(3, 3)
    for image, result, (brightness, saturation, contrast) in zip(x, COLOR(uniforms, x), uniforms, strict=True):
        expected = image + (brightness - 0.5)
        expected = (expected - expected.mean(-1, keepdims=True)) * 2 * saturation + expected.mean(-1, keepdims=True)
        expected = (expected - expected.mean()) * (contrast + 0.5) + expected.mean()
        np.testing.assert_allclose(result, expected, atol=1e-6)


def test_color_of_neutral_draws_changes_nothing():
    x = pictures(2, 4, 4, 3)
    np.testing.assert_allclose(COLOR(np.full((2, 3), 0.5, np.float32), x), x, atol=1e-6)


def shifted(image, down, right):
    result = np.zeros_like(image)
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            if 0 <= row - down < image.shape[0] and 0 <= column - right < image.shape[1]:
                result[row, column] = image[row - down, column - right]
    return result


def test_translation_by_every_shift():
    # 12 rows and 20 columns: an eighth, half rounded up, is 2 and 3 pixels.
    shifts = [(down, right) for down in range(-2, 3) for right in range(-3, 4)]
    uniforms = np.array([((down + 2.5) / 5, (right + 3.5) / 7) for down, right in shifts], np.float32)
    x = pictures(len(shifts), 12, 20, 3)
    expected = [shifted(image, *shift) for image, shift in zip(x, shifts, strict=True)]
    np.testing.assert_array_equal(TRANSLATION(uniforms, x), expected)


def test_the_ends_of_the_draws_are_the_greatest_shifts():
    last = np.nextafter(np.float32(1), np.float32(0))
    x = pictures(2, 12, 20, 3)
    result = TRANSLATION(np.array([(0, 0), (last, last)], np.float32), x)
    np.testing.assert_array_equal(result, [shifted(x[0], -2, -3), shifted(x[1], 2, 3)])


@pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=str)  # sides of even and of odd length are cut out
def test_cutout_by_every_place(size):
    lengths = [int(s / 2 + 0.5) for s in size]
    counts = [s + 1 - length % 2 for s, length in zip(size, lengths, strict=True)]
    centres = [(row, column) for row in range(counts[0]) for column in range(counts[1])]
    uniforms = np.array([((r + 0.5) / counts[0], (c + 0.5) / counts[1]) for r, c in centres], np.float32)
    x = 2.0 + pictures(len(centres), *size, 3)
    expected = x.copy()
    for image, centre in zip(expected, centres, strict=True):
        # The published way: indices of the rectangle, clipped to the image.
        rows, columns = (
            np.clip(np.arange(length) + at - length // 2, 0, side - 1)
            for length, at, side in zip(lengths, centre, size, strict=True)
        )
        image[np.ix_(rows, columns)] = 0.0
    np.testing.assert_array_equal(CUTOUT(uniforms, x), expected)


# The whole


def test_the_whole_is_its_parts_on_the_draws_of_the_key():
    key, x = jax.random.key(3), pictures(4, 8, 8, 3)
    uniforms = np.asarray(jax.random.uniform(key, (4, 7)))
    expected = CUTOUT(uniforms[:, 5:], TRANSLATION(uniforms[:, 3:5], COLOR(uniforms[:, :3], x)))
    np.testing.assert_allclose(AUGMENT(key, x, ALL, RANGE), expected, atol=1e-6)
    expected = TRANSLATION(uniforms[:, 3:5], CUTOUT(uniforms[:, 5:], x))
    np.testing.assert_array_equal(AUGMENT(key, x, ("cutout", "translation"), RANGE), expected)


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (0, 255)])
def test_it_is_the_same_in_every_value_range(value_range):
    low, high = value_range
    key, x = jax.random.key(0), pictures(4, 8, 8, 3)
    expected = low + (np.asarray(AUGMENT(key, x, ALL, RANGE)) + 1) / 2 * (high - low)
    result = AUGMENT(key, low + (x + 1) / 2 * (high - low), ALL, value_range)
    np.testing.assert_allclose(result, expected, atol=1e-5 * (high - low))


def test_the_key_decides():
    x = np.broadcast_to(pictures(1, 8, 8, 3), (6, 8, 8, 3))
    first, again, other = (np.asarray(AUGMENT(jax.random.key(seed), x, ALL, RANGE)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max(axis=(1, 2, 3)).min() > 0.1
    distances = np.abs(first[:, None] - first[None]).max(axis=(2, 3, 4))
    assert (distances + np.eye(6) > 0.1).all()  # equal images of one batch come out different


def test_neither_devices_nor_the_batch_size_change_an_example():
    key, x = jax.random.key(5), pictures(8, 8, 8, 3)
    expected = AUGMENT(key, x, ALL, RANGE)
    sharded = shard_batch(make_mesh(), {"image": x})["image"]
    np.testing.assert_allclose(AUGMENT(key, sharded, ALL, RANGE), expected, atol=1e-6)
    np.testing.assert_allclose(AUGMENT(key, x[:3], ALL, RANGE), expected[:3], atol=1e-6)


def test_gradients_are_those_of_an_affine_map():
    # All three are affine in the image on given draws, so a finite difference is exact.
    key, x, direction, cotangent = (
        jax.random.key(7), pictures(3, 8, 8, 3), pictures(3, 8, 8, 3, seed=1), pictures(3, 8, 8, 3, seed=2),
    )  # fmt: skip

    def projected(x):
        return jnp.sum(cotangent * diff_augment(key, x, ALL, (0.0, 1.0)))

    value_and_grad = jit(jax.value_and_grad(projected))
    value, gradient = value_and_grad(x)
    moved, gradient_there = value_and_grad(x + direction)
    np.testing.assert_allclose(gradient, gradient_there, atol=1e-6)
    np.testing.assert_allclose(moved - value, np.vdot(gradient, direction), rtol=1e-4)
    assert (np.abs(gradient).max(axis=(1, 2, 3)) > 0.01).all()


def test_no_gradient_reaches_what_is_cut_out():
    x, uniforms = pictures(1, 8, 8, 3), np.full((1, 2), 0.5, np.float32)
    gradient = jit(jax.grad(lambda x: jnp.sum(cutout(uniforms, x))))(x)
    expected = np.ones((1, 8, 8, 3))
    expected[:, 2:6, 2:6] = 0
    np.testing.assert_array_equal(gradient, expected)


def test_bfloat16_is_computed_on_in_float32():
    x = jnp.asarray(pictures(2, 8, 8, 3), jnp.bfloat16)
    result = AUGMENT(jax.random.key(0), x, ALL, RANGE)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, AUGMENT(jax.random.key(0), x.astype(jnp.float32), ALL, RANGE), atol=1e-6)


def test_what_a_caller_can_get_wrong():
    x = pictures(1, 8, 8, 3)
    with pytest.raises(UserError, match="'colour', but must be one of color, cutout, translation"):
        diff_augment(jax.random.key(0), x, ("cutout", "colour"), RANGE)
    with pytest.raises(UserError, match="value_range is 0"):
        diff_augment(jax.random.key(0), x, ALL, (1, 0))
