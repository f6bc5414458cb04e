import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vgpt_jax.data.image_folder import load_image_folder, read_image
from vgpt_jax.errors import UserError


def noise(seed, size=(12, 10)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes of eight pictures; at a share of 40 percent neither part is empty."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(noise(100 * label + i)).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def load(tmp_path):
    def load(folder, **options):
        defaults = {"held_out_percent": 40, "cache_dir": str(tmp_path / "cache")}
        return load_image_folder(str(folder), **defaults | options)

    return load


def all_paths(parts):
    return {path for part in parts for path in part.paths}


def test_missing_folder_is_refused(load, tmp_path):
    with pytest.raises(UserError, match="data.folder .*nowhere.* is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="data.folder ''"):
        load("")


def test_folder_with_nothing_in_it_is_refused(load, tmp_path):
    (tmp_path / "flat" / ".hidden").mkdir(parents=True)
    Image.fromarray(noise(0)).save(tmp_path / "flat" / ".hidden" / "0.png")
    (tmp_path / "flat" / "notes.txt").write_text("not a picture")
    with pytest.raises(UserError, match="has neither folders nor pictures in it"):
        load(tmp_path / "flat")


def test_pictures_without_class_folders_are_one_class(load, folder, tmp_path):
    flat = folder / "cat"
    (flat / ".hidden").mkdir()
    Image.fromarray(noise(0)).save(flat / ".hidden" / "0.png")
    parts = load(flat, held_out_percent=50)
    assert all_paths(parts) == {flat / f"{i}.png" for i in range(8)}
    assert parts[0].class_names == parts[1].class_names == ("picture",)
    assert {int(label) for part in parts for label in part.labels} == {0}
    identity = parts[0].identity
    assert load(flat.rename(tmp_path / "elsewhere"), held_out_percent=50)[0].identity == identity


def test_empty_class_is_named(load, folder):
    (folder / "eel").mkdir()
    (folder / "eel" / "notes.txt").write_text("not a picture")
    with pytest.raises(UserError, match="class 'eel' has no pictures"):
        load(folder)


def test_unknown_on_corrupt_is_refused(load, folder):
    with pytest.raises(UserError, match="'ignore'.*error, skip"):
        load(folder, on_corrupt="ignore")


def test_classes_are_in_alphabetical_order_and_label_their_pictures(load, folder):
    (folder / "ant").mkdir()
    Image.fromarray(noise(9)).save(folder / "ant" / "0.png")
    parts = load(folder)
    assert parts[0].class_names == parts[1].class_names == ("ant", "cat", "dog")
    assert len(parts[0]) + len(parts[1]) == 17
    for part in parts:
        assert [part.class_names[label] for label in part.labels] == [path.parent.name for path in part.paths]
        for i, path in enumerate(part.paths):
            example = part[i]
            np.testing.assert_array_equal(example["image"], np.asarray(Image.open(path)))
            assert example["label"] == part.labels[i]


def test_extensions_in_any_case_and_folders_in_classes_are_found(load, folder):
    (folder / "cat" / "more").mkdir()
    for name in ("a.JPG", "b.jpeg", "c.WebP", "more/d.PNG"):
        Image.fromarray(noise(1)).save(folder / "cat" / name)
    (folder / "cat" / "e.txt").write_text("")
    found = all_paths(load(folder))
    assert {folder / "cat" / name for name in ("a.JPG", "b.jpeg", "c.WebP", "more/d.PNG")} < found
    assert len(found) == 20


def test_split_is_a_hash_of_class_and_name(load, folder):
    def percentile(path):
        name = f"{path.parent.name}/{path.name}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100

    training, held_out = load(folder)
    assert all(percentile(path) >= 40 for path in training.paths)
    assert all(percentile(path) < 40 for path in held_out.paths)
    assert len(training) + len(held_out) == 16


def test_split_stays_when_the_folder_moves_and_grows(load, folder):
    _, before = load(folder)
    moved = folder.rename(folder.with_name("moved"))
    for i in range(8, 12):
        Image.fromarray(noise(i)).save(moved / "cat" / f"{i}.png")
    training, held_out = load(moved)
    old = {path.relative_to(folder) for path in before.paths}
    assert old <= {path.relative_to(moved) for path in held_out.paths}
    assert not old & {path.relative_to(moved) for path in training.paths}


def test_too_few_pictures_are_refused(load, tmp_path):
    (tmp_path / "one" / "cat").mkdir(parents=True)
    Image.fromarray(noise(0)).save(tmp_path / "one" / "cat" / "0.png")
    with pytest.raises(UserError, match="the held-out part of .* is empty .1 pictures, data.held_out_percent 0"):
        load(tmp_path / "one", held_out_percent=0)
    with pytest.raises(UserError, match="the training part of .* is empty"):
        load(tmp_path / "one", held_out_percent=100)


def test_corrupt_picture_is_named_and_counted(load, folder):
    (folder / "dog" / "3.png").write_bytes(b"no picture")
    (folder / "dog" / "5.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 16 pictures .* first is .*dog/3\.png .*'skip'"):
        load(folder)


def test_corrupt_pictures_are_skipped_named_and_counted(load, folder, capsys):
    corrupt = {folder / "dog" / "3.png", folder / "cat" / "5.png"}
    for path in corrupt:
        path.write_bytes(b"no picture")
    assert all_paths(load(folder, on_corrupt="skip")) == set(folder.rglob("*.png")) - corrupt
    written = capsys.readouterr().err
    assert all(f"skipped: {path} (" in written for path in corrupt)
    assert "skipped 2 of 16 pictures" in written


def test_nothing_is_said_of_skipping_where_all_pictures_are_whole(load, folder, capsys):
    assert len(all_paths(load(folder, on_corrupt="skip"))) == 16
    assert "skipped" not in capsys.readouterr().err


def test_class_with_corrupt_pictures_only_is_refused(load, folder):
    for path in (folder / "dog").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="class 'dog' has no picture that can be read"):
        load(folder, on_corrupt="skip")


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpeg_is_noticed(load, folder, progressive):
    path = folder / "cat" / "cut.jpg"
    Image.fromarray(noise(7, (64, 64))).save(path, quality=95, progressive=progressive)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"1 of 17 .*cut\.jpg"):
        load(folder)
    with pytest.raises(UserError, match=r"cut\.jpg cannot be read"):
        read_image(path)


@pytest.mark.parametrize("extension", ["png", "webp"])
def test_other_truncated_pictures_are_noticed(load, folder, extension):
    path = folder / "cat" / f"cut.{extension}"
    Image.fromarray(noise(7, (64, 64))).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"1 of 17 .*cut\.{extension}"):
        load(folder)


def test_picture_whose_exif_cannot_be_read_is_noticed_before_training(load, folder):
    path = folder / "cat" / "exif.webp"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(7)).save(path, exif=exif)
    whole = path.read_bytes()
    assert whole.count(b"MM\x00*") == 1
    path.write_bytes(whole.replace(b"MM\x00*", b"MM;*"))
    with pytest.raises(UserError, match=r"1 of 17 .*exif\.webp"):
        load(folder)


def test_check_is_remembered_until_a_picture_changes(load, folder, monkeypatch):
    checked = []
    real_open = Image.open

    def counting(path, *rest):
        checked.append(path)
        return real_open(path, *rest)

    monkeypatch.setattr(Image, "open", counting)
    load(folder)
    assert len(checked) == 16
    load(folder)
    assert len(checked) == 16
    (folder / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cat/0\.png"):
        load(folder)


def test_skipping_is_remembered(load, folder):
    (folder / "dog" / "3.png").write_bytes(b"no picture")
    first, second = (all_paths(load(folder, on_corrupt="skip")) for _ in range(2))
    assert first == second
    assert folder / "dog" / "3.png" not in second


def test_skipping_is_remembered_where_the_folder_is_written_another_way(load, folder, monkeypatch):
    (folder / "dog" / "3.png").write_bytes(b"no picture")
    load(folder, on_corrupt="skip")
    monkeypatch.chdir(folder.parent)
    names = {path.name for path in all_paths(load(folder.name, on_corrupt="skip")) if path.parent.name == "dog"}
    assert names == {f"{i}.png" for i in range(8) if i != 3}


@pytest.mark.parametrize("damage", [b"", b'{"half', b"\xff\xfe\x80"])
def test_damaged_memory_of_the_check_is_replaced(load, folder, tmp_path, damage):
    (folder / "dog" / "3.png").write_bytes(b"no picture")
    load(folder, on_corrupt="skip")
    (remembered,) = (tmp_path / "cache").iterdir()
    remembered.write_bytes(damage)
    assert len(all_paths(load(folder, on_corrupt="skip"))) == 15
    assert len(json.loads(remembered.read_text().partition("\n")[2])) == 1  # behind the checksum


def test_cache_that_cannot_be_written_is_no_obstacle(load, folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert len(all_paths(load(folder, cache_dir=str(tmp_path / "file")))) == 16
    assert "could not be remembered" in capsys.readouterr().err


def test_transparency_is_put_on_white(tmp_path):
    pixels = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), [[[255, 255, 255], [255, 0, 0], [127, 127, 127]]])


def test_transparent_colour_of_a_palette_is_put_on_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "palette.png", transparency=0)
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), [[[255, 255, 255], [10, 20, 30]]])


def test_grey_pictures_have_three_equal_channels(tmp_path):
    Image.fromarray(np.array([[0, 100, 255]], np.uint8)).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), [[[0] * 3, [100] * 3, [255] * 3]])
    Image.fromarray(np.array([[[100, 255], [100, 0]]], np.uint8), "LA").save(tmp_path / "grey_alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey_alpha.png"), [[[100] * 3, [255] * 3]])


def test_grey_of_sixteen_bits_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 128 * 257, 65535]], np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_allclose(read_image(tmp_path / "deep.png"), [[[0] * 3, [128] * 3, [255] * 3]], atol=1)


def test_lossless_webp_is_read_exactly(tmp_path):
    Image.fromarray(noise(3)).save(tmp_path / "a.webp", lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / "a.webp"), noise(3))


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_rotation_is_applied(tmp_path, orientation, turn):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16], pixels[8:, 16:] = (255, 0, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg"), np.rot90(pixels, turn).astype(int), atol=4)


def test_identity_is_of_pictures_and_labels_and_not_of_where_they_lie(load, folder, tmp_path):
    here = load(folder)[0].identity
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere")[0].identity == here
    next((tmp_path / "elsewhere" / "dog").glob("*.png")).rename(tmp_path / "elsewhere" / "dog" / "new.png")
    parts = load(tmp_path / "elsewhere", held_out_percent=40)
    assert [p.identity for p in parts] != [p.identity for p in load(folder)]
    (folder / "cat").rename(folder / "lynx")
    assert load(folder)[0].identity != here
