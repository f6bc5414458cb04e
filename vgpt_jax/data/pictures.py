"""Reading pictures, whatever holds them: a file, a member of an archive, a record of a data set."""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from vgpt_jax.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp"})
ON_CORRUPT = ("error", "skip")
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for what is no picture, or only a part of one."""

UNLABELLED = "picture"
"""The one class of pictures that come without labels."""


def read_image(file: Path | BinaryIO, name: str | None = None) -> np.ndarray:
    """A picture as ``[H, W, 3]`` uint8: turned upright by its EXIF tag, transparency on white.

    Args:
      file: a path, or an open file.
      name: what messages call it; None: the path.

    Raises:
      UserError: the file cannot be read as a picture.
    """
    try:
        _check_is_file(file)
        with Image.open(file) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I;16"):  # 16-bit grey, which convert("RGB") would clip
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                canvas = Image.new("RGBA", picture.size, "white")
                canvas.alpha_composite(picture)
                picture = canvas
            return np.asarray(picture.convert("RGB"))
    except UNREADABLE as error:
        raise UserError(f"{name or file} cannot be read as a picture ({error})") from error


def why_unreadable(file: Path | BinaryIO) -> str | None:
    """The reason why a picture cannot be decoded to its end, or None where it can."""
    try:
        _check_is_file(file)
        with Image.open(file) as picture:
            picture.getexif()  # `read_image` turns pictures upright by it
            picture.draft("RGB", (64, 64))  # JPEG: reads to the end, but decodes an eighth
            picture.load()
    except UNREADABLE as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def _check_is_file(file: Path | BinaryIO) -> None:
    """Raises `OSError` for a pipe or a device: what opens one may wait for ever."""
    if isinstance(file, Path) and file.exists() and not file.is_file():
        raise OSError("it is no file")


def check_on_corrupt(on_corrupt: str) -> None:
    """Raises `UserError` unless it is one of `ON_CORRUPT`."""
    if on_corrupt not in ON_CORRUPT:
        raise UserError(f"data.on_corrupt is {on_corrupt!r}, but must be one of {', '.join(ON_CORRUPT)}")


def report_corrupt(corrupt: Mapping[str, str], total: int, on_corrupt: str) -> None:
    """Refuses pictures that cannot be read, or names and counts them on standard error where they are left out.

    Args:
      corrupt: name and reason of each.
      total: pictures in all.
      on_corrupt: "error" or "skip".

    Raises:
      UserError: there are some, and ``on_corrupt`` is "error".
    """
    if corrupt and on_corrupt == "error":
        name, reason = next(iter(corrupt.items()))
        raise UserError(
            f"{len(corrupt)} of {total} pictures cannot be read, the first is {name} ({reason}): "
            "mend or remove them, or set data.on_corrupt to 'skip'"
        )
    for name, reason in corrupt.items():
        print(f"skipped: {name} ({reason})", file=sys.stderr)
    if corrupt:
        print(f"skipped {len(corrupt)} of {total} pictures that cannot be read", file=sys.stderr)


def is_held_out(name: str, percent: int) -> bool:
    """Whether a picture belongs to the held-out part: by a hash of its name."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()  # names of files need not be UTF-8
    return int.from_bytes(digest[:4], "big") % 100 < percent


def split_by_name(names: list[str], percent: int, of_what: str) -> tuple[list[int], list[int]]:
    """Numbers of the pictures of the training and of the held-out part, by `is_held_out` of their names.

    Args:
      names: of all pictures.
      percent: share that is held out.
      of_what: what messages call the whole.

    Raises:
      UserError: a part would be empty.
    """
    held_out = [is_held_out(name, percent) for name in names]
    parts = [i for i, held in enumerate(held_out) if not held], [i for i, held in enumerate(held_out) if held]
    for what, part in zip(("training", "held-out"), parts, strict=True):
        if not part:
            raise UserError(
                f"the {what} part of {of_what} is empty ({len(names)} pictures, data.held_out_percent {percent}): "
                "add pictures or change the share"
            )
    return parts
