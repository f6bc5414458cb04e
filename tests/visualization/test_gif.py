import struct

import numpy as np
import pytest
from PIL import Image
from skimage import data

from vgpt_jax.errors import UserError
from vgpt_jax.visualization.gif import frame_counts, patch_reveal, save_gif

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0], [255, 255, 0]], np.uint8)


def read_gif(path):
    frames, durations = [], []
    with Image.open(path) as picture:
        for i in range(picture.n_frames):
            picture.seek(i)
            frames.append(np.asarray(picture.convert("RGB")))
            durations.append(picture.info["duration"])
        return np.stack(frames), durations, picture.info.get("loop")


def read_blocks(path):
    """The global palette ``[256, 3]``, and for each stored frame its rectangle and the fields of its control block."""
    content = path.read_bytes()
    assert content[:6] == b"GIF89a"
    assert content[10] & 0b10000111 == 0b10000111  # a global palette of 256
    palette = np.frombuffer(content[13 : 13 + 768], np.uint8).reshape(256, 3)
    at, frames, control = 13 + 768, [], None
    while content[at : at + 1] != b";":
        if content[at : at + 2] == b"!\xf9":
            flags, hundredths, transparent = struct.unpack("<BHB", content[at + 3 : at + 7])
            control = {"disposal": flags >> 2 & 7, "hundredths": hundredths}
            assert not flags & 1 or transparent == 255
        if content[at : at + 1] == b"!":
            at += 2
        else:
            assert content[at : at + 1] == b","
            left, top, width, height, local = struct.unpack("<HHHHB", content[at + 1 : at + 10])
            assert local == 0  # neither a palette of its own nor interlaced
            frames.append({"box": (left, top, width, height), **control})
            at += 11
        while content[at]:
            at += 1 + content[at]
        at += 1
    assert at == len(content) - 1
    return palette, frames


def save(frames, path, **options):
    save_gif(iter(frames), path, palette_from=frames[-1], num_frames=len(frames), **options)


@pytest.fixture
def few_colours():
    """Patches of clear colours, on which a palette loses nothing, and their uncovering in five frames."""
    pictures = COLOURS[np.random.default_rng(0).integers(0, 5, (1, 8, 8))]
    return np.stack(list(patch_reveal(pictures, (2, 4), np.arange(8)[None], np.array([1, 2, 4, 6, 8]))))[:, 0]


@pytest.fixture(scope="module")
def photo():
    return np.ascontiguousarray(data.astronaut()[:96, 160:288])


def test_patches_are_uncovered_in_raster_order():
    images = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    frames = np.stack(list(patch_reveal(images, (2, 3), np.arange(6)[None], np.array([0, 1, 4, 6]))))
    assert frames.shape == (4, 2, 4, 6, 3)
    assert frames.dtype == np.uint8
    expected = np.full_like(frames, 255)
    expected[1, :, :2, :2] = images[:, :2, :2]
    expected[2, :, :2] = images[:, :2]
    expected[2, :, 2:, :2] = images[:, 2:, :2]
    expected[3] = images
    np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize("orders", [1, 3])
@pytest.mark.parametrize("counts", [[0, 1, 2, 9, 15], [3, 3, 15], [15, 4, 0, 5]])
def test_patches_are_uncovered_in_any_order(orders, counts):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 255, (3, 15, 6, 3), dtype=np.uint8).transpose(0, 2, 1, 3)  # [3, 6, 15, 3], not contiguous
    order = np.stack([rng.permutation(15) for _ in range(orders)])
    frames = list(patch_reveal(images, (3, 5), order, np.array(counts)))
    assert len(frames) == len(counts)
    for frame, count in zip(frames, counts, strict=True):
        expected = np.full_like(frame, 255)
        for m in range(3):
            for position in order[m % orders][:count]:
                y, x = 2 * (position // 5), 3 * (position % 5)
                expected[m, y : y + 2, x : x + 3] = images[m, y : y + 2, x : x + 3]
        np.testing.assert_array_equal(frame, expected)


def test_patches_are_uncovered_one_frame_at_a_time():
    taken = []
    frames = patch_reveal(
        np.zeros((1, 4, 4, 3), np.uint8), (2, 2), np.arange(4)[None], (taken.append(c) or c for c in range(5))
    )
    assert not taken
    next(frames)
    next(frames)
    assert taken == [0, 1]


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
    save(few_colours, tmp_path / "new" / "a.gif")
    frames, _, loop = read_gif(tmp_path / "new" / "a.gif")
    np.testing.assert_array_equal(frames, few_colours)
    assert loop == 0
    assert all(frame["disposal"] == 1 for frame in read_blocks(tmp_path / "new" / "a.gif")[1])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (13, 1), (17, 31), (3, 301)])
def test_odd_sizes_and_frames_that_come_and_go(height, width, tmp_path):
    rng = np.random.default_rng(height * width)
    frames = COLOURS[rng.integers(0, 5, (6, height, width))]
    frames[2] = 255
    frames[4, height // 2 :] = frames[3, height // 2 :]
    frames[5, 0, 0] = 255 - frames[4, 0, 0]
    save_gif(frames, tmp_path / "a.gif", palette_from=np.concatenate([255 - COLOURS, COLOURS])[None], num_frames=6)
    kept = [i for i in range(6) if i == 0 or (frames[i] != frames[i - 1]).any()]
    np.testing.assert_array_equal(read_gif(tmp_path / "a.gif")[0], frames[kept])


def test_255_colours_are_kept_however_close(tmp_path):
    blues = np.arange(254, dtype=np.uint8)
    close = np.stack([np.full(254, 100, np.uint8), np.full(254, 101, np.uint8), blues], axis=-1)[None]
    frames = [np.full_like(close, 255), close, close[:, ::-1]]
    save_gif(frames, tmp_path / "a.gif", palette_from=close, num_frames=3)
    np.testing.assert_array_equal(read_gif(tmp_path / "a.gif")[0], frames)
    palette, _ = read_blocks(tmp_path / "a.gif")
    assert len(np.unique(palette[:255], axis=0)) == 255


def test_only_what_changed_is_stored(tmp_path):
    pictures = COLOURS[np.random.default_rng(2).integers(0, 5, (1, 32, 48))]
    order = np.random.default_rng(3).permutation(24)
    frames = np.stack(list(patch_reveal(pictures, (4, 6), order[None], np.arange(25))))[:, 0]
    save(frames, tmp_path / "a.gif")
    boxes = [frame["box"] for frame in read_blocks(tmp_path / "a.gif")[1]]
    assert boxes[0] == (0, 0, 48, 32)
    for position, (left, top, width, height) in zip(order, boxes[1:], strict=True):
        assert (left // 8, top // 8) == (position % 6, position // 6)
        assert ((left + width - 1) // 8, (top + height - 1) // 8) == (position % 6, position // 6)
    np.testing.assert_array_equal(read_gif(tmp_path / "a.gif")[0], frames)


def test_what_stands_still_between_two_changes_costs_little(photo, tmp_path):
    moved = photo.copy()
    moved[0, 0], moved[-1, -1] = 255 - moved[0, 0], 255 - moved[-1, -1]
    save([photo], tmp_path / "one.gif")
    save([moved, photo], tmp_path / "two.gif")
    first, second = ((tmp_path / name).stat().st_size for name in ("one.gif", "two.gif"))
    assert read_blocks(tmp_path / "two.gif")[1][1]["box"] == (0, 0, 128, 96)
    assert first > 8000
    assert second < first + 500


def test_another_colour_of_the_same_index_is_no_change(tmp_path):
    colours = COLOURS[np.arange(20).reshape(4, 5) % 5]
    near = colours.copy()
    near[:2] ^= 1
    near[3, 4] = 255
    save_gif([colours, near], tmp_path / "a.gif", palette_from=colours, num_frames=2)
    assert read_blocks(tmp_path / "a.gif")[1][1]["box"] == (4, 3, 1, 1)


def test_durations(few_colours, tmp_path):
    save(few_colours, tmp_path / "a.gif", seconds=2.0, hold_seconds=1.5)
    _, durations, _ = read_gif(tmp_path / "a.gif")
    assert len(set(durations[:-1])) == 1
    assert sum(durations[:-1]) == 2000  # from the first frame to the last
    assert durations[-1] == 1500


def test_no_frame_is_shorter_than_viewers_show(few_colours, tmp_path):
    save(few_colours, tmp_path / "a.gif", seconds=0.01, hold_seconds=0)
    _, durations, _ = read_gif(tmp_path / "a.gif")
    assert durations == [20] * 5


def test_longest_that_a_gif_can_hold(few_colours, tmp_path):
    save(few_colours, tmp_path / "a.gif", seconds=8.0, hold_seconds=10_000.0)
    assert read_gif(tmp_path / "a.gif")[1] == [2000, 2000, 2000, 2000, 655_350]


def test_equal_frames_keep_their_time(few_colours, tmp_path):
    standing = few_colours[[0, 0, 0, 2, 3, 4, 4]]
    save(standing, tmp_path / "a.gif", seconds=6.0, hold_seconds=1.5)
    frames, durations, _ = read_gif(tmp_path / "a.gif")
    np.testing.assert_array_equal(frames, few_colours[[0, 2, 3, 4]])
    assert durations == [3000, 1000, 1000, 2500]


def test_nothing_but_equal_frames(few_colours, tmp_path):
    save(few_colours[[4, 4, 4]], tmp_path / "a.gif", seconds=2.0, hold_seconds=1.5)
    frames, durations, _ = read_gif(tmp_path / "a.gif")
    np.testing.assert_array_equal(frames, few_colours[4:])
    assert durations == [3500]


def test_one_frame(few_colours, tmp_path):
    save(few_colours[-1:], tmp_path / "a.gif", hold_seconds=1.5)
    frames, durations, _ = read_gif(tmp_path / "a.gif")
    np.testing.assert_array_equal(frames, few_colours[-1:])
    assert durations == [1500]


def test_every_pixel_has_the_nearest_colour_and_white_is_white(photo, tmp_path):
    order = np.random.default_rng(4).permutation(16)
    frames = np.stack(list(patch_reveal(photo[None], (4, 4), order[None], np.arange(0, 17, 4))))[:, 0]
    frames[1] = 255 - frames[1]  # colours that the palette was not fitted to
    save(frames, tmp_path / "a.gif")
    stored, _, _ = read_gif(tmp_path / "a.gif")
    palette = read_blocks(tmp_path / "a.gif")[0][:255].astype(int)
    for frame, shown in zip(frames.astype(int), stored.astype(int), strict=True):
        squared = ((shown - frame) ** 2).sum(axis=-1)
        best = np.min([((frame - colour) ** 2).sum(axis=-1) for colour in palette], axis=0)
        np.testing.assert_array_equal(squared, best)
        assert (shown[(frame == 255).all(axis=-1)] == 255).all()
    assert (stored[0] == 255).all()


@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_palette_is_as_good_as_those_of_pillow(name, tmp_path):
    picture = getattr(data, name)()[:128, 64:256]
    save(picture[None], tmp_path / "a.gif")
    difference = np.abs(read_gif(tmp_path / "a.gif")[0][0].astype(int) - picture)
    for method in (Image.Quantize.MAXCOVERAGE, Image.Quantize.MEDIANCUT):
        theirs = Image.fromarray(picture).quantize(255, method, dither=Image.Dither.NONE).convert("RGB")
        assert difference.mean() < np.abs(np.asarray(theirs).astype(int) - picture).mean()
    assert difference.max() < 32


def test_a_little_on_much_white_keeps_its_colours(tmp_path):
    picture = np.full((256, 512, 3), 255, np.uint8)
    picture[100:130, 200:230] = data.astronaut()[100:130, 150:180]
    save(picture[None], tmp_path / "a.gif")
    difference = np.abs(read_gif(tmp_path / "a.gif")[0][0].astype(int) - picture)
    assert difference[100:130, 200:230].mean() < 0.9  # 0.67, or 1.13 if white takes part in the fit
    assert difference.max() < 16


def test_last_frame_is_the_picture_up_to_its_palette(tmp_path):
    y, x = np.mgrid[:32, :32]
    picture = np.stack([x * 8, y * 8, 255 - x * 4 - y * 4], axis=-1).astype(np.uint8)  # 1024 colours
    save(
        [frame[0] for frame in patch_reveal(picture[None], (4, 4), np.arange(16)[None], np.arange(1, 17))],
        tmp_path / "a",
    )
    frames, _, _ = read_gif(tmp_path / "a")
    assert len(frames) == 16
    difference = np.abs(frames[-1].astype(int) - picture)
    assert difference.mean() < 6
    assert difference.max() < 32
    np.testing.assert_array_equal(frames[0][8:], 255)


def test_frames_are_taken_one_at_a_time_and_may_share_one_buffer(few_colours, tmp_path):
    buffer = np.empty_like(few_colours[0])

    def in_one_buffer():
        for frame in few_colours:
            buffer[...] = frame
            yield buffer

    save_gif(in_one_buffer(), tmp_path / "a.gif", palette_from=few_colours[-1], num_frames=5)
    np.testing.assert_array_equal(read_gif(tmp_path / "a.gif")[0], few_colours)


@pytest.mark.parametrize("there", [False, True])
def test_frames_that_fail_leave_what_was_there(there, few_colours, tmp_path):
    if there:
        (tmp_path / "a.gif").write_bytes(b"before")

    def failing():
        yield from few_colours[:3]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        save_gif(failing(), tmp_path / "a.gif", palette_from=few_colours[-1], num_frames=5)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"] * there
    assert not there or (tmp_path / "a.gif").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 6}, "num_frames is 6, but 5 frames came"),
        ({"num_frames": 4}, "num_frames is 4, but more frames came"),
        ({"num_frames": 0}, "num_frames is 0, but must be at least 1"),
        ({"frames": []}, "num_frames is 5, but 0 frames came"),
        ({"seconds": -1}, "seconds is -1, but must be at least 0"),
        ({"hold_seconds": float("nan")}, "hold_seconds is nan"),
        ({"frames": [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)]}, r"number 1 is uint8 \(8, 9, 3\)"),
        ({"frames": [np.zeros((8, 8, 3), np.float32)]}, "number 0 is float32"),
        ({"frames": [np.zeros((1, 65536, 3), np.uint8)]}, "longer side is 65536, but must be at most 65535"),
    ],
)
def test_what_a_caller_can_do_wrong(change, message, few_colours, tmp_path):
    arguments = {"frames": few_colours, "palette_from": few_colours[-1], "num_frames": 5, **change}
    with pytest.raises(UserError, match=message):
        save_gif(path=tmp_path / "a.gif", **arguments)
    assert not list(tmp_path.iterdir())
