"""Data sets of tensorflow-datasets as sources: read at random from array_record files, without tensorflow."""

import functools
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from vgpt_jax.data.pictures import read_image, split_by_name
from vgpt_jax.data.sources import identity_of
from vgpt_jax.errors import UserError, choose, close_names

SPLITS = ("percent", "official")
BOUNDING_BOXES = ("first", "none")


@dataclass(frozen=True)
class TfdsSource:
    """Pictures of a prepared data set, decoded when they are asked for.

    Attributes:
      directory: of the prepared version, such as ``~/tensorflow_datasets/stanford_dogs/0.2.0``.
      splits: names of the splits that the records are of.
      records: ``[M, 2]`` int64, of every example the number of its split and its number in there.
      class_names: as the data set has them.
      full_name: of the data set, with its version.
      bounding_box: "first" or "none".
    """

    directory: str
    splits: tuple[str, ...]
    records: np.ndarray
    class_names: tuple[str, ...]
    full_name: str
    bounding_box: str

    @property
    def identity(self) -> str:
        """Differs with the data set, its version, the examples and their order, the classes and the crop.

        An example counts by its split and its number in there, which a data set's version fixes: its labels are not read for it.
        """
        of_what = (self.full_name, f"bounding box {self.bounding_box}", *self.splits)
        return identity_of(self.class_names, of_what, self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        split, number = self.records[index]
        name = self.splits[split]
        record = opened(self.directory, name)[int(number)]
        image = read_image(io.BytesIO(record["image"]), f"{self.full_name}, {name} {number}")
        if self.bounding_box == "first":
            image = crop_to_box(image, first_box(record))
        return {"image": image, "label": int(record["label"])}


@functools.lru_cache(maxsize=32)
def opened(directory: str, split: str) -> Sequence[dict]:
    """A split's records, their pictures encoded. Kept here, so that a source can be sent to another process."""
    tfds = import_tfds()
    builder = tfds.builder_from_directory(directory)
    pictures = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
    return builder.as_data_source(split, decoders={name: tfds.decode.SkipDecoding() for name in pictures})


def first_box(record: dict) -> np.ndarray | None:
    """(ymin, xmin, ymax, xmax) as shares of the picture's sides, or None where the record has no box."""
    boxes = record["bbox"] if "bbox" in record else record.get("objects", {}).get("bbox", ())
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    return boxes[0] if len(boxes) else None


def crop_to_box(image: np.ndarray, box: np.ndarray | None) -> np.ndarray:
    """Cuts a box, as `first_box` gives it, out of ``[H, W, 3]``; all of the picture where there is none or it is empty.

    The sides were whole pixels before they were made shares in float32, so they are rounded and not cut off.
    """
    if box is None:
        return image
    height, width = image.shape[:2]
    top, left, bottom, right = np.round(np.clip(box, 0, 1) * [height, width, height, width]).astype(int)
    return image[top:bottom, left:right] if top < bottom and left < right else image


def load_tfds(
    name: str,
    *,
    split: str = "percent",
    held_out_percent: int = 10,
    bounding_box: str = "first",
    data_dir: str = "",
    manual_dir: str = "",
    other_names: Sequence[str] = (),
) -> tuple[TfdsSource, TfdsSource]:
    """The training and the held-out part of a data set, which is prepared first where it is not.

    Args:
      name: as tensorflow-datasets has it, "stanford_dogs" or "imagenet_resized/64x64", with the features "image" and "label".
      split: "percent": all splits with labels together, a share held out by a hash of split and number. "official":
        "train"; held out is "validation" where that is there and has labels, or else "test".
      held_out_percent: share of "percent".
      bounding_box: "first" crops to the first box of an annotation, where there is one; "none" keeps the whole picture.
      data_dir, manual_dir: as `vgpt_jax.data.tfds_prepare.prepare`.
      other_names: of data sets that are not of tensorflow-datasets, for the message of an unknown name.

    Raises:
      UserError: an unknown name, a set without pictures or labels, one that cannot be prepared, or an empty part.
    """
    choose("data.split", split, dict.fromkeys(SPLITS))
    choose("data.bounding_box", bounding_box, dict.fromkeys(BOUNDING_BOXES))
    builder = make_builder(name, data_dir, other_names)
    check_features(name, builder.info.features)
    if not is_prepared(builder):
        from vgpt_jax.data.tfds_prepare import prepare

        prepare(name, data_dir=data_dir, manual_dir=manual_dir)
        builder = make_builder(name, data_dir)
    directory, info = check_format(name, builder), builder.info
    sizes = {s: info.splits[s].num_examples for s in info.splits if info.splits[s].num_examples}
    labelled = [s for s in sizes if opened(directory, s)[0]["label"] >= 0]

    if split == "official":
        held_out_split = next((s for s in ("validation", "test") if s in labelled), None)
        if "train" not in labelled or held_out_split is None:
            raise UserError(
                f"data.split is 'official', but {name} has the labelled splits {', '.join(labelled) or 'none'} and not train "
                "beside validation or test: set data.split to 'percent'"
            )
        parts = [
            ((s,), np.stack([np.zeros(sizes[s], np.int64), np.arange(sizes[s])], 1)) for s in ("train", held_out_split)
        ]
    else:
        records = np.array([(k, i) for k, s in enumerate(labelled) for i in range(sizes[s])], np.int64).reshape(-1, 2)
        names = [f"{info.name}/{labelled[k]}/{i}" for k, i in records]
        chosen = split_by_name(names, held_out_percent, name)
        parts = [(tuple(labelled), records[part]) for part in chosen]
    class_names = names_of_classes(info.features, directory, labelled)
    training, held_out = (TfdsSource(directory, s, r, class_names, info.full_name, bounding_box) for s, r in parts)
    return training, held_out


def names_of_classes(features, directory: str, splits: Sequence[str]) -> tuple[str, ...]:
    """The classes' names, or their numbers where the data set has no names for them.

    Where it names them in each example alone (caltech_birds), examples are read until every class has been seen.
    """
    names = list(features["label"].names)
    if "label_name" not in features or names != [str(i) for i in range(len(names))]:
        return tuple(names)
    unnamed = set(range(len(names)))
    for split in splits:
        for record in opened(directory, split):
            if record["label"] in unnamed:
                names[record["label"]] = record["label_name"].decode()
                unnamed.remove(record["label"])
            if not unnamed:
                return tuple(names)
    return tuple(names)


def import_tfds() -> ModuleType:
    """The package, imported late: it is slow, and not every data set is one of its own."""
    import importlib.resources.abc
    import sys

    # It uses this package without requiring it; the standard library has had the same since Python 3.11.
    sys.modules.setdefault("importlib_resources", importlib.resources)
    import tensorflow_datasets

    return tensorflow_datasets


def make_builder(name: str, data_dir: str, other_names: Sequence[str] = ()):
    """The builder of a data set by name.

    Raises:
      UserError: there is none of that name, or not of that configuration or version.
    """
    tfds = import_tfds()
    known = tfds.list_builders(with_community_datasets=False)  # whose own are fetched from the network
    if name.split("/")[0].split(":")[0] not in known:
        raise UserError(
            f"data.name is {name!r}, but must be {', '.join(map(repr, other_names)) or 'a name'} or one of "
            f"tensorflow-datasets: {close_names(name, known)}"
        )
    folder = Path(data_dir).expanduser() if data_dir else None
    try:
        return tfds.builder(name, data_dir=folder and os.fspath(folder))
    except ImportError as error:
        raise UserError(f"{name} needs the package {error.name}: pip install {error.name}") from error
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(f"data.name is {name!r}: {first_line(error)}") from error


def is_prepared(builder) -> bool:
    """Whether the data set lies there whole; the builder's own answer comes with a warning where it does not."""
    return (Path(os.fspath(builder.data_dir)) / "dataset_info.json").is_file()


def check_features(name: str, features) -> None:
    """Raises `UserError` unless there are an image and one label for all of it."""
    tfds = import_tfds()
    image, label = (features[key] if key in (features or ()) else None for key in ("image", "label"))
    if not isinstance(image, tfds.features.Image) or np.dtype(image.np_dtype).kind != "u":
        raise UserError(
            f"{name} has no feature 'image' of whole numbers, but {', '.join(features or ())}: choose another set"
        )
    if not isinstance(label, tfds.features.ClassLabel):
        raise UserError(f"{name} has no feature 'label' that is a class, but {', '.join(features)}: choose another set")


def check_format(name: str, builder) -> str:
    """The folder of a prepared data set.

    Raises:
      UserError: it was prepared in a format that cannot be read at random.
    """
    found = builder.info.file_format
    directory = os.fspath(builder.data_dir)
    if found is None or found.value != "array_record":
        raise UserError(
            f"{name} was prepared in {directory} as {found.value if found else 'nothing known'}, which cannot be read at random: "
            f"give another data.data_dir, or convert it: tfds convert_format --dataset_version_dir={directory} "
            "--out_file_format=array_record"
        )
    return directory


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
