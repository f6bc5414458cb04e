import numpy as np
import pytest
from PIL import Image

from vgpt_jax.visualization.gif import frame_counts, patch_reveal, save_gif


def read_gif(path):
    frames, durations = [], []
    with Image.open(path) as picture:
        for i in range(picture.n_frames):
            picture.seek(i)
            frames.append(np.asarray(picture.convert("RGB")))
            durations.append(picture.info["duration"])
        return np.stack(frames), durations, picture.info.get("loop")


@pytest.fixture
def few_colours():
    """Patches of clear colours, on which a palette loses nothing, and their uncovering in five frames."""
    rng = np.random.default_rng(0)
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0], [255, 255, 0]], np.uint8)
    pictures = colours[rng.integers(0, 5, (1, 8, 8))]
    return patch_reveal(pictures, (2, 4), np.array([1, 2, 4, 6, 8]))[:, 0]


def test_patches_are_uncovered_in_raster_order():
    images = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    frames = patch_reveal(images, (2, 3), np.array([0, 1, 4, 6]))
    assert frames.shape == (4, 2, 4, 6, 3)
    assert frames.dtype == np.uint8
    expected = np.full_like(frames, 255)
    expected[1, :, :2, :2] = images[:, :2, :2]
    expected[2, :, :2] = images[:, :2]
    expected[2, :, 2:, :2] = images[:, 2:, :2]
    expected[3] = images
    np.testing.assert_array_equal(frames, expected)


def test_frame_counts_by_hand():
    np.testing.assert_array_equal(frame_counts(4, 10), [1, 2, 3, 4])
    np.testing.assert_array_equal(frame_counts(64, 4), [16, 32, 48, 64])
    np.testing.assert_array_equal(frame_counts(7, 1), [7])


@pytest.mark.parametrize(("tokens", "most"), [(36, 10), (256, 48), (5, 4), (1024, 64)])
def test_frame_counts_rise_evenly_to_the_end(tokens, most):
    counts = frame_counts(tokens, most)
    assert len(counts) == most
    assert counts[-1] == tokens
    steps = np.diff(counts, prepend=0)
    assert steps.min() >= 1
    assert steps.max() - steps.min() <= 1


def test_animation_has_its_frames_and_runs_endlessly(few_colours, tmp_path):
    save_gif(few_colours, tmp_path / "new" / "a.gif")
    frames, _, loop = read_gif(tmp_path / "new" / "a.gif")
    np.testing.assert_array_equal(frames, few_colours)
    assert loop == 0


def test_durations(few_colours, tmp_path):
    save_gif(few_colours, tmp_path / "a.gif", seconds=2.0, hold_seconds=1.5)
    _, durations, _ = read_gif(tmp_path / "a.gif")
    assert len(set(durations[:-1])) == 1
    assert sum(durations[:-1]) == 2000  # from the first frame to the last
    assert durations[-1] == 1500


def test_no_frame_is_shorter_than_viewers_show(few_colours, tmp_path):
    save_gif(few_colours, tmp_path / "a.gif", seconds=0.01)
    _, durations, _ = read_gif(tmp_path / "a.gif")
    assert min(durations) == 20


def test_equal_frames_keep_their_time(few_colours, tmp_path):
    save_gif(few_colours, tmp_path / "moving.gif", seconds=2.0, hold_seconds=1.0)
    standing = few_colours.copy()
    standing[1] = standing[2]
    save_gif(standing, tmp_path / "standing.gif", seconds=2.0, hold_seconds=1.0)
    assert sum(read_gif(tmp_path / "standing.gif")[1]) == sum(read_gif(tmp_path / "moving.gif")[1])


def test_one_frame(few_colours, tmp_path):
    save_gif(few_colours[-1:], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as picture:
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), few_colours[-1])


def test_last_frame_is_the_picture_up_to_its_palette(tmp_path):
    y, x = np.mgrid[:32, :32]
    picture = np.stack([x * 8, y * 8, 255 - x * 4 - y * 4], axis=-1).astype(np.uint8)  # 1024 colours
    save_gif(patch_reveal(picture[None], (4, 4), frame_counts(16, 16))[:, 0], tmp_path / "a.gif")
    frames, _, _ = read_gif(tmp_path / "a.gif")
    assert len(frames) == 16
    difference = np.abs(frames[-1].astype(int) - picture)
    assert difference.mean() < 6
    assert difference.max() < 32
    np.testing.assert_array_equal(frames[0][8:], 255)
