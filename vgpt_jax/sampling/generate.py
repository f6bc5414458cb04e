"""Token generation: prefill the condition and what is given, then `lax.scan` over the rest, with a key-value cache.

Layers are unrolled and lengths static. The cache grows from segment to segment, so that early positions do not read what is not
written yet. Everything here is to be traced; `sampling.program` compiles it together with the decoder.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from vgpt_jax.models.gpt import GPT, Cache
from vgpt_jax.sampling.logits import draw, guide

SEGMENT = 64
"""Positions for which the cache keeps its length."""


@struct.dataclass
class Options:
    """How tokens are drawn; all but ``top_k`` may be traced.

    Attributes:
      temperature, top_p, min_p: as in `sampling.logits.draw`.
      guidance: scale of classifier-free guidance, a scalar, or ``[N]`` for each position in the order of writing
        (`sampling.guidance`). None: off, at half the work.
      top_k: static; 0: off.
    """

    temperature: Array | float = 1.0
    top_p: Array | float | None = None
    min_p: Array | float | None = None
    guidance: Array | float | None = None
    top_k: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Given:
    """Tokens that are not drawn.

    Attributes:
      token_ids: ``[B, N]`` int32, by place.
      kept: ``[B, N]`` bool, the places where they stay.
      num_first: static; so many of the first places in the order of writing are kept, and go in at once.
    """

    token_ids: Array
    kept: Array
    num_first: int = struct.field(pytree_node=False, default=0)


def generate(
    gpt: GPT,
    conditions: Array,
    uniforms: Array,
    options: Options,
    *,
    orders: Array | None = None,
    given: Given | None = None,
) -> Array:
    """Writes N tokens after each condition, one after the other.

    Args:
      gpt: the generator.
      conditions: ``[B]`` int32, ids of the first position (`GPT.condition_ids`).
      uniforms: ``[B, N]`` float32 in ``[0, 1)``, one for each place: the only randomness.
      options: of the drawing.
      orders: ``[B, N]`` int32, places in the order of writing, for models of random order. None: raster.
      given: tokens to keep. What is kept later in the order than a token is not seen when that is drawn.

    Returns:
      ``[B, N]`` int32 token ids, by place.
    """
    num_tokens = gpt.num_tokens
    uniforms = in_order(uniforms, orders)
    first = 0
    if given is not None:
        first, kept, kept_ids = given.num_first, in_order(given.kept, orders), in_order(given.token_ids, orders)
        if first == num_tokens:
            return given.token_ids

    def write(logits: Array, index: Array | int) -> Array:
        token = draw_token(logits, uniforms[:, index], options)
        return token if given is None else jnp.where(kept[:, index], kept_ids[:, index], token)

    def next_token(carry, index):
        token, cache = carry
        logits, cache = predict(gpt, token[:, None], cache, index, scale_at(options, index), **where(orders, index))
        token = write(logits[:, 0], index)
        return (token, cache), token

    # Lengths of the cache: where each segment ends, the last with the last token, which is drawn and not put in.
    ends = [*range(-(-(first + 1) // SEGMENT) * SEGMENT, num_tokens, SEGMENT), num_tokens]
    inputs = conditions[:, None] if not first else jnp.concatenate([conditions[:, None], kept_ids[:, :first]], axis=1)
    cache = start_cache(gpt, conditions, ends[0], options)
    logits, cache = predict(gpt, inputs, cache, 0, scale_at(options, first), **where(orders, 0, first + 1))
    token = write(logits[:, -1], first)
    written = [inputs[:, 1:], token[:, None]]
    begin = first + 1
    for end in ends:
        (token, cache), tokens = jax.lax.scan(next_token, (token, cache.grown(end)), jnp.arange(begin, end))
        written.append(tokens.T)
        begin = end
    return by_place(jnp.concatenate(written, axis=1), orders)


def start_cache(gpt: GPT, conditions: Array, length: int, options: Options) -> Cache:
    """An empty cache; with guidance each sequence is followed by a second one without its class."""
    if options.guidance is not None:
        conditions = in_turn(conditions, jnp.full_like(conditions, gpt.begin_id))
    return gpt.init_cache(conditions, length)


def predict(
    gpt: GPT, ids: Array, cache: Cache, index: Array | int, scale: Array | None, rows: Array | None = None, **places
) -> tuple[Array, Cache]:
    """Guided logits of the inputs ``ids`` ``[B, T]`` beside those in the cache.

    Args:
      gpt: the generator.
      ids: of a first position among them, the conditions.
      cache: of `start_cache`.
      index: where the first of ``ids`` is written.
      scale: of the guidance, broadcastable to ``[B, rows, K]``; None: there is none.
      rows: ``[R]``, the inputs whose logits are wanted; None: the last.
      **places: ``positions``, ``targets``, ``mask`` of `GPT.extend`; the first two ``[B, T]``.

    Returns:
      ``[B, R, K]`` float32, and the cache.
    """
    if scale is not None:
        blank = jnp.where(ids >= gpt.num_codes, gpt.begin_id, ids)
        ids = in_turn(ids, blank)
        for name in {"positions", "targets"} & places.keys():
            places[name] = in_turn(places[name], places[name])
    x, cache = gpt.extend(ids, cache, index, **places)
    logits = gpt.code_logits(x[:, -1:] if rows is None else x[:, rows], cache)
    if scale is not None:
        logits = guide(*jnp.unstack(logits.reshape(-1, 2, *logits.shape[1:]), axis=1), scale)
    return logits, cache


def in_turn(with_class: Array, without: Array) -> Array:
    """Rows of the two in turn, so that a batch that is split over devices stays where it is."""
    return jnp.stack([with_class, without], axis=1).reshape(-1, *with_class.shape[1:])


def draw_token(logits: Array, uniforms: Array, options: Options) -> Array:
    """`sampling.logits.draw` with the options: ``[B, K]`` and ``[B]`` to ``[B]``."""
    return draw(
        logits,
        uniforms,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
    )


def scale_at(options: Options, index: Array | int) -> Array | None:
    """The scale of the guidance at one or some indices in the order of writing, None without guidance."""
    scale = options.guidance
    return scale if scale is None or not jnp.ndim(scale) else jnp.asarray(scale)[index]


def where(orders: Array | None, index: Array | int, count: int = 1) -> dict[str, Array]:
    """Own places and targets ``[B, count]`` of the inputs from ``index`` on, for `predict`; empty in raster order."""
    if orders is None:
        return {}
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, index, count, axis=1)  # noqa: E731
    return {"positions": cut(jnp.pad(orders + 1, ((0, 0), (1, 0)))), "targets": cut(orders)}


def in_order(by_place: Array, orders: Array | None) -> Array:
    """``[B, N]`` by place, in the order of writing."""
    return by_place if orders is None else jnp.take_along_axis(by_place, orders, axis=1)


def by_place(in_order: Array, orders: Array | None) -> Array:
    """``[B, N]`` in the order of writing, by place."""
    return in_order if orders is None else jnp.take_along_axis(in_order, jnp.argsort(orders, axis=1), axis=1)
