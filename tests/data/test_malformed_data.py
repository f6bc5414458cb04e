"""Data that is not what it seems: names that are no text, pipes, labels without end, what is remembered and then spoilt."""

import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from vgpt_jax.data.image_folder import load_image_folder
from vgpt_jax.data.pictures import is_held_out, read_image, why_unreadable
from vgpt_jax.data.shards import find_shards, load_shards
from vgpt_jax.data.sources import ArraySource, remembered
from vgpt_jax.data.token_cache import read_token_cache, write_token_cache
from vgpt_jax.data.transforms import ImageTransform
from vgpt_jax.data.views import CacheViews
from vgpt_jax.errors import UserError


def test_a_name_need_not_be_utf8(tmp_path):
    for name in (f"{i}.png".encode() if i else b"\xff.png" for i in range(12)):
        (tmp_path / "cats").mkdir(exist_ok=True)
        Image.new("RGB", (5, 5)).save(tmp_path / "cats" / os.fsdecode(name))
    parts = load_image_folder(str(tmp_path), held_out_percent=40, cache_dir=str(tmp_path / ".cache"))
    assert sum(map(len, parts)) == 12
    name = b"cats/\xff.png"  # held out by the hash of its bytes
    expected = int.from_bytes(hashlib.sha256(name).digest()[:4], "big") % 100
    assert [is_held_out(os.fsdecode(name), percent) for percent in (expected, expected + 1)] == [False, True]


def test_nobody_waits_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="pipe.png cannot be read as a picture .it is no file"):
        read_image(tmp_path / "pipe.png")
    assert why_unreadable(tmp_path / "pipe.png") == "it is no file"


@pytest.fixture
def labelled(tmp_path):
    """Writes an archive of pictures of class 1 but for the first, whose label is given, and loads it."""

    def load(label: bytes, suffix: str = ".cls"):
        file = io.BytesIO()
        Image.new("RGB", (5, 5)).save(file, "PNG")
        contents = {f"{i}{s}": c for i in range(12) for s, c in ((".png", file.getvalue()), (".cls", b"1"))}
        del contents["0.cls"]
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for name, content in (contents | {f"0{suffix}": label}).items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return load_shards(find_shards(str(tmp_path / "a.tar")), held_out_percent=40, cache_dir=str(tmp_path / "cache"))

    return load


@pytest.mark.parametrize("label", [b"1048576", b"9" * 5000])
def test_a_label_that_is_too_great_is_refused(labelled, label):
    with pytest.raises(
        UserError, match=r"a.tar: 0.cls says class \d{7,20}, but a number of a class must be below 1048576"
    ):
        labelled(label)


@pytest.mark.parametrize(("label", "count"), [(b"000000000000003", 4), (b"0", 2), (b"00", 2)])
def test_zeros_before_a_label_do_not_count(labelled, label, count):
    assert len(labelled(label)[0].class_names) == count


def test_a_label_that_is_nested_without_end_is_refused(labelled):
    with pytest.raises(UserError, match="0.json cannot be read"):
        labelled(b"[" * 10**5, ".json")


def test_a_link_to_no_archive_is_refused(tmp_path):
    (tmp_path / "a.tar").symlink_to("nowhere")
    with pytest.raises(UserError, match="a.tar is no file, or a link to none"):
        find_shards(str(tmp_path))


@pytest.mark.parametrize("spoil", [lambda x: x[:-1], lambda x: x.replace(b"7", b"8"), lambda x: b"[]", lambda x: b""])
def test_what_is_remembered_is_found_out_again_where_any_byte_is_another(tmp_path, spoil):
    path = tmp_path / "known"
    assert remembered(path, lambda: {"number": 7}, "it") == {"number": 7}
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    assert remembered(path, lambda: {"number": 7}, "it") == {"number": 7}
    assert path.read_bytes() == whole
    assert remembered(path, lambda: 1 / 0, "it") == {"number": 7}


@pytest.fixture
def token_cache(tmp_path):
    """Writes a small cache; returns its folder, and what reads and what writes it."""
    images = np.zeros((3, 2, 2, 3), np.uint8)
    source = ArraySource(images, np.array([0, 1, 1], np.int32), ("a", "b"), ("x", "y", "z"))
    views = CacheViews("none", ImageTransform(image_size=2))

    def write() -> None:
        write_token_cache(
            tmp_path, lambda x: np.zeros((len(x), 4), int), (source, source), (views, views),
            batch_size=2, num_codes=8, token_shape=(4,), fingerprint="abc", shard_size=2,
        )  # fmt: skip

    write()
    return tmp_path, lambda: read_token_cache(tmp_path, fingerprint="abc"), write


@pytest.mark.parametrize(
    "change", [{"labels": [0, 0]}, {"labels": 7}, {"sha256": 1e-300}, {"labels": [10**30, 1]}, {"more": 1}]
)
def test_a_record_of_the_token_cache_that_was_changed_is_written_again(token_cache, change):
    folder, read, write = token_cache
    record = folder / "training-00000-of-00002.json"
    whole = record.read_bytes()
    record.write_text(json.dumps(json.loads(whole) | change))
    with pytest.raises(UserError, match="1 of 4 shards are missing, the first is training-00000-of-00002"):
        read()
    write()
    assert record.read_bytes() == whole
    assert read()[0].labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("number", "said"),
    [(10**30, f"of {10**30 + 3} shards"), (0, "cannot be read"), (-3, "cannot be read"), ("3", "cannot be read")],
)
def test_metadata_of_the_token_cache_may_say_any_number(token_cache, number, said):
    folder, read, _ = token_cache
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["parts"]["training"]["num_pictures"] = number
    metadata["shard_size"] = 1
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=said):
        read()


def test_ids_of_another_shape_are_refused(token_cache):
    folder, read, _ = token_cache
    np.save(folder / "training-00000-of-00002.npy", np.uint16(3))
    with pytest.raises(
        UserError, match=r"training-00000-of-00002.npy of the token cache cannot be read \(it is of shape \(\)\)"
    ):
        read()
