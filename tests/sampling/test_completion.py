"""Completing a picture: what a part or a mask keeps, and that it stays while the rest is drawn."""

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from vgpt_jax.errors import UserError
from vgpt_jax.models.gpt import GPT
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.sampling.completion import Completion, keep, read_completion
from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT

TOP = np.arange(16).reshape(4, 4) < 8
LEFT = TOP.T
ANY = (np.arange(16).reshape(4, 4) % 5 == 2) | (np.arange(16).reshape(4, 4) == 0)


def save(pixels: np.ndarray, path) -> str:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("part", "grid", "expected"),
    [
        ("top", (4, 4), [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]),
        ("left", (4, 4), [[1, 1, 0, 0]] * 4),
        ("top", (3, 3), [[1, 1, 1], [0, 0, 0], [0, 0, 0]]),
        ("left", (3, 2), [[1, 0]] * 3),
    ],
)
def test_halves(part, grid, expected):
    np.testing.assert_array_equal(keep(part, grid), np.array(expected, bool))


def test_a_place_with_one_black_pixel_is_drawn(tmp_path):
    mask = np.full((12, 12, 3), 255)
    mask[5, 11] = 0  # row 1, the last column of a grid of four
    mask[8, 0] = 127  # less than half is black
    mask[0, 0] = 128
    expected = np.ones((4, 4), bool)
    expected[1, 3] = expected[2, 0] = False
    np.testing.assert_array_equal(keep(save(mask, tmp_path / "mask.png"), (4, 4)), expected)


def test_of_a_mask_that_is_not_square_the_middle_counts(tmp_path):
    mask = np.zeros((8, 14, 3))
    mask[:4, 3:11] = 255  # the upper half of the middle square, columns 3 to 10
    mask[4:, :3] = mask[4:, 11:] = 255  # beyond it
    np.testing.assert_array_equal(keep(save(mask, tmp_path / "wide.png"), (4, 4)), TOP)
    high = np.transpose(mask, (1, 0, 2))
    np.testing.assert_array_equal(keep(save(high, tmp_path / "high.png"), (4, 4)), LEFT)


def test_a_mask_whose_sides_are_no_multiple_of_the_grid_is_cut_as_evenly_as_can_be(tmp_path):
    for row in range(7):
        mask = np.full((7, 7, 3), 255)
        mask[row] = 0
        kept = keep(save(mask, tmp_path / "mask.png"), (4, 4))
        np.testing.assert_array_equal(~kept[:, 0], np.arange(4) == row * 4 // 7)


@pytest.mark.parametrize(
    ("pixels", "named"),
    [
        (np.full((8, 8, 3), 255), "keeps all"),
        (np.zeros((8, 8, 3)), "keeps nothing"),
        (np.full((3, 20, 3), 255), "is 3 pixels wide or high, less than the 4 places"),
    ],
)
def test_masks_that_mean_nothing_are_refused(tmp_path, pixels, named):
    with pytest.raises(UserError, match=named):
        keep(save(pixels, tmp_path / "mask.png"), (4, 4))


def test_what_cannot_be_read_is_one_clear_error(tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    picture = save(np.zeros((8, 8, 3)), tmp_path / "picture.png")
    for path, part in (("none.png", "top"), ("no.png", "top"), (picture, "middle"), (picture, "no.png")):
        with pytest.raises(UserError, match="cannot be read as a picture"):
            read_completion(tmp_path / path, str(tmp_path / part) if part.endswith("png") else part, 16, (4, 4))
    with pytest.raises(UserError, match="keeps nothing"):
        read_completion(picture, "top", 16, (1, 1))


def test_a_picture_is_read_as_the_tokenizer_sees_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3))
    completion = read_completion(save(pixels, tmp_path / "wide.png"), "left", 16, (4, 4))
    np.testing.assert_allclose(completion.image, pixels[:, 4:20] / 255, atol=1e-6)
    assert completion.image.dtype == np.float32
    np.testing.assert_array_equal(completion.kept, LEFT)
    large = read_completion(save(np.full((50, 40, 3), 51), tmp_path / "large.png"), "top", 16, (4, 4))
    np.testing.assert_allclose(large.image, np.full((16, 16, 3), 0.2), atol=1e-6)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(5).random((16, 16, 3), np.float32)


@pytest.mark.parametrize(
    ("toy", "kept", "options"),
    [
        ("raster_toy", TOP, {}),
        ("raster_toy", ANY, {}),
        ("random_toy", LEFT, {"guidance": 2.0}),
        ("random_toy", ANY, {"num_steps": 3}),
    ],
)
def test_what_is_kept_stays_and_the_rest_is_drawn(request, picture, kept, toy, options):
    model = request.getfixturevalue(toy)
    given = np.asarray(model.tokenizer.encode(picture[None] * 2 - 1))[0]  # the value range is -1..1
    one, two = (
        model.sample([0, 1], num=2, completion=Completion(picture, kept), seed=seed, **options) for seed in (0, 1)
    )
    for samples in (one, two):
        np.testing.assert_array_equal(samples.token_ids[:, kept], np.tile(given[kept], (4, 1)))
        np.testing.assert_allclose(
            samples.images, np.clip(model.tokenizer.decode(samples.token_ids), -1, 1) / 2 + 0.5, atol=1e-5
        )
        for order in samples.orders:  # a permutation, what is kept first and in raster order
            np.testing.assert_array_equal(np.sort(order), np.arange(16))
            np.testing.assert_array_equal(order[: kept.sum()], np.flatnonzero(kept))
    drawn = one.token_ids[:, ~kept]
    assert (drawn != two.token_ids[:, ~kept]).any(axis=1).all()
    assert (drawn[0] != drawn[1]).any() and (drawn != given[~kept]).any(axis=1).all()
    if "num_steps" not in options:
        np.testing.assert_array_equal(one.orders[0][kept.sum() :], np.flatnonzero(~kept))


def test_only_in_random_order_does_what_is_drawn_see_what_is_kept_below_it(raster_toy, random_toy, picture):
    """Two pictures that differ only in the lower half, of which a part is kept."""
    bottom, other = ~TOP, picture.copy()
    other[8:] = 1 - other[8:]
    for model, depends in ((raster_toy, False), (random_toy, True)):
        one, two = (
            model.sample([0, 1], num=2, completion=Completion(image, bottom)).token_ids for image in (picture, other)
        )
        assert (one[:, bottom] != two[:, bottom]).any()
        assert (one[:, TOP] != two[:, TOP]).any() == depends


def test_more_steps_than_are_left_are_as_many_as_are_left(random_toy, picture):
    samples = [random_toy.sample([2], num=2, completion=Completion(picture, TOP), num_steps=steps) for steps in (8, 16)]
    np.testing.assert_array_equal(samples[0].token_ids, samples[1].token_ids)


def test_pictures_and_grids_of_another_size_are_refused(raster_toy, picture):
    for image, kept in ((picture[:8], TOP), (picture, TOP[:2]), (picture[..., :1], TOP)):
        with pytest.raises(UserError, match="but the tokenizer's are"):
            raster_toy.sample([0], completion=Completion(image, kept))


@pytest.fixture
def composed(random_module):
    """Makes a `CondVisualGPT` whose quantizer gives more than one token a place, of 2x2 places."""

    def make(quantizer: str, **arguments) -> CondVisualGPT:
        sizes = {"ch": 8, "z_channels": 4, "num_downsamplings": 3, "num_res_blocks": 1, "res_channels": 4}
        of_tokenizer = {
            "image_size": 16,
            "architecture": "vqvae",
            "architecture_args": sizes,
            "quantizer": quantizer,
            "quantizer_args": {"quantizer": "fsq", "quantizer_args": {"levels": [4, 8]}} | arguments,
        }
        tokenizer = random_module(lambda: Tokenizer(**of_tokenizer, rngs=nnx.Rngs(0)), 1.0)
        of_gpt = {"num_codes": tokenizer.num_codes, "num_tokens": tokenizer.num_tokens, "num_classes": 2}
        of_gpt |= {"d_model": 8, "num_layers": 1, "num_heads": 1}
        gpt = random_module(lambda: GPT(**of_gpt, rngs=nnx.Rngs(0)), 1.0)
        return CondVisualGPT(tokenizer, gpt, class_names=("a", "b"), value_range=(0.0, 1.0))

    return make


def test_with_several_tokens_a_place_all_of_a_place_are_kept(composed, picture):
    model = composed("grouped_quantize", num_groups=3)
    kept = np.array([[True, False], [False, True]])
    samples = model.sample([0], num=2, completion=Completion(picture, kept))
    given = np.asarray(jax.jit(model.tokenizer.encode)(picture[None]))[0]
    assert samples.token_ids.shape == (2, 2, 2, 3)
    np.testing.assert_array_equal(samples.token_ids[:, kept], np.tile(given[kept], (2, 1, 1)))
    np.testing.assert_array_equal(samples.orders[0], [0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8])
    assert (samples.token_ids[0, ~kept] != samples.token_ids[1, ~kept]).any()


def test_where_tokens_have_no_place_nothing_can_be_kept(composed, picture):
    model = composed("multi_scale_quantize", scales=[1, 2], num_phi=1)
    with pytest.raises(UserError, match=r"has tokens of shape \(5,\)"):
        model.sample([0], completion=Completion(picture, np.array([[True, False], [False, True]])))
