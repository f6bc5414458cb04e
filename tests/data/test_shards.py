import hashlib
import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from vgpt_jax.data import shards as shards_module
from vgpt_jax.data.image_folder import load_image_folder
from vgpt_jax.data.shards import expand_braces, find_shards, load_shards
from vgpt_jax.errors import UserError


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)


def png(seed):
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, contents, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_zip(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for i, (name, content) in enumerate(contents.items()):
            archive.writestr(name, content, compress_type=(zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[i % 2])
    return path


WRITERS = {".tar": write_tar, ".zip": write_zip}
FOLDERS = {f"{name}/{i}.png": png(100 * label + i) for label, name in enumerate(("cat", "dog")) for i in range(6)}


@pytest.fixture
def load(tmp_path):
    def load(folder, **options):
        defaults = {"held_out_percent": 40, "cache_dir": str(tmp_path / "cache")}
        return load_shards(find_shards(str(folder)), **defaults | options)

    return load


def found_in(parts):
    """Pictures and class names, by what a member is called."""
    return {
        member.name: (source[i]["image"].tobytes(), source.class_names[source[i]["label"]])
        for source in parts
        for i, member in enumerate(source.members)
    }


def numbered(seed, name):
    return pixels(seed).tobytes(), name


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("around", ["", "./", "pictures/of animals/"])
def test_class_folders_are_read_as_they_are_from_a_folder(load, tmp_path, suffix, around):
    path = WRITERS[suffix](
        tmp_path / f"a{suffix}", {f"{around}{name}": c for name, c in FOLDERS.items()} | {"notes.txt": b"x"}
    )
    for name, content in FOLDERS.items():
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(content)
    of_shards = load(path)
    of_folder = load_image_folder(str(tmp_path / "pictures"), held_out_percent=40, cache_dir=str(tmp_path / "cache"))
    for mine, theirs in zip(of_shards, of_folder, strict=True):
        assert mine.class_names == theirs.class_names == ("cat", "dog")
        assert len(mine) == len(theirs) > 0
        for i in range(len(mine)):
            np.testing.assert_array_equal(mine[i]["image"], theirs[i]["image"])
            assert mine[i]["label"] == theirs[i]["label"]


def test_several_shards_are_one_set(load, tmp_path):
    names = list(FOLDERS)
    write_tar(tmp_path / "set" / "b.tar", {n: FOLDERS[n] for n in names[::2]})
    write_zip(tmp_path / "set" / "a.zip", {n: FOLDERS[n] for n in names[1::2]})
    (tmp_path / "set" / "README").write_text("not a shard")
    parts = load(tmp_path / "set")
    assert [p.name for p in parts[0].shards] == ["a.zip", "b.tar"]
    assert set(found_in(parts)) == set(FOLDERS)
    assert {len(parts[0]) + len(parts[1])} == {12}


@pytest.mark.parametrize("kind", ["cls", "txt", "json label", "json cls", "json class"])
def test_labels_beside_the_pictures(load, tmp_path, kind):
    extension, _, key = kind.partition(" ")
    contents = {}
    for i in range(12):
        name = ("dog", "cat", "eel")[i % 3]
        contents[f"{i:04d}.png"] = png(i)
        contents[f"{i:04d}.{extension}"] = json.dumps({key: name, "width": 5}).encode() if key else f"{name}\n".encode()
    found = found_in(load(write_tar(tmp_path / "a.tar", contents)))
    assert found == {f"{i:04d}.png": numbered(i, ("dog", "cat", "eel")[i % 3]) for i in range(12)}


@pytest.mark.parametrize("suffix", WRITERS)
def test_numbers_as_labels_get_their_names_from_beside_the_shards(load, tmp_path, suffix):
    contents = {}
    for i in range(12):
        contents |= {f"{i:03d}.png": png(i), f"{i:03d}.cls": str(i % 3).encode(), f"{i:03d}.txt": b"a caption of it"}
    path = WRITERS[suffix](tmp_path / f"a{suffix}", contents)
    assert load(path)[0].class_names == ("class_0", "class_1", "class_2")
    (tmp_path / "class_names.json").write_text(json.dumps(["ant", "bee", "cat", "dog"]))
    assert load(path)[0].class_names == ("ant", "bee", "cat", "dog")
    (tmp_path / "classes.txt").write_text("zero\none\ntwo\n")
    assert found_in(load(path)) == {f"{i:03d}.png": numbered(i, ("zero", "one", "two")[i % 3]) for i in range(12)}
    (tmp_path / "classes.txt").write_text("zero\none\n")
    with pytest.raises(UserError, match="classes.txt names 2 classes, but the pictures' labels go up to 2"):
        load(path)


def test_pictures_without_labels_are_one_class_and_keys_may_repeat_in_other_shards(load, tmp_path):
    for shard in range(3):
        write_tar(tmp_path / "set" / f"{shard}.tar", {f"{i}.png": png(10 * shard + i) for i in range(5)})
    parts = load(tmp_path / "set")
    assert parts[0].class_names == ("picture",)
    seen = [source[i]["image"].tobytes() for source in parts for i in range(len(source))]
    assert sorted(seen) == sorted(pixels(10 * shard + i).tobytes() for shard in range(3) for i in range(5))

    def percentile(name):
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100

    names = {f"{parts[1].shards[m.shard].name}/{m.name}" for m in parts[1].members}
    assert names == {f"{s}.tar/{i}.png" for s in range(3) for i in range(5) if percentile(f"{s}.tar/{i}.png") < 40}


def test_labels_for_some_pictures_alone_are_refused(load, tmp_path):
    contents = {"1.png": png(1), "1.cls": b"0", "2.png": png(2)}
    with pytest.raises(UserError, match=r"a\.tar: 2\.png has no label beside it"):
        load(write_tar(tmp_path / "a.tar", contents))
    with pytest.raises(UserError, match="names for some pictures and numbers for others"):
        load(write_tar(tmp_path / "b.tar", contents | {"2.cls": b"cat"}))
    with pytest.raises(UserError, match=r"c\.tar: 3\.png is in no folder"):
        load(write_tar(tmp_path / "c.tar", {"3.png": png(3), "cat/4.png": png(4)}))
    with pytest.raises(UserError, match=r"d\.tar: 1\.json cannot be read"):
        load(write_tar(tmp_path / "d.tar", {"1.png": png(1), "1.json": b"{"}))


def test_a_shard_without_pictures_is_refused(load, tmp_path):
    with pytest.raises(UserError, match="no pictures in"):
        load(write_tar(tmp_path / "a.tar", {"notes.txt": b"x"}))


@pytest.mark.parametrize("suffix", WRITERS)
def test_corrupt_pictures_are_named_or_left_out(load, tmp_path, capsys, suffix):
    path = WRITERS[suffix](tmp_path / f"a{suffix}", FOLDERS | {"cat/3.png": b"no picture", "dog/9.png": png(9)[:60]})
    with pytest.raises(UserError, match=r"2 of 13 pictures .* first is .*cat/3\.png .*'skip'"):
        load(path)
    assert set(found_in(load(path, on_corrupt="skip"))) == set(FOLDERS) - {"cat/3.png"}
    assert "skipped 2 of 13 pictures" in capsys.readouterr().err


def test_a_class_with_corrupt_pictures_only_is_refused(load, tmp_path):
    path = write_tar(tmp_path / "a.tar", FOLDERS | {"eel/1.png": b"no picture"})
    with pytest.raises(UserError, match="class 'eel' has no picture that can be read"):
        load(path, on_corrupt="skip")


def damaged(content, how):
    if how == "empty":
        return b""
    if how == "cut":
        return content[: len(content) // 2]
    return content[: len(content) // 2] + b"\xff" * (len(content) - len(content) // 2)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("how", ["empty", "cut", "overwritten"])
def test_a_damaged_archive_is_one_line(load, tmp_path, suffix, how):
    path = WRITERS[suffix](tmp_path / f"a{suffix}", FOLDERS)
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(UserError, match=rf"a\{suffix} is damaged"):
        load(path)


def test_an_archive_that_was_changed_under_a_running_training_is_one_line(load, tmp_path):
    path = write_zip(tmp_path / "a.zip", FOLDERS)
    source = load(path)[0]
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match=r"a\.zip: .*png cannot be read"):
        for i in range(len(source)):
            source[i]
    path.unlink()
    with pytest.raises(UserError, match=r"a\.zip: .*png cannot be read"):
        source[0]


def test_what_is_in_an_archive_is_remembered_until_it_changes(load, tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", FOLDERS)
    scanned = []
    scan = shards_module._scan
    monkeypatch.setattr(shards_module, "_scan", lambda shards: scanned.append(shards) or scan(shards))
    assert load(path)[0].identity == load(path)[0].identity
    assert len(scanned) == 1
    write_tar(path, FOLDERS | {"eel/1.png": png(1)})
    assert load(path)[0].class_names == ("cat", "dog", "eel")
    assert len(scanned) == 2


def test_identity_is_not_of_where_the_archives_lie(load, tmp_path):
    path = write_tar(tmp_path / "a.tar", FOLDERS)
    here = [p.identity for p in load(path)]
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "a.tar")
    assert [p.identity for p in load(moved)] == here
    write_tar(moved, {name: c for name, c in FOLDERS.items() if name != "cat/0.png"})
    assert [p.identity for p in load(moved)] != here


def test_a_source_can_be_sent_to_another_process(load, tmp_path):
    source = load(write_tar(tmp_path / "a.tar", FOLDERS))[0]
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[0]["image"], source[0]["image"])


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz"])
def test_compressed_archives_are_refused_with_the_remedy(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"")
    for folder in (tmp_path, tmp_path / f"a{suffix}"):
        with pytest.raises(UserError, match=rf"a\{suffix} is compressed as a whole.*unpack it to a \.tar"):
            find_shards(str(folder))


def test_braces_and_stars_are_expanded(tmp_path):
    assert expand_braces("a") == ["a"]
    assert expand_braces("t-{098..101}.tar") == ["t-098.tar", "t-099.tar", "t-100.tar", "t-101.tar"]
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    for name in ("t-00.tar", "t-01.tar", "v-00.tar"):
        write_tar(tmp_path / name, {"a.png": b""})
    for pattern, expected in (
        ("t-{00..01}.tar", ["t-00.tar", "t-01.tar"]),
        ("t-*.tar", ["t-00.tar", "t-01.tar"]),
        ("{v,t}-00.tar", ["v-00.tar", "t-00.tar"]),
        ("v-00.tar", ["v-00.tar"]),
    ):
        assert [p.name for p in find_shards(f"{tmp_path}/{pattern}")] == expected
    with pytest.raises(UserError, match=r"means 3 archives, but there is no .*t-02\.tar"):
        find_shards(f"{tmp_path}/t-{{00..02}}.tar")
    with pytest.raises(UserError, match="there is no .*x-"):
        find_shards(f"{tmp_path}/x-*.tar")
    (tmp_path / "a.rar").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.rar, but must be a folder, or archives \.tar, \.zip"):
        find_shards(f"{tmp_path}/a.rar")


def test_a_folder_of_class_folders_is_not_taken_for_shards(tmp_path):
    (tmp_path / "cat").mkdir()
    write_tar(tmp_path / "backup.tar", FOLDERS)
    assert find_shards(str(tmp_path)) == ()
    assert find_shards("") == find_shards(str(tmp_path / "nowhere")) == ()
