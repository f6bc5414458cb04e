import numpy as np
import pytest
from PIL import Image

from vgpt_jax.visualization.grid import enlarge, make_grid, pairs_grid, save_png, scale_for


def flat(*values, height=2, width=3):
    """Pictures of one grey each."""
    return np.stack([np.full((height, width, 3), value, np.uint8) for value in values])


def test_enlarge_repeats_pixels():
    image = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    enlarged = enlarge(image, 3)
    assert enlarged.shape == (1, 6, 6, 3)
    for row in range(6):
        for column in range(6):
            np.testing.assert_array_equal(enlarged[0, row, column], image[0, row // 3, column // 3])
    np.testing.assert_array_equal(enlarge(image, 1), image)


def test_scale_is_whole_and_at_least_one():
    assert [scale_for(size) for size in (32, 64, 100, 128, 1000)] == [4, 2, 1, 1, 1]
    assert scale_for(10, target=48) == 5


def test_grid_by_hand():
    expected = np.full((7, 9, 3), 255, np.uint8)  # one pixel around two rows of two and three columns of three
    expected[1:3, 1:4], expected[1:3, 5:8], expected[4:6, 1:4] = 10, 20, 30
    np.testing.assert_array_equal(make_grid(flat(10, 20, 30), 2, padding=1), expected)


def test_grid_without_padding_is_a_concatenation():
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 3), np.uint8)
    rows = [np.concatenate(list(images[i : i + 2]), axis=1) for i in (0, 2)]
    np.testing.assert_array_equal(make_grid(images, 2, padding=0), np.concatenate(rows))


def test_row_names_stand_left_of_their_rows():
    images = flat(100, 100, 100, 100, height=20, width=20)
    bare = make_grid(images, 2, padding=2)
    with_names = make_grid(images, 2, padding=2, row_names=("", "second"))
    margin = with_names.shape[1] - bare.shape[1]
    assert margin > 0
    np.testing.assert_array_equal(with_names[:, margin:], bare)
    first, second = with_names[:23, :margin], with_names[23:, :margin]
    assert (first == 255).all()
    assert second.min() < 100


def test_long_row_name_is_not_cut():
    grid = make_grid(flat(0, height=20, width=20), 1, row_names=("a name much wider than a picture",))
    dark = np.flatnonzero((grid[:, : grid.shape[1] - 28] < 128).any(axis=(0, 2)))
    assert dark[0] > 0
    assert dark[-1] < grid.shape[1] - 29


def test_pairs_stand_one_over_the_other():
    grid = pairs_grid(flat(1, 2, 3), flat(101, 102, 103), 2, padding=0)
    expected = np.array([[1, 2], [101, 102], [3, 255], [103, 255]], np.uint8).repeat(2, axis=0).repeat(3, axis=1)
    np.testing.assert_array_equal(grid, expected[:, :, None].repeat(3, axis=2))


def test_pairs_fewer_than_columns():
    grid = pairs_grid(flat(1), flat(101), 3, padding=0)
    np.testing.assert_array_equal(grid[::2, ::3, 0], [[1, 255, 255], [101, 255, 255]])


@pytest.mark.parametrize("name", ["grid.png", "new/folder/grid.png"])
def test_png_is_written_exactly(tmp_path, name):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    save_png(image, tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture), image)
