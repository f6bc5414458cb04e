"""Grids of pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def enlarge(images: np.ndarray, scale: int) -> np.ndarray:
    """Repeats every pixel ``scale`` times both ways: ``[..., H, W, 3]`` to ``[..., scale H, scale W, 3]``."""
    return np.repeat(np.repeat(images, scale, axis=-3), scale, axis=-2)


def scale_for(size: int, target: int = 128) -> int:
    """The whole factor that brings pictures of ``size`` pixels near ``target`` pixels."""
    return max(1, round(target / size))


def make_grid(images: np.ndarray, columns: int, *, padding: int = 4, row_names: Sequence[str] = ()) -> np.ndarray:
    """Lays pictures out in rows, on white, with a name to the left of each row if given.

    Args:
      images: ``[M, H, W, 3]`` uint8; the last row may be short.
      columns: pictures a row.
      padding: pixels around each picture.
      row_names: one for each row, or none.

    Returns:
      ``[H', W', 3]`` uint8.
    """
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    font = ImageFont.load_default(max(12, height // 7))
    margin = int(max((font.getlength(name) for name in row_names), default=0)) + (2 * padding + 4 if row_names else 0)
    canvas = Image.new(
        "RGB", (margin + columns * (width + padding) + padding, rows * (height + padding) + padding), "white"
    )
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        canvas.paste(
            Image.fromarray(image), (margin + padding + column * (width + padding), padding + row * (height + padding))
        )
    draw = ImageDraw.Draw(canvas)
    for row, name in enumerate(row_names):
        middle = padding + row * (height + padding) + height // 2
        draw.text((margin - padding, middle), name, fill="black", font=font, anchor="rm")
    return np.asarray(canvas)


def pairs_grid(above: np.ndarray, below: np.ndarray, columns: int, **options) -> np.ndarray:
    """Rows of ``above`` and ``below`` ``[M, H, W, 3]`` in turn, so that each picture stands over its counterpart."""
    rows = []
    for start in range(0, len(above), columns):
        rows += [above[start : start + columns], below[start : start + columns]]
    blank = [np.full((columns - len(row), *above.shape[1:]), 255, np.uint8) for row in rows]
    return make_grid(np.concatenate([x for pair in zip(rows, blank, strict=True) for x in pair]), columns, **options)


def save_png(image: np.ndarray, path: Path) -> None:
    """Writes ``[H, W, 3]`` uint8 as a PNG; folders on the way are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, optimize=True)
