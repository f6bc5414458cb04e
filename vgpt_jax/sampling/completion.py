"""What is kept of a given picture, so that the rest is drawn: a part of it, or a mask."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vgpt_jax.data.image_folder import read_image
from vgpt_jax.data.transforms import crop, resize_short_side
from vgpt_jax.errors import UserError


@dataclass(frozen=True)
class Completion:
    """A picture that is completed.

    Attributes:
      image: ``[H, W, 3]`` float32 in 0..1, of the tokenizer's size.
      kept: ``[h, w]`` bool, the places of the token grid whose tokens stay.
    """

    image: np.ndarray
    kept: np.ndarray


def read_completion(path: str | Path, part: str, size: int, grid: tuple[int, int]) -> Completion:
    """Reads a picture that is to be completed: its middle square, as the tokenizer sees it.

    Args:
      path: of the picture.
      part: what stays: see `keep`.
      size: pixels of a side.
      grid: ``(h, w)`` of the tokens.

    Raises:
      UserError: picture or mask cannot be read, or nothing or all is kept.
    """
    picture = crop(resize_short_side(read_image(Path(path)), size), size, None)
    return Completion(picture.astype(np.float32) / 255, keep(part, grid))


def keep(part: str, grid: tuple[int, int]) -> np.ndarray:
    """Which places of a token grid a part of the picture covers.

    Args:
      part: "top" or "left": the upper or the left half; or the path of a picture whose middle square is white where the picture
        stays and black where it is to be drawn. A place stays if all of it is white.
      grid: ``(h, w)``.

    Returns:
      ``[h, w]`` bool.

    Raises:
      UserError: the mask cannot be read or is smaller than the grid, or it keeps nothing or all.
    """
    kept = np.zeros(grid, bool)
    if part == "top":
        kept[: grid[0] // 2] = True
    elif part == "left":
        kept[:, : grid[1] // 2] = True
    else:
        mask = read_image(Path(part))
        side = min(mask.shape[:2])
        if side < max(grid):
            raise UserError(
                f"the mask {part} is {side} pixels wide or high, less than the {max(grid)} places of the token grid"
            )
        black = crop(mask, side, None).mean(axis=-1) < 128
        rows, columns = (np.arange(side) * cells // side for cells in grid)
        drawn = np.zeros(grid, int)
        np.add.at(drawn, (rows[:, None], columns[None, :]), black)
        kept = drawn == 0
    if kept.all() or not kept.any():
        raise UserError(
            f"{part} keeps {'all' if kept.all() else 'nothing'} of the picture, but a part must stay and a part be drawn"
        )
    return kept
