"""Rotary positions (Su et al. 2021, arXiv 2104.09864): queries and keys are rotated by angles that grow with their position.

A table has a row for each position: row 0 is the condition, row ``1 + p`` the token at place ``p`` of the grid in raster order.
The pairs that are rotated together are channel ``j`` and channel ``j + D/2`` of a head, as in Hugging Face's Llama.
"""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from vgpt_jax.errors import UserError

Table = tuple[np.ndarray, np.ndarray]
"""Cosines and sines, ``[1 + N, D/2]`` float32 each."""


def along_the_sequence(num_tokens: int, grid: Sequence[int], head_dim: int, base: float) -> Table:
    """One axis: the condition is at 0, the tokens at 1 to N."""
    return _cos_sin(np.outer(np.arange(1 + num_tokens), _frequencies(head_dim, base)))


def over_the_grid(num_tokens: int, grid: Sequence[int], head_dim: int, base: float) -> Table:
    """Two axes: half of the pairs turn with the row, half with the column; the condition's are not turned.

    Raises:
      UserError: there is no grid of two sides, or heads whose width 4 does not divide.
    """
    if len(grid) != 2:
        raise UserError(f"gpt.positions: a rotation over rows and columns needs a grid of two sides, not {tuple(grid)}")
    if head_dim % 4:
        raise UserError(f"gpt.positions: over rows and columns, heads must be a multiple of 4 wide, not {head_dim}")
    rows, columns = np.divmod(np.arange(num_tokens), grid[1])
    frequencies = _frequencies(head_dim // 2, base)
    angles = np.concatenate([np.outer(rows, frequencies), np.outer(columns, frequencies)], axis=1)
    return _cos_sin(np.pad(angles, ((1, 0), (0, 0))))


def over_the_grid_without_condition(num_tokens: int, grid: Sequence[int], head_dim: int, base: float) -> Table:
    """As `over_the_grid`, but the condition's query and key become 0, as LlamaGen's (arXiv 2406.06525) weights expect."""
    cos, sin = over_the_grid(num_tokens, grid, head_dim, base)
    cos[0] = 0.0
    return cos, sin


ROTATIONS: dict[str, Callable[..., Table]] = {
    "rotary": along_the_sequence,
    "rotary_2d": over_the_grid,
    "rotary_llamagen": over_the_grid_without_condition,
}


@functools.cache
def rotary_table(name: str, num_tokens: int, grid: tuple[int, ...], head_dim: int, base: float) -> Table:
    """The table of a kind in ``ROTATIONS``; see there for its errors."""
    if head_dim % 2:
        raise UserError(f"gpt.positions: rotary positions need heads of an even width, not {head_dim}")
    return ROTATIONS[name](num_tokens, grid, head_dim, base)


def rotate(x: Array, rotation: tuple[Array, Array] | None) -> Array:
    """Rotates ``[B, heads, T, D]`` by cosines and sines ``[B or 1, T, D/2]``, in float32; the identity where there are none."""
    if rotation is None:
        return x
    cos, sin = (table[:, None] for table in rotation)  # [B or 1, 1, T, D/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _frequencies(width: int, base: float) -> np.ndarray:
    return base ** (-np.arange(0, width, 2) / width)


def _cos_sin(angles: np.ndarray) -> Table:
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
