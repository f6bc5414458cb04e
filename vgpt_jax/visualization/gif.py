"""The animation of a decoding: token after token, several pictures side by side.

What a frame shows (`patch_reveal`, `frame_counts`) and the GIF file itself (`save_gif`). Frames are made and written one at
a time, and only what changed is looked at and stored, so that a frame for every token is cheap. Pictures that stand still are
in `grid`.
"""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from PIL.GifImagePlugin import getdata

from vgpt_jax.errors import UserError, check_range
from vgpt_jax.files import written_whole

WHITE = 0xFFFFFF
TRANSPARENT = 255  # the index, beyond those of the at most 255 colours, of pixels that stay as they are
LARGEST = 65535  # GIF stores sides and hundredths of a second in 16 bits
PALETTE_SAMPLE = 2**14  # pixels to fit a palette to; four times as many: 2 % less error, three times the time


def patch_reveal(
    images: np.ndarray, grid: tuple[int, int], order: np.ndarray, counts: np.ndarray
) -> Iterator[np.ndarray]:
    """Finished pictures uncovered patch by patch, in the order in which their tokens are written, on white.

    Args:
      images: ``[M, H, W, 3]`` uint8; H and W are multiples of the grid's sides.
      grid: tokens down and across.
      order: ``[M or 1, N]`` int, the positions in raster numbering (0 is top left, 1 right of it), first written first; one
        row holds for all pictures.
      counts: ``[F]``, how many patches each frame shows.

    Yields:
      F times ``[M, H, W, 3]`` uint8, each an array of its own.
    """
    pictures, height, width, channels = images.shape
    patched = (pictures, grid[0], height // grid[0], grid[1], width // grid[1], channels)
    patches = images.reshape(patched)
    order = np.asarray(order)
    canvas = np.full(images.shape, 255, np.uint8)
    canvas_patches = canvas.reshape(patched)
    each = np.arange(pictures)[:, None]
    shown = 0
    for count in counts:
        if count < shown:
            canvas[...], shown = 255, 0
        rows, columns = np.divmod(order[:, shown:count], grid[1])
        canvas_patches[each, rows, :, columns] = patches[each, rows, :, columns]
        shown = count
        yield canvas.copy()


def frame_counts(num_tokens: int, max_frames: int) -> np.ndarray:
    """How many tokens each frame shows: every token one frame, or evenly spaced up to ``max_frames``; ends with all."""
    frames = min(num_tokens, max_frames)
    return np.round(np.linspace(num_tokens / frames, num_tokens, frames)).astype(int)


def save_gif(
    frames: Iterable[np.ndarray],
    path: Path,
    *,
    palette_from: np.ndarray,
    num_frames: int,
    seconds: float = 4.0,
    hold_seconds: float = 2.0,
) -> None:
    """Writes an endless animation with one palette for all frames; an error on the way leaves what was at ``path``.

    Args:
      frames: each ``[H, W, 3]`` uint8, taken one at a time. Equal ones in a row are stored as one that stays as long.
      path: ``*.gif``; folders on the way are made.
      palette_from: ``[H', W', 3]`` uint8, a picture with the colours of the animation, such as its last frame. Up to 255
        colours with white are kept as they are, more are brought to 254 and white.
      num_frames: how many ``frames`` there are.
      seconds: from the first frame to the last; longer where a frame would stay less than the 0.02 s that viewers can show.
      hold_seconds: how long the last one stays.

    Raises:
      UserError: ``seconds``, ``hold_seconds`` or ``num_frames`` is out of its range, ``num_frames`` is not how many came, or
        frames differ in shape, are not uint8, or are larger than a GIF can be.
    """
    check_range("num_frames", num_frames, least=1)
    check_range("seconds", seconds, least=0)
    check_range("hold_seconds", hold_seconds, least=0)
    each, hold = (max(2, round(100 * time)) for time in (seconds / max(1, num_frames - 1), hold_seconds))
    palette = _fit_palette(palette_from)
    with written_whole(path) as unfinished, unfinished.open("wb") as file:
        came, drawn, hundredths = 0, None, 0
        for came, change in enumerate(_changes(frames, palette), start=1):
            if came > num_frames:
                raise UserError(f"num_frames is {num_frames}, but more frames came; give how many there are")
            if came == 1:
                file.write(_header(change[0].shape, palette))
            elif change is not None:
                _write_drawn(file, *drawn, hundredths)
                hundredths = 0
            drawn = change or drawn
            hundredths += hold if came == num_frames else each
        if came < num_frames:
            raise UserError(f"num_frames is {num_frames}, but {came} frames came; give how many there are")
        _write_drawn(file, *drawn, hundredths)
        file.write(b";")


def _changes(frames: Iterable[np.ndarray], palette: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[int, int]] | None]:
    """What each frame draws over those before it: None if nothing, else palette indices uint8 and their left upper corner.

    The indices ``[H', W']`` cover the bounding box of what changed, and are `TRANSPARENT` within it where nothing did.
    """
    known = np.full(2**24, TRANSPARENT, np.uint8)  # the nearest of the palette for each packed colour met so far
    last = None
    for number, frame in enumerate(frames):
        expected = frame.shape if last is None else last.shape
        if frame.shape != expected or frame.dtype != np.uint8:
            raise UserError(f"frames: number {number} is {frame.dtype} {frame.shape}, but must be uint8 {expected}")
        if last is None:
            check_range("frames: the longer side", max(expected), most=LARGEST)
            last, canvas = frame.copy(), _nearest(frame, palette, known)
            yield canvas.copy(), (0, 0)
            continue
        box = _bounding_box(frame != last)
        indices = _nearest(frame[box], palette, known)
        last[box] = frame[box]  # a copy, for the frames may share one buffer
        changed = indices != canvas[box]
        if not changed.any():
            yield None
            continue
        canvas[box] = indices
        indices[~changed] = TRANSPARENT
        inner = _bounding_box(changed)  # smaller where another colour became the same index
        yield indices[inner], (box[1].start + inner[1].start, box[0].start + inner[0].start)


def _bounding_box(changed: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns within which ``changed`` ``[H, W, ...]`` bool is true anywhere; empty if it is nowhere."""
    rows = np.flatnonzero(changed.reshape(len(changed), -1).any(axis=1)).tolist()
    if not rows:
        return slice(0, 0), slice(0, 0)
    down = slice(rows[0], rows[-1] + 1)
    columns = np.flatnonzero(changed[down].any(axis=0).reshape(changed.shape[1], -1).any(axis=1)).tolist()
    return down, slice(columns[0], columns[-1] + 1)


def _pack(pixels: np.ndarray) -> np.ndarray:
    """``[..., 3]`` uint8 as one int32 each, 0xRRGGBB."""
    wide = pixels.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def _unpack(packed: np.ndarray) -> np.ndarray:
    """The inverse of `_pack`, ``[..., 3]`` uint8."""
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=-1).astype(np.uint8)


def _fit_palette(picture: np.ndarray) -> np.ndarray:
    """At most 255 colours ``[P, 3]`` uint8 for ``picture`` ``[H, W, 3]`` uint8, white the last of them."""
    pixels = _pack(picture).ravel()
    colours = np.union1d(pixels, [WHITE])
    if len(colours) > TRANSPARENT:
        pixels = pixels[pixels != WHITE]  # which is kept as it is, and would crowd the others out of the sample
        _, rare = np.unique(pixels & 0xF0F0F0, return_index=True)  # one pixel of each shade, that none be left out
        sample = pixels
        if len(pixels) > PALETTE_SAMPLE:
            sample = np.random.default_rng(0).choice(pixels, PALETTE_SAMPLE, replace=False)
        sample = np.concatenate([sample, np.repeat(pixels[rare], 4)])
        # Median cut with k-means has the least mean error of what Pillow offers; the shades halve its greatest.
        image = Image.fromarray(_unpack(sample)[None])
        fitted = image.quantize(TRANSPARENT - 1, Image.Quantize.MEDIANCUT, kmeans=1).getpalette()
        colours = np.union1d(_pack(np.array(fitted).reshape(-1, 3)[: TRANSPARENT - 1]), [WHITE])
    return _unpack(colours)


def _nearest(pixels: np.ndarray, palette: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The index of the colour of ``palette`` nearest to each pixel.

    Args:
      pixels: ``[H, W, 3]`` uint8.
      palette: ``[P, 3]`` uint8.
      known: ``[2**24]`` uint8, the answer for each packed colour or `TRANSPARENT`; what it lacks is added to it.

    Returns:
      ``[H, W]`` uint8.
    """
    packed = _pack(pixels)
    indices = known.take(packed)
    unknown = indices == TRANSPARENT
    if not unknown.any():
        return indices
    colours = np.unique(packed[unknown])
    # |c - p|^2 less |c|^2, as one product: whole numbers below 2**24, exact in float32.
    weights = palette.astype(np.float32)
    weights = np.concatenate([-2 * weights.T, (weights**2).sum(axis=1)[None]])  # [4, P]
    for some in np.array_split(colours, -(-len(colours) // 4096)):  # 4 MiB of distances at a time
        known[some] = np.argmin(np.insert(_unpack(some).astype(np.float32), 3, 1, axis=1) @ weights, axis=1)
    return known.take(packed)


def _header(shape: tuple[int, ...], palette: np.ndarray) -> bytes:
    """What stands before the first frame: the size, 256 colours for all frames, and that the animation never ends."""
    screen = struct.pack("<6sHHBBB", b"GIF89a", shape[1], shape[0], 0b11110111, 0, 0)  # 8 bits a colour, 2**8 colours
    endless = struct.pack("<BBB11sBBHB", 0x21, 0xFF, 11, b"NETSCAPE2.0", 3, 1, 0, 0)
    return screen + palette.tobytes().ljust(3 * 256, b"\0") + endless


def _write_drawn(file: BinaryIO, indices: np.ndarray, corner: tuple[int, int], hundredths: int) -> None:
    """Writes palette ``indices`` ``[H', W']`` uint8 that stay for ``hundredths`` of a second and are drawn over after."""
    options = {"duration": 10 * min(hundredths, LARGEST), "disposal": 1, "transparency": TRANSPARENT}  # 1: leave it
    file.writelines(getdata(Image.fromarray(indices), corner, **options))
