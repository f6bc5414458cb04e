"""Data sets of tensorflow-datasets: Stanford Dogs in miniature by its real builder, the others by builders of their features."""

import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from vgpt_jax.data import tfds_source
from vgpt_jax.data.pictures import is_held_out
from vgpt_jax.data.tfds_source import crop_to_box, first_box, import_tfds, load_tfds
from vgpt_jax.errors import UserError


@pytest.fixture(scope="module")
def load(dogs):
    def load(**options):
        return load_tfds("stanford_dogs", **{"data_dir": str(dogs.data_dir), "held_out_percent": 5} | options)

    return load


def number_of(source, index):
    """The number that a picture has in the miniature, by its file name, which the source does not give."""
    split, record = source.records[index]
    filename = tfds_source.opened(source.directory, source.splits[split])[int(record)]["image/filename"].decode()
    return int(filename.rsplit("_", 1)[1].removesuffix(".jpg"))


def test_labels_classes_and_official_splits_are_those_published(dogs, load):
    training, held_out = load(split="official")
    assert training.class_names == tuple(name.lower() for name in dogs.made.class_folders())
    assert training.class_names[0] == "n02085620-chihuahua"
    assert (len(training), len(held_out)) == (240, 120)
    for source, numbers in ((training, range(240)), (held_out, range(240, 360))):
        found = {number_of(source, i): source[i]["label"] for i in range(len(source))}
        assert found == {n: n % 120 for n in numbers}


def test_pictures_are_cut_to_their_first_box_or_whole(dogs, load):
    cut, whole = load(split="official")[1], load(split="official", bounding_box="none")[1]
    for i in range(0, 120, 7):
        number = number_of(cut, i)
        left, top, right, bottom = dogs.made.boxes_of(number)[0]
        pixels = dogs.made.pixels_of(number % 120, number)
        height, width = dogs.made.picture_size(number)
        image = whole[i]["image"]
        assert image.shape == (height, width, 3)
        assert image.dtype == np.uint8
        assert np.abs(image.astype(int) - pixels).max() < 12  # JPEG
        np.testing.assert_array_equal(cut[i]["image"], image[top:bottom, left:right])
        assert cut[i]["image"].shape == (bottom - top, right - left, 3)


def test_percent_is_of_all_pictures_by_a_hash(load):
    training, held_out = load()
    assert training.splits == ("train", "test")
    assert len(training) + len(held_out) == 360
    of = {(s, r): p for p, source in enumerate((training, held_out)) for s, r in source.records.tolist()}
    assert of == {
        (s, r): int(is_held_out(f"stanford_dogs/{split}/{r}", 5))
        for s, (split, count) in enumerate((("train", 240), ("test", 120)))
        for r in range(count)
    }
    assert 5 <= len(held_out) <= 40
    assert held_out[0]["label"] == number_of(held_out, 0) % 120


def test_identity_is_of_the_examples_and_the_crop(load):
    training, held_out = load()
    assert training.identity == load()[0].identity
    others = [held_out, load(held_out_percent=10)[0], load(bounding_box="none")[0], load(split="official")[0]]
    assert len({training.identity, *(o.identity for o in others)}) == 5


def test_a_source_is_read_by_threads_and_sent_to_other_processes(load):
    source = load()[0]
    indices = list(range(0, 300, 3))
    alone = [source[i] for i in indices]
    again = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(alone, pool.map(again.__getitem__, indices), strict=True):
            np.testing.assert_array_equal(one["image"], other["image"])
            assert one["label"] == other["label"]


def test_reading_needs_no_tensorflow(dogs):
    program = (
        "import sys; from vgpt_jax.data.tfds_source import load_tfds; "
        f"load_tfds('stanford_dogs', data_dir={str(dogs.data_dir)!r})[0][0]; print('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.25, 0.1, 0.75, 0.5), (slice(1, 3), slice(1, 5))),
        ((0.0, 0.0, 1.0, 1.0), (slice(0, 4), slice(0, 10))),
        ((0.0, 0.0, 1.0, 1.7), (slice(0, 4), slice(0, 10))),
        ((0.26, 0.0, 0.3, 1.0), (slice(0, 4), slice(0, 10))),  # not a pixel high
        ((0.5, 0.5, 0.25, 0.75), (slice(0, 4), slice(0, 10))),
    ],
)
def test_crop_to_a_box_by_hand(box, expected):
    image = np.arange(120, dtype=np.uint8).reshape(4, 10, 3)
    np.testing.assert_array_equal(crop_to_box(image, np.array(box, np.float32)), image[expected])
    np.testing.assert_array_equal(crop_to_box(image, None), image)


def test_a_side_in_whole_pixels_is_kept_whatever_float32_makes_of_it():
    for size in range(1, 700):
        image = np.zeros((size, 1, 3), np.uint8)
        box = np.array([size // 3 / size, 0, (size - size // 4) / size, 1], np.float32)
        assert len(crop_to_box(image, box)) == size - size // 4 - size // 3


def test_the_first_box_is_found_wherever_sets_have_it():
    one, other = np.arange(4, dtype=np.float32), np.arange(4, 8, dtype=np.float32)
    records = ({"bbox": one}, {"bbox": np.stack([one, other])}, {"objects": {"bbox": [one, other]}})  # birds, -, dogs
    for record in records:
        np.testing.assert_array_equal(first_box(record), one)
    assert first_box({"objects": {"bbox": []}}) is None
    assert first_box({"label": 1}) is None


def make_set(folder, name, features, examples):
    """Prepares a data set of these features and examples by split, as tensorflow-datasets would the one of that name."""
    tfds = import_tfds()
    splits = {split: list(enumerate(of_split)) for split, of_split in examples.items()}
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets=splits,
        data_dir=folder,
        file_format="array_record",
    )
    return tfds.builder_from_directory(folder / name / "1.0.0")


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Makes `load_tfds` find a prepared set of given features and examples."""

    def prepared(features, examples):
        builder = make_set(tmp_path / f"set_{len(list(tmp_path.iterdir()))}", "made_up", features, examples)
        monkeypatch.setattr(tfds_source, "make_builder", lambda *_: builder)
        return lambda **options: load_tfds("made_up", **options)

    return prepared


def test_grey_pictures_are_made_colour_and_official_parts_are_train_and_test(prepared):
    """The features of mnist."""
    features = import_tfds().features
    digits = {"image": features.Image(shape=(28, 28, 1)), "label": features.ClassLabel(num_classes=10)}
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28, 1), np.uint8)
    examples = [{"image": p, "label": i % 10} for i, p in enumerate(pixels)]
    training, held_out = prepared(digits, {"train": examples[:8], "test": examples[8:]})(split="official")
    assert training.class_names == tuple("0123456789")
    found = sorted((s[i]["image"].tobytes(), s[i]["label"]) for s in (training, held_out) for i in range(len(s)))
    assert found == sorted((np.repeat(p, 3, axis=-1).tobytes(), i % 10) for i, p in enumerate(pixels))
    assert (len(training), len(held_out)) == (8, 4)


def test_birds_are_cut_to_their_box_without_their_masks_being_decoded(prepared):
    """The features of caltech_birds2011, masks included, which are no PNG here."""
    tfds = import_tfds()
    features = {
        "image": tfds.features.Image(),
        "image/filename": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["001.albatross", "002.auklet"]),
        "bbox": tfds.features.BBoxFeature(),
        "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
    }
    pixels = np.random.default_rng(0).integers(0, 256, (4, 10, 20, 3), np.uint8)
    box = tfds.features.BBox(ymin=0.1, xmin=0.25, ymax=0.5, xmax=1.0)
    examples = [
        {"image": p, "image/filename": "a", "label": i % 2, "bbox": box, "segmentation_mask": p[:, :, :1]}
        for i, p in enumerate(pixels)
    ]
    training, _ = prepared(features, {"train": examples[:3], "test": examples[3:]})(split="official")
    found = {training[i]["image"].tobytes() for i in range(3)}
    assert found == {p[1:5, 5:].tobytes() for p in pixels[:3]}
    assert training.class_names == ("001.albatross", "002.auklet")


def test_splits_without_labels_are_left_out(prepared):
    """As the test split of imagenet2012: "official" is train and validation, "percent" of both."""
    features = import_tfds().features
    these = {"image": features.Image(shape=(2, 2, 3)), "label": features.ClassLabel(num_classes=3)}

    def examples(count, label, colour):
        return [{"image": np.full((2, 2, 3), colour + i, np.uint8), "label": label} for i in range(count)]

    load = prepared(these, {"train": examples(20, 1, 0), "validation": examples(5, 2, 50), "test": examples(4, -1, 90)})
    training, held_out = load(split="official")
    assert {training[i]["label"] for i in range(20)} == {1}
    assert {int(held_out[i]["image"][0, 0, 0]) for i in range(len(held_out))} == set(range(50, 55))
    parts = load(held_out_percent=40)
    assert sum(map(len, parts)) == 25
    assert {s[i]["label"] for s in parts for i in range(len(s))} == {1, 2}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "train"}, "data.split is 'train'.*official, percent"),
        ({"bounding_box": "last"}, "data.bounding_box is 'last'.*first, none"),
        ({"held_out_percent": 0}, "the held-out part of stanford_dogs is empty"),
    ],
)
def test_options_out_of_range_are_refused(load, options, said):
    with pytest.raises(UserError, match=said):
        load(**options)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stanford_dog", "data.name is 'stanford_dog'.*'emoji'.*did you mean 'stanford_dogs'"),
        ("huggingface:dogs", "data.name is 'huggingface:dogs'"),
        ("imagenet_resized/7x7", "data.name is 'imagenet_resized/7x7': .*7x7"),
        ("stanford_dogs:9.9.9", "data.name is 'stanford_dogs:9.9.9': .*9.9.9"),
        ("imdb_reviews", "imdb_reviews has no feature 'image'.*text, label"),
        ("coco/2017", "coco/2017 has no feature 'label'"),
    ],
)
def test_names_that_are_no_set_of_labelled_pictures_are_refused(tmp_path, name, said):
    with pytest.raises(UserError, match=said):
        load_tfds(name, data_dir=str(tmp_path), other_names=("emoji",))


def test_official_splits_that_are_not_there_are_refused(prepared):
    features = import_tfds().features
    these = {"image": features.Image(shape=(2, 2, 3)), "label": features.ClassLabel(num_classes=1)}
    load = prepared(these, {"train": [{"image": np.zeros((2, 2, 3), np.uint8), "label": 0}]})
    with pytest.raises(UserError, match="labelled splits train and not train beside validation or test"):
        load(split="official")


def test_pictures_in_other_modes_are_read_as_those_of_folders_are(prepared):
    """A JPEG in CMYK, as some of ImageNet's are."""
    features = import_tfds().features
    file = io.BytesIO()
    Image.new("CMYK", (3, 2), (0, 255, 255, 0)).save(file, "JPEG", quality=95)
    file.seek(0)
    these = {"image": features.Image(encoding_format="jpeg"), "label": features.ClassLabel(num_classes=1)}
    load = prepared(
        these, {"train": [{"image": file, "label": 0}], "test": [{"image": np.zeros((2, 3, 3), np.uint8), "label": 0}]}
    )
    image = load(split="official")[0][0]["image"]
    assert image.shape == (2, 3, 3)
    assert np.abs(image.astype(int) - [255, 0, 0]).max() < 40
