"""Miniature archives of Stanford Dogs in the layout that is published, for the real builder to prepare."""

import io
import tarfile
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

BREEDS = ("Chihuahua", "Japanese_spaniel", "Maltese_dog", "Pekinese", "Shih-Tzu")  # then made-up ones, for 120 in all
NUM_BREEDS = 120


def class_folders() -> list[str]:
    """The 120 folders, such as "n02085620-Chihuahua", in the order of their numbers."""
    names = [*BREEDS, *(f"breed_{i}" for i in range(len(BREEDS), NUM_BREEDS))]
    return [f"n{2085620 + 162 * i:08d}-{name}" for i, name in enumerate(names)]


def picture_size(number: int) -> tuple[int, int]:
    """Height and width of a picture by its number: all different among 35 that follow each other."""
    return 24 + number % 7, 28 + number % 5


def boxes_of(number: int) -> list[tuple[int, int, int, int]]:
    """(xmin, ymin, xmax, ymax) in pixels of the dogs in a picture: one, two or three, the first of them the one to crop to."""
    height, width = picture_size(number)
    first = (2 + number % 3, 1 + number % 4, width - 3, height - 2)
    return [first, (0, 0, width, height), (1, 1, 5, 6)][: 1 + number % 3]


def pixels_of(label: int, number: int) -> np.ndarray:
    """Smooth and of a colour of its own for every class, so that JPEG keeps it nearly as it is: ``[H, W, 3]`` uint8."""
    height, width = picture_size(number)
    rows, columns = np.mgrid[:height, :width]
    red = 4 * rows + number % 50
    green = 4 * columns + 20
    blue = np.full_like(rows, 2 * label)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def annotation(folder: str, stem: str, number: int) -> str:
    """An annotation as the data set has them: text around every number, and boxes in pixels."""
    height, width = picture_size(number)
    objects = "".join(
        f"\t<object>\n\t\t<name>{folder.split('-', 1)[1]}</name>\n\t\t<pose>Unspecified</pose>\n"
        "\t\t<truncated>0</truncated>\n\t\t<difficult>0</difficult>\n\t\t<bndbox>\n"
        f"\t\t\t<xmin>{xmin}</xmin>\n\t\t\t<ymin>{ymin}</ymin>\n\t\t\t<xmax>{xmax}</xmax>\n\t\t\t<ymax>{ymax}</ymax>\n"
        "\t\t</bndbox>\n\t</object>\n"
        for xmin, ymin, xmax, ymax in boxes_of(number)
    )
    return (
        f"<annotation>\n\t<folder>{folder.split('-')[0][1:]}</folder>\n\t<filename>{stem}</filename>\n\t<source>\n"
        "\t\t<database>ImageNet database</database>\n\t</source>\n\t<size>\n"
        f"\t\t<width>{width}</width>\n\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>\n"
        f"\t<segment>0</segment>\n{objects}</annotation>\n"
    )


def make_miniature_dogs(folder: Path, train_per_class: int = 1, test_per_class: int = 1) -> Path:
    """Writes ``images.tar``, ``annotation.tar`` and ``lists.tar`` to a folder, which becomes a ``--manual_dir``.

    Picture ``k`` of class ``c`` has number ``k * 120 + c`` (`picture_size`, `boxes_of`, `pixels_of` tell the rest); the first
    ``train_per_class`` of a class are in the training list, the others in the test list.

    Args:
      folder: made where it is not there.
      train_per_class, test_per_class: pictures of each of the 120 classes.

    Returns:
      ``folder``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lists = {"train": [], "test": []}
    with (
        tarfile.open(folder / "images.tar", "w") as images,
        tarfile.open(folder / "annotation.tar", "w") as annotations,
    ):
        for label, name in enumerate(class_folders()):
            for k in range(train_per_class + test_per_class):
                number = k * NUM_BREEDS + label
                stem = f"{name.split('-')[0]}_{number}"
                jpeg = io.BytesIO()
                Image.fromarray(pixels_of(label, number)).save(jpeg, "JPEG", quality=95, subsampling=0)
                _add(images, f"Images/{name}/{stem}.jpg", jpeg.getvalue())
                _add(annotations, f"Annotation/{name}/{stem}", annotation(name, stem, number).encode())
                lists["train" if k < train_per_class else "test"].append((f"{name}/{stem}", label + 1))
    with tarfile.open(folder / "lists.tar", "w") as archive:
        for part, entries in {"file": lists["train"] + lists["test"], **lists}.items():
            stems = [stem for stem, _ in entries]
            mat = io.BytesIO()
            columns = {
                "file_list": np.array([[f"{stem}.jpg"] for stem in stems], dtype=object),
                "annotation_list": np.array([[stem] for stem in stems], dtype=object),
                "labels": np.array([[label] for _, label in entries], np.uint8),
            }
            scipy.io.savemat(mat, columns)
            _add(archive, f"{part}_list.mat", mat.getvalue())
    return folder


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
