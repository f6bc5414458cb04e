"""From logits to a token: guidance, then temperature, top-k, top-p and min-p, in that order.

`filter_logits` says what the distribution is; `draw` samples from it with one uniform a token. Nothing is sorted: where a
filter cuts off is found by a search over the bits of the threshold, and a uniform is inverted in two levels of about
``sqrt(V)`` each. All is float32. ``top_k`` is static; the other options may be traced, each a scalar or ``[B, 1]``.

The order of tokens is that of the logits as given, the lower id first at a tie. Temperature has no part in it.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

_BITS_PER_PASS = 2


def guide(conditional: Array, unconditional: Array, scale: Array | float) -> Array:
    """Classifier-free guidance: ``conditional + (scale - 1) * (conditional - unconditional)``.

    Args:
      conditional, unconditional: ``[B, V]`` finite logits with the condition and without it.
      scale: scalar or ``[B, 1]``, may be traced. 1 is the conditional logits exactly, 0 the unconditional ones; above 1
        goes beyond the condition.

    Returns:
      ``[B, V]`` float32.

    Reference: Ho & Salimans 2022, arXiv 2207.12598, eq. 6, whose ``w`` is ``scale - 1``.
    """
    conditional, unconditional = conditional.astype(jnp.float32), unconditional.astype(jnp.float32)
    return conditional + (scale - 1.0) * (conditional - unconditional)


def filter_logits(
    logits: Array,
    *,
    temperature: Array | float = 1.0,
    top_k: int = 0,
    top_p: Array | float | None = None,
    min_p: Array | float | None = None,
) -> Array:
    """Scales logits and sets those that may not be drawn to minus infinity. The greatest always stays.

    Args:
      logits: ``[B, V]``, finite or minus infinity, at least one of a row finite.
      temperature: divides the logits; above 0.
      top_k: keeps exactly the k first in order. 0 keeps all.
      top_p: then keeps the smallest set of the first in order whose probabilities, as renormalised after top-k, add up to
        ``top_p`` or more (nucleus sampling, arXiv 1904.09751). None, or 1 and above, keeps all.
      min_p: then keeps those at least ``min_p`` times as probable as the most probable (arXiv 2407.01082). None or 0
        keeps all, 1 and above the most probable alone and those that equal it.

    Returns:
      ``[B, V]`` float32, shifted so that the greatest of a row is 0: softmax does not see it, and no temperature
      overflows.
    """
    logits = logits.astype(jnp.float32)
    vocabulary = logits.shape[-1]
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    kept = jnp.ones(logits.shape, bool)
    if 0 < top_k < vocabulary:
        kept = _first_reaching(logits, kept.astype(jnp.float32), jnp.float32(top_k))
    if top_p is not None:
        weights = jnp.where(kept, jnp.exp(scaled), 0.0)
        target = top_p * jnp.sum(weights, axis=-1, keepdims=True)
        nucleus = _first_reaching(logits, weights, target)
        kept &= nucleus | (jnp.asarray(top_p) >= 1)  # the sum may reach 1 early, by rounding
    if min_p is not None:
        kept &= jnp.exp(scaled) >= jnp.minimum(min_p, 1.0)  # the greatest has exp(0)
    return jnp.where(kept, scaled, -jnp.inf)


def draw(
    logits: Array,
    uniforms: Array,
    *,
    temperature: Array | float = 1.0,
    top_k: int = 0,
    top_p: Array | float | None = None,
    min_p: Array | float | None = None,
) -> Array:
    """Draws a token from ``softmax(filter_logits(...))`` by inverting its cumulative distribution.

    Args:
      logits: ``[B, V]``, as in `filter_logits`.
      uniforms: ``[B]`` float32 in ``[0, 1)``.
      temperature, top_k, top_p, min_p: as in `filter_logits`.

    Returns:
      ``[B]`` int32, never a token of probability 0. ``top_k=1`` is the argmax, to the lower id at a tie.
    """
    if top_k == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    filtered = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    weights = jnp.exp(filtered)  # the greatest is 1: softmax but for the division
    return _invert(weights, uniforms * jnp.sum(weights, axis=-1))


def _order(logits: Array) -> Array:
    """Maps float32 to uint32 such that the integers compare as the floats do."""
    logits = jnp.where(logits == 0, 0.0, logits)  # -0.0 equals 0.0, but not in its bits
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _first_reaching(logits: Array, weights: Array, target: Array) -> Array:
    """The smallest set of the first in order (descending, then the lower id) whose weights add up to ``target`` or more.

    Where rounding leaves the sum of all below the target, that is everything.

    Args:
      logits: ``[B, V]`` float32. Those that are equal must be of equal weight, or of weight 0.
      weights: ``[B, V]`` float32, not negative.
      target: scalar or ``[B, 1]`` float32. At 0 and below, the first alone is kept.

    Returns:
      ``[B, V]`` bool; what it says where the weight is 0 means nothing.
    """
    order = _order(logits)
    target = jnp.maximum(target, jnp.finfo(jnp.float32).tiny)
    threshold = _greatest_threshold(order, weights, target)
    above = order > threshold
    tied = jnp.where(order == threshold, weights, 0.0)
    missing = target - jnp.sum(jnp.where(above, weights, 0.0), axis=-1, keepdims=True)
    count = jnp.ceil(missing / jnp.max(tied, axis=-1, keepdims=True))  # of the tied ones, to take
    last = _invert((tied > 0).astype(jnp.float32), count[:, 0] - 0.5)
    return above | ((order == threshold) & (jnp.arange(order.shape[-1]) <= last[:, None]))


def _greatest_threshold(order: Array, weights: Array, target: Array) -> Array:
    """The greatest ``t`` for which the weights where ``order >= t`` add up to ``target`` or more: ``[B, 1]`` uint32.

    Found from the highest bit down, two bits a pass, so that a pass compares with three thresholds: on a CPU that costs
    little more than a pass with one, and on a GPU, where a pass is one reduction, it halves their number. It ends at 0
    where all weights together do not reach the target.
    """
    digits = jnp.arange(1, 1 << _BITS_PER_PASS, dtype=jnp.uint32)  # [T]

    def fix_bits(i: Array, prefix: Array) -> Array:
        shift = (32 - _BITS_PER_PASS * (i + 1)).astype(jnp.uint32)
        thresholds = prefix + (digits << shift)  # [B, T]
        reached = order[:, None, :] >= thresholds[:, :, None]  # [B, T, V]
        sums = jnp.sum(jnp.where(reached, weights[:, None, :], 0.0), axis=-1)  # [B, T]
        return prefix + (jnp.sum(sums >= target, axis=-1, keepdims=True, dtype=jnp.uint32) << shift)

    start = jnp.zeros((order.shape[0], 1), jnp.uint32)
    return jax.lax.fori_loop(0, 32 // _BITS_PER_PASS, fix_bits, start)


def _invert(weights: Array, target: Array) -> Array:
    """The least id up to which the weights add up to more than the target, the last of positive weight if none does.

    Two levels, blocks and then inside one, so that no cumulative sum is longer than about ``sqrt(V)``: one over all rounds
    more, and takes several times as long.

    Args:
      weights: ``[B, V]`` float32, not negative.
      target: ``[B]`` float32.

    Returns:
      ``[B]`` int32. Its weight is positive, if any is.
    """
    batch, vocabulary = weights.shape
    size = math.isqrt(vocabulary - 1) + 1
    blocks = jnp.pad(weights, ((0, 0), (0, -vocabulary % size))).reshape(batch, -1, size)  # [B, V / size, size]
    sums = jnp.sum(blocks, axis=-1)
    block = _first_above(sums, target)
    before = jnp.sum(jnp.where(jnp.arange(sums.shape[-1]) < block[:, None], sums, 0.0), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [B, size]
    return block * size + _first_above(inside, target - before)


def _first_above(weights: Array, target: Array) -> Array:
    """`_invert` in one level. Weights of 0 are passed over also where rounding makes the cumulative sum rise at one."""
    positive = weights > 0
    above = positive & (jnp.cumsum(weights, axis=-1) > target[:, None])
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    return jnp.where(jnp.any(above, axis=-1), jnp.argmax(above, axis=-1), last).astype(jnp.int32)
