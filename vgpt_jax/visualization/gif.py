"""The animation of a decoding: token after token, several pictures side by side."""

from pathlib import Path

import numpy as np
from PIL import Image


def patch_reveal(images: np.ndarray, grid: tuple[int, int], counts: np.ndarray) -> np.ndarray:
    """Finished pictures uncovered patch by patch in raster order, on white.

    Args:
      images: ``[M, H, W, 3]`` uint8.
      grid: tokens down and across.
      counts: ``[F]``, how many patches each frame shows.

    Returns:
      ``[F, M, H, W, 3]`` uint8.
    """
    shown = np.arange(grid[0] * grid[1])[None, :] < np.asarray(counts)[:, None]  # [F, N]
    shown = shown.reshape(-1, *grid)
    rows, columns = images.shape[1] // grid[0], images.shape[2] // grid[1]
    mask = np.repeat(np.repeat(shown, rows, axis=1), columns, axis=2)[:, None, :, :, None]  # [F, 1, H, W, 1]
    return np.where(mask, images[None], np.uint8(255))


def frame_counts(num_tokens: int, max_frames: int) -> np.ndarray:
    """How many tokens each frame shows: every token one frame, or evenly spaced up to ``max_frames``; ends with all."""
    frames = min(num_tokens, max_frames)
    return np.round(np.linspace(num_tokens / frames, num_tokens, frames)).astype(int)


def save_gif(frames: np.ndarray, path: Path, *, seconds: float = 4.0, hold_seconds: float = 2.0) -> None:
    """Writes an endless animation with one palette for all frames, taken from the last.

    Args:
      frames: ``[F, H, W, 3]`` uint8.
      path: ``*.gif``; folders on the way are made.
      seconds: from the first frame to the last.
      hold_seconds: how long the last one stays.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sample = np.concatenate([frames[-1], frames[len(frames) // 2]], axis=0)
    # Greatest coverage keeps white white. The 256th colour is what Pillow marks unchanged pixels with, a quarter of the size.
    palette = Image.fromarray(sample).quantize(255, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    each = max(20, round(1000 * seconds / max(1, len(pictures) - 1) / 10) * 10)  # GIF counts hundredths of a second
    durations = [each] * (len(pictures) - 1) + [round(1000 * hold_seconds)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)
