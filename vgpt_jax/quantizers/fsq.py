"""Finite scalar quantization: every dimension of a latent rounded to a few levels, and no codebook."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError, check_range
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.quantizer import Quantizer, straight_through

OVERSHOOT = 1e-3  # the bounded range is that much wider than the outer levels, so that latents can reach them


class FSQ(Quantizer):
    """Bounds each of D dimensions by a tanh and rounds it to one of its levels; the codes are all K combinations.

    No parameters, no state and no losses: nothing can collapse, and nothing needs a weight. With L levels a dimension of
    ``z_q`` takes the L values ``(digit - L // 2) / (L // 2)``: evenly spaced, from -1 to 1 where L is odd, and to
    ``1 - 2 / L`` where it is even. A latent of 0 is the code of zeros; other codes, given as latents, are bounded again
    and may become another. The gradient is that of the bound, as if nothing had been rounded.

    Args:
      levels: levels of each dimension, 3 to 1000; their number is D, their product K (at most 2^31 - 1). More levels are
        finer, more dimensions are wider. The paper advises at least 5 a dimension, and for K near
        2^8: 8 6 5; 2^10: 8 5 5 5; 2^12: 7 5 5 5 5; 2^14: 8 8 8 6 5; 2^16: 8 8 8 5 5 5 (its table 1).
      rngs: not drawn from; all quantizers are built alike.

    Raises:
      UserError: an argument is out of its range; the message names it and the range.

    Reference: Mentzer et al. 2023, arXiv 2309.15505, section 3 and appendix A.1 (``OVERSHOOT``, the shift of even levels).
    The first dimension is the least significant of an id, as there.
    """

    def __init__(self, *, levels: Sequence[int] = (8, 5, 5, 5), rngs: nnx.Rngs):
        if not levels:
            raise UserError("fsq.levels is empty, but must have a number of levels for each dimension")
        for dimension, number in enumerate(levels):
            # 2 levels would part far from 0, where latents are not; past 1000 the overshoot would round to another level.
            check_range(f"fsq.levels[{dimension}]", number, least=3, most=1000)
        check_range("fsq.levels: the product, the number of codes,", math.prod(levels), most=2**31 - 1)
        self.levels = tuple(levels)
        self.num_codewords = math.prod(levels)
        self.embedding_dim = len(levels)

    def __call__(self, z_e: Array, key: Array | None = None) -> QuantizerOutput:
        """Quantizes latents.

        Args:
          z_e: ``[..., D]`` of any float dtype; computed on in float32.
          key: not read; nothing is drawn.

        Returns:
          `QuantizerOutput` without losses; ``loss`` is 0.
        """
        z_e = z_e.astype(jnp.float32)
        token_ids = self.quantize(z_e)
        continuous = self._bound(z_e) / self._middles().astype(np.float32)
        return QuantizerOutput(
            z_q=straight_through(continuous, self.dequantize(token_ids)),
            token_ids=token_ids,
            z_e=z_e,
            losses={},
            loss=jnp.zeros((), jnp.float32),
        )

    def quantize(self, z_e: Array) -> Array:
        """The ids ``[...]`` int32 of latents ``[..., D]``."""
        self.check_width(z_e)
        digits = jnp.round(self._bound(z_e.astype(jnp.float32))).astype(jnp.int32) + self._middles()
        return jnp.sum(digits * self._place_values(), axis=-1, dtype=jnp.int32)

    def dequantize(self, token_ids: Array) -> Array:
        """The codes ``[..., D]`` float32, in ``[-1, 1]``, of ids ``[...]`` in ``[0, K)``."""
        digits = token_ids[..., None] // self._place_values() % np.array(self.levels, np.int32)
        return (digits - self._middles()).astype(jnp.float32) / self._middles().astype(np.float32)

    def _bound(self, z_e: Array) -> Array:
        """Latents to where they lie among the levels, ``[..., D]`` float32: the middle level is 0, its neighbours +-1."""
        levels = np.array(self.levels)
        half_range = (levels - 1) * (1 + OVERSHOOT) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)  # even levels lie half a step below the middle of the range
        shift = np.arctanh(offset / half_range)  # so that 0 stays 0
        half_range, offset, shift = (x.astype(np.float32) for x in (half_range, offset, shift))
        return jnp.tanh(z_e + shift) * half_range - offset

    def _middles(self) -> np.ndarray:
        """The digit ``[D]`` int32 of each dimension whose value is 0."""
        return np.array(self.levels, np.int32) // 2

    def _place_values(self) -> np.ndarray:
        """What one step of each dimension's digit adds to an id, ``[D]`` int32."""
        return np.cumprod([1, *self.levels[:-1]]).astype(np.int32)
