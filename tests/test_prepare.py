"""Preparing data sets from archives by their real builders, without a network."""

import importlib.util
import io
import shutil
import socket
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vgpt_jax import prepare as command
from vgpt_jax.data.tfds_prepare import prepare
from vgpt_jax.data.tfds_source import import_tfds, load_tfds
from vgpt_jax.errors import UserError

spec = importlib.util.spec_from_file_location("miniature_dogs", Path(__file__).parent / "data" / "miniature_dogs.py")
miniature_dogs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(miniature_dogs)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    return miniature_dogs.make_miniature_dogs(tmp_path_factory.mktemp("archives"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuses every connection, as a machine without a network does."""

    def refuse(*_, **__):
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def write_tar(path, contents):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_the_command_prepares_and_says_how_many_and_does_nothing_twice(archives, tmp_path, capsys):
    arguments = ["--name", "stanford_dogs", "--data_dir", str(tmp_path), "--manual_dir", str(archives)]
    command.main(arguments)
    said = capsys.readouterr()
    assert (
        said.out.splitlines()[-1] == f"stanford_dogs is prepared in {tmp_path}/stanford_dogs/0.2.0: train 120, test 120"
    )
    assert said.err.count("is not the archive that was published") == 3
    assert not list(tmp_path.glob("*extracted*"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stanford_dogs").rglob("*")}
    command.main(arguments[:-2])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stanford_dogs").rglob("*")} == before


def test_a_data_set_is_prepared_where_it_is_asked_for(archives, tmp_path):
    training, held_out = load_tfds("stanford_dogs", split="official", data_dir=str(tmp_path), manual_dir=str(archives))
    assert (len(training), len(held_out)) == (120, 120)


def test_what_is_missing_is_said_by_name_and_address(archives, tmp_path, error_of):
    folder = tmp_path / "some"
    shutil.copytree(archives, folder)
    (folder / "lists.tar").unlink()
    arguments = ["--name", "stanford_dogs", "--data_dir", str(tmp_path / "data"), "--manual_dir", str(folder)]
    message = error_of(lambda *a: command.main(list(a)), *arguments)
    assert "put lists.tar (http://vision.stanford.edu/aditya86/ImageNetDogs/lists.tar) in" in message
    assert str(folder) in message and "--manual_dir" in message and "data.manual_dir" in message
    assert "images.tar" not in message and message.endswith("(vision.stanford.edu does not answer)")
    assert not (tmp_path / "data" / "stanford_dogs" / "0.2.0").exists()


def test_without_archives_all_are_named(tmp_path):
    with pytest.raises(UserError, match=r"annotation\.tar \(http.*images\.tar \(http.*lists\.tar \(http") as error:
        load_tfds("stanford_dogs", data_dir=str(tmp_path))
    assert "\n" not in str(error.value)


def test_imagenet_asks_for_both_of_its_archives(tmp_path):
    (tmp_path / "by hand").mkdir()
    (tmp_path / "by hand" / "ILSVRC2012_img_train.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"put ILSVRC2012_img_val\.tar in"):
        prepare("imagenet2012", data_dir=str(tmp_path), manual_dir=str(tmp_path / "by hand"))


def test_a_manual_dir_and_a_data_dir_that_cannot_be_are_one_line(archives, tmp_path):
    with pytest.raises(UserError, match="data.manual_dir .*nowhere.* is not a folder"):
        prepare("stanford_dogs", data_dir=str(tmp_path), manual_dir=str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.* cannot be written.*give another data.data_dir"):
        prepare("stanford_dogs", data_dir=str(tmp_path / "file"), manual_dir=str(archives))


def test_a_damaged_archive_leaves_nothing_prepared_and_a_whole_one_mends_it(archives, tmp_path):
    folder = tmp_path / "archives"
    shutil.copytree(archives, folder)
    whole = (folder / "images.tar").read_bytes()
    (folder / "images.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="stanford_dogs could not be prepared in"):
        prepare("stanford_dogs", data_dir=str(tmp_path), manual_dir=str(folder))
    assert not list((tmp_path / "stanford_dogs").iterdir())
    (folder / "images.tar").write_bytes(whole)
    prepare("stanford_dogs", data_dir=str(tmp_path), manual_dir=str(folder))
    assert len(load_tfds("stanford_dogs", split="official", data_dir=str(tmp_path))[0]) == 120


def test_an_interrupted_preparation_leaves_nothing_that_counts(archives, tmp_path, monkeypatch):
    from tensorflow_datasets.core import dataset_info

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dataset_info.DatasetInfo, "write_to_directory", interrupt)  # the last thing that it does
        with pytest.raises(KeyboardInterrupt):
            prepare("stanford_dogs", data_dir=str(tmp_path), manual_dir=str(archives))
    assert not (tmp_path / "stanford_dogs" / "0.2.0").exists()
    # As a kill leaves them, before anything can clean up.
    for left in (tmp_path / "stanford_dogs" / "incomplete.ABCDEF_0.2.0", tmp_path / "stanford_dogs.extracted"):
        (left / "below").mkdir(parents=True)
    prepare("stanford_dogs", data_dir=str(tmp_path), manual_dir=str(archives))
    assert [path.name for path in (tmp_path / "stanford_dogs").iterdir()] == ["0.2.0"]
    assert not (tmp_path / "stanford_dogs.extracted").exists()


def test_a_set_in_another_format_is_refused_with_the_remedy(archives, tmp_path):
    tfds = import_tfds()
    directory = Path(prepare("stanford_dogs", data_dir=str(tmp_path), manual_dir=str(archives)))
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    assert tfds.builder("stanford_dogs", data_dir=str(tmp_path)).info.file_format.value == "tfrecord"
    for use in (load_tfds, prepare):
        with pytest.raises(UserError, match=rf"as tfrecord.*tfds convert_format --dataset_version_dir={directory} "):
            use("stanford_dogs", data_dir=str(tmp_path))


def test_cifar10_in_its_published_layout(tmp_path):
    rng = np.random.default_rng(0)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    images = rng.integers(0, 256, (12, 32, 32, 3), np.uint8)
    records = [bytes([i % 10]) + image.transpose(2, 0, 1).tobytes() for i, image in enumerate(images)]
    contents = {f"cifar-10-batches-bin/data_batch_{k + 1}.bin": b"".join(records[2 * k : 2 * k + 2]) for k in range(5)}
    contents["cifar-10-batches-bin/test_batch.bin"] = b"".join(records[10:])
    contents["cifar-10-batches-bin/batches.meta.txt"] = "\n".join(names).encode()
    write_tar(tmp_path / "cifar-10-binary.tar.gz", contents)
    training, held_out = load_tfds(
        "cifar10", split="official", data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path)
    )
    assert training.class_names == tuple(names)
    for source, of_source in ((training, range(10)), (held_out, range(10, 12))):
        found = {(source[i]["image"].tobytes(), source[i]["label"]) for i in range(len(source))}
        assert found == {(images[i].tobytes(), i % 10) for i in of_source}


@pytest.fixture
def bird_archives(tmp_path):
    """Three birds of two classes in the published layout, and the picture, box and class of each."""
    birds = [(1, "Black_footed_Albatross", 1), (2, "Laysan_Albatross", 1), (2, "Laysan_Albatross", 0)]
    lists = {"images": [], "train_test_split": [], "bounding_boxes": [], "image_class_labels": []}
    pictures, masks, made = {}, {}, []
    for i, (number, name, train) in enumerate(birds, 1):
        picture = np.full((20 + i, 30, 3), 40 * i, np.uint8)
        where, (x, y, w, h) = f"{number:03d}.{name}/{name}_{i:04d}_1", (2.0 + i, 3.0, 11.0, 7.0 + i)
        file, mask = io.BytesIO(), io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=95)
        Image.fromarray(picture[:, :, 0]).save(mask, "PNG")
        pictures[f"CUB_200_2011/images/{where}.jpg"], masks[f"segmentations/{where}.png"] = (
            file.getvalue(),
            mask.getvalue(),
        )
        lists["images"].append(f"{i} {where}.jpg")
        lists["train_test_split"].append(f"{i} {train}")
        lists["bounding_boxes"].append(f"{i} {x} {y} {w} {h}")
        made.append((40 * i, (int(h), int(w), 3), number - 1, train))
    texts = {f"CUB_200_2011/{name}.txt": ("\n".join(lines) + "\n").encode() for name, lines in lists.items()}
    write_tar(tmp_path / "CUB_200_2011.tgz", texts | pictures)
    write_tar(tmp_path / "segmentations.tgz", masks)
    return tmp_path, made


def test_birds_in_their_published_layout(bird_archives, monkeypatch):
    """OpenCV, which the builder reads the masks with and which is large, is stood in for by its one function that is called."""
    folder, made = bird_archives
    imdecode = lambda buffer, flags: np.asarray(Image.open(io.BytesIO(buffer.tobytes())).convert("L"))  # noqa: E731
    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace(imdecode=imdecode))
    parts = load_tfds("caltech_birds2011", split="official", data_dir=str(folder / "data"), manual_dir=str(folder))
    assert parts[0].class_names[:3] == ("black_footed_albatross", "laysan_albatross", "2")
    assert len(parts[0].class_names) == 200
    for source, train in zip(parts, (1, 0), strict=True):
        found = [source[i] for i in range(len(source))]
        found = sorted((int(e["image"].mean().round()), e["image"].shape, e["label"]) for e in found)
        assert found == [m[:3] for m in made if m[3] == train]


def test_a_package_that_is_missing_is_named(bird_archives, monkeypatch):
    folder, _ = bird_archives
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="needs the package opencv-python-headless: pip install opencv-python-headless"):
        prepare("caltech_birds2011", data_dir=str(folder / "data"), manual_dir=str(folder))


def test_help_says_how_it_is_used():
    said = subprocess.run(
        [sys.executable, "-m", "vgpt_jax.prepare", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "python -m vgpt_jax.prepare --name stanford_dogs" in said and "--manual_dir" in said
