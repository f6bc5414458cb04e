"""Both sides draw from the same networks: the same tokens give the same picture and score; both write a GIF of all patches."""

import argparse

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("imageio")

from vgpt_jax.benchmarks import end_to_end  # noqa: E402
from vgpt_jax.models.gpt import SIZES  # noqa: E402


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gifs")
    arguments = argparse.Namespace(candidates=3, size="tiny", image_size=32, ch=32, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", {"d_model": 32, "num_layers": 1, "num_heads": 2})
        ours = end_to_end.Ours(arguments, folder / "ours.gif")
        return ours, end_to_end.Theirs(ours, arguments, folder / "theirs.gif")


def test_the_same_tokens_give_the_same_picture_and_score(both):
    of_images, of_scores = end_to_end.check(*both)
    assert of_images < 1e-4
    assert of_scores < 1e-5


def test_both_write_a_gif_that_ends_with_a_whole_picture(both):
    for side in both:
        drawing, writing = side(seed=1)
        assert drawing > 0 and writing > 0
        with Image.open(side.path) as gif:
            assert gif.size[0] >= 32
            assert gif.n_frames > 200  # of 256: equal ones may be one
            gif.seek(gif.n_frames - 1)
            last = np.asarray(gif.convert("RGB"))
        assert (last[..., 0] != 255).mean() > 0.5
