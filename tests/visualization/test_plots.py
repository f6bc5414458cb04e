import matplotlib
import numpy as np
import pytest
from PIL import Image

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402 - after the choice of a backend that needs no screen

from vgpt_jax.visualization.plots import plot_curves  # noqa: E402


def pixels(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.fixture(autouse=True)
def no_figure_is_left_open():
    yield
    assert plt.get_fignums() == []


def test_plot_is_written_with_its_curve(tmp_path):
    plot_curves({"loss": {"training": [(0, 2.0), (10, 1.0), (20, 0.5)]}}, tmp_path / "new" / "plot.png")
    image = pixels(tmp_path / "new" / "plot.png")
    blue = (image[..., 2] - image[..., 0] > 80) & (image[..., 2] > 150)  # the first colour of the cycle
    assert blue.sum() > 50


def test_lines_of_a_panel_have_their_own_colours(tmp_path):
    curve = [(0, 2.0), (10, 1.0)]
    plot_curves({"loss": {"training": curve, "held-out": [(0, 3.0), (10, 2.5)]}}, tmp_path / "plot.png")
    image = pixels(tmp_path / "plot.png")
    orange = (image[..., 0] - image[..., 2] > 150) & (image[..., 1] > 80) & (image[..., 1] < 180)
    assert orange.sum() > 50


def test_empty_series_and_panels_are_left_out(tmp_path):
    curve = [(0, 2.0), (10, 1.0)]
    plot_curves({"loss": {"training": curve}}, tmp_path / "bare.png")
    plot_curves({"psnr": {"held-out": []}, "loss": {"training": curve, "held-out": []}}, tmp_path / "with_empty.png")
    np.testing.assert_array_equal(pixels(tmp_path / "bare.png"), pixels(tmp_path / "with_empty.png"))


@pytest.mark.parametrize("panels", [{}, {"loss": {}}, {"loss": {"training": []}}])
def test_nothing_is_written_where_there_is_nothing_to_draw(tmp_path, panels):
    plot_curves(panels, tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []


def test_four_panels_stand_in_two_rows(tmp_path):
    curve = [(0, 2.0), (10, 1.0)]
    plot_curves({"a": {"x": curve}}, tmp_path / "one.png")
    plot_curves({name: {"x": curve} for name in "abcd"}, tmp_path / "four.png")
    one, four = pixels(tmp_path / "one.png"), pixels(tmp_path / "four.png")
    assert four.shape == (2 * one.shape[0], 3 * one.shape[1], 3)
    lower_right = four[one.shape[0] + 8 :, one.shape[1] + 8 :]
    assert (lower_right == 255).all()  # places without a panel stay empty
