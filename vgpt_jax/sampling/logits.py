"""From logits to a token: temperature, top-k and top-p, in that order.

`filter_logits` says what the distribution is; `draw` samples from it with one uniform a token and without sorting more
than the k largest. `top_k` is static; `temperature` and `top_p` may be traced.
"""

import jax
import jax.numpy as jnp
from jax import Array


def filter_logits(
    logits: Array, *, temperature: Array | float = 1.0, top_k: int = 0, top_p: Array | float | None = None
) -> Array:
    """Scales logits and sets those that may not be drawn to minus infinity.

    Args:
      logits: ``[B, V]`` float32.
      temperature: divides the logits; above 0.
      top_k: keeps the k largest. 0 keeps all.
      top_p: then keeps the smallest set of the most probable tokens whose probabilities add up to ``top_p`` or more
        (nucleus sampling, arXiv 1904.09751). None keeps all.

    Returns:
      ``[B, V]`` float32.
    """
    logits = logits / temperature
    values, ids = jax.lax.top_k(logits, top_k or logits.shape[-1])  # equal logits: the lower id first
    kept = jnp.full_like(logits, -jnp.inf)
    return kept.at[jnp.arange(logits.shape[0])[:, None], ids].set(jnp.where(_nucleus(values, top_p), values, -jnp.inf))


def draw(
    logits: Array,
    uniforms: Array,
    *,
    temperature: Array | float = 1.0,
    top_k: int = 0,
    top_p: Array | float | None = None,
) -> Array:
    """Draws a token from ``softmax(filter_logits(...))`` by inverting its cumulative distribution.

    Args:
      logits: ``[B, V]`` float32.
      uniforms: ``[B]`` float32 in ``[0, 1)``.
      temperature, top_k, top_p: as in `filter_logits`. With neither top-k nor top-p nothing is sorted.

    Returns:
      ``[B]`` int32. ``top_k=1`` is the argmax, to the lower id at a tie.
    """
    logits = logits / temperature
    if not top_k and top_p is None:
        return _invert(jax.nn.softmax(logits, axis=-1), uniforms)
    values, ids = jax.lax.top_k(logits, top_k or logits.shape[-1])
    probabilities = jax.nn.softmax(jnp.where(_nucleus(values, top_p), values, -jnp.inf), axis=-1)
    return jnp.take_along_axis(ids, _invert(probabilities, uniforms)[:, None], axis=-1)[:, 0]


def _nucleus(values: Array, top_p: Array | float | None) -> Array:
    """Which of descending logits ``[B, k]`` are in the nucleus: those before which less than ``top_p`` has accumulated.

    At 1 that is all of them, also where rounding lets the sum reach 1 before the end.
    """
    if top_p is None:
        return jnp.ones(values.shape, bool)
    probabilities = jax.nn.softmax(values, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return ((before < top_p) | (jnp.asarray(top_p) >= 1)).at[:, 0].set(True)


def _invert(probabilities: Array, uniforms: Array) -> Array:
    """The least index whose cumulative probability exceeds the uniform, never one of probability 0: ``[B]`` int32."""
    cumulative = jnp.cumsum(probabilities, axis=-1)
    index = jnp.sum(cumulative <= uniforms[:, None] * cumulative[:, -1:], axis=-1)
    last = probabilities.shape[-1] - 1 - jnp.argmax(probabilities[:, ::-1] > 0, axis=-1)  # rounding may pass the end
    return jnp.minimum(index, last).astype(jnp.int32)
